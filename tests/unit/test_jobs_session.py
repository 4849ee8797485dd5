"""One run session: begun, held, stopped, failed, gone on with, finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manylora.errors import DataError, RunError
from manylora.files import dump_yaml
from manylora.jobs.progress import Progress
from manylora.jobs.session import Session, check_same_settings, reserved_folder, with_date_of
from manylora.training.config import TrainConfig
from manylora.training.runs import RunFolder

CONFIG = TrainConfig(date="2026-01-31").to_dict()


class Lines(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, line: str) -> None:
        self.lines.append(line)


def state(path: Path) -> tuple[str, str | None]:
    found = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return found["state"], found.get("error")


def test_a_run_begins_is_held_and_finishes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Session.begin(path, config=CONFIG, progress=Progress()) as session:
        assert (session.path, session.resumed, session.writes) == (path, False, True)
        assert state(path) == ("running", None)
        with pytest.raises(RunError, match="in use by another process"):
            Session.resume(path, progress=Progress())
        session.finish(seconds=1.5)
    assert json.loads((path / "state.json").read_text(encoding="utf-8"))["seconds"] == 1.5
    with pytest.raises(RunError, match="exists already"):
        Session.begin(path, config=CONFIG, progress=Progress())


@pytest.mark.parametrize(
    ("error", "reason", "lines"),
    [
        (DataError("rows are gone"), "rows are gone", []),
        (ZeroDivisionError("a bug"), "ZeroDivisionError('a bug')", []),
        (
            KeyboardInterrupt(),
            "stopped by Ctrl-C",
            ["continue with: manylora train --resume {}"],
        ),
    ],
)
def test_a_run_notes_why_it_failed_and_goes_on(
    error: BaseException, reason: str, lines: list[str], tmp_path: Path
) -> None:
    path, progress = tmp_path / "run", Lines()
    with (
        pytest.raises(type(error)),
        Session.begin(path, config=CONFIG, progress=progress),
    ):
        raise error
    assert state(path) == ("failed", reason)
    assert progress.lines == [line.format(path) for line in lines]
    with Session.begin(path, config=CONFIG, or_resume=True, progress=progress) as session:
        assert session.resumed
        session.finish()
    assert state(path) == ("finished", None)


@pytest.mark.parametrize(
    "left",
    [
        {".lock": ""},
        {".lock": "", "config.yaml.partial": "mod"},
        {".lock": "", "config.yaml": dump_yaml({**CONFIG, "date": "2025-12-31"})},
        {".lock": "", "config.yaml": dump_yaml(CONFIG), "environment.json.partial": "{"},
        {".lock": "", "config.yaml": dump_yaml(CONFIG), "environment.json": "{}", "state.json.partial": ""},
    ],
)
def test_what_a_kill_left_before_the_state_gives_way(left: dict[str, str], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    for name, text in left.items():
        (begun / name).write_text(text, encoding="utf-8")
    with Session.begin(begun, config=CONFIG, or_resume=True, progress=Progress()) as session:
        assert not session.resumed
        assert state(begun) == ("running", None)


@pytest.mark.parametrize(
    "mine",
    [
        {"thesis.tex": "important"},
        {"config.yaml": "title: thesis"},
        {"config.yaml": dump_yaml({**CONFIG, "r": 4})},
        {"config.yaml": dump_yaml(CONFIG), "notes.txt": "important"},
        {"config.yaml": "- [", "environment.json": "{}"},
        {"environment.json": "{}"},
    ],
)
def test_a_folder_of_somebody_s_own_stays_as_it_is(mine: dict[str, str], tmp_path: Path) -> None:
    for name, text in mine.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match="exists already"):
        Session.begin(tmp_path, config=CONFIG, or_resume=True, progress=Progress())
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == mine


def test_a_run_that_is_just_beginning_elsewhere_is_left_alone(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "run")
    other.path.mkdir()
    with other:
        other.lock()
        with pytest.raises(RunError, match="in use by another process"):
            Session.begin(other.path, config=CONFIG, or_resume=True, progress=Progress())
        assert (other.path / ".lock").exists()


def test_settings_and_date_of_a_run_that_was_begun(tmp_path: Path) -> None:
    path = tmp_path / "run"
    check_same_settings(path, TrainConfig(r=4))  # nothing is there
    with Session.begin(path, config=CONFIG, progress=Progress()):
        pass
    assert with_date_of(path, TrainConfig()).date == "2026-01-31"
    check_same_settings(path, with_date_of(path, TrainConfig()))
    with pytest.raises(RunError, match="other settings"):
        check_same_settings(path, TrainConfig(r=4))
    # How many rows share a pass is the machine's own choice.
    check_same_settings(path, TrainConfig(date="2026-01-31", micro_batch_size=4))


def test_a_folder_is_reserved_and_given_back_after_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError), reserved_folder(str(out)):
        (out / "nothing").unlink()
    assert not out.exists()
    with reserved_folder(str(out)) as folder:
        assert folder == out
        (out / "scores.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="exists already"), reserved_folder(str(out)):
        pass
    with reserved_folder(None) as folder:
        assert folder is None
