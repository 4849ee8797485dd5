"""Cells of kind "transfer": leave a task out, train on the others, then learn the task from a few examples.

What the other tasks' training gives is one matrix per layer: the B that ALoRA's experts share, or the A that
HydraLoRA's do. It is frozen, and a LoRA's other matrix is trained on the few examples. The other matrix starts at
zero, so that both begin as the base model; "none" is a fresh LoRA, which begins there too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from manylora.errors import ConfigError, ModelError
from manylora.files import build_config, locked
from manylora.files.settings import field_types, settings_of
from manylora.studies.kinds import Job
from manylora.studies.results import Measured
from manylora.studies.settings import TransferCellSettings
from manylora.studies.train_cells import joined, one_run, only, shortened
from manylora.training.config import TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from manylora.data import Splits

DONORS: Mapping[str, str] = {"B": "alora", "A": "hydralora"}
"""Frozen matrix to the method whose experts share it."""

SETTINGS = frozenset(field_types(TransferCellSettings)) - {"method"}


def check(settings: Mapping[str, Any]) -> None:
    """Refuse values that cannot be.

    Raises:
        ConfigError: see `TransferCellSettings`.
    """
    _cell_settings(settings)
    for name in ("num_experts", "share", "router"):
        if name in settings:
            raise ConfigError(f"{name} follows from frozen in a transfer; leave it out.")


def _cell_settings(settings: Mapping[str, Any]) -> TransferCellSettings:
    values = {"frozen": None, **settings}  # refused as null where it is not given
    return build_config(TransferCellSettings, values, source="", remedy="see docs/compare.md")


def _config(settings: Mapping[str, Any], **more: Any) -> TrainConfig:
    return dataclasses.replace(settings_of(_cell_settings(settings), TrainConfig), **more)


def tasks(settings: Mapping[str, Any]) -> list[str]:
    """Names of a cell's scores: "TASK@EXAMPLES"."""
    from manylora.training.prepared import all_rows

    cell = _cell_settings(settings)
    left_out = cell.left_out or list(all_rows(_config(settings).resolved()).train)
    return [f"{task}@{shots}" for task in left_out for shots in cell.shots]


def work(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Optimizer steps and answers of a cell, the donors included."""
    from manylora.training.prepared import all_rows

    cell = _cell_settings(settings)
    config = _config(settings).resolved()
    rows = {task: len(found[: cell.train_limit]) for task, found in all_rows(config).train.items()}
    tested = {task: len(found[: cell.test_limit]) for task, found in all_rows(config).test.items()}
    left_out, shots = cell.left_out or list(rows), len(cell.shots)
    steps = len(left_out) * shots * cell.adapt_steps
    if cell.frozen != "none":
        steps += sum(math.ceil((sum(rows.values()) - rows.get(task, 0)) * (config.epochs or 1) / config.rows_per_step)
                     for task in left_out)  # fmt: skip
    return steps, sum(tested.get(task, 0) for task in left_out) * shots


def run(job: Job) -> Measured:
    """Every task that is left out, with every number of examples; scores are called "TASK@EXAMPLES"."""
    from manylora.training.prepared import all_rows

    cell = _cell_settings(job.settings)
    splits = all_rows(_config(job.settings, seed=job.seed).resolved())
    left_out = cell.left_out or list(splits.train)
    if unknown := [task for task in left_out if task not in splits.train]:
        raise ConfigError(
            f"left_out names {unknown}, which have no rows; the tasks are {list(splits.train)}."
        )
    parts = []
    for task in left_out:
        donor = None if cell.frozen == "none" else _donor(job, splits, task)
        parts += [_adapted(job, splits, task, shots, donor) for shots in cell.shots]
    return joined(parts)


def _donor(job: Job, splits: Splits, task: str) -> dict[str, Tensor]:
    """Module name to the matrix that training on the other tasks gives, from this study's shared folder or made now."""
    from manylora.adapters import read_adapter
    from manylora.training import prepare

    cell = _cell_settings(job.settings)
    more: dict[str, Any] = {"seed": job.seed, "method": DONORS[cell.frozen], "router": "token"}
    if cell.donor_learning_rate is not None:
        more["learning_rate"] = cell.donor_learning_rate
    config = _config(job.settings, **more)
    facts = [config.to_dict(), task, cell.train_limit]
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = job.shared / f"donor-{mark}"
    with locked(job.shared / f"donor-{mark}.lock" / ".held"):
        others = only(splits, [name for name in splits.train if name != task])
        others = shortened(others, cell.train_limit)
        other_job = dataclasses.replace(job, settings={}, split="validation")
        one_run(prepare(config, splits=others), other_job, folder)
    _, weights = read_adapter(folder / "adapter")
    leaf = f"lora_{cell.frozen}"
    return {name: value for name, value in weights.items() if name.endswith(f".manylora_experts.{leaf}")}


def _adapted(job: Job, splits: Splits, task: str, shots: int, donor: Mapping[str, Tensor] | None) -> Measured:
    """A LoRA trained on a few examples of the task that was left out."""
    from manylora.training import build_model, prepare

    cell = _cell_settings(job.settings)
    rows = splits.train[task]
    if shots > len(rows):
        raise ConfigError(f"shots asks for {shots} examples, but task {task} has {len(rows)} rows.")
    few = random.Random(f"{job.seed}:{task}:{shots}").sample(rows, shots)
    alone = dataclasses.replace(only(splits, [task]), train={task: few})
    config = _config(job.settings, seed=job.seed, method="lora").resolved()
    batch = min(config.rows_per_step, shots)
    more: dict[str, Any] = {"batch_size": batch, "epochs": cell.adapt_steps * batch / shots}
    if config.micro_batch_size is not None:
        more["micro_batch_size"] = min(batch, config.micro_batch_size)
    if job.learning_rate is not None:
        more["learning_rate"] = job.learning_rate
    prepared = prepare(dataclasses.replace(config, **more), splits=alone)
    path = job.folder / f"run-{task}-{shots}"
    if not (path / "measured.json").is_file():  # begin anew: a checkpoint does not know what was frozen
        shutil.rmtree(path, ignore_errors=True)
    model = build_model(prepared)
    if donor is not None:
        put_on(model, donor, frozen=cell.frozen)
    measured = one_run(prepared, dataclasses.replace(job, settings={"test_limit": cell.test_limit}), path,
                       model=model)  # fmt: skip
    name = f"{task}@{shots}"
    return measured.model_copy(
        update={
            "scores": {name: measured.scores[task]},
            "examples": {name: measured.examples[task]},
            "metrics": {name: measured.metrics[task]} if task in measured.metrics else {},
            "others": {
                other: {name: values[task]} for other, values in measured.others.items() if task in values
            },
        }
    )


def put_on(model: PeftModel, donor: Mapping[str, Tensor], *, frozen: str) -> None:
    """Give a LoRA the donor's matrix in every layer, frozen, and start the other at zero.

    Raises:
        ModelError: a layer has no matrix of its shape in the donor.
    """
    import torch

    other = "A" if frozen == "B" else "B"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            bare = name.replace(".default.", ".")
            if bare.endswith(f".lora_{frozen}"):
                if bare not in donor or donor[bare].shape != parameter.shape:
                    raise ModelError(f"the donor has no matrix {bare} of shape {tuple(parameter.shape)}.")
                parameter.copy_(donor[bare])
                parameter.requires_grad_(False)
            elif bare.endswith(f".lora_{other}"):
                parameter.zero_()
