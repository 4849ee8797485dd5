"""The run folder: what a run writes, in which order, and how a reader can trust it.

    config.yaml         the configuration as run, every default filled in
    environment.json    versions, seed, threads, command
    state.json          {"state": "running" | "finished" | "failed", …}
    metrics.jsonl       one line per log or validation
    checkpoints/        checkpoint-STEP/, complete only where it holds complete.json
    adapters/           step-STEP.safetensors: the adapter's weights at chosen steps, where `keep_adapters` asks for it
    adapter/            the result in PEFT format, renamed into place when whole
    tasks.json          cut-off of prompts, and per task: expert, rows, tokens an answer may have
    predictions.jsonl   test rows with the model's answers
    scores.json         the table

Every file but `metrics.jsonl` and the checkpoints appears under its name only when it is whole.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from manylora._version import __version__
from manylora.errors import RunError
from manylora.training.processes import Processes

COMPLETE = "complete.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write `path` so that it holds either what it held or all of `text`, also after a crash."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON that every reader takes: it has no NaN and no infinity, so these become null."""
    return json.dumps(without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)


def without_nan(value: Any) -> Any:
    """The same values, None for each that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    return [without_nan(part) for part in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: object) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json_text(value, indent=2) + "\n")


class RunFolder:
    """One run on disk; leaving its `with` block gives up the lock that `create` and `lock` take."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

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
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run.lock()
        write_text(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        write_json(path / "environment.json", environment(seed))
        run.set_state("running")
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            RunError: `path` is no run folder.
        """
        folder = Path(path).expanduser()
        for name in ("config.yaml", "state.json"):
            if not (folder / name).is_file():
                raise RunError(
                    f"{path} is not a run folder (it has no {name}); give a folder that a run wrote."
                )
        return cls(folder)

    @property
    def state(self) -> dict[str, Any]:
        """Contents of `state.json`."""
        state = self.read_json("state.json")
        if not isinstance(state, dict):
            raise RunError(f"{self.path / 'state.json'} holds no state; the run folder is damaged.")
        return state

    def set_state(self, state: str, **facts: Any) -> None:
        """Write `state.json`; facts of earlier calls stay."""
        path = self.path / "state.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known.pop("error", None)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(path, {**known, "state": state, "time": now, "pid": os.getpid(), **facts})

    def read_json(self, name: str) -> Any:
        """A JSON file of the run.

        Raises:
            RunError: it is missing or broken.
        """
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path / name} cannot be read ({error}); the run folder is damaged."
            ) from error

    def read_config(self) -> dict[str, Any]:
        """`config.yaml` as plain values.

        Raises:
            RunError: it is missing or broken.
        """
        try:
            values = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise RunError(
                f"{self.path / 'config.yaml'} cannot be read: {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(values, dict):
            raise RunError(f"{self.path / 'config.yaml'} holds no settings; the run folder is damaged.")
        return values

    def lock(self) -> None:
        """Hold the run for this process until it ends, however it ends.

        Raises:
            RunError: another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows: no lock, as nothing there releases one after a kill
            return
        file = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise RunError(f"{self.path} is in use by another process; wait for it or end it.") from error
        self._lock = file

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
        complete = [path.parent for path in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
        return max(complete, key=step_of, default=None)

    def mark_complete(self, step: int, *, keep: Iterable[int] = ()) -> None:
        """Declare a checkpoint whole, then remove the older ones except those in `keep`."""
        folder = self.checkpoint(step)
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        write_json(folder / COMPLETE, {"step": step})
        kept = {step, *keep}
        for other in self.checkpoints.glob("checkpoint-*"):
            if step_of(other) not in kept:
                shutil.rmtree(other)

    def drop_incomplete(self) -> None:
        """Remove what a kill left: half checkpoints and half-written files."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / COMPLETE).is_file():
                shutil.rmtree(path)
        for path in self.path.glob("*.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # ---- metrics

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_text(row) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` that come after `step`, and a half-written last one."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # no line of ours
                continue
        write_text(path, "".join(kept))

    def place_folder(self, name: str, partial: Path) -> None:
        """Rename a finished folder into the run, replacing an older one."""
        final = self.path / name
        if final.exists():
            shutil.rmtree(final)
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
    suffix = checkpoint.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


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
