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
from manylora.files import build_config
from manylora.studies.kinds import Job, Measured, held
from manylora.studies.train_cells import check_limits, joined, one_run, only, shortened
from manylora.training.config import TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from manylora.data import Splits

DONORS: Mapping[str, str] = {"B": "alora", "A": "hydralora"}
"""Frozen matrix to the method whose experts share it."""

DEFAULTS: Mapping[str, Any] = {
    "shots": [8, 32, 128],
    "left_out": None,
    "adapt_steps": 60,
    "donor_learning_rate": None,
    "test_limit": None,
    "train_limit": None,
}
"""`shots`: numbers of examples. `left_out`: tasks to leave out, each in turn; None: all. `adapt_steps`: optimizer
steps on the few examples, the same for every number of them. `train_limit`: rows of each other task.
`donor_learning_rate`: of the training on the other tasks; None: the recipe's (a study's learning rates are those on the
few examples)."""

_OWN = frozenset({"frozen", *DEFAULTS})
SETTINGS = frozenset(field.name for field in dataclasses.fields(TrainConfig)) - {"method"} | _OWN


def check(settings: Mapping[str, Any]) -> None:
    """Refuse values that cannot be.

    Raises:
        ConfigError: see `TrainConfig`; or a setting of this kind.
    """
    own = {**DEFAULTS, **settings}
    _config(settings)
    if own.get("frozen") not in (*DONORS, "none"):
        raise ConfigError(f"frozen is {own.get('frozen')!r}; choose 'A', 'B' or 'none'.")
    shots = own["shots"]
    if not isinstance(shots, list) or not shots or not all(isinstance(n, int) and n > 0 for n in shots):
        raise ConfigError(f"shots is {shots!r}; give a list of numbers of examples, such as [8, 32, 128].")
    if not isinstance(own["adapt_steps"], int) or own["adapt_steps"] < 1:
        raise ConfigError(f"adapt_steps is {own['adapt_steps']!r}; give a number of steps.")
    if own["left_out"] is not None and (not isinstance(own["left_out"], list) or not own["left_out"]):
        raise ConfigError(f"left_out is {own['left_out']!r}; give a list of tasks.")
    check_limits(settings)
    for name in ("num_experts", "share", "router"):
        if name in settings:
            raise ConfigError(f"{name} follows from frozen in a transfer; leave it out.")


def _config(settings: Mapping[str, Any], **more: Any) -> TrainConfig:
    own = {key: value for key, value in settings.items() if key not in _OWN}
    return build_config(TrainConfig, own, source="", remedy="see manylora train --help", **more)


def tasks(settings: Mapping[str, Any]) -> list[str]:
    """Names of a cell's scores: "TASK@EXAMPLES"."""
    from manylora.training.prepared import all_rows

    own = {**DEFAULTS, **settings}
    left_out = own["left_out"] or list(all_rows(_config(settings).resolved()).train)
    return [f"{task}@{shots}" for task in left_out for shots in own["shots"]]


def work(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Optimizer steps and answers of a cell, the donors included."""
    from manylora.training.prepared import all_rows

    own = {**DEFAULTS, **settings}
    config = _config(settings).resolved()
    rows = {task: len(found[: own["train_limit"]]) for task, found in all_rows(config).train.items()}
    tested = {task: len(found[: own["test_limit"]]) for task, found in all_rows(config).test.items()}
    left_out, shots = own["left_out"] or list(rows), len(own["shots"])
    steps = len(left_out) * shots * own["adapt_steps"]
    if own["frozen"] != "none":
        steps += sum(math.ceil((sum(rows.values()) - rows.get(task, 0)) * (config.epochs or 1) / config.rows_per_step)
                     for task in left_out)  # fmt: skip
    return steps, sum(tested.get(task, 0) for task in left_out) * shots


def run(job: Job) -> Measured:
    """Every task that is left out, with every number of examples; scores are called "TASK@EXAMPLES"."""
    from manylora.training.prepared import all_rows

    own = {**DEFAULTS, **job.settings}
    splits = all_rows(_config(job.settings, seed=job.seed).resolved())
    left_out = own["left_out"] or list(splits.train)
    if unknown := [task for task in left_out if task not in splits.train]:
        raise ConfigError(
            f"left_out names {unknown}, which have no rows; the tasks are {list(splits.train)}."
        )
    parts = []
    for task in left_out:
        donor = None if own["frozen"] == "none" else _donor(job, splits, task)
        parts += [_adapted(job, splits, task, shots, donor) for shots in own["shots"]]
    return joined(parts)


def _donor(job: Job, splits: Splits, task: str) -> dict[str, Tensor]:
    """Module name to the matrix that training on the other tasks gives, from this study's shared folder or made now."""
    from manylora.adapters import read_adapter
    from manylora.training import prepare

    own = {**DEFAULTS, **job.settings}
    more: dict[str, Any] = {"seed": job.seed, "method": DONORS[own["frozen"]], "router": "token"}
    if own["donor_learning_rate"] is not None:
        more["learning_rate"] = own["donor_learning_rate"]
    config = _config(job.settings, **more)
    facts = [config.to_dict(), task, own["train_limit"]]
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = job.shared / f"donor-{mark}"
    with held(job.shared / f"donor-{mark}.lock"):
        others = only(splits, [name for name in splits.train if name != task])
        others = shortened(others, own["train_limit"])
        other_job = dataclasses.replace(job, settings={}, split="validation")
        one_run(prepare(config, splits=others), other_job, folder)
    _, weights = read_adapter(folder / "adapter")
    leaf = f"lora_{own['frozen']}"
    return {name: value for name, value in weights.items() if name.endswith(f".manylora_experts.{leaf}")}


def _adapted(job: Job, splits: Splits, task: str, shots: int, donor: Mapping[str, Tensor] | None) -> Measured:
    """A LoRA trained on a few examples of the task that was left out."""
    from manylora.training import build_model, prepare

    own = {**DEFAULTS, **job.settings}
    rows = splits.train[task]
    if shots > len(rows):
        raise ConfigError(f"shots asks for {shots} examples, but task {task} has {len(rows)} rows.")
    few = random.Random(f"{job.seed}:{task}:{shots}").sample(rows, shots)
    alone = dataclasses.replace(only(splits, [task]), train={task: few})
    config = _config(job.settings, seed=job.seed, method="lora").resolved()
    batch = min(config.rows_per_step, shots)
    more: dict[str, Any] = {"batch_size": batch, "epochs": own["adapt_steps"] * batch / shots}
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
        put_on(model, donor, frozen=own["frozen"])
    measured = one_run(prepared, dataclasses.replace(job, settings={"test_limit": own["test_limit"]}), path,
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
