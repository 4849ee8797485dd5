"""The scripts in examples/ as a newcomer starts them, with small numbers: each in an empty folder of its own."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CASES: dict[str, tuple[list[str], list[str], list[str]]] = {
    # script: arguments, patterns that the output must hold, files that must be there
    "five_tasks_one_model": (
        ["8"],
        [r"praised_thing: \d+\.\d on 8 test rows", r"register_entry: \d", r"mean: \d+\.\d ± \d"],
        ["runs/train-001/adapter/adapter_model.safetensors", "runs/train-001/report.html"],
    ),
    "one_expert_per_task": (
        ["8"],
        [r"mean score \d", r"expert \d, praised_thing: .+", r"expert \d, blamed_thing: .+"],
        [f"runs/train-001/loras/{task}/adapter_config.json" for task in ("praised_thing", "former_owner")],
    ),
    "consortium_of_clients": (
        ["8", "2"],
        [r"current_holder: \d+\.\d, \d+\.\d", r"mean over 3 clients: \d"],
        ["runs/federate-001/scores.json", "runs/federate-001/report.html"],
    ),
    "own_chat_data": (
        ["2"],
        [r"ROUGE-1: \d+\.\d on 6 test rows", r"Where is the tea\? → ", r"Which aisle has soap\? → "],
        ["chats/train.jsonl", "runs/train-001/predictions.jsonl"],
    ),
    "with_trl": (
        ["2"],
        [
            r"loss: \d+\.\d+ at the first step, \d+\.\d+ at the last",
            "loaded again from trl-adapter: MANYLORA",
        ],
        ["trl-adapter/adapter_model.safetensors"],
    ),
    "compare_two_methods": (
        ["8", "1"],
        [
            r"alora on mean: \d",
            r"hydralora on former_owner: \d",
            "Sharing B scores higher than sharing A: undecided",
        ],
        ["two-methods.yaml", "runs/compare-two-methods/study.json"],
    ),
    "look_into_a_lora": (
        [],
        [
            r"35 modules, trained on former_owner",
            r"A: similarity \d\.\d+, of random matrices \d",
            "gradients on B",
        ],
        ["loras/former_owner/adapter_config.json", "runs/analyze-001/analysis.json"],
    ),
}


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_an_example_prints_numbers_and_writes_files(
    name: str, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "with_trl":
        pytest.importorskip("trl", reason="trl is not installed: pip install 'manylora[trl]'")
    arguments, patterns, files = CASES[name]
    run_example(name, arguments, monkeypatch)
    printed = capsys.readouterr().out
    for pattern in patterns:
        assert re.search(pattern, printed), f"{pattern} is not in\n{printed}"
    assert [file for file in files if not Path(file).is_file()] == []


def test_the_trl_example_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"skipped: TRL is not installed; pip install 'manylora\[trl\]'"):
        run_example("with_trl", [], monkeypatch)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_stands_in_the_table(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    row = f"[{path.name}]({path.name}) | `python examples/{path.name}` |"
    assert row in (EXAMPLES / "README.md").read_text(encoding="utf-8")
