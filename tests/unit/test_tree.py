"""What a clone holds: no links, and no paths of the machine it was written on."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""A clone, or an unpacked sdist."""

_SYSTEM = {
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib64",
    "opt",
    "proc",
    "run",
    "sbin",
    "srv",
    "sys",
    "usr",
    "var",
}
"""Folders at the root of every Linux; a path in them is no one's own."""
_EXAMPLES = ("me", "you", "user")
"""Whose home folders texts may name."""
_TEXTS = {
    ".cff", ".cfg", ".css", ".csv", ".html", ".ini", ".js", ".json", ".jsonl", ".md", ".py", ".sh", ".svg", ".toml",
    ".txt", ".yaml", ".yml", "",
}  # fmt: skip


def ignored() -> list[str]:
    """Names that are no part of the tree: git's own, and those of .gitignore."""
    path = ROOT / ".gitignore"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    known = [line.strip().strip("/") for line in lines if line.strip() and not line.startswith("#")]
    return [".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", *known]


def entries(folder: Path, names: list[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(entry.name, name) for name in names):
            continue
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from entries(entry, names)


def machine_paths(text: str, own: set[str]) -> list[str]:
    """Paths below folders that belong to one machine or person."""
    found = re.findall(r"(?<![\w.~/<>{}$:-])/(\w+)/([\w.-]+)", text)
    return [
        f"/{top}/{name}"
        for top, name in found
        if top in own and not (top in ("home", "Users") and name in _EXAMPLES)
    ]


def own_folders() -> set[str]:
    """Top folders of this machine's clone, home and temporary files, and what they are called elsewhere."""
    here = (ROOT, Path.home(), Path(os.environ.get("TMPDIR", "/tmp")))
    found = {place.absolute().parts[1] for place in here if len(place.absolute().parts) > 2}
    return (found | {"home", "root", "tmp", "Users", "mnt", "scratch"}) - _SYSTEM


def test_the_tree_holds_no_links() -> None:
    links = [str(entry.relative_to(ROOT)) for entry in entries(ROOT, ignored()) if entry.is_symlink()]
    assert links == []


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    own, found = own_folders(), {}
    for entry in entries(ROOT, ignored()):
        if entry.is_file() and not entry.is_symlink() and entry.suffix in _TEXTS and entry != Path(__file__):
            paths = machine_paths(entry.read_text(encoding="utf-8", errors="replace"), own)
            if paths:
                found[str(entry.relative_to(ROOT))] = paths[:3]
    assert found == {}


def test_the_search_finds_what_it_is_for() -> None:
    own = own_folders()
    place = f"{Path('/', 'tmp')}/pytest-of-someone"
    assert machine_paths(f'data = "{place}/rows.jsonl"', own) == [place]
    assert machine_paths(f"see {ROOT.absolute()}/notes", own) or ROOT.absolute().parts[1] in _SYSTEM
    assert machine_paths("https://example.org/tmp/x and ~/home/x and /usr/bin/env and /home/me/x", own) == []
