"""Run a study's cells, each a process of its own, some side by side; whatever is killed, the next start goes on."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from manylora.errors import ConfigError
from manylora.files import open_own
from manylora.studies.cells import (
    WORKERS,
    Cell,
    cell_settings,
    check_same,
    choose_rates,
    final_cells,
    results_of,
    screened_methods,
    screening_cells,
)
from manylora.studies.config import Study

MEMORY_PER_CELL = 2 * 2**30
"""What a cell is taken to need where nothing better is known; one on the embedded base needs about 0.8 GiB."""

_POLL = 0.1
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Progress:
    """What is told while a study runs. This one shows nothing; another overrides what it shows."""

    def began(self, cell: Cell, number: int, total: int) -> None:
        """A cell starts; its number among the cells of this stage, and how many they are."""

    def ended(self, cell: Cell, seconds: float, left: float) -> None:
        """A cell is done; its seconds, and those left for the stage."""

    def failed(self, cell: Cell, log: Path) -> None:
        """A cell failed; its log."""


def default_workers(cells: int) -> int:
    """As many cells side by side as there are cores and memory for."""
    able = min(usable_cores(), int(0.8 * psutil.virtual_memory().available) // MEMORY_PER_CELL)
    return max(1, min(able, cells))


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_settings(workers: int) -> dict[str, str]:
    """Environment of a cell: its share of the cores, or what OMP_NUM_THREADS says already; MKL would not ask that."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // workers))
    return dict.fromkeys(_THREAD_SETTINGS, threads)


def cell_command(study_file: Path, out: Path, cell: Cell) -> list[str]:
    """The command that runs one cell, here or on any machine that sees the same folders."""
    words = [sys.executable, "-m", "manylora.cli", "compare", str(study_file.absolute())]
    return [*words, "--out", str(out.absolute()), "--cell", cell.id]


def launched(command: Sequence[str], launcher: str | None) -> list[str]:
    """A cell's command as it is started: through a shell where a launcher wraps it.

    Raises:
        ConfigError: the launcher has no place for the command.
    """
    if launcher is None:
        return list(command)
    if "{command}" not in launcher:
        raise ConfigError(
            f"launcher {launcher!r} has no {{command}}; write it where the cell's command goes."
        )
    return ["/bin/sh", "-c", launcher.replace("{command}", shlex.join(command))]


def pending(study: Study, out: Path) -> list[Cell]:
    """Cells that are not done and can run now: the screening, then, when that is done, the final ones.

    Raises:
        RunError: a final cell was run with another learning rate than the one that is chosen now.
    """
    screening = [cell for cell in screening_cells(study) if cell.result(out) is None]
    return screening or [cell for cell in _chosen_cells(study, out) if cell.result(out) is None]


def _chosen_cells(study: Study, out: Path) -> list[Cell]:
    """The final cells at the rates that the screening chose; one that was run at another rate is an error."""
    cells = final_cells(study, choose_rates(study, results_of(study, out)))
    for cell in cells:
        check_same(cell.folder(out), cell_settings(study, cell))
    return cells


def find_cell(study: Study, out: Path, cell_id: str) -> Cell:
    """The cell of this id, with the learning rate that the screening chose.

    Raises:
        ConfigError: there is none.
        RunError: the screening is not done.
    """
    screening = {cell.id: cell for cell in screening_cells(study)}
    if cell_id in screening:
        return screening[cell_id]
    if cell_id not in {cell.id for cell in final_cells(study)}:
        raise ConfigError(f"the study has no cell {cell_id!r}; --print-cells shows them.")
    rates = choose_rates(study, results_of(study, out))
    return next(cell for cell in final_cells(study, rates) if cell.id == cell_id)


def run_study(
    study: Study,
    out: Path,
    *,
    study_file: Path,
    workers: int,
    launcher: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Run what is not done: the screening, then the final cells.

    A cell that fails is reported and left; the others run on. A method whose screening failed wholly has no final
    cells.

    Returns:
        The cells that failed, each with its log.

    Raises:
        RunError: see `pending`.
    """
    pool = _Pool(
        out=out, study_file=study_file, workers=workers, launcher=launcher, progress=progress or Progress()
    )
    pool.run([cell for cell in screening_cells(study) if cell.result(out) is None])
    known = screened_methods(study, results_of(study, out))
    rest = dataclasses.replace(study, methods=tuple(m for m in study.methods if m.name in known))
    pool.run([cell for cell in _chosen_cells(rest, out) if cell.result(out) is None])
    return pool.failed


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a cell and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except (AttributeError, OSError):  # Windows has no groups; or it has ended
        process.terminate()


@dataclass(kw_only=True)
class _Pool:
    out: Path
    study_file: Path
    workers: int
    launcher: str | None
    progress: Progress
    running: dict[Cell, tuple[subprocess.Popen[bytes], float]] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    failed: dict[str, Path] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> None:
        queue, total = list(cells), len(cells)
        self.times = []
        try:
            while queue or self.running:
                while queue and len(self.running) < self.workers:
                    cell = queue.pop(0)
                    self.progress.began(cell, total - len(queue), total)
                    self.running[cell] = (self._start(cell), time.monotonic())
                ended = [cell for cell, (process, _) in self.running.items() if process.poll() is not None]
                for cell in ended:
                    self._end(cell, len(queue))
                if not ended:
                    time.sleep(_POLL)
        finally:
            for process, _ in self.running.values():
                _end(process)
            for process, _ in self.running.values():
                process.wait()

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        folder = cell.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, WORKERS: str(self.workers)}
        if self.launcher is None:  # a cluster's machines have their own cores
            environment |= thread_settings(self.workers)
        command = launched(cell_command(self.study_file, self.out, cell), self.launcher)
        with open_own(folder / "log.txt", os.O_APPEND | os.O_WRONLY) as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that what a launcher started ends with it
            )

    def _end(self, cell: Cell, waiting: int) -> None:
        process, began = self.running.pop(cell)
        seconds = time.monotonic() - began
        if process.returncode == 0 and cell.result(self.out) is not None:
            self.times.append(seconds)
            mean = sum(self.times) / len(self.times)
            left = mean * (waiting + 0.5 * len(self.running)) / self.workers
            self.progress.ended(cell, seconds, left)
        else:
            log = cell.folder(self.out) / "log.txt"
            self.failed[cell.id] = log
            self.progress.failed(cell, log)
