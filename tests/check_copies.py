"""Fails when a block marked `# Copied from SCRIPT.NAME` differs from its original; `--fix` copies it again.

    # Copied from train_adt_sd15.load_unet with StableDiffusionPipeline->StableDiffusionXLPipeline, unet->transformer

stands above a function, class or assignment at the top level of a script. The replacements are made in this order. A
line that ends with a comma goes on in the next one.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"# Copied from (\w+)\.(\w+)(?: with (.+))?$")


def blocks(source):
    """{name: (first line, past the last line)} of the definitions at the top level, 0-based, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = first - 1, node.end_lineno
        elif isinstance(node, ast.Assign):
            names = [leaf.id for leaf in ast.walk(node.targets[0]) if isinstance(leaf, ast.Name)]
            found[names[0]] = node.lineno - 1, node.end_lineno
    return found


def expected_block(original, name, replacements):
    """The lines of `name` in the source `original`, after `replacements` ("A->B, C->D" or None), formatted."""
    first, last = blocks(original)[name]
    text = "\n".join(original.splitlines()[first:last]) + "\n"
    if not replacements:
        return text
    for pair in replacements.split(", "):
        before, after = pair.split("->")
        text = text.replace(before, after)
    # A longer name may break a line elsewhere.
    command = [Path(sys.executable).parent / "ruff", "format", "--config", ROOT / "pyproject.toml", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def check(path, fix):
    """Returns what differs in the file at `path`, as sentences; mends it if `fix`."""
    problems = []
    for line in [line for line in path.read_text().splitlines() if line.startswith("# Copied from ")]:
        source = path.read_text()
        lines = source.splitlines()
        mark = below = lines.index(line)
        while lines[below].endswith(","):
            below += 1
            line += lines[below].removeprefix("#")
        script, name, replacements = MARK.match(line).groups()
        here = [span for span in blocks(source).values() if span[0] == below + 1]
        original = (ROOT / f"{script}.py").read_text()
        if not here or name not in blocks(original):
            problems.append(f"{path.name}:{mark + 1}: nothing of that name to copy, or nothing below the mark")
            continue
        first, last = here[0]
        expected = expected_block(original, name, replacements)
        if "\n".join(lines[first:last]) + "\n" != expected:
            problems.append(f"{path.name}:{mark + 1}: differs from {script}.{name}")
            if fix:
                lines[first:last] = expected.splitlines()
                path.write_text("\n".join(lines) + "\n")
    return problems


if __name__ == "__main__":
    found = [problem for path in sorted(ROOT.glob("*.py")) for problem in check(path, "--fix" in sys.argv)]
    print("\n".join(found) or "All copies agree.")
    sys.exit(bool(found) and "--fix" not in sys.argv)
