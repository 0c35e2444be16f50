"""Tests of README.md and docs/: what can be checked of them without running a command."""

import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import write_options  # noqa: E402


NEEDED = ["--pretrained_model_name_or_path", "base"]
PAGES = [ROOT / "README.md", ROOT / "related" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page names because a command writes it.
WRITTEN = {"report.md", "sd15-adt/README.md"}


def code(text) -> str:
    """What stands in backticks, a line for each place."""
    return "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))


def anchors(page) -> set:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_options_are_what_the_parsers_say():
    assert write_options.FILE.read_text() == write_options.write(), "run `make docs`"


def test_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page):
    names = set(re.findall(r"[\w./*-]+\.(?:py|md|txt)\b", code(page.read_text()))) - WRITTEN
    assert [name for name in sorted(names) if not any(ROOT.glob(name)) and not any(page.parent.glob(name))] == []


def test_the_map_names_what_is_there():
    """The functions, classes and constants that docs/changing.md sends a reader to."""
    section = (ROOT / "docs" / "changing.md").read_text()
    names = {part for name in re.findall(r"`(\w+(?:\.\w+)?)`", section) for part in name.split(".")}
    names -= {"py", "args", *(file.stem for file in ROOT.glob("*.py"))}
    files = [*ROOT.glob("*.py"), ROOT / "docs" / "write_options.py", *ROOT.glob("tests/*.py")]
    source = "\n".join(file.read_text() for file in files)
    defined = set(re.findall(r"(?:\bdef|\bclass|^) *(\w+)(?=[(:]| = |: )", source, re.MULTILINE))
    assert len(names) > 30 and names - defined == set()


def test_compared_options():
    """Those that docs/compared.md says are here are, and those that it says are missing are not."""
    text = (ROOT / "docs" / "compared.md").read_text()
    known = {
        option for script in write_options.SCRIPTS.values() for option in vars(script.make_parser().parse_args(NEEDED))
    }
    missing = text.split("## Missing here")[1].split("## Only here")[0]
    there = {name for row in missing.splitlines() for name in re.findall(r"`--(\w+)`", row.rpartition(" | ")[0])}
    assert len(there) > 30 and there & known == set()
    here = set(re.findall(r"`--(\w+)`", text.split("## Only here")[1]))
    here |= {
        name
        for row in text.split("## Missing here")[0].splitlines()
        if row.startswith("| ")
        for name in re.findall(r"`--(\w+)`", row.rpartition(" | ")[2])
    }
    assert len(here) > 15 and here <= known
