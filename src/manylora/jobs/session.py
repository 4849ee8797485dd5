"""One run: how it begins, is held by one process, goes on, and ends well or ill. Nobody else knows."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from manylora.errors import RunError, explain
from manylora.files import dump_yaml, parse_yaml, read_yaml
from manylora.jobs.launch import Launch
from manylora.jobs.progress import Progress
from manylora.training.config import TrainConfig, filled
from manylora.training.processes import Processes
from manylora.training.runs import RunFolder

ALONE = Launch(Processes())
"""One process, started by no launcher."""

_WRITTEN_FIRST = (".lock", "config.yaml", "environment.json", "state.json")
"""What a run writes before anything else, in this order; with the last of them it is one."""

_HOW = ("micro_batch_size",)
"""Settings that change how a step is computed and not what: a CPU's own choice, which a GPU, several processes or an
earlier version would not make."""

_GO_ON = {
    "train": "continue with: manylora train --resume {run}",
    "federate": "continue with: manylora federate --resume {run}",
    "analyze": "the same command goes on from here",
}
"""What to say after Ctrl-C, by kind of run."""


class Session:
    """A run while it is worked on: `with Session.begin(…) as session: …; session.finish()`.

    Leaving the block gives the run up. Where it is left by an error, the run notes why it failed; a run that was
    stopped, killed or failed goes on with `resume`.

    Args:
        folder: of the run; locked by this process, or by the first one of several.
        resumed: whether the run was begun before.
        kind: the verb whose run it is.
        progress: told, after Ctrl-C, how the run goes on.
        writes: whether this process is the one that writes and shows.
    """

    def __init__(
        self, folder: RunFolder, *, resumed: bool, kind: str, progress: Progress, writes: bool = True
    ) -> None:
        self.folder, self.resumed = folder, resumed
        self.writes, self._kind, self._progress = writes, kind, progress

    @classmethod
    def begin(
        cls,
        out: str | Path | None,
        *,
        config: Mapping[str, Any],
        kind: str = "train",
        or_resume: bool = False,
        progress: Progress,
        launch: Launch = ALONE,
    ) -> Session:
        """Make a run folder: `out`, or the next free `runs/KIND-NNN`.

        Args:
            out: the folder.
            config: the settings that the run notes, its "seed" among them.
            kind: the verb whose run it is.
            or_resume: go on with the run in `out` where there is one; the caller has seen that it has these settings.
            progress: see the class.
            launch: the processes that work on it.

        Raises:
            RunError: `out` exists and is not an empty folder, or another process works on it.
        """

        def hold() -> tuple[RunFolder, bool]:
            path = None if out is None else Path(out).expanduser()
            if path is not None and or_resume:
                if (path / "state.json").is_file():
                    return RunFolder.open(path).lock(), True
                if path.is_dir() and _was_killed_early(path, config):
                    _clear(path)
            place = None if path is None else str(path)
            return RunFolder.create(place, config=config, seed=config["seed"], kind=kind), False

        return cls._held(hold, launch, kind=kind, progress=progress)

    @classmethod
    def resume(
        cls, path: str | Path, *, kind: str = "train", progress: Progress, launch: Launch = ALONE
    ) -> Session:
        """Go on with a run.

        Raises:
            RunError: `path` is no run folder, or another process works on it.
        """
        folder = RunFolder.open(path)
        return cls._held(lambda: (folder.lock(), True), launch, kind=kind, progress=progress)

    @classmethod
    def _held(
        cls, hold: Callable[[], tuple[RunFolder, bool]], launch: Launch, *, kind: str, progress: Progress
    ) -> Session:
        """The run that the first process holds, in all of them; the others leave the disk alone."""
        held: list[tuple[RunFolder, bool]] = []

        def path() -> str:
            held.append(hold())
            return str(held[0][0].path)

        place = launch.folder(path)
        folder, resumed = held[0] if held else (RunFolder(Path(place)), False)
        return cls(folder, resumed=resumed, kind=kind, progress=progress, writes=launch.processes.first)

    @property
    def path(self) -> Path:
        """Of the run folder."""
        return self.folder.path

    def finish(self, **facts: Any) -> None:
        """Note that the run is finished, with the checksums of its results and further facts."""
        self.folder.set_state("finished", **facts)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None and self.writes:
                self._fail(error)
        finally:
            self.folder.__exit__()

    def _fail(self, error: BaseException) -> None:
        stopped = isinstance(error, KeyboardInterrupt)
        reason = "stopped by Ctrl-C" if stopped else explain(error) or repr(error)
        with contextlib.suppress(OSError):  # a full disk cannot take this either; "running" resumes alike
            self.folder.set_state("failed", error=reason)
        if stopped:
            self._progress.show_line(_GO_ON[self._kind].format(run=shlex.quote(str(self.path))))


def _was_killed_early(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run with these settings was killed in this folder while it began, before it had done anything.

    A folder is taken for one only where nothing stands in it that would not be written again: it may be somebody's own,
    with a config.yaml of theirs.
    """
    there = {found.name.removesuffix(".partial") for found in path.iterdir()}
    if not there or not there <= {*_WRITTEN_FIRST}:
        return False
    if not (path / "config.yaml").is_file():
        return "environment.json" not in there
    try:
        known = read_yaml(path / "config.yaml")
    except (OSError, ValueError):
        return False
    settings = parse_yaml(dump_yaml(config))
    # Of another day, where the chat template asks for the date.
    free = {*_HOW, "date"}
    return isinstance(known, dict) and _without(known, free) == _without(settings, free)


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _clear(path: Path) -> None:
    """Remove what a run that was killed early has left.

    Raises:
        RunError: it was not killed, but is just beginning in another process.
    """
    with RunFolder(path).lock():
        for name in reversed(_WRITTEN_FIRST):  # the lock goes last, while it is held
            for found in (path / f"{name}.partial", path / name):
                found.unlink(missing_ok=True)


@contextlib.contextmanager
def reserved_folder(out: str | None) -> Iterator[Path | None]:
    """Make `out` at once, so that hours of work are not lost to a bad name; after an error it is gone again.

    Raises:
        RunError: it exists and is not an empty folder.
    """
    folder = None if out is None else Path(out).expanduser()
    made = folder is not None and not folder.exists()
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{out} exists already; choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        if folder is not None and made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only while it is empty
        raise


def check_same_settings(path: str | Path, config: TrainConfig) -> None:
    """Refuse to go on, in `path`, with a training that was begun there with other settings.

    Raises:
        RunError: naming the folder.
    """
    if not (Path(path) / "state.json").is_file():
        return
    known = RunFolder.open(path).read_config()
    if _without(filled(known), _HOW) != _without(config.to_dict(), _HOW):
        raise RunError(f"{path} was begun with other settings; choose another --out, or remove it.")


def with_date_of(path: str | Path, config: TrainConfig) -> TrainConfig:
    """The configuration with the date that the chat template was told where the run in `path` began."""
    if config.date is not None or not (Path(path) / "state.json").is_file():
        return config
    return dataclasses.replace(config, date=RunFolder.open(path).read_config().get("date"))
