"""What each kind of cell trains and scores, on a tiny base in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manylora.errors import ConfigError, RunError
from manylora.studies.cells import cell_settings, final_cells, screening_cells, study_date
from manylora.studies.config import parse_study
from manylora.studies.kinds import Job, kind_of
from manylora.studies.results import Measured
from manylora.studies.runner import pending

LAYERS = 2
SHAPES = [(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]
"""(O, D) of the tiny base's linear layers."""


def run(
    folder: Path, base: Path, data: Path, kind: str = "train", *, split: str = "test", **more: Any
) -> Measured:
    settings = {
        "model": str(base),
        "data": str(data),
        "target_modules": "all-linear",
        "device": "cpu",
        "max_new_tokens": 4,
        "batch_size": 8,
        "tasks": ["swap", "first_word"],
        **({"epochs": 2} if kind != "federate" else {"rounds": 2}),
        **more,
    }
    module = kind_of(kind)
    module.check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        settings=settings,
        seed=0,
        learning_rate=0.01,
        split=split,
        folder=folder,
        shared=folder.parent / "shared",
    )  # type: ignore[arg-type]
    return module.run(job)


def adapter(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "adapter" / "adapter_model.safetensors")


def test_limits_cut_training_and_test_rows_apart(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    found = run(tmp_path / "cell", tiny_base, small_data, method="lora", train_limit=8, test_limit=5)
    tasks = json.loads((tmp_path / "cell" / "run" / "tasks.json").read_text())["tasks"]
    assert {task["train_rows"] for task in tasks.values()} == {8}
    assert {task: len(rows) for task, rows in found.examples.items()} == {"swap": 5, "first_word": 5}
    for task, rows in found.examples.items():
        assert found.scores[task] == pytest.approx(sum(rows) / 5)
    steps, answers = kind_of("train").work(
        {"data": str(small_data), "model": str(tiny_base), "epochs": 2, "batch_size": 8, "train_limit": 8}
    )
    assert (steps, answers) == (3 * 8 * 2 // 8, 18)


def test_validation_rows_are_others_than_test_rows(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    run(tmp_path / "cell", tiny_base, small_data, method="lora", split="validation")
    lines = (tmp_path / "cell" / "run" / "predictions.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    tested = (small_data / "test" / "swap.jsonl").read_text() + (
        small_data / "test" / "first_word.jsonl"
    ).read_text()
    trained = (small_data / "train" / "swap.jsonl").read_text()
    instructions = [prompt.split("### Instruction:\n")[1].split("\n")[0] for prompt in prompts]
    assert not any(f'"{text}"' in tested for text in instructions)
    assert any(f'"{text}"' in trained for text in instructions)


def test_a_curve_looks_on_without_changing_the_training(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    plain = run(tmp_path / "plain", tiny_base, small_data, method="alora")
    looked = run(tmp_path / "looked", tiny_base, small_data, method="alora", score_epochs=[1, 2])
    for name, value in adapter(tmp_path / "plain" / "run").items():
        assert torch.equal(value, adapter(tmp_path / "looked" / "run")[name]), name
    curve = looked.extra["curve"]
    assert [point["epoch"] for point in curve] == [1.0, 2.0]
    assert curve[-1]["scores"] == dict(looked.scores) == dict(plain.scores)


def test_a_done_cell_is_read_and_not_run(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    first = run(tmp_path / "cell", tiny_base, small_data, method="lora")
    before = (tmp_path / "cell" / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run(tmp_path / "cell", tiny_base, small_data, method="lora") == first
    after = (tmp_path / "cell" / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert before == after


@pytest.mark.parametrize(("frozen", "method"), [("B", "alora"), ("A", "hydralora")])
def test_transfer_trains_one_matrix_over_the_other_tasks_other(
    frozen: str, method: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    found = run(
        tmp_path / "cell", tiny_base, small_data, "transfer",
        frozen=frozen, shots=[4, 8], left_out=["swap"], adapt_steps=3, tasks=["swap", "first_word", "last_word"],
    )  # fmt: skip
    assert list(found.scores) == ["swap@4", "swap@8"]
    (donor,) = (tmp_path / "shared").glob("donor-*/adapter")
    donor_tasks = json.loads((donor.parent / "tasks.json").read_text())["tasks"]
    assert list(donor_tasks) == ["first_word", "last_word"]
    given, learnt = adapter(donor.parent), adapter(tmp_path / "cell" / "run-swap-8")
    other = {"A": "B", "B": "A"}[frozen]
    kept = [name for name in learnt if name.endswith(f"lora_{frozen}")]
    assert len(kept) == LAYERS * len(SHAPES)
    for name in kept:
        assert torch.equal(learnt[name], given[name])
    assert any(value.abs().max() > 0 for name, value in learnt.items() if name.endswith(f"lora_{other}"))
    width = {"B": lambda O, D: D, "A": lambda O, D: O}[frozen]  # noqa: E741
    assert found.parameters == 2 * LAYERS * sum(8 * width(*shape) for shape in SHAPES)
    rows = json.loads((tmp_path / "cell" / "run-swap-4" / "tasks.json").read_text())["tasks"]
    assert rows["swap"]["train_rows"] == 4
    steps, answers = kind_of("transfer").work(
        {"frozen": frozen, "shots": [4, 8], "left_out": ["swap"], "adapt_steps": 3, "epochs": 2, "batch_size": 8,
         "data": str(small_data), "model": str(tiny_base)}
    )  # fmt: skip
    assert (steps, answers) == (
        2 * 3 + math.ceil(2 * 22 * 2 / 8),
        12,
    )  # 22: two of 24 rows are validation rows


def test_a_transfer_without_a_donor_is_a_fresh_lora(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    found = run(
        tmp_path / "cell", tiny_base, small_data, "transfer",
        frozen="none", shots=[4], left_out=["swap"], adapt_steps=2,
    )  # fmt: skip
    assert not (tmp_path / "shared").exists()
    assert found.parameters == LAYERS * sum(8 * (out + D) for out, D in SHAPES)
    with pytest.raises(ConfigError, match="asks for 400 examples"):
        run(
            tmp_path / "many",
            tiny_base,
            small_data,
            "transfer",
            frozen="none",
            shots=[400],
            left_out=["swap"],
        )
    with pytest.raises(ConfigError, match="left_out names"):
        run(tmp_path / "odd", tiny_base, small_data, "transfer", frozen="none", left_out=["swop"])


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_federated_cell_scores_every_client(
    split: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    found = run(
        tmp_path / "cell", tiny_base, small_data, "federate",
        strategy="fed-alora", split=split, train_limit=8, **({"limit": 4} if split == "test" else {}),
    )  # fmt: skip
    assert set(found.scores) == {"swap", "first_word"}
    assert {len(rows) for rows in found.examples.values()} == ({4} if split == "test" else {1})
    for task, rows in found.examples.items():
        assert found.scores[task] == pytest.approx(sum(rows) / len(rows))
    assert found.parameters == 2 * LAYERS * sum(8 * (out + D) for out, D in SHAPES)
    assert found.extra["bytes_up"] > 0


def test_rows_that_are_not_there_are_named(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="tasks swap, first_word have no test rows"):
        run(tmp_path / "cell", tiny_base, small_data / "train", method="lora")


def test_a_final_cell_of_another_grid_is_not_taken_for_one_at_the_rate_chosen_now(tmp_path: Path) -> None:
    grid = parse_study({"name": "s", "methods": ["lora", "alora"], "learning_rates": [0.1, 0.01], "seeds": 2})
    screening, finals = screening_cells(grid), final_cells(grid, {"lora": 0.1, "alora": 0.01})

    def done(cell: Any, **more: Any) -> None:
        folder = cell.folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps({**cell_settings(grid, cell), **more}), encoding="utf-8")
        scores = {"a": 2.0 if (cell.method, cell.learning_rate) in (("lora", 0.1), ("alora", 0.01)) else 1.0}
        row = {
            "stage": cell.stage,
            "method": cell.method,
            "learning_rate": cell.learning_rate,
            "scores": scores,
        }
        (folder / "result.json").write_text(json.dumps(row), encoding="utf-8")

    for cell in screening:
        done(cell)
    assert pending(grid, tmp_path) == finals
    done(finals[0])
    assert pending(grid, tmp_path) == finals[1:]
    done(finals[1], learning_rate=0.1)  # before the grid had 0.01
    with pytest.raises(RunError, match=r"final/alora/seed0 was run with learning_rate 0\.1, now it is 0\.01"):
        pending(grid, tmp_path)


def test_all_cells_of_a_study_see_the_date_of_its_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.studies.cells.today", lambda: "2024-02-29")  # stands for the clock
    assert study_date(tmp_path) == "2024-02-29"
    monkeypatch.setattr("manylora.studies.cells.today", lambda: "2024-03-01")
    assert study_date(tmp_path) == "2024-02-29"
