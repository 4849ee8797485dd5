"""The benchmark commands run and write what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.step import main
from benchmarks.variants import PRESETS, Step, Variant, all_variants, make_base

ROOT = Path(__file__).parents[2]


def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_step_measures_time_and_memory_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    words = ("--quick", "--experts", "3", "--dropout", "0.05", "--share", "B", "--kind", "ours")
    done = run("step", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [row["key"] for row in record["rows"]] == ["floor", "lora-0.05", "ours-B-3-0.05"]
    for row in record["rows"]:
        assert len(row["seconds"]) == record["repeats"] == 2
        assert all(value > 0 for value in (*row["seconds"], row["kept"], row["growth"]))
        first, median, third = row["ratio"]
        assert 0 < first <= median <= third
    (lora,) = (row for row in record["rows"] if row["kind"] == "lora")
    assert lora["ratio"] == [1.0, 1.0, 1.0]
    (check,) = (check for check in record["targets"] if "0.05: median" in check["target"])
    assert check["holds"] == (check["value"] <= check["bound"])
    for text in ("ours-B-3-0.05", check["target"]):
        assert text in done.stdout


def test_step_says_that_cuda_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(["--preset", "cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "use --preset cpu" in line


def test_all_variants_start_as_the_base_and_share_its_weights() -> None:
    size = PRESETS["quick"]
    torch.manual_seed(0)
    base = make_base(size, "cpu")
    steps = {
        variant.key: Step(variant, base, size, "cpu")
        for variant in all_variants((1, 3), (0.0,), ("A", "B", "none"))
    }
    assert list(steps) == [
        "floor", "lora-0", "released-3-0", "ours-A-1-0", "ours-A-3-0", "ours-B-3-0", "ours-none-3-0",
    ]  # fmt: skip
    losses = {key: float(step.loss().detach()) for key, step in steps.items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["floor"]), rel=1e-5)
    own = {p.data_ptr() for p in base.parameters()}
    for step in steps.values():
        assert own <= {p.data_ptr() for p in step.model.parameters()}


def test_the_released_loop_computes_what_ours_does_without_dropout() -> None:
    size = PRESETS["quick"]
    torch.manual_seed(0)
    base = make_base(size, "cpu")
    loop = Step(Variant(kind="released", experts=3), base, size, "cpu")
    ours = Step(Variant(kind="ours", experts=3), base, size, "cpu")
    layers = dict(loop.model.named_modules())
    with torch.no_grad():
        for name, bank in ours.model.named_modules():
            if name.endswith("manylora_experts.default"):
                bank.lora_B.normal_(std=0.1)
                twin = layers[
                    name.removeprefix("base_model.model.").removesuffix(".manylora_experts.default")
                ]
                twin.lora_B.weight.copy_(bank.lora_B)
                twin.lora_route.weight.copy_(bank.lora_router)
                for a, rows in zip(twin.lora_A, bank.lora_A.split(size.rank), strict=True):
                    a.weight.copy_(rows)
    losses = [step.loss() for step in (loop, ours)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    got = ours.model.get_parameter(
        "base_model.model.model.layers.0.self_attn.q_proj.manylora_experts.default.lora_B"
    )
    torch.testing.assert_close(
        got.grad, layers["model.layers.0.self_attn.q_proj"].lora_B.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_the_memory_plan_is_within_15_percent_of_a_real_training(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    done = run("memory", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text(encoding="utf-8"))
    assert row["steps"] == 2
    assert row["estimate"] / row["measured"] == pytest.approx(1, abs=0.15)
    # the process alone is not the peak: the part that the plan works out is most of the rest
    assert row["measured"] - row["after_planning"] > 300 * 2**20
    worked_out = row["estimate"] - row["parts"]["process"]
    assert worked_out == pytest.approx(row["measured"] - row["after_planning"], rel=0.35)


def test_the_numbers_on_hostile_clients_are_those_of_the_committed_cells() -> None:
    """Every score in the docs' table is one that the cells give; five seeds of every cell, nothing refused."""
    from benchmarks.hostile import HOSTILE, RULES, read, table

    cells = read(ROOT / "docs" / "studies" / "hostile.jsonl")
    keys = {(c["partition"], c["rule"], c["hostile"], c["seed"]) for c in cells}
    assert keys == {
        (partition, rule, hostile, seed)
        for partition, counts in HOSTILE.items()
        for hostile in counts
        for rule in RULES
        for seed in range(5)
    }
    assert len(cells) == len(keys)
    assert not any(c["refused"] for c in cells)
    told = (ROOT / "docs" / "federated.md").read_text(encoding="utf-8").replace("−", "-")
    for partition in HOSTILE:
        scores = table(cells, partition).columns[2]
        for score in scores.cells:
            assert f" {score} " in told, (partition, score)
