"""A training that is killed again and again (kill -9) logs what an unbroken one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, os, signal, sys
from transformers import TrainerCallback
from manylora.training import RunFolder, TrainConfig, finetune, prepare

path, settings, moment = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3].split()

class Kill(TrainerCallback):
    def die(self, args, state, control, **_):
        if moment[1:] in ([], [str(state.global_step)]):
            os.kill(os.getpid(), signal.SIGKILL)

if moment:
    setattr(Kill, moment[0], Kill.die)
prepared = prepare(TrainConfig(**settings))
if os.path.exists(path):
    run = RunFolder.open(path)
    run.lock()
else:
    run = RunFolder.create(path, config=prepared.config.to_dict(), seed=0)
with run:
    finetune(prepared, run, callbacks=[Kill()])
"""
MOMENTS = ["on_step_end 7", "on_log 10", "on_save 12", "on_evaluate 16", "on_train_end"]
"""Between a checkpoint and a log, behind a log, behind a checkpoint, between a validation and its checkpoint, at the
end."""
TIMES = ("_runtime", "_per_second")


def train(path: Path, settings: dict[str, object], moment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(path), json.dumps(settings), moment],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def logged(path: Path) -> list[dict[str, object]]:
    """The rows of metrics.jsonl without times and speeds."""
    rows = map(json.loads, (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


@pytest.mark.slow
def test_a_killed_run_logs_the_losses_of_an_unbroken_one(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    settings = {
        "model": str(tiny_base),
        "data": str(small_data / "train"),
        "epochs": 2.0,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 0.01,
        "save_steps": 4,
        "eval_steps": 8,
        "device": "cpu",
    }
    assert train(tmp_path / "whole", settings, "") == 0
    for moment in MOMENTS:
        assert train(tmp_path / "broken", settings, moment) == -signal.SIGKILL, moment
    assert train(tmp_path / "broken", settings, "") == 0
    rows = logged(tmp_path / "whole")
    assert [row["step"] for row in rows if "loss" in row] == [1, 10]
    assert [row["step"] for row in rows if "train_loss" in row] == [17]
    assert logged(tmp_path / "broken") == rows
    weights = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "broken")
    ]
    assert weights[0] == weights[1]
