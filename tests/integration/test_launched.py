"""`manylora train` in two real processes (gloo, CPU): one run, as if it were one process.

The two go through several runs (`launched_worker.py`), because starting torch takes longer than they do.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from broken_bases import marked_rows, spoil
from manylora.cli import main

WORKER = Path(__file__).with_name("launched_worker.py")
EXACT = 1e-5
"""On losses of about 4; two half batches are added in another order than one whole."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(*command: object) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
    return subprocess.run(
        [sys.executable, *launcher, "--master-addr=127.0.0.1", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def two_workers(*arguments: object) -> tuple[str, str]:
    """What both printed, on standard output and error; in the environment that torchrun would give them."""
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [worker.communicate(timeout=300) for worker in workers]
    out, err = ("".join(text) for text in zip(*printed, strict=True))
    assert [worker.returncode for worker in workers] == [0, 0], err[-3000:]
    return out, err


def command(base: Path, data: Path, *more: object) -> list[str]:
    fixed = ("train", "--model", base, "--data", data, "--epochs", 1, "--batch-size", 8, "--device", "cpu")
    return [str(word) for word in (*fixed, "--learning-rate", 0.01, "--save-steps", 4, *more)]


def losses(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [{key: value for key, value in json.loads(line).items() if _is_loss(key)} for line in lines]
    return [row for row in kept if row]


def _is_loss(key: str) -> bool:
    # transformers' own eval_loss is a mean over batches, and so depends on how the rows are divided into them
    return "loss" in key and key not in ("eval_loss", "train_loss")


@pytest.fixture(scope="module")
def runs(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `alone` in one process, the others in two."""
    folder = tmp_path_factory.mktemp("launched")
    exact = ("--lora-dropout", 0)
    assert main(command(tiny_base, small_data, *exact, "--out", folder / "alone")) == 0
    # 66 rows in steps of 8: the last step has 2 rows, so of its passes of 2 rows the second process's is empty
    again = command(tiny_base, small_data, "--gradient-checkpointing")
    plan = [
        {"command": words, "port": free_port(), "interrupted_at": 6 if interrupted else None}
        for words, interrupted in (
            (
                command(tiny_base, small_data, *exact, "--micro-batch-size", 2, "--out", folder / "together"),
                False,
            ),
            ([*again, "--out", str(folder / "whole")], False),
            ([*again, "--out", str(folder / "broken")], True),
            (["train", "--resume", str(folder / "broken")], False),
            (command(tiny_base, small_data, "--out", folder / "whole"), False),
            (command(tiny_base, small_data, "--batch-size", 9, "--out", folder / "uneven"), False),
        )
    ]
    out, err = two_workers(folder, json.dumps(plan))
    (folder / "out.txt").write_text(out, encoding="utf-8")
    (folder / "err.txt").write_text(err, encoding="utf-8")
    return folder


def test_two_processes_train_what_one_trains(runs: Path) -> None:
    alone, together = losses(runs / "alone"), losses(runs / "together")
    assert len(alone) == len(together) == 3
    assert any("eval_loss/swap" in row for row in alone)
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, abs=EXACT)
    left, right = (
        load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("alone", "together")
    )
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=0, atol=2e-4, msg=key)
    assert any(value.abs().max() > 0.01 for key, value in left.items() if key.endswith("lora_B"))


def test_the_run_folder_is_written_once_and_whole(runs: Path) -> None:
    run = runs / "together"
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {path.name for path in (runs / "alone").iterdir()} - {".lock"}
    assert json.loads((run / "state.json").read_text(encoding="utf-8"))["state"] == "finished"
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert steps == sorted(steps)
    scores, expected = (
        json.loads((folder / "scores.json").read_text(encoding="utf-8")) for folder in (run, runs / "alone")
    )
    assert [row["n"] for row in scores["tasks"]] == [row["n"] for row in expected["tasks"]]
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["batch_size"] == 8  # of a step, however many share it


def test_only_the_first_process_prints(runs: Path) -> None:
    printed = (runs / "out.txt").read_text(encoding="utf-8")
    assert printed.count(f"run folder: {runs / 'together'}") == 1
    assert "Traceback" not in (runs / "err.txt").read_text(encoding="utf-8")


def test_a_broken_run_ends_with_the_weights_of_a_whole_one(runs: Path) -> None:
    """Each process's dropout goes on where it was; with one's masks in both, they would differ."""
    whole, broken = (
        (runs / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")
    )
    assert whole == broken
    assert losses(runs / "whole") == losses(runs / "broken")
    states = [runs / "whole" / "checkpoints" / "checkpoint-9" / f"rng_state_{rank}.pth" for rank in (0, 1)]
    assert states[0].read_bytes() != states[1].read_bytes()


def test_bad_input_ends_all_processes_with_one_line(runs: Path) -> None:
    for rank in (0, 1):
        codes = json.loads((runs / f"codes-{rank}.json").read_text(encoding="utf-8"))
        assert codes == [0, 0, 130, 0, 2, 2]
    lines = [
        line
        for line in (runs / "err.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("manylora:")
    ]
    ctrl_c, exists, uneven = sorted(lines, key=lambda line: "batch_size" in line)[-3:]
    assert len(lines) == 3
    assert "stopped by Ctrl-C" in ctrl_c
    assert "exists already" in exists
    assert "batch_size 9 cannot be divided between 2 processes" in uneven
    assert not (runs / "uneven").exists()


def test_a_loss_that_is_not_finite_ends_all_processes_with_one_line(tiny_base: Path, tmp_path: Path) -> None:
    """The row is in one process's share alone; the other would wait for its gradients."""
    base = spoil(tiny_base, tmp_path / "base")
    data = marked_rows(tmp_path / "data", "colours", marked=5)
    words = command(base, data, "--micro-batch-size", 2, "--save-steps", 1, "--out", tmp_path / "run")
    _, err = two_workers(
        tmp_path, json.dumps([{"command": words, "port": free_port(), "interrupted_at": None}])
    )
    for rank in (0, 1):
        assert json.loads((tmp_path / f"codes-{rank}.json").read_text(encoding="utf-8")) == [2]
    (line,) = [line for line in err.splitlines() if line.startswith("manylora:")]
    assert "the loss of task 'colours'" in line
    assert "colours.jsonl:6)" in line
    state = json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))
    assert state["state"] == "failed"


def test_verbs_of_one_process_refuse_a_launcher(tmp_path: Path) -> None:
    done = torchrun("-m", "manylora.cli", "federate", "--out", tmp_path / "run")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("manylora:")]
    assert len(lines) == 1
    assert "a launcher started 2" in lines[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()
