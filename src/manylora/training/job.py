"""The main job: prepare a run (data, plan), then train its adapter, from the start or from where it broke off."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from manylora.adapters import put_weights, read_weights
from manylora.data import (
    Splits,
    asks_date,
    fix_date,
    load_splits,
    mixture_schedule,
    today,
    unread_note,
)
from manylora.errors import ConfigError, DataError, ManyLoraError, RunError
from manylora.files import remove
from manylora.training.batches import Collator, EncodedRows, EncodedTask, data_fingerprint, encode_tasks
from manylora.training.config import TrainConfig, as_list
from manylora.training.fingerprint import base_fingerprint, comparable, same_base, weakness
from manylora.training.labels import LabelCollator, LabelSets, LabelTrainer, encode_labelled
from manylora.training.memory import MemoryPlan, MemoryUnknownError, estimate_memory
from manylora.training.models import (
    context_of,
    first_line,
    head_modules,
    load_base,
    load_classifier,
    load_config,
    load_tokenizer,
    pick_device,
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
from manylora.training.processes import Processes, wait_for_all
from manylora.training.result import save_result
from manylora.training.runs import RunFolder, step_of
from manylora.training.snapshots import SnapshotRecorder, snapshot_steps
from manylora.training.trainer import (
    ManyTaskTrainer,
    Reporter,
    RunRecorder,
    training_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

_LOG = logging.getLogger("manylora")

Report = Callable[[int, int, Mapping[str, float]], None]
"""Called with step, number of steps and the trainer's log."""

_EXPERTS_OF_THE_BASE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""By these a base's configuration is known to be a mixture of experts."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a run needs but its weights: nothing of it has touched the disk."""

    config: TrainConfig
    """Resolved."""
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[EncodedTask]
    validation: Sequence[EncodedTask]
    order: Sequence[int]
    """Rows of `train`, concatenated, in the order of the whole run."""
    steps_per_epoch: int
    most_answer_tokens: int
    """Half of the model's context: one long training answer must not take the prompts' room."""
    plan: Plan
    labels: LabelSets | None = None
    """With task type SEQ_CLS, each task's labels."""

    @property
    def task_names(self) -> list[str]:
        """The training tasks; their positions are the expert ids under the task router."""
        return [task.name for task in self.train]

    @property
    def answer_tokens(self) -> dict[str, int]:
        """Per task the tokens a generated answer may have."""
        fixed = self.config.max_new_tokens
        return {
            task.name: fixed or min(task.longest_answer + 8, self.most_answer_tokens) for task in self.train
        }


def prepare(config: TrainConfig, *, splits: Splits | None = None) -> Prepared:
    """Load and encode the data and compute the plan.

    Args:
        config: of the run.
        splits: rows to use in place of those that `config` names.

    Raises:
        DataError, ModelError, ConfigError, TargetModulesError: what is wrong with the input.
    """
    config = config.resolved()
    if config.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError("report_to tensorboard needs another package: pip install 'manylora[tensorboard]'.")
    if config.task_type == "SEQ_CLS" and Processes.here().count > 1:
        raise ConfigError("task_type SEQ_CLS trains in one process; start it without a launcher.")
    splits = splits or all_rows(config)
    config = _with_experts(config, tasks=len(splits.train))
    tokenizer = load_tokenizer(config.model, task_type=config.task_type)
    if config.task_type == "CAUSAL_LM" and asks_date(
        tokenizer
    ):  # the same prompts on every day of the run and after it
        config = dataclasses.replace(config, date=config.date or today())
        fix_date(tokenizer, config.date)
    architecture = load_config(config.model, task_type=config.task_type)
    context = context_of(architecture)
    labels = _labels(splits) if config.task_type == "SEQ_CLS" else None
    lengths: dict[str, Any] = {
        "max_length": config.max_length,
        "context_length": context,
        "vocabulary": token_rows(architecture),
    }
    train, validation = (
        encode_labelled(part, tokenizer, labels, **lengths)
        if labels
        else encode_tasks(part, tokenizer, loss_on=config.loss_on, **lengths)
        for part in (splits.train, splits.validation)
    )
    _refuse_unknown(validation, train)
    sizes = {task.name: len(task.rows) for task in train}
    order = mixture_schedule(
        sizes,
        epochs=config.epochs,  # type: ignore[arg-type]
        strategy=config.mixing,
        temperature=config.mixing_temperature,
        seed=config.seed,
    )
    steps_per_epoch = max(1, round(sum(sizes.values()) / config.rows_per_step))
    return Prepared(
        config=config,
        splits=splits,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        order=order,
        steps_per_epoch=steps_per_epoch,
        most_answer_tokens=(context or 2**20) // 2,
        plan=_plan(
            config,
            splits,
            train,
            validation,
            order,
            labels=labels,
            notes=[*splits.notes, *([] if labels else unread_note(splits.rows(), tokenizer))],
        ),
        labels=labels,
    )


def _labels(splits: Splits) -> LabelSets:
    """The labels of the training rows, those that a cut has moved to validation included."""
    return LabelSets.of(
        {task: [*rows, *splits.validation.get(task, ())] for task, rows in splits.train.items()}
    )


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
    labels: LabelSets | None,
    notes: Sequence[str],
) -> Plan:
    adapter = adapter_config(config, task_names=[task.name for task in train])
    model = shadow_model(config, adapter, labels=labels.count if labels else 0)
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
    try:
        return estimate_memory(
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


def build_model(prepared: Prepared) -> PeftModel:
    """The base with a fresh adapter, initialised from the run's seed."""
    config = prepared.config
    adapter = adapter_config(config, task_names=prepared.task_names)
    if prepared.labels:
        base = load_classifier(
            config.model,
            labels=prepared.labels.count,
            pad_token_id=prepared.tokenizer.pad_token_id,
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
        )
        adapter.modules_to_save = head_modules(base)
    else:
        base = load_base(config.model, dtype=config.dtype, device=config.device)
    adapter.base_fingerprint = base_fingerprint(base, without=adapter.modules_to_save or ())
    set_seed(config.seed)
    model = get_peft_model(base, adapter)
    model.peft_config["default"].base_model_name_or_path = config.model
    return model


def finetune(
    prepared: Prepared,
    run: RunFolder,
    *,
    report: Report | None = None,
    model: PeftModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PeftModel:
    """Train until the plan is done and place `adapter/` in the run folder.

    Continues from the newest complete checkpoint where there is one, and then ends with the weights an unbroken
    run would have had (bit-identical on one CPU with one number of threads). Where a launcher has started several
    processes, each of them calls this with the same arguments, and the first one writes.

    Args:
        prepared: the plan.
        run: where to write.
        report: told of every log.
        model: the model to train, the same one when the run is continued. Default: from `build_model`.
        callbacks: further ones for the trainer.

    Raises:
        RunError: the run was begun on other data, or none of its checkpoints is whole.
    """
    model = build_model(prepared) if model is None else model
    rows = [*prepared.train, *prepared.validation]
    prints = {
        "data": data_fingerprint(rows, labelled=prepared.labels is not None),
        "base": model.active_peft_config.base_fingerprint,
    }
    _check_unchanged(run, model, prints)
    first = Processes.here().first
    if first:
        run.set_state("running", fingerprints=prints, steps=prepared.plan.steps)
        run.drop_incomplete()
    trainer = _trainer(prepared, run, model, report, callbacks)
    if first:
        kept = snapshot_steps(prepared.plan.steps, prepared.config.keep_adapters)
        trainer.add_callback(SnapshotRecorder(run.path, model, kept))
    wait_for_all()
    checkpoint, damaged = run.whole_checkpoint()
    wait_for_all()  # every process has looked at the damaged ones before the first one removes them
    if first:
        for folder, damage in damaged.items():
            begins = f"goes on from {checkpoint.name}" if checkpoint else "begins anew"
            print(f"{folder} is damaged ({damage}); the run {begins}", file=sys.stderr, flush=True)
            remove(folder)
        run.rewind_metrics(step_of(checkpoint) if checkpoint else 0)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except ManyLoraError:
        raise
    except Exception as error:
        # What a library says of a file that it cannot load has no common type.
        if checkpoint is None or trainer.began or isinstance(error, torch.OutOfMemoryError):
            raise
        raise RunError(
            f"{checkpoint} is damaged ({type(error).__name__}: {first_line(error)}); remove it to go on from an older "
            "one or anew."
        ) from error
    step = trainer.state.best_global_step
    if prepared.config.keep == "best" and step is not None:
        _load_best(run, step, model)
    if first:
        save_result(prepared, run, model)
    return model


def _check_unchanged(run: RunFolder, model: PeftModel, now: Mapping[str, str | None]) -> None:
    """Refuse to go on with other data or another base than the run was begun with."""
    known: Mapping[str, Any] = run.state.get("fingerprints", now)
    base, mark = known.get("base"), now["base"]
    if base is not None and mark is not None:
        mark = mark if comparable(base, mark) else base_fingerprint(model.get_base_model(), like=base)
        weak = weakness(base, mark)
        if weak and Processes.here().first:
            _LOG.warning(f"{run.path}: {weak}.")
    found = {**now, "base": mark}
    for what, old in known.items():
        if old != found.get(what) and not (what == "base" and same_base(str(old), str(mark))):
            raise RunError(
                f"The {what} of {run.path} has changed since it was begun (fingerprint {old}, now "
                f"{found.get(what)}); put the old one back, or start a new run (earlier versions took "
                "other rows under --limit)."
            )


def _load_best(run: RunFolder, step: int, model: PeftModel) -> None:
    """Put the weights of an earlier step into the model.

    Raises:
        RunError: its checkpoint is damaged.
    """
    best = run.checkpoint(step)
    if damage := run.damage(best):
        raise RunError(
            f"{best}, which holds the best weights, is damaged ({damage}); put a copy of it back, or start a new run."
        )
    weights = best / SAFETENSORS_WEIGHTS_NAME
    put_weights(model, read_weights(weights), source=weights)


def _trainer(
    prepared: Prepared,
    run: RunFolder,
    model: PeftModel,
    report: Report | None,
    callbacks: Sequence[TrainerCallback],
) -> ManyTaskTrainer:
    config, plan = prepared.config, prepared.plan
    recorder = RunRecorder(run, keep_best=config.keep == "best")
    kind, collate = (
        (partial(LabelTrainer, labels=prepared.labels), LabelCollator)
        if prepared.labels
        else (ManyTaskTrainer, Collator)
    )
    arguments = training_arguments(
        config,
        run,
        steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        steps_per_epoch=prepared.steps_per_epoch,
        validate=bool(prepared.validation),
    )
    # A layer of an expert of the base may get no token of a step; to look for such layers takes DDP time.
    text = model.config.get_text_config()
    arguments.ddp_find_unused_parameters = any(hasattr(text, name) for name in _EXPERTS_OF_THE_BASE)
    return kind(
        task_names=prepared.task_names,
        route_by_task=config.router == "task" and config.num_experts != 1,
        model=model,
        args=arguments,
        train_dataset=EncodedRows.of(
            prepared.train,
            prepared.task_names,
            prepared.order,
            empty=Processes.here().empty_rows(len(prepared.order), config),
        ),
        eval_dataset=EncodedRows.of(prepared.validation, prepared.task_names)
        if prepared.validation
        else None,
        data_collator=collate(pad_token_id=prepared.tokenizer.pad_token_id),
        callbacks=[recorder, *([Reporter(report)] if report else []), *callbacks],
    )
