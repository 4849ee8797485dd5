"""Cells of kind "train": one run of `manylora train`, or one for each task, or one whose rank is matched."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.errors import RunError
from manylora.files import build_config, read_record
from manylora.files.settings import field_types, settings_of
from manylora.studies.kinds import Job
from manylora.studies.presets import PRESETS
from manylora.studies.results import Measured
from manylora.studies.settings import TrainCellSettings
from manylora.training.config import TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.data import Example, Splits, TaskData
    from manylora.training import Prepared

SETTINGS = frozenset(field_types(TrainCellSettings))


class _Saved(Measured):
    """A measured.json, which is used only if it says all that was written into it."""

    cpu_seconds: float
    evaluation_seconds: float
    resumed: bool
    extra: dict[str, Any]


def check(settings: Mapping[str, Any]) -> None:
    """Refuse values that cannot be.

    Raises:
        ConfigError: see `TrainCellSettings`.
    """
    train_config(settings)


def train_config(settings: Mapping[str, Any], **more: Any) -> TrainConfig:
    """The settings that `manylora train` has too."""
    cell = build_config(TrainCellSettings, settings, source="", remedy="see docs/compare.md", **more)
    return settings_of(cell, TrainConfig)


def tasks(settings: Mapping[str, Any]) -> list[str]:
    """Names of a cell's scores: the tasks that have training rows."""
    from manylora.training.prepared import all_rows

    return list(all_rows(train_config(settings).resolved()).train)


def work(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Optimizer steps and answers of a cell."""
    from manylora.training.prepared import all_rows

    config = train_config(settings).resolved()
    splits = shortened(all_rows(config), settings.get("train_limit"))
    rows, epochs = [len(found) for found in splits.train.values()], config.epochs or 1
    steps = math.ceil(sum(rows) * epochs / config.rows_per_step)
    if settings.get("alone"):
        steps = sum(math.ceil(count * epochs / config.rows_per_step) for count in rows)
    answers = sum(len(found[: settings.get("test_limit")]) for found in splits.test.values())
    return steps, answers * max(1, len(settings.get("score_epochs") or ()))


def run(job: Job) -> Measured:
    """Train and score the cell; what is done already is not done again."""
    from manylora.training import prepare
    from manylora.training.prepared import all_rows

    more: dict[str, Any] = {"seed": job.seed}
    if job.learning_rate is not None:
        more["learning_rate"] = job.learning_rate
    config = train_config(job.settings, **more)
    splits = shortened(all_rows(config.resolved()), job.settings.get("train_limit"))
    for note in splits.notes:
        print(f"note: {note}", flush=True)  # into the cell's log
    prepared = prepare(config, splits=splits)
    if match := job.settings.get("match"):
        config = matched(config, {**job.settings, **PRESETS[match][1]}, tasks=len(prepared.task_names))
        prepared = prepare(config, splits=splits)
    if not job.settings.get("alone"):
        return one_run(prepared, job, job.folder / "run")
    parts = [
        one_run(
            prepare(dataclasses.replace(config, tasks=[task]), splits=only(splits, [task])),
            job,
            job.folder / f"run-{index}",
        )
        for index, task in enumerate(prepared.task_names)
    ]
    return joined(parts)


def shortened(splits: Splits, limit: int | None) -> Splits:
    """The same with at most so many training rows a task, a sample."""
    if limit is None:
        return splits
    from manylora.data import sample_tasks

    return dataclasses.replace(splits, train=sample_tasks(splits.train, limit))


def only(splits: Splits, tasks: Sequence[str]) -> Splits:
    """The same with these tasks alone."""

    def part(data: TaskData) -> dict[str, list[Example]]:
        return {task: rows for task, rows in data.items() if task in tasks}

    return dataclasses.replace(
        splits, train=part(splits.train), validation=part(splits.validation), test=part(splits.test)
    )


def joined(parts: Sequence[Measured]) -> Measured:
    """Cells of one method on different tasks, as one."""
    curves = [part.extra["curve"] for part in parts if "curve" in part.extra]
    extra: dict[str, Any] = {}
    if curves:
        extra["curve"] = [
            {
                "epoch": points[0]["epoch"],
                "scores": {task: score for point in points for task, score in point["scores"].items()},
            }
            for points in zip(*curves, strict=True)
        ]
    return Measured(
        scores={task: score for part in parts for task, score in part.scores.items()},
        examples={task: scores for part in parts for task, scores in part.examples.items()},
        metrics={task: metric for part in parts for task, metric in part.metrics.items()},
        others={
            name: {task: value for part in parts for task, value in part.others.get(name, {}).items()}
            for name in dict.fromkeys(name for part in parts for name in part.others)
        },
        parameters=sum(part.parameters for part in parts),
        seconds=math.fsum(part.seconds for part in parts),
        cpu_seconds=math.fsum(part.cpu_seconds for part in parts),
        evaluation_seconds=math.fsum(part.evaluation_seconds for part in parts),
        resumed=any(part.resumed for part in parts),
        extra=extra,
    )


def matched(config: TrainConfig, target: Mapping[str, Any], *, tasks: int) -> TrainConfig:
    """The LoRA of the smallest rank that has no fewer trainable parameters than `target`, at the same scaling s.

    Args:
        config: of the LoRA.
        target: settings of the method to match.
        tasks: number of tasks, on which the size of a task router's adapter depends.
    """
    wanted = trainable(train_config({**target, "match": None}), tasks=tasks)
    per_rank = trainable(dataclasses.replace(config, r=1), tasks=tasks)
    rank = -(-wanted // per_rank)
    grown = rank / config.r
    alpha = config.lora_alpha * (math.sqrt(grown) if config.use_rslora else grown)
    return dataclasses.replace(config, r=rank, lora_alpha=alpha)


def trainable(config: TrainConfig, *, tasks: int) -> int:
    """Parameters of the adapters that a configuration has, counted without weights."""
    from manylora.training.plan import adapter_config, shadow_model

    config = config.resolved()
    if config.num_experts is None:
        config = dataclasses.replace(config, num_experts=tasks)
    names = [f"task {index}" for index in range(tasks)]
    model = shadow_model(config, adapter_config(config, task_names=names))
    return sum(value.numel() for name, value in model.named_parameters() if "manylora_experts" in name)


def one_run(prepared: Prepared, job: Job, path: Path, *, model: PeftModel | None = None) -> Measured:
    """Train one adapter in a run folder and score it.

    Args:
        prepared: the plan.
        job: the cell, for its split.
        path: the run folder; one that is there is continued.
        model: the model to train. Default: the base with a fresh adapter.
    """
    from manylora.adapters import read_weights
    from manylora.evaluation import write_scores
    from manylora.files import write_json
    from manylora.jobs.progress import Progress
    from manylora.jobs.session import Session
    from manylora.jobs.train import train_and_score
    from manylora.studies.curves import Curve

    settings, progress = prepared.config.to_dict(), Progress()
    with Session.begin(path, config=settings, or_resume=True, progress=progress) as session:
        if (path / "measured.json").is_file():
            if (kept := path / "adapter" / "adapter_model.safetensors").is_file():
                read_weights(kept)  # what an earlier version scored may not be finite
            found = read_record(path / "measured.json", _Saved, remedy=f"remove {path} to run that again")
            return Measured(**found.model_dump())
        test = rows_to_score(prepared, job)
        curve = Curve.wanted(prepared, job, session.folder, test)
        callbacks = [curve] if curve else []
        trained = train_and_score(
            prepared, session, test, model=model, callbacks=callbacks, progress=progress
        )
        scores, spent = trained.scores, curve.seconds if curve else 0.0
        assert scores is not None  # `rows_to_score` refuses a cell without rows
        write_scores(path, scores, {})
        measured = Measured(
            scores=scores.by_task(),
            metrics={task.task: task.metric for task in scores.tasks},
            others=scores.other_metrics(),
            examples={
                task.task: [row.metrics[task.metric] for row in task.examples] for task in scores.tasks
            },
            parameters=sum(p.numel() for p in trained.model.parameters() if p.requires_grad),
            seconds=trained.seconds - spent,
            cpu_seconds=trained.cpu_seconds - (curve.cpu_seconds if curve else 0.0),
            evaluation_seconds=trained.evaluation_seconds + spent,
            resumed=session.resumed,
            extra={"curve": curve.points()} if curve else {},
        )
        write_json(path / "measured.json", measured.model_dump())
        seconds = {
            "training": round(measured.seconds, 1),
            "evaluation": round(measured.evaluation_seconds, 1),
        }
        session.finish(seconds=seconds)
        shutil.rmtree(session.folder.checkpoints, ignore_errors=True)  # of hundreds of cells they fill a disk
        return measured


def rows_to_score(prepared: Prepared, job: Job) -> TaskData:
    """The rows of the cell's split, in the order of the tasks.

    Raises:
        RunError: there are none.
    """
    rows = prepared.splits.validation if job.split == "validation" else prepared.splits.test
    missing = [task for task in prepared.task_names if task not in rows]
    if missing:
        raise RunError(
            f"the tasks {', '.join(missing)} have no {job.split} rows; give them with {job.split}."
        )
    from manylora.data import sample_rows

    limit = job.settings.get("test_limit")
    return {task: sample_rows(rows[task], limit, task=task) for task in prepared.task_names}
