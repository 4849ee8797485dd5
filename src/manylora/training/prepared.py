"""Prepare a run: its data, encoded, and its plan; nothing touches the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft import PeftModel

from manylora.data import Splits, load_splits
from manylora.errors import ConfigError, DataError
from manylora.evaluation.generation import context_of
from manylora.training.base_options import quantisation_options, quantised_bytes
from manylora.training.batches import EncodedTask, longest_first, rows_of_a_pass
from manylora.training.config import TrainConfig, as_list
from manylora.training.kinds import KINDS, TaskKind
from manylora.training.memory import MemoryPlan, MemoryUnknownError, estimate_memory
from manylora.training.models import (
    load_config,
    load_tokenizer,
    pick_device,
    pick_dtype,
    token_rows,
)
from manylora.training.plan import (
    Plan,
    TaskPlan,
    adapter_config,
    count_fused,
    count_modules,
    left_out_layers,
    shadow_model,
    step_counts,
)
from manylora.training.processes import Processes
from manylora.training.task_weights import schedule
from manylora.training.trainer_options import check_optimizer, check_reporters, reporters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a run needs but its weights: nothing of it has touched the disk."""

    config: TrainConfig
    """Resolved."""
    kind: TaskKind
    """What the model does with the rows."""
    splits: Splits
    train: Sequence[EncodedTask]
    validation: Sequence[EncodedTask]
    order: Sequence[int]
    """Rows of `train`, concatenated, in the order of the whole run."""
    steps_per_epoch: int
    plan: Plan

    @property
    def task_names(self) -> list[str]:
        """The training tasks; their positions are the expert ids under the task router."""
        return [task.name for task in self.train]


def prepare(config: TrainConfig, *, splits: Splits | None = None) -> Prepared:
    """Load and encode the data and compute the plan.

    Args:
        config: of the run.
        splits: rows to use in place of those that `config` names.

    Raises:
        DataError, ModelError, ConfigError, TargetModulesError: what is wrong with the input.
    """
    config = config.resolved()
    check_reporters(reporters(config))
    check_optimizer(config)
    kind_of_tasks = KINDS[config.task_type]
    if kind_of_tasks.one_process and Processes.here().count > 1:
        raise ConfigError(f"task_type {config.task_type} trains in one process; start it without a launcher.")
    splits = splits or all_rows(config)
    config = _with_experts(config, tasks=len(splits.train))
    tokenizer = load_tokenizer(config.model, task_type=config.task_type)
    chosen, config = config.template, kind_of_tasks.resolve_prompts(config, tokenizer)
    architecture = load_config(config.model, task_type=config.task_type)
    device = pick_device(config.device)
    quantisation_options(
        config.quantize,
        architecture,
        model=config.model,
        device=device,
        dtype=pick_dtype(config.dtype, device),
    )
    kind = kind_of_tasks.of_run(config, splits, tokenizer=tokenizer, context=context_of(architecture))
    train, validation = (
        kind.encode(part, vocabulary=token_rows(architecture)) for part in (splits.train, splits.validation)
    )
    _refuse_unknown(validation, train)
    if config.early_stopping and not validation:
        raise ConfigError(
            f"early_stopping {config.early_stopping} needs validation rows; give them with --validation."
        )
    sizes = {task.name: len(task.rows) for task in train}
    order = schedule(sizes, config)
    lengths = [len(row.input_ids) for task in train for row in task.rows]
    config, order = _in_passes(config, order, lengths, architecture)
    steps_per_epoch = max(1, round(sum(sizes.values()) / config.rows_per_step))
    notes = [
        *splits.notes,
        *_cut_validation(validation, config.max_length),
        *kind.unread(splits.rows()),
        *(_chat_note(splits) if (chosen, config.template) == ("auto", "chat") else []),
    ]
    return Prepared(
        config=config,
        kind=kind.with_rows(train),
        splits=splits,
        train=train,
        validation=validation,
        order=order,
        steps_per_epoch=steps_per_epoch,
        plan=_plan(config, splits, train, validation, order, labels=kind.head_outputs, notes=notes),
    )


_TOKENS_PER_PASS = 6e9
"""What a forward and backward pass costs by itself on a CPU, in tokens times parameters: measured with 135 million
parameters, where it is about 40 tokens (docs/log.md). A model of a few million takes a step's rows in one pass."""


def _in_passes(
    config: TrainConfig, order: list[int], lengths: Sequence[int], architecture: PretrainedConfig
) -> tuple[TrainConfig, list[int]]:
    """How many rows share a forward pass, and the order of the rows: those of a step stay together."""
    step = config.rows_per_step
    by_length = longest_first(order, lengths, step=step)
    text = architecture.get_text_config()
    layers, width = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    on_cpu = pick_device(config.device).type == "cpu" and Processes.here().count == 1
    if config.micro_batch_size is None and on_cpu and layers and width:
        overhead = _TOKENS_PER_PASS / (12 * layers * width**2)
        rows = rows_of_a_pass(by_length, lengths, step=step, overhead=overhead)
        config = dataclasses.replace(config, micro_batch_size=rows if rows < step else None)
    return config, by_length if (config.micro_batch_size or step) < step else order


def _cut_validation(validation: Sequence[EncodedTask], max_length: int) -> list[str]:
    """A sentence on the validation prompts that are cut: the plan's column counts those of training."""
    cut = [f"{task.name} {100 * task.truncated:.1f} %" for task in validation if task.truncated]
    return [f"validation prompts longer than {max_length} tokens and cut: {', '.join(cut)}"] if cut else []


def _chat_note(splits: Splits) -> list[str]:
    """A sentence on the template that was taken for instruction rows; none where there are no such rows."""
    if all(row.form != "alpaca" for row in splits.rows()):
        return []
    return [
        "rows of instruction and input are asked through the model's chat template (--template alpaca: as Alpaca)"
    ]


def all_rows(config: TrainConfig) -> Splits:
    """The rows that a resolved `config` names.

    Raises:
        DataError: what is wrong with them.
    """
    return load_splits(
        data=config.data,
        test=config.test,
        validation=config.validation,
        tasks=as_list(config.tasks),
        task_column=config.task_column,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        limit=config.limit,
    )


def _with_experts(config: TrainConfig, *, tasks: int) -> TrainConfig:
    if config.num_experts is None:
        return dataclasses.replace(config, num_experts=tasks)
    if config.router == "task" and config.num_experts not in (1, tasks):
        raise ConfigError(
            f"router task has one expert per task, but num_experts is {config.num_experts} and there are "
            f"{tasks} tasks; leave num_experts out."
        )
    return config


def _refuse_unknown(validation: Sequence[EncodedTask], train: Sequence[EncodedTask]) -> None:
    unknown = {task.name for task in validation} - {task.name for task in train}
    if unknown:
        raise DataError(
            f"Validation tasks {sorted(unknown)} have no training rows; the training tasks are "
            f"{sorted(task.name for task in train)}."
        )


def _plan(
    config: TrainConfig,
    splits: Splits,
    train: Sequence[EncodedTask],
    validation: Sequence[EncodedTask],
    order: Sequence[int],
    *,
    labels: int,
    notes: Sequence[str],
) -> Plan:
    adapter = adapter_config(config, task_names=[task.name for task in train])
    model = shadow_model(config, adapter, labels=labels)
    trainable, total = model.get_nb_trainable_parameters()
    modules, fused = count_modules(model), count_fused(model)
    lengths = [len(row.input_ids) for task in train for row in task.rows]
    steps, warmup = step_counts(len(order), config)
    return Plan(
        tasks=[
            TaskPlan(
                name=task.name,
                train=len(task.rows),
                validation=len(splits.validation.get(task.name, ())),
                test=len(splits.test.get(task.name, ())),
                truncated=task.truncated,
                longest=task.longest,
                longest_answer=task.longest_answer,
            )
            for task in train
        ],
        modules=modules,
        trainable=trainable,
        total=total,
        steps=steps,
        warmup_steps=warmup,
        tokens=sum(lengths[index] for index in order),
        memory=_memory(config, model, train, validation, rows=len(order)),
        leaks=splits.leaks,
        dropped=splits.dropped,
        left_out=left_out_layers(config, adapter),
        fused=fused,
        notes=notes,
    )


def _memory(
    config: TrainConfig,
    model: PeftModel,
    train: Sequence[EncodedTask],
    validation: Sequence[EncodedTask],
    *,
    rows: int,
) -> MemoryPlan | str:
    longest = max(len(row.input_ids) for task in train for row in task.rows)
    base = None if config.quantize is None else quantised_bytes(model, config.quantize)
    try:
        found = estimate_memory(
            model,
            rows=min(Processes.here().rows_per_pass(config), rows),
            length=longest,
            answer=max(task.longest_answer for task in train) if config.loss_on == "answer" else longest,
            checkpointing=config.gradient_checkpointing,
            validation_rows=min(config.eval_batch_size, sum(len(task.rows) for task in validation)),
            on_cpu=pick_device(config.device).type == "cpu",
        )
    except MemoryUnknownError as error:
        return str(error)
    return found if base is None else dataclasses.replace(found, base=base)
