"""The run folder: what a run writes, in which order, and how a reader can trust it.

    config.yaml         the configuration as run, every default filled in
    environment.json    versions, seed, threads, command
    state.json          {"state": "running" | "finished" | "failed", …} and, under "files", checksums of the others
    metrics.jsonl       one line per log or validation
    checkpoints/        checkpoint-STEP/, complete only where it holds complete.json, with the checksums of its files
    adapters/           step-STEP.safetensors: the adapter's weights at chosen steps, where `keep_adapters` asks for it
    adapter/            the result in PEFT format, renamed into place when whole
    merged/             the merged model, or one per task, where `save_merged` asks for it
    tasks.json          cut-off of prompts, and per task: expert, rows, tokens an answer may have
    predictions.jsonl   test rows with the model's answers
    scores.json         the table

Every file but `metrics.jsonl` and the checkpoints appears under its name only when it is whole. A folder may come from
a stranger or a failing disk: what is read is checked, and nothing is written through a link (`manylora.files`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from manylora._version import __version__
from manylora.errors import RunError
from manylora.files import (
    COMPLETE,
    NOTES,
    Record,
    append_line,
    build_config,
    changed_file,
    check_noted,
    check_record,
    dump_yaml,
    folder_sums,
    json_text,
    make_folder,
    noted,
    open_own,
    parse_json,
    read_json,
    read_yaml,
    reason,
    refuse_links,
    remove,
    whole_number,
    write_json,
    write_text,
)
from manylora.files.settings import field_types
from manylora.training.processes import Processes
from manylora.training.settings import BEFORE

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
_RESULTS = ("config.yaml", "tasks.json", "scores.json", "predictions.jsonl")
"""Files whose checksums a finished run notes, beside those in adapter/ and adapters/."""
_VERB_OF = {"strategy": "federate", "measure": "analyze", "learning_rate": "train"}
"""A setting to the verb whose run it tells; the first that is there."""
_REMEDIES = {
    "train": "go on with it by: manylora train --resume {run}",
    "federate": "go on with it by: manylora federate --resume {run}",
    "analyze": "run the same manylora analyze command again to go on with it",
}
_PUT_BACK = "put a copy of it back"


class _State(Record):
    """What state.json holds, beside a verb's further facts."""

    state: Literal["running", "finished", "failed"]
    steps: int | None = None
    fingerprints: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)


class RunFolder:
    """One run on disk; leaving its `with` block gives up the lock that `create` and `lock` take."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[bytes] | None = None

    @classmethod
    def create(
        cls, out: str | None, *, config: Mapping[str, Any], seed: int, kind: str = "train"
    ) -> RunFolder:
        """Make a new folder: `out`, or the next free `runs/KIND-NNN`.

        Raises:
            RunError: `out` exists and is not an empty folder.
        """
        path = Path(out).expanduser() if out is not None else _next_free(kind)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                f"{path} exists already; choose another --out, or continue that run with --resume {path}."
            )
        make_folder(path)
        run = cls(path).lock()
        write_text(path / "config.yaml", dump_yaml(config))
        write_json(path / "environment.json", environment(seed))
        run.set_state("running", **{NOTES: folder_sums(path, ["config.yaml"])})
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run, to read or to go on with.

        Raises:
            RunError: `path` is no run folder, or a link in it leads out of it.
        """
        folder = Path(path).expanduser()
        for name in ("config.yaml", "state.json"):
            if not (folder / name).is_file():
                raise RunError(
                    f"{path} is not a run folder (it has no {name}); give a folder that a run wrote."
                )
        refuse_links(folder)
        return cls(folder)

    @property
    def state(self) -> dict[str, Any]:
        """Contents of `state.json`.

        Raises:
            RunError: it is missing or broken.
        """
        state: dict[str, Any] = self.read_json("state.json")
        check_record(state, _State, source=self.path / "state.json", remedy=_PUT_BACK)
        return state

    def set_state(self, state: str, **facts: Any) -> None:
        """Write `state.json`; facts of earlier calls stay. A finished run notes the checksums of its results."""
        path = self.path / "state.json"
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # whoever needs what it held has read it before
            if isinstance(found := read_json(path), dict):
                known = found
        known.pop("error", None)
        notes = known.get(NOTES)
        sums = {name: notes[name] for name in ("config.yaml",) if isinstance(notes, dict) and name in notes}
        if state == "finished":
            weights = [
                *self.path.glob("adapter/*"),
                *self.path.glob("adapters/*.safetensors"),
                *self.path.glob("clients/*/adapter/*"),  # of a federated run
                *self.path.glob(f"clients/*/{COMPLETE}"),  # which note what is beside them
            ]
            names = [*_RESULTS, *(place.relative_to(self.path).as_posix() for place in weights)]
            sums = folder_sums(self.path, names) | sums
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(path, {**known, "state": state, "time": now, "pid": os.getpid(), NOTES: sums, **facts})

    def missing_result(self) -> str | None:
        """The first file of a finished run's result that is not there; None where all are.

        Raises:
            RunError: all are, but one is not what the run noted.
        """
        # Snapshots are not made again, and may be removed to save space.
        notes = [name for name in noted(self.path) if not name.startswith("adapters/")]
        wanted = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", *notes)
        missing = next((name for name in wanted if not (self.path / name).is_file()), None)
        for name in () if missing else notes:
            check_noted(self.path / name)
        return missing

    def read_json(self, name: str) -> Any:
        """A JSON file of the run.

        Raises:
            RunError: it is missing or broken, or not the one that the run noted.
        """
        return self._read(name, read_json)

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        check_noted(self.path / name)
        try:
            return read(self.path / name)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path / name} cannot be read ({reason(error)}); the run folder is damaged: {_PUT_BACK}."
            ) from error

    def read_config(self) -> dict[str, Any]:
        """`config.yaml` as plain values.

        Raises:
            RunError: it is missing or broken, or not the one that the run noted.
        """
        values = self._read("config.yaml", read_yaml)
        if not isinstance(values, dict):
            raise RunError(f"{self.path / 'config.yaml'} holds no settings; {_PUT_BACK}.")
        return values

    def config(self, kind: type[Config], *, verb: str) -> Config:
        """`config.yaml`, checked as the same settings on the command line are.

        Args:
            kind: the verb's configuration.
            verb: whose run this has to be.

        Raises:
            RunError: as `read_config`; or it is another verb's run.
            ConfigError: a value that cannot be.
        """
        values = self.read_config()
        found = next((other for mark, other in _VERB_OF.items() if mark in values), verb)
        if found != verb:
            raise RunError(f"{self.path} is a run of {found}; {_REMEDIES[found].format(run=self.path)}")
        before = {name: value for name, value in BEFORE.items() if name in field_types(kind)}
        return build_config(
            kind,
            {**before, **values},
            source=self.path / "config.yaml",
            remedy=f"{_PUT_BACK}, or, if another version wrote it, use that one",
        )

    def lock(self) -> RunFolder:
        """Hold the run for this process until it ends, however it ends; gives the folder back.

        Raises:
            RunError: another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows: no lock, as nothing there releases one after a kill
            return self
        file = open_own(self.path / ".lock", os.O_WRONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise RunError(f"{self.path} is in use by another process; wait for it or end it.") from error
        self._lock = file
        return self

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- checkpoints

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.checkpoints / f"checkpoint-{step}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainer's checkpoints."""
        return self.path / "checkpoints"

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end.

        transformers writes a checkpoint in place, so a killed run can leave half of one; what counts is the
        marker that `mark_complete` writes last.
        """
        return next(iter(self._complete()), None)

    def whole_checkpoint(self) -> tuple[Path | None, dict[Path, str]]:
        """The newest complete checkpoint whose files are what they were, and the newer ones, each with what is wrong.

        Raises:
            RunError: there are checkpoints, and all of them are damaged.
        """
        damaged: dict[Path, str] = {}
        for folder in self._complete():
            damage = self.damage(folder)
            if damage is None:
                return folder, damaged
            damaged[folder] = damage
        if damaged:
            folder, damage = next(iter(damaged.items()))
            raise RunError(
                f"{folder} is damaged ({damage}), and there is no older one; put a copy of it back, or remove it to "
                "begin the run anew."
            )
        return None, {}

    def damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a complete checkpoint, in a few words; None where nothing is, or nothing is known."""
        try:
            marker = read_json(checkpoint / COMPLETE)
            sums = marker[NOTES] if isinstance(marker, dict) and NOTES in marker else None
            if sums is None:  # of an earlier version
                return None if isinstance(marker, dict) else f"{COMPLETE} is broken"
            there = {
                path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
            }
            if strange := sorted(there - {*sums, COMPLETE}):
                return f"{strange[0]} was not part of it"
            changed = changed_file(checkpoint, sums)
            return f"{changed} is not what the run wrote" if changed else None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            return f"{COMPLETE}: {reason(error)}"

    def mark_complete(self, step: int, *, keep: Iterable[int] = ()) -> None:
        """Declare a checkpoint whole, with its files' checksums, then remove the older ones except those in `keep`."""
        folder = self.checkpoint(step)
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        write_json(folder / COMPLETE, {"step": step, NOTES: folder_sums(folder)})
        kept = {step, *keep}
        for other in self.checkpoints.glob("checkpoint-*"):
            if step_of(other) not in kept:
                remove(other)

    def drop_incomplete(self) -> None:
        """Remove what a kill left: half checkpoints and half-written files."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / COMPLETE).is_file():
                remove(path)
        for path in self.path.glob("*.partial"):
            remove(path)

    def _complete(self) -> list[Path]:
        """The complete checkpoints, the newest first."""
        places = (path.parent for path in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}"))
        found = [place for place in places if step_of(place) >= 0]
        return sorted(found, key=step_of, reverse=True)

    # ---- metrics

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        append_line(self.path / "metrics.jsonl", json_text(row))

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` that come after the checkpoint of `step`, and a half-written last one."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = parse_json(line, finite=False)
                if (
                    row["step"] <= step and "train_loss" not in row
                ):  # the summary comes after the last checkpoint
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # no line of ours
                continue
        write_text(path, "".join(kept))

    def place_folder(self, name: str, partial: Path) -> None:
        """Rename a finished folder into the run, replacing an older one."""
        final = self.path / name
        remove(final)
        partial.replace(final)


def environment(seed: int) -> dict[str, Any]:
    """Versions and circumstances to repeat a run with."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "manylora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "processes": Processes.here().count,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name; -1 where there is none."""
    step = whole_number(checkpoint.name.rpartition("-")[2])
    return -1 if step is None else step


def _next_free(kind: str) -> Path:
    """Make and return the first runs/KIND-NNN that is not there; of two processes each gets its own."""
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        path = Path(f"runs/{kind}-{number:03d}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError
