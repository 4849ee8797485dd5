"""`manylora analyze --figures`: the paper's figures 1 and 2, from runs that this trains where they are missing.

One LoRA for each of two tasks and each seed. Figure 1 is the similarity of the pairs of runs (two tasks, one seed; one
task, two seeds; two tasks, two seeds), figure 2 the change of each run. What a run trains is `training_config`'s
business alone: everything after it takes finished run folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.analysis import load_source
from manylora.data import EMBEDDED
from manylora.errors import ConfigError, RunError
from manylora.federated.home import folder_name
from manylora.jobs.measure import analyse, conclude
from manylora.jobs.progress import Progress
from manylora.jobs.session import Session, check_same_settings
from manylora.jobs.train import is_whole, train_prepared
from manylora.training import RunFolder, TrainConfig, prepare
from manylora.training.config import as_list

if TYPE_CHECKING:
    from manylora.analysis import Analysis
    from manylora.jobs.settings import AnalyzeConfig
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


def draw_figures(config: AnalyzeConfig, *, progress: Progress) -> tuple[Analysis, Path]:
    """Train what is missing, then analyse all runs.

    Returns:
        What was found, and the folder of the figures.

    Raises:
        ConfigError: not two tasks, or fewer than two seeds.
        RunError: the folder holds something else, or runs with other settings.
    """
    tasks, seeds = _tasks(config), _seeds(config)
    path = Path(config.out or FOLDER).expanduser()
    settings = {**dataclasses.asdict(config), "tasks": tasks, "seeds": seeds, "out": str(path)}
    folders = {
        (task, seed): path / "runs" / f"{folder_name(task)}-seed-{seed}" for task in tasks for seed in seeds
    }
    date = _date_of(folders.values())
    # before anything is written, so that bad input leaves nothing behind
    prepared = {
        (task, seed): prepare(training_config(task, seed, config, date=date))
        for (task, seed), folder in folders.items()
        if not is_whole(folder)
    }
    _check_settings(path, settings)
    with Session.begin(path, config=settings, kind="analyze", or_resume=True, progress=progress) as session:
        session.folder.set_state("running")
        for number, (run, folder) in enumerate(folders.items(), 1):
            done = "" if run in prepared else " (finished before)"
            progress.show_warning(f"run {number}/{len(folders)}: {run[0]}, seed {run[1]}{done}")
            if run in prepared:
                _train(prepared[run], folder, progress)
        sources = list(map(load_source, folders.values()))
        # every run has one task, so there is no conflict and no router to measure
        found = analyse(sources, dataclasses.replace(config, measure="none"), progress=progress)
        conclude(found, session)
    return found, path


def _date_of(folders: Iterable[Path]) -> str | None:
    """The date that the runs' chat templates are told, if one of them has begun."""
    begun = (RunFolder(folder).read_config() for folder in folders if (folder / "config.yaml").is_file())
    return next((date for settings in begun if (date := settings.get("date"))), None)


def training_config(task: str, seed: int, config: AnalyzeConfig, *, date: str | None = None) -> TrainConfig:
    """What one run trains: a LoRA on a language model or an encoder, by the recipe of `manylora train`."""
    return TrainConfig(
        task_type=config.task_type,
        model=config.model or EMBEDDED,
        data=config.data or EMBEDDED,
        tasks=[task],
        task_column=config.task_column,
        template="alpaca",  # as the figures of every version
        method="lora",
        r=config.r,
        lora_alpha=2.0 * config.r,  # the published runs' ratio: one scaling at every rank
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        seed=seed,
        keep_adapters=KEPT,
        date=date,
        dtype=config.dtype,
        device=config.device,
    )


def _train(prepared: Prepared, folder: Path, progress: Progress) -> None:
    """Train one run, from the start or from where it broke off, and score it on its test rows.

    Raises:
        RunError: the folder holds a run with other settings.
    """
    check_same_settings(folder, prepared.config)
    settings = prepared.config.to_dict()
    with (
        # Told nothing: after Ctrl-C it is the command for the figures that goes on, not one for this run.
        Session.begin(folder, config=settings, or_resume=True, progress=Progress()) as session,
        contextlib.redirect_stdout(sys.stderr),
    ):
        train_prepared(prepared, session, progress=progress)


def _check_settings(path: Path, settings: dict[str, object]) -> None:
    """Refuse to go on with figures of other settings.

    Raises:
        RunError: naming the first that differs.
    """
    if not (path / "state.json").is_file():
        return
    known = RunFolder.open(path).read_config()
    other = [name for name in _TRAINING if known.get(name) != settings[name]]
    if other:
        raise RunError(
            f"{path} holds figures with another --{other[0].replace('_', '-')} ({known.get(other[0])}); choose another "
            "--out."
        )


def _tasks(config: AnalyzeConfig) -> list[str]:
    tasks = as_list(config.tasks)
    if tasks is None and config.data not in (None, EMBEDDED):
        raise ConfigError("--figures on your own --data needs the names of two of its tasks: --tasks a,b.")
    tasks = tasks or list(TASKS)
    if len(tasks) != 2 or tasks[0] == tasks[1]:
        raise ConfigError(f"--figures compares two tasks; --tasks gives {', '.join(tasks)}.")
    return tasks


def _seeds(config: AnalyzeConfig) -> list[int]:
    given = config.seeds.split(",") if isinstance(config.seeds, str) else config.seeds
    try:
        seeds = [int(seed) for seed in given]
    except ValueError as error:
        raise ConfigError(f"--seeds {config.seeds} are no numbers; give such as 0,1.") from error
    if len(set(seeds)) < 2 or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {config.seeds}: give two or more different seeds, such as 0,1.")
    return seeds
