"""The house: imports go one way, every room says what it is, nothing heavy is imported for nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import manylora

ROOT = Path(manylora.__file__).parent
ORDER = [
    "errors",
    "files",
    "table",
    "assets",
    "data",
    "adapters",
    "evaluation",
    "training",
    "analysis",
    "federated",
    "serving",
    "jobs",
    "studies",
    "report",
    "cli",
]
"""A room imports only itself and rooms before it."""
ROOMS = [name for name in ORDER if (ROOT / name).is_dir()]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module]
                if node.module != "manylora"
                else [f"manylora.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("manylora.")}
    return found & set(ORDER)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    allowed = set(ORDER[: ORDER.index(room) + 1])
    for path in (ROOT / room).rglob("*.py"):
        assert imported_rooms(path) <= allowed, f"{path} imports {imported_rooms(path) - allowed}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(node: ast.AST, known: Collection[str]) -> set[str]:
    """Which of these modules are imported, in functions too; those for the type checker do not count."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & set(known)
    if isinstance(node, ast.ImportFrom) and node.module:
        named = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name if name in known else node.module for name in named} & set(known)
    return {name for child in ast.iter_child_nodes(node) for name in imported_modules(child, known)}


@pytest.mark.parametrize("room", ROOMS)
def test_there_are_no_circles_in_a_room(room: str) -> None:
    trees = {
        module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / room).rglob("*.py")
    }
    graph = {name: imported_modules(tree, trees) - {name} for name, tree in trees.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_what_a_task_type_means_stands_in_the_kinds_and_heads_alone() -> None:
    naming = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "SEQ_CLS"
    }
    kinds = {f"training/{name}.py" for name in ("heads", "kinds/__init__", "kinds/choosing")}
    assert naming == {*kinds, "training/config.py", "adapters/card.py"}  # its settings, and PEFT's classes


def test_the_report_imports_results_and_nothing_that_makes_them() -> None:
    code = "import sys, manylora.report.writing as w; from manylora.report import train_page, federate_page"
    code += ", analyze_page, compare_page; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert run_python(code) == "set()"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_and_lists_its_names(room: str) -> None:
    module = importlib.import_module(f"manylora.{room}")
    assert module.__doc__
    assert module.__all__ == sorted(
        module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_public_names_are_a_reviewed_list() -> None:
    assert manylora.__all__ == [
        "AnalyzeConfig",
        "CompareConfig",
        "EvaluateConfig",
        "ExportConfig",
        "FederateConfig",
        "ManyLoraConfig",
        "PredictConfig",
        "TrainConfig",
        "__version__",
        "analyze",
        "compare",
        "evaluate",
        "export",
        "federate",
        "open_run",
        "predict",
        "train",
    ]
    assert importlib.import_module("manylora.cli").VERBS.keys() == {
        "train",
        "evaluate",
        "predict",
        "export",
        "federate",
        "analyze",
        "compare",
    }


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("verb", ["train", "federate"])
def test_help_imports_no_torch(verb: str) -> None:
    code = (
        "import sys; from manylora.cli import main\n"
        f"try: main(['{verb}', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules))"
    )
    assert run_python(code).splitlines()[-1] == "set()"


@pytest.mark.parametrize("first", ["import manylora, peft", "import peft, manylora"])
def test_importing_manylora_registers_the_method_whatever_the_order(first: str) -> None:
    code = f"{first}\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\nprint([str(k.value) for k in m][-1])"
    assert run_python(code) == "MANYLORA"


def test_files_stay_small() -> None:
    long = {
        p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long == {}
