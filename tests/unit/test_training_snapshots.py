"""Weights kept at chosen steps: which, whole, the same after a kill, and what analyze makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manylora.analysis import changes, load_source
from manylora.errors import ConfigError
from manylora.training import RunFolder, TrainConfig, build_model, find_snapshots, finetune, prepare
from manylora.training.snapshots import snapshot_steps


@pytest.mark.parametrize(
    ("steps", "count", "kept"),
    [
        (100, 0, []),
        (100, 1, [0, 5, 100]),
        (100, 4, [0, 5, 25, 50, 75, 100]),
        (20, 2, [0, 2, 10, 20]),
        (1, 3, [0, 1]),
    ],
)
def test_steps_are_the_start_an_early_one_and_evenly_spread_ones(
    steps: int, count: int, kept: list[int]
) -> None:
    assert snapshot_steps(steps, count) == kept


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="keep_adapters is -1"):
        TrainConfig(keep_adapters=-1)


def test_a_run_keeps_its_start_and_its_end(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    prepared = prepare(
        TrainConfig(
            model=str(tiny_base), data=str(small_data), epochs=1, batch_size=8, learning_rate=0.01,
            device="cpu", keep_adapters=2,
        )
    )  # fmt: skip
    with RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run:
        finetune(prepared, run)
    kept = find_snapshots(tmp_path / "run")
    assert prepared.plan.steps == 9
    assert list(kept) == [0, 2, 4, 9]
    final = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    first = load_file(kept[0])
    assert first.keys() == final.keys()
    fresh = dict(build_model(prepared).named_parameters())
    for name, tensor in first.items():
        adapter = name.replace(".manylora_experts.", ".manylora_experts.default.")
        assert torch.equal(tensor, fresh[adapter].detach())
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_file(kept[9]).items())
    source = load_source(tmp_path / "run")
    assert (source.tasks, source.seed, source.last_step) == (("first_word", "last_word", "swap"), 0, 9)
    spans = {(c.matrix, c.from_step, c.to_step) for c in changes(source)}
    assert spans == {
        ("A", 0, 2), ("A", 0, 4), ("A", 0, 9), ("A", 2, 4), ("A", 2, 9), ("B", 2, 4), ("B", 2, 9),
    }  # fmt: skip
    for change in changes(source):
        # B leaves zero at step 2, so that A, whose gradient goes through B, stands still until then
        still = (change.matrix, change.to_step) == ("A", 2)
        assert change.direction == pytest.approx(0, abs=1e-12) if still else change.direction > 1e-6


class StopError(Exception):
    """What ends a run on the way."""


def test_stopped_and_resumed_it_keeps_the_same_weights(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    prepared = prepare(
        TrainConfig(
            model=str(tiny_base), data=str(small_data), epochs=3, batch_size=8, learning_rate=0.01,
            device="cpu", keep_adapters=4, save_steps=8,
        )
    )  # fmt: skip

    def stop(step: int, steps: int, logs: object) -> None:
        if step >= 20:
            raise StopError

    with RunFolder.create(str(tmp_path / "whole"), config=prepared.config.to_dict(), seed=0) as run:
        finetune(prepared, run)
    with RunFolder.create(str(tmp_path / "stopped"), config=prepared.config.to_dict(), seed=0) as run:
        with pytest.raises(StopError):
            finetune(prepared, run, report=stop)
        assert list(find_snapshots(run.path)) == [0, 2, 6, 12, 19]
        for name in (
            "step-000999.safetensors",
            "step-000025.safetensors.partial",
        ):  # of a longer run, of a kill
            (run.path / "adapters" / name).write_bytes(b"half")
        finetune(prepared, run)
    names = sorted(path.name for path in (tmp_path / "whole" / "adapters").iterdir())
    assert names == [f"step-{step:06d}.safetensors" for step in (0, 2, 6, 12, 19, 25)]
    assert sorted(path.name for path in (tmp_path / "stopped" / "adapters").iterdir()) == names
    for name in names:
        one, other = (tmp_path / run / "adapters" / name for run in ("whole", "stopped"))
        assert one.read_bytes() == other.read_bytes(), name
