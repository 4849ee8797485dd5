"""The run folder: whole files, complete checkpoints, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manylora.errors import RunError
from manylora.files import write_text
from manylora.training import RunFolder
from manylora.training.runs import step_of


def make_checkpoint(run: RunFolder, step: int, *, whole: bool, keep: tuple[int, ...] = ()) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step), encoding="utf-8")
    if whole:
        run.mark_complete(step, keep=keep)
    return folder


def test_a_new_run_never_takes_an_existing_folder(tmp_path: Path) -> None:
    with RunFolder.create(str(tmp_path / "run"), config={"r": 8}, seed=0) as run:
        assert run.read_config() == {"r": 8}
        assert run.state["state"] == "running"
    with pytest.raises(RunError, match="exists already"):
        RunFolder.create(str(tmp_path / "run"), config={}, seed=0)
    (tmp_path / "empty").mkdir()
    with RunFolder.create(str(tmp_path / "empty"), config={}, seed=0) as run:
        assert run.path == tmp_path / "empty"


def test_default_names_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        with RunFolder.create(None, config={}, seed=0) as run:
            assert run.path == Path(f"runs/train-{number:03d}")


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0) as run:
        assert run.newest_checkpoint() is None
        make_checkpoint(run, 5, whole=True)
        half = make_checkpoint(run, 40, whole=False)
        assert run.newest_checkpoint() == run.checkpoints / "checkpoint-5"
        run.drop_incomplete()
        assert not half.exists()
        assert run.newest_checkpoint() == run.checkpoints / "checkpoint-5"


def test_a_complete_checkpoint_replaces_the_older_ones_but_the_kept(tmp_path: Path) -> None:
    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0) as run:
        for step in (5, 9, 100):  # as numbers, not as text
            make_checkpoint(run, step, whole=True, keep=(5,))
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-100", "checkpoint-5"]
        assert run.newest_checkpoint() == run.checkpoints / "checkpoint-100"


def test_metrics_are_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0) as run:
        for step in (10, 20, 30):
            run.append_metrics({"step": step, "loss": 1 / step})
        with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 40, "lo')  # a kill in the middle of a line
        run.rewind_metrics(20)
        rows = [
            json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert [row["step"] for row in rows] == [10, 20]


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from manylora.training.runs import RunFolder; from manylora.errors import RunError\n"
        "try: RunFolder.open(sys.argv[1]).lock()\n"
        "except RunError as error: print(error)\n"
        "else: print('mine')"
    )

    def other() -> str:
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0):
        assert "in use by another process" in other()
    assert other().strip() == "mine"


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"


def test_a_damaged_run_says_which_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.yaml"):
        RunFolder.open(tmp_path)
    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0) as run:
        (run.path / "state.json").write_text("{", encoding="utf-8")
        with pytest.raises(RunError, match=r"state\.json"):
            _ = run.state


def test_a_folder_whose_number_is_no_number_is_no_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("checkpoint-2", "checkpoint-²", "checkpoint-٣", "checkpoint-"):
        folder = run.checkpoints / name
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text("{}", encoding="utf-8")
    assert run.newest_checkpoint() == run.checkpoints / "checkpoint-2"
    assert [step_of(Path(f"checkpoint-{name}")) for name in ("7", "²", "٣", "9" * 5000)] == [7, -1, -1, -1]
