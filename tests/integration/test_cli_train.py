"""`manylora train` and `evaluate` as a user runs them, on a tiny base."""

from __future__ import annotations

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from manylora.cli import main
from processes import cli_process, killed_process


def train(base: Path, data: Path, *more: object) -> list[str]:
    fixed = [
        "train",
        "--model",
        base,
        "--data",
        data,
        "--epochs",
        4,
        "--batch-size",
        8,
        "--learning-rate",
        0.01,
        "--keep-adapters",
        3,
    ]
    return [str(word) for word in (*fixed, "--device", "cpu", *more)]


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run in a process of its own, on one thread."""
    folder = tmp_path_factory.mktemp("runs")
    process = cli_process([*train(tiny_base, small_data), "--out", folder / "whole"], folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder / "whole" / "printed.txt").write_text(out, encoding="utf-8")
    return folder / "whole"


def test_a_run_leaves_what_the_docs_promise(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    assert config["share"] == "B"
    assert config["num_experts"] == 3
    assert config["target_modules"] == "all-linear"
    assert None not in (config["learning_rate"], config["epochs"], config["warmup"])
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    assert environment["seed"] == 0
    assert environment["packages"]["peft"]
    assert json.loads((finished / "state.json").read_text(encoding="utf-8"))["state"] == "finished"
    rows = [
        json.loads(line) for line in (finished / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == 18
    assert {row["task"] for row in rows} == {"last_word", "first_word", "swap"}
    metrics = [
        json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [row["step"] for row in metrics]
    assert steps == sorted(steps)
    validations = [row for row in metrics if "eval_mean_task_loss" in row]
    # 66 rows x 4 epochs / 8 rows: once an epoch (8.25 steps), and at the last step
    assert [row["step"] for row in validations] == [8, 16, 24, 32, 33]
    assert validations[-1]["eval_mean_task_loss"] < validations[0]["eval_mean_task_loss"]
    assert {"eval_loss/last_word", "eval_loss/first_word", "eval_loss/swap"} <= validations[0].keys()
    assert not list(finished.glob("*.partial"))
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert f"--out {finished}" in page
    assert {path.suffix for path in (finished / "figures").iterdir()} == {".svg", ".png"}
    assert (finished / "tables" / "scores.csv").read_text(encoding="utf-8").count("\n") == 5
    assert f"report: {finished / 'report.html'}" in (finished / "printed.txt").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_drawn_costs_a_warning_not_the_result(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("figures", "report.html"))
    (run / "figures").write_text("a file where a folder should be", encoding="utf-8")
    assert main(["train", "--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "last_word" in out
    assert "no report was drawn" in err
    assert len(err.strip().splitlines()) == 1
    (run / "figures").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_the_table_holds_every_task_and_the_mean(finished: Path) -> None:
    printed = (finished / "printed.txt").read_text(encoding="utf-8")
    for word in ("last_word", "first_word", "swap", "mean", "score", "s.e.", "ROUGE-1"):
        assert word in printed


def test_training_twice_with_one_seed_gives_the_same_numbers(
    finished: Path, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    process = cli_process([*train(tiny_base, small_data), "--out", "again"], tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert weights(tmp_path / "again") == weights(finished)
    for name in ("predictions.jsonl", "scores.json", "tasks.json", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_evaluate_repeats_the_scores_of_the_run(
    finished: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--adapter", finished, "--data", small_data / "test", "--device", "cpu"]
    assert main([*map(str, command), "--batch-size", "5", "--out", str(tmp_path / "scored")]) == 0
    assert "mean" in capsys.readouterr().out
    again, first = (
        json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        for folder in (tmp_path / "scored", finished)
    )
    assert again["tasks"] == first["tasks"]


def test_evaluate_reads_the_test_rows_of_a_run_as_the_run_did(tiny_base: Path, in_empty_folder: Path) -> None:
    rows = "kind,instruction,output\n" + "".join(
        f"{kind},Say {kind},{kind}\n" * 4 for kind in ("a", "b", "c")
    )
    for name in ("train.csv", "test.csv"):
        Path(name).write_text(rows, encoding="utf-8")
    command = [
        "train",
        "--model",
        str(tiny_base),
        "--data",
        "train.csv",
        "--test",
        "test.csv",
        "--epochs",
        "1",
    ]
    routed = [
        "--task-column",
        "kind",
        "--tasks",
        "b,a",
        "--router",
        "task",
        "--max-new-tokens",
        "2",
        "--limit",
        "3",
    ]
    assert main([*command, *routed, "--device", "cpu", "--out", "run"]) == 0
    assert main(["evaluate", "--adapter", "run", "--device", "cpu", "--out", "scored"]) == 0
    first, again = (json.loads(Path(name, "scores.json").read_text()) for name in ("run", "scored"))
    assert [task["task"] for task in again["tasks"]] == ["b", "a"]
    assert again["tasks"] == first["tasks"]
    assert [task["n"] for task in again["tasks"]] == [3, 3]


MOMENTS = {
    "early": "checkpoint-6",
    "in_a_save": "checkpoint-6/complete.json",
    "between_log_and_checkpoint": "checkpoint-12",
    "at_the_end": "broken/adapter",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_weights(
    moment: str, finished: Path, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "broken"
    begin = [*train(tiny_base, small_data), "--save-steps", 3, "--out", run]
    killed_process(begin, tmp_path, before=MOMENTS[moment])
    assert json.loads((run / "state.json").read_text(encoding="utf-8"))["state"] == "running"
    assert not (run / "adapter").exists()
    if moment == "in_a_save":  # what a kill between two files of a checkpoint leaves
        newest = max(run.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        half = newest.with_name("checkpoint-999")
        half.mkdir()
        (half / "adapter_model.safetensors").write_bytes(b"half")
    resumed = cli_process(["train", "--resume", run], tmp_path)
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert weights(run) == weights(finished)
    kept = [path.name for path in (finished / "adapters").iterdir()]
    assert len(kept) == 5
    for name in kept:
        assert (run / "adapters" / name).read_bytes() == (finished / "adapters" / name).read_bytes(), name
    assert (run / "predictions.jsonl").read_bytes() == (finished / "predictions.jsonl").read_bytes()
    assert not (run / "checkpoints" / "checkpoint-999").exists()
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert steps == sorted(steps)


def test_a_run_killed_while_the_base_is_scored_ends_with_the_same_scores(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    begin = [*train(tiny_base, small_data), "--epochs", 1, "--score-base"]
    whole = cli_process([*begin, "--out", "whole"], tmp_path)
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    killed_process([*begin, "--out", "broken"], tmp_path, before="broken/predictions.jsonl")
    assert (tmp_path / "broken" / "adapter").is_dir()
    assert main(["train", "--resume", str(tmp_path / "broken")]) == 0
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("whole", "broken")]
    assert scores[0]["gains"]
    assert scores[1] == scores[0]


def test_ctrl_c_ends_with_130_and_says_how_to_continue(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    command = [*train(tiny_base, small_data), "--epochs", 400, "--out", "long"]
    # A shell lets its background jobs ignore Ctrl-C, and they pass that on to what they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = cli_process(command, tmp_path, preexec_fn=heed)
    deadline = time.monotonic() + 280
    while not (tmp_path / "long" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "manylora train --resume long" in out
    state = json.loads((tmp_path / "long" / "state.json").read_text(encoding="utf-8"))
    assert state["state"] == "failed"
    assert "Ctrl-C" in state["error"]


def test_the_best_weights_can_be_kept(tiny_base: Path, small_data: Path, in_empty_folder: Path) -> None:
    command = train(tiny_base, small_data, "--keep", "best", "--epochs", 6, "--learning-rate", 0.3)
    assert main([*command, "--eval-steps", "4", "--out", "best"]) == 0
    metrics = [
        json.loads(line) for line in Path("best/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = {row["step"]: row["eval_mean_task_loss"] for row in metrics if "eval_mean_task_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    kept = Path(f"best/checkpoints/checkpoint-{best}/adapter_model.safetensors")
    assert kept.read_bytes() == weights(Path("best"))


def test_a_task_router_gives_each_task_its_expert(
    tiny_base: Path, small_data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train(tiny_base, small_data, "--router", "task"), "--out", "routed"]) == 0
    config = json.loads(Path("routed/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_names"] == ["first_word", "last_word", "swap"]
    assert config["num_experts"] == 3
    hint = "next: manylora predict --adapter routed --task first_word 'your prompt'"
    assert hint in capsys.readouterr().out  # it works as it is printed
    question = ["predict", "--adapter", "routed", "--device", "cpu", "Last of: red cat up"]
    assert main([*question, "--task", "last_word"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert main([*question, "--task", "middle_word"]) == 2
    assert "first_word, last_word, swap" in capsys.readouterr().err
    assert main(question) == 2
    assert "--task" in capsys.readouterr().err
    command = ["evaluate", "--adapter", "routed", "--data", str(small_data / "test"), "--out", "scored"]
    assert main([*command, "--device", "cpu"]) == 0
    first, again = (
        json.loads(Path(name).read_text(encoding="utf-8"))
        for name in ("routed/scores.json", "scored/scores.json")
    )
    assert first["tasks"] == again["tasks"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tiny_base: Path, small_data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train(tiny_base, small_data), "--dry-run"]) == 0
    out = capsys.readouterr().out
    # 22 training rows a task (2 are cut for validation), 4 epochs, 8 rows a step
    assert "33 of 8 rows (4 epochs, 2 warm-up)" in out
    assert "14 layers: 2 × down_proj" in out
    # per layer N·R·D + R·O + N·D with N = 3, R = 8; all seven kinds of a layer that is 32 wide and 64 within
    per_block = (
        4 * (24 * 32 + 8 * 32 + 3 * 32) + 2 * (24 * 32 + 8 * 64 + 3 * 32) + (24 * 64 + 8 * 32 + 3 * 64)
    )
    assert f"{2 * per_block:,} of" in out
    assert list(in_empty_folder.iterdir()) == []


def test_flags_win_over_the_config_file(
    tiny_base: Path, small_data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(
        f"model: {tiny_base}\ndata: {small_data}\nr: 4\nnum_experts: 5\ntarget_modules: [q_proj, v_proj]\n",
        encoding="utf-8",
    )
    assert main(["train", "--config", "run.yaml", "--r", "2", "--dry-run", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "share B, 5 experts, router token, r 2" in out
    assert "4 layers: 2 × q_proj, 2 × v_proj" in out
