"""`manylora analyze --figures`: the paper's figures 1 and 2, from runs that this trains where they are missing.

One LoRA for each of two tasks and each seed. Figure 1 is the similarity of the pairs of runs (two tasks, one seed; one
task, two seeds; two tasks, two seeds), figure 2 the change of each run. What a run trains is `training_config`'s
business alone: everything after it takes finished run folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.analyze import analyse, conclude
from manylora.cli.console import TrainingProgress, explain
from manylora.cli.options import AnalyzeOptions
from manylora.data import EMBEDDED
from manylora.errors import ConfigError, RunError
from manylora.federated.home import folder_name
from manylora.training import RunFolder, TrainConfig
from manylora.training.config import as_list, filled

if TYPE_CHECKING:
    from manylora.training import Prepared

TASKS = ("praised_thing", "register_entry")
"""Two tasks of the embedded suite with little in common: choosing from a list, and formatting a record."""

KEPT = 4
"""Snapshots of each run, for figure 2."""

FOLDER = "runs/figures"
"""Where the figures go unless --out says otherwise."""

_TRAINING = (
    "tasks",
    "seeds",
    "task_type",
    "model",
    "data",
    "task_column",
    "r",
    "epochs",
    "learning_rate",
    "dtype",
)
"""Options that the runs depend on."""


@dataclass(frozen=True, kw_only=True)
class FigureRun:
    """One LoRA: for one task, from one seed."""

    task: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return (self.folder / "state.json").is_file() and RunFolder(self.folder).state.get(
            "state"
        ) == "finished"


def run_figures(options: AnalyzeOptions) -> int:
    """Train what is missing, then analyse all runs.

    Raises:
        ConfigError: not two tasks, or fewer than two seeds.
        RunError: the folder holds something else, or runs with other settings.
    """
    from manylora.analysis import load_source
    from manylora.training import prepare

    tasks, seeds = _tasks(options), _seeds(options)
    path = Path(options.out or FOLDER).expanduser()
    settings = {**dataclasses.asdict(options), "tasks": tasks, "seeds": seeds, "out": str(path)}
    runs = [
        FigureRun(task=task, seed=seed, folder=path / "runs" / f"{folder_name(task)}-seed-{seed}")
        for task in tasks
        for seed in seeds
    ]
    # before anything is written, so that bad input leaves nothing behind
    date = _begun(runs)
    prepared = {run: prepare(training_config(run, options, date=date)) for run in runs if not run.finished}
    with _folder(path, settings, options) as folder, _failing(folder):
        folder.lock()
        folder.set_state("running")
        for number, run in enumerate(runs, 1):
            done = "" if run in prepared else " (finished before)"
            print(f"run {number}/{len(runs)}: {run.task}, seed {run.seed}{done}", file=sys.stderr, flush=True)
            if run in prepared:
                train(run, prepared[run])
        sources = [load_source(run.folder) for run in runs]
        # every run has one task, so there is no conflict and no router to measure
        found = analyse(sources, dataclasses.replace(options, measure="none"))
        conclude(found, folder)
    return 0


@contextlib.contextmanager
def _failing(folder: RunFolder) -> Iterator[None]:
    """Note in the folder why the block did not come to its end."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        reason = "stopped by Ctrl-C" if stopped else explain(error) or repr(error)
        with contextlib.suppress(OSError):
            folder.set_state("failed", error=reason)
        if stopped:
            print("the same command goes on from here")
        raise


def _begun(runs: Sequence[FigureRun]) -> str | None:
    """The date that the runs' chat templates are told, if one of them has begun."""
    there = (run.folder for run in runs if (run.folder / "config.yaml").is_file())
    return next((date for folder in there if (date := RunFolder(folder).read_config().get("date"))), None)


def training_config(run: FigureRun, options: AnalyzeOptions, *, date: str | None = None) -> TrainConfig:
    """What one run trains: a LoRA on a language model or an encoder, by the recipe of `manylora train`."""
    return TrainConfig(
        task_type=options.task_type,
        model=options.model or EMBEDDED,
        data=options.data or EMBEDDED,
        tasks=[run.task],
        task_column=options.task_column,
        method="lora",
        r=options.r,
        lora_alpha=2.0 * options.r,  # the published runs' ratio: one scaling at every rank
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        seed=run.seed,
        keep_adapters=KEPT,
        date=date,
        dtype=options.dtype,
        device=options.device,
    )


def train(run: FigureRun, prepared: Prepared) -> None:
    """Train one run into its folder, from the start or from where it broke off, and score it on its test rows.

    Raises:
        RunError: the folder holds a run with other settings.
    """
    from manylora.cli.scoring import score_run
    from manylora.training import finetune

    with (
        _run_folder(run, prepared.config) as folder,
        _failing(folder),
        contextlib.redirect_stdout(sys.stderr),
    ):
        model = finetune(prepared, folder, report=TrainingProgress())
        score_run(prepared, folder, model)
        folder.set_state("finished")


def _run_folder(run: FigureRun, config: TrainConfig) -> RunFolder:
    """The run's folder, new or begun before."""
    if run.folder.exists() and not (run.folder / "state.json").is_file():
        shutil.rmtree(run.folder)  # killed while it was made
    if not run.folder.exists():
        return RunFolder.create(str(run.folder), config=config.to_dict(), seed=run.seed)
    folder = RunFolder.open(run.folder)
    if filled(folder.read_config()) != config.to_dict():
        raise RunError(f"{run.folder} was begun with other settings; choose another --out, or remove it.")
    folder.lock()
    return folder


def _folder(path: Path, settings: dict[str, object], options: AnalyzeOptions) -> RunFolder:
    """The folder of the figures, new or begun before with the same settings."""
    if not (path / "state.json").is_file():
        folder = RunFolder.create(str(path), config=settings, seed=options.seed, kind="analyze")
        folder.__exit__()  # its lock is taken again by whoever uses it
        return folder
    folder = RunFolder.open(path)
    known = folder.read_config()
    other = [name for name in _TRAINING if known.get(name) != settings[name]]
    if other:
        raise RunError(
            f"{path} holds figures with another --{other[0].replace('_', '-')} ({known.get(other[0])}); choose another "
            "--out."
        )
    return folder


def _tasks(options: AnalyzeOptions) -> list[str]:
    tasks = as_list(options.tasks)
    if tasks is None and options.data not in (None, EMBEDDED):
        raise ConfigError("--figures on your own --data needs the names of two of its tasks: --tasks a,b.")
    tasks = tasks or list(TASKS)
    if len(tasks) != 2 or tasks[0] == tasks[1]:
        raise ConfigError(f"--figures compares two tasks; --tasks gives {', '.join(tasks)}.")
    return tasks


def _seeds(options: AnalyzeOptions) -> list[int]:
    given = options.seeds.split(",") if isinstance(options.seeds, str) else options.seeds
    try:
        seeds = [int(seed) for seed in given]
    except ValueError as error:
        raise ConfigError(f"--seeds {options.seeds} are no numbers; give such as 0,1.") from error
    if len(set(seeds)) < 2 or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {options.seeds}: give two or more different seeds, such as 0,1.")
    return seeds
