"""`manylora compare` with real cells: processes on a tiny base, killed, failing, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from manylora.cli import main
from manylora.studies.config import load_study
from manylora.studies.runner import launched, pending, thread_settings
from processes import cli_process


def study_file(folder: Path, base: Path, data: Path, **more: Any) -> Path:
    values = {
        "name": "tiny",
        "question": "Does anything differ?",
        "settings": {
            "model": str(base),
            "data": str(data),
            "tasks": ["swap", "first_word"],
            "epochs": 2,
            "batch_size": 8,
            "save_steps": 2,
            "target_modules": "all-linear",
            "device": "cpu",
            "max_new_tokens": 6,
        },
        "learning_rates": [0.01],
        "seeds": [0],
        "methods": ["alora", "lora-per-task"],
        **more,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(
    tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A study of which one method cannot run."""
    folder = tmp_path_factory.mktemp("study")
    methods = {"alora": None, "lora-per-task": None, "broken": {"preset": "lora", "model": "/no/such/model"}}
    path = study_file(folder, tiny_base, small_data, methods=methods)
    process = cli_process(["compare", path, "--out", folder / "out", "--workers", 2], folder)
    out, err = process.communicate(timeout=300)
    return folder / "out", subprocess.CompletedProcess([], process.returncode, out, err)


def test_a_study_runs_and_one_failed_cell_does_not_lose_the_rest(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, process = whole
    assert process.returncode == 2
    assert (
        f"the cell final/broken/seed0 failed; its log is {out}/cells/final/broken/seed0/log.txt"
        in process.stderr
    )
    assert "/no/such/model is not a model folder" in process.stderr  # the log's last line
    assert "try them again with: manylora compare" in process.stderr
    assert "Traceback" not in process.stderr
    assert "3/3" in process.stderr
    summary = json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert [cell["method"] for cell in summary["cells"]] == ["alora", "lora-per-task"]
    assert summary["missing"] == ["broken seed 0"]
    for cell in summary["cells"]:
        assert set(cell["scores"]) == {"swap", "first_word"}
        assert cell["peak_bytes"] > 50 * 2**20
        assert cell["seconds"] > 0
        assert cell["workers"] == 2
    assert "Δm%" in process.stdout
    assert "alora scores higher than lora-per-task: undecided" in process.stdout


def test_a_cell_is_a_run_folder_and_per_task_cells_are_several(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = whole
    run = out / "cells" / "final" / "alora" / "seed0" / "run"
    assert {"config.yaml", "environment.json", "metrics.jsonl", "scores.json", "state.json", "adapter"} <= {
        path.name for path in run.iterdir()
    }
    assert json.loads((run / "state.json").read_text())["state"] == "finished"
    assert not (run / "checkpoints").exists()
    result = json.loads((run.parent / "result.json").read_text(encoding="utf-8"))
    saved = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    assert result["scores"] == {task["task"]: task["score"] for task in saved["tasks"]}
    alone = out / "cells" / "final" / "lora-per-task" / "seed0"
    trained = [yaml.safe_load((alone / f"run-{i}" / "config.yaml").read_text())["tasks"] for i in (0, 1)]
    assert trained == [["swap"], ["first_word"]]
    both = json.loads((alone / "result.json").read_text(encoding="utf-8"))
    parts = [json.loads((alone / f"run-{i}" / "measured.json").read_text()) for i in (0, 1)]
    assert both["parameters"] == sum(part["parameters"] for part in parts)


def test_done_cells_are_not_run_again_and_the_tables_come_again(
    whole: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, process = whole
    study = load_study(out / "study.yaml")
    assert [cell.id for cell in pending(study, out)] == ["final/broken/seed0"]
    before = (out / "study.json").read_bytes()
    assert main(["compare", str(out / "study.yaml"), "--out", str(out), "--tables"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in process.stdout
    after = json.loads((out / "study.json").read_bytes())
    assert {**after, "environment": None} == {**json.loads(before), "environment": None}
    assert main(["compare", "--from-cells", str(out / "cells.jsonl")]) == 0
    table, _, page = printed.rpartition("report: ")
    assert page == f"{out / 'report.html'}\n"
    assert capsys.readouterr().out == table  # without a folder there is no page
    assert main(["compare", str(out / "study.yaml"), "--out", str(out), "--print-cells"]) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert command.endswith("--cell final/broken/seed0")


def test_a_folder_of_other_settings_is_refused_by_the_cell(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _ = whole
    values = yaml.safe_load((out / "study.yaml").read_text(encoding="utf-8"))
    values["settings"]["epochs"] = 3
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["compare", str(other), "--out", str(out)]) == 2
    assert "was run with epochs 2, now it is 3" in capsys.readouterr().err
    assert load_study(out / "study.yaml").method("alora").settings["epochs"] == 2
    assert main(["compare", str(other), "--out", str(tmp_path)]) == 2
    assert "is no study's folder" in capsys.readouterr().err


def test_dry_run_names_cells_and_time(
    whole: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = whole
    assert main(["compare", str(out / "study.yaml"), "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "0 + 3 cells" in printed
    assert "from the cells that are done" in printed


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_with_its_cell_a_study_goes_on_to_the_same_scores(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    path, out = study_file(tmp_path, tiny_base, small_data, methods=["alora"]), tmp_path / "out"
    command = ["compare", path, "--out", out, "--workers", 1]
    process = cli_process(command, tmp_path)
    cell = out / "cells" / "final" / "alora" / "seed0"
    wait_for(cell / "run" / "checkpoints", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    os.kill(json.loads((cell / "run" / "state.json").read_text())["pid"], signal.SIGKILL)
    assert not (cell / "result.json").exists()
    again = cli_process(command, tmp_path)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    result = json.loads((cell / "result.json").read_text(encoding="utf-8"))
    assert result["resumed"] is True
    unbroken = json.loads(
        (whole[0] / "cells" / "final" / "alora" / "seed0" / "result.json").read_text(encoding="utf-8")
    )
    assert result["scores"] == unbroken["scores"]
    assert result["examples"] == unbroken["examples"]


def test_a_launcher_gets_the_command_as_one_shell_word_list() -> None:
    command = ["python", "-m", "x", "a b"]
    assert launched(command, None) == command
    assert launched(command, "srun -c 4 {command}") == ["/bin/sh", "-c", "srun -c 4 python -m x 'a b'"]


def test_cells_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.studies.runner.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert set(thread_settings(3).values()) == {"2"}
    assert set(thread_settings(16).values()) == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert set(thread_settings(3).values()) == {"4"}


def test_a_launcher_without_a_place_is_refused(
    whole: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = whole
    assert main(["compare", str(out / "study.yaml"), "--out", str(out), "--launcher", "srun"]) == 2
    assert "has no {command}" in capsys.readouterr().err
