"""Fails when a block marked `# Copied from SCRIPT.NAME` differs from its original; `--fix` copies it again.

    # Copied from train_adt_sd15.update_generator

stands above a function, class or assignment at the top level of a script.
"""

import ast
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"# Copied from (\w+)\.(\w+)$")


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


def check(path, fix):
    """Returns what differs in the file at `path`, as sentences; mends it if `fix`."""
    problems = []
    for line in [line for line in path.read_text().splitlines() if line.startswith("# Copied from ")]:
        source = path.read_text()
        lines = source.splitlines()
        mark = lines.index(line)
        match = MARK.match(line)
        here = [span for span in blocks(source).values() if span[0] == mark + 1]
        original = (ROOT / f"{match[1]}.py").read_text() if match else ""
        if not match or not here or match[2] not in blocks(original):
            problems.append(f"{path.name}:{mark + 1}: nothing of that name to copy, or nothing below the mark")
            continue
        (first, last), (original_first, original_last) = here[0], blocks(original)[match[2]]
        expected = original.splitlines()[original_first:original_last]
        if lines[first:last] != expected:
            problems.append(f"{path.name}:{mark + 1}: differs from {match[1]}.{match[2]}")
            if fix:
                lines[first:last] = expected
                path.write_text("\n".join(lines) + "\n")
    return problems


if __name__ == "__main__":
    found = [problem for path in sorted(ROOT.glob("*.py")) for problem in check(path, "--fix" in sys.argv)]
    print("\n".join(found) or "All copies agree.")
    sys.exit(bool(found) and "--fix" not in sys.argv)
