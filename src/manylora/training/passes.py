"""One stretch of a longer training: the steps of one federated round, by the same trainer as a whole run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SaveStrategy

from manylora.data import mixture_schedule
from manylora.training.batches import Collator, EncodedRows, EncodedTask
from manylora.training.config import TrainConfig
from manylora.training.losses import AnswerLoss
from manylora.training.plan import step_counts
from manylora.training.runs import RunFolder
from manylora.training.trainer import ManyTaskTrainer, training_arguments

if TYPE_CHECKING:
    from peft import PeftModel

Moments = Mapping[str, Mapping[str, Tensor]]
"""Parameter name to the optimizer's tensors for it (AdamW: exp_avg, exp_avg_sq, step)."""


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What a pass did."""

    steps: int
    loss: float
    """Mean over the steps of the mean loss of an answer token."""
    moments: Moments = field(default_factory=dict)


def pass_order(tasks: Sequence[EncodedTask], config: TrainConfig, *, epochs: float, seed: int) -> list[int]:
    """The rows of one pass, in order, as indices into the rows of `tasks` laid end to end."""
    return mixture_schedule(
        {task.name: len(task.rows) for task in tasks},
        epochs=epochs,
        strategy=config.mixing,
        temperature=config.mixing_temperature,
        seed=seed,
    )


def train_pass(
    model: PeftModel,
    tasks: Sequence[EncodedTask],
    config: TrainConfig,
    *,
    epochs: float,
    number: int,
    passes: int,
    seed: int,
    pad_token_id: int,
    scratch: Path,
    moments: Moments | None = None,
) -> PassResult:
    """Train the model's trainable parameters in place.

    The learning rate follows one schedule over all passes, and is zero at no step. Deterministic on one CPU with one
    number of threads.

    Args:
        model: base and adapter, left in training mode.
        tasks: the rows.
        config: resolved; its `epochs` are not read.
        epochs: of this pass.
        number: of this pass, from 0.
        passes: in all.
        seed: of the order and dropout.
        pad_token_id: fills up rows.
        scratch: where the trainer may write; it is told not to.
        moments: what the optimizer starts with, for those parameters named. Default: nothing.
    """
    order = pass_order(tasks, config, epochs=epochs, seed=seed)
    steps, _ = step_counts(len(order), config)
    _, warmup = step_counts(len(order) * passes, config)
    arguments = training_arguments(
        dataclasses.replace(config, seed=seed),
        RunFolder(scratch),
        steps=steps,
        warmup_steps=0,
        steps_per_epoch=max(1, steps),
        validate=False,
    )
    arguments.save_strategy = SaveStrategy.NO
    names = [task.name for task in tasks]
    trainer = ManyTaskTrainer(
        task_names=names,
        route_by_task=False,
        loss=AnswerLoss(),
        model=model,
        args=arguments,
        train_dataset=EncodedRows.of(tasks, names, order),
        data_collator=Collator(pad_token_id=pad_token_id),
    )
    optimizer = trainer.create_optimizer()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _restore(optimizer, named, moments or {})
    trainer.lr_scheduler = _shifted(
        # One step longer and one step on: transformers' schedules begin at zero, and a pass of one step would
        # learn nothing by it.
        get_scheduler(
            config.scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps * passes + 1
        ),
        optimizer,
        first_step=number * steps + 1,
    )
    output = trainer.train()
    trainer.accelerator.unwrap_model(
        model, keep_fp32_wrapper=False
    )  # else each pass wraps the last one's wrapper
    loss = float(output.training_loss)
    return PassResult(
        steps=steps, loss=loss if math.isfinite(loss) else math.nan, moments=_saved(optimizer, named)
    )


def _shifted(schedule: LambdaLR, optimizer: Optimizer, *, first_step: int) -> LambdaLR:
    """The same schedule, of which `first_step` steps are over."""
    (factor,) = schedule.lr_lambdas[:1]
    for group in optimizer.param_groups:
        group["lr"] = group.pop("initial_lr")
    return LambdaLR(optimizer, lambda step: factor(first_step + step))


def _restore(optimizer: Optimizer, named: Mapping[str, torch.nn.Parameter], moments: Moments) -> None:
    for name, values in moments.items():
        if name in named:
            parameter = named[name]
            optimizer.state[parameter] = {
                # the step counter stays on the CPU, as AdamW keeps it
                key: value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
                for key, value in values.items()
            }


def _saved(optimizer: Optimizer, named: Mapping[str, torch.nn.Parameter]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value.detach().to("cpu", copy=True) for key, value in optimizer.state[parameter].items()}
        for name, parameter in named.items()
        if parameter in optimizer.state
    }
