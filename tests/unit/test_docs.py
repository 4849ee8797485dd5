"""The page of the house names rooms, files and functions that are there; the site's list has every page; the README
is short and says what the log says. That commands run is tested in tests/integration/test_documented_commands.py.
"""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import yaml
from tests.unit.test_house import ORDER, imported_rooms

from manylora.cli import VERBS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "manylora"
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOUSE = (DOCS / "architecture.md").read_text(encoding="utf-8")


@cache
def defined_in(path: Path) -> frozenset[str]:
    """Functions and classes of a file, methods as "Class.method" and by themselves, and names of its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(child, ast.FunctionDef):
                found |= {child.name, f"{node.name}.{child.name}"}
    return frozenset(found)


def section(title: str) -> str:
    return HOUSE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def room_rows() -> dict[str, str]:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", section("Rooms"), flags=re.M)
    return dict(rows)


def test_the_rooms_are_those_of_the_code_in_their_order() -> None:
    assert list(room_rows()) == ORDER
    for room, imports in room_rows().items():
        above, named = set(ORDER[: ORDER.index(room)]), set(re.findall(r"`(\w+)`", imports))
        allowed = above - named if imports.startswith("any above") else named
        folder = SOURCES / room
        files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
        real = {found for path in files for found in imported_rooms(path)} - {room}
        assert real <= allowed, f"{room} also imports {real - allowed}"


def test_every_file_that_the_page_names_is_there() -> None:
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", HOUSE):
        if "VERB" not in name:
            assert any((base / name).is_file() for base in (SOURCES, SOURCES.parent, ROOT)), name


def test_every_function_that_the_page_names_stands_in_its_file() -> None:
    pairs = re.findall(r"`(\w+/[\w/]+\.py)`, `([\w.]+)`(?: and `([\w.]+)`)?", HOUSE)
    named = [(file, name) for file, *names in pairs for name in names if name]
    named += [(file, name) for name, file in re.findall(r"`([\w.]+)`\s+of\s+`(\w+/[\w/]+\.py)`", HOUSE)]
    assert len(named) > 25
    for file, name in named:
        if not name.endswith(".py"):
            assert name in defined_in(SOURCES / file), f"{file} has no {name}"


def test_every_other_name_of_the_walks_stands_somewhere() -> None:
    everything = frozenset().union(*(defined_in(path) for path in SOURCES.rglob("*.py")))
    walks = HOUSE.split("\n## From configuration")[1].split("\n## Places")[0]
    words = {word for word in re.findall(r"`([A-Za-z_.]+)`", walks) if not word.endswith((".py", ".html"))}
    fields = {
        "expert_ids",
        "task",
        "a_of",
        "b_of",
        "study.json",
        "result.json",
        "cells.jsonl",
        "manylora.train",
    }
    assert words - fields - everything == set()


def test_no_walk_is_longer_than_twelve_lines() -> None:
    for title in ("From configuration to optimizer step", "From row to expert", "From study to page"):
        assert len(re.findall(r"^\d+\. ", section(title), flags=re.M)) <= 12


def test_the_site_lists_every_page_once() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_reference_names_what_is_there() -> None:
    for name in re.findall(r"^::: manylora\.?(.*)$", (DOCS / "reference.md").read_text(), flags=re.M):
        *path, last = name.split(".") if name else [""]
        file = SOURCES.joinpath(*path).with_suffix(".py") if path else SOURCES / f"{last or '__init__'}.py"
        assert file.is_file(), name
        assert not path or last in defined_in(file), name


def test_every_dotted_name_is_there() -> None:
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for name in re.findall(r"`(manylora(?:\.\w+)+)", page.read_text(encoding="utf-8")):
            module, *rest = name.split(".")
            found = importlib.import_module(module)
            for part in rest:
                if not hasattr(found, part):
                    importlib.import_module(f"{found.__name__}.{part}")  # raises where it is no module either
                found = getattr(found, part)


def test_the_readme_fits_on_two_screens_and_names_every_verb() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []
    assert re.findall(r"^\| \[?`manylora (\w+)`", README, flags=re.M) == list(VERBS)
    assert "*Activated*" in README  # PEFT's aLoRA is another method


def test_the_numbers_of_the_readme_are_those_of_the_log_and_the_studies() -> None:
    """Every score with a decimal in the README stands in the log, or in the text of the studies, as it does there."""
    sources = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("log.md", "studies/README.md"))
    known = set(re.findall(r"\d+\.\d+", sources))
    demo, _, findings = README.partition("## From Python")
    scores = re.findall(r"\d+\.\d+", findings.partition("## What the paper says")[2])
    assert len(scores) > 10
    assert set(scores) - known - {"1.3"} == set()  # 1.3 M parameters
    table = [line.split() for line in demo.splitlines() if re.match(r" \w+ +ROUGE-1 ", line)]
    assert len(table) == 9
    for task, _, score, *_, majority, keyword in table:
        row = re.search(rf"^\| {task} \| .* \| {score} \| {majority} \| {keyword} \|$", sources, flags=re.M)
        assert row, task
