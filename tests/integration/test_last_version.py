"""What version 0.1 left behind opens, goes on, answers and is summed up as it was there.

`tests/fixtures/version-0.1` was written by that version on a random base: a finished and a killed training, a finished
and a killed federation (Fed-ALoRA, ranks 2 and 4), an analysis, and a study of four cells. "HERE" is its folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import manylora
from manylora.cli import main
from manylora.jobs.run import FederatedRun, Run

KEPT = Path(__file__).parents[1] / "fixtures" / "version-0.1"


@pytest.fixture
def there(in_empty_folder: Path) -> Iterator[Path]:
    """A copy of the folder, and the place to work in."""
    for path in KEPT.iterdir():
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, in_empty_folder / path.name)
    for path in in_empty_folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("HERE", str(in_empty_folder)), encoding="utf-8")
    return in_empty_folder


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(path: Path) -> list[tuple[object, ...]]:
    return [(row["task"], row["prompt"], row["prediction"], row["reference"]) for row in rows(path)]


def assert_same_weights(first: Path, second: Path) -> None:
    """As near as two machines come to each other in some dozen steps."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_a_finished_training_opens_scores_answers_and_leaves(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = manylora.open_run("train")
    assert isinstance(run, Run)
    assert run.finished
    assert run.scores.by_task() == {"colour": 75.0, "pet": 100.0}
    assert (run.config.epochs, run.config.num_experts, run.config.r) == (8, 2, 2)
    assert "87.5" in repr(run)
    again = manylora.evaluate(run, out="again", device="cpu", progress=False)
    assert again.by_task() == run.scores.by_task()
    assert answers(there / "again" / "predictions.jsonl") == answers(there / "train" / "predictions.jsonl")
    (answer,) = manylora.predict(run, "Name a pet (7)", device="cpu", progress=False)
    assert str(answer) == "cat"
    exported = manylora.export(run, to="out", merge=True, progress=False)
    assert sorted(exported.folders) == ["colour", "pet"]
    capsys.readouterr()
    assert main(["train", "--resume", "train"]) == 0
    assert "87.50" in capsys.readouterr().out


def test_a_killed_training_goes_on_to_the_weights_of_an_unbroken_one(there: Path) -> None:
    assert main(["train", "--resume", "unfinished"]) == 0
    steps = [row["step"] for row in rows(there / "unfinished" / "metrics.jsonl") if "train_loss" in row]
    assert steps == [44]
    name = Path("adapter") / "adapter_model.safetensors"
    assert_same_weights(there / "train" / name, there / "unfinished" / name)
    assert manylora.open_run("unfinished").scores.by_task() == {"colour": 75.0, "pet": 100.0}  # type: ignore[union-attr]


def test_a_federation_opens_and_its_adapters_answer(there: Path) -> None:
    run = manylora.open_run("federated")
    assert isinstance(run, FederatedRun)
    assert run.mean == pytest.approx(50.0)
    assert {client: run.scores[client].mean for client in run.scores} == {"colour": 0.0, "pet": 100.0}
    for client in ("colour", "pet"):
        adapter = there / "federated" / "clients" / client / "adapter"
        again = manylora.evaluate(
            adapter, data="data/test", tasks=[client], max_new_tokens=4, device="cpu", progress=False
        )
        assert again.by_task()[client] == run.scores[client].by_task()[client]


def test_a_killed_federation_goes_on_to_the_sums_of_an_unbroken_one(there: Path) -> None:
    assert main(["federate", "--resume", "federated-unfinished"]) == 0
    for name in ("rounds/round-0002", "clients/pet/round-0002", "clients/pet/adapter/adapter_model"):
        found = [there / run / f"{name}.safetensors" for run in ("federated", "federated-unfinished")]
        assert_same_weights(*found)
    runs = [manylora.open_run(name) for name in ("federated", "federated-unfinished")]
    means = [{client: scores.mean for client, scores in run.scores.items()} for run in runs]  # type: ignore[union-attr]
    assert means[0] == means[1]


def test_an_analysis_is_drawn(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = json.loads((there / "analysis" / "analysis.json").read_text(encoding="utf-8"))
    found = manylora.analyze(["train"], measure="none", out="again", progress=False)
    assert found.to_dict().keys() >= saved.keys() - {"manylora", "environment"}
    for name in ("similarity", "subspaces", "router"):
        assert json.loads(json.dumps(found.to_dict().get(name))) == saved.get(name), name


def test_cells_give_the_same_tables_and_verdicts(there: Path) -> None:
    saved = json.loads((there / "study" / "study.json").read_text(encoding="utf-8"))
    for words in (["--from-cells", "study/cells.jsonl", "--out", "again"], ["study.yaml", "--out", "study"]):
        assert main(["compare", *words]) == 0
    for path in ("again", "study"):
        summary = json.loads((there / path / "study.json").read_text(encoding="utf-8"))
        for name in ("table", "cells", "claims", "delta_m", "learning_rates", "missing"):
            assert summary[name] == saved[name], name

    html = manylora.compare(from_cells="study/cells.jsonl", report=False, progress=False)._repr_html_()
    assert "A shared B scores higher than one LoRA" in html
