"""The main job: train the adapter of a prepared run, from the start or from where it broke off."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from manylora.adapters import put_weights, read_weights
from manylora.errors import ManyLoraError, RunError
from manylora.files import remove, write_json
from manylora.training.batches import Collator, EncodedRows, data_fingerprint
from manylora.training.early_stopping import EarlyStopping
from manylora.training.fingerprint import base_fingerprint, comparable, same_base, weakness
from manylora.training.heads import head_of
from manylora.training.models import first_line
from manylora.training.plan import adapter_config
from manylora.training.prepared import Prepared
from manylora.training.processes import Processes, wait_for_all
from manylora.training.runs import RunFolder, step_of
from manylora.training.snapshots import SnapshotRecorder, snapshot_steps
from manylora.training.trainer import (
    SELECTION,
    ManyTaskTrainer,
    Reporter,
    RunRecorder,
    save_adapter,
    training_arguments,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

_LOG = logging.getLogger("manylora")

Report = Callable[[int, int, Mapping[str, float]], None]
"""Called with step, number of steps and the trainer's log."""

_EXPERTS_OF_THE_BASE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""By these a base's configuration is known to be a mixture of experts."""


def build_model(prepared: Prepared) -> PeftModel:
    """The base with a fresh adapter, initialised from the run's seed."""
    config = prepared.config
    adapter = adapter_config(config, task_names=prepared.task_names)
    base = prepared.kind.load_base(config)
    if parts := head_of(config.task_type).parts(base):
        adapter.modules_to_save = parts
    adapter.base_fingerprint = base_fingerprint(base, without=parts)
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
        "data": data_fingerprint(rows, mark=prepared.kind.mark),
        "base": model.active_peft_config.base_fingerprint,
    }
    _check_unchanged(run, model, prints)
    first = Processes.here().first
    if first:
        run.set_state("running", fingerprints=prints, steps=prepared.plan.steps)
        run.drop_incomplete()
    config, steps = prepared.config, prepared.plan.steps
    stopping = EarlyStopping(SELECTION, config.early_stopping) if config.early_stopping else None
    trainer = _trainer(prepared, run, model, report, [*([stopping] if stopping else []), *callbacks])
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
    if stopping and checkpoint and (step := stopping.stopped_at(checkpoint)) is not None:
        # Killed after it had stopped: the rest is left out, as the Trainer would take one more step.
        trainer.args.max_steps = step
        rows = trainer.train_dataset
        rows.order, rows.empty = rows.order[: step * config.rows_per_step], 0
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
        if stopping and (sentence := stopping.sentence(trainer.state, steps)):
            run.set_state("running", stopped=sentence)
        _save_result(prepared, run, model)
    return model


def _check_unchanged(run: RunFolder, model: PeftModel, now: Mapping[str, str | None]) -> None:
    """Refuse to go on with other data or another base than the run was begun with."""
    known: Mapping[str, Any] = run.state.get("fingerprints", {})
    lacking = [what for what, print_ in now.items() if print_ is not None and known.get(what) is None]
    if lacking and run.newest_checkpoint() is not None and Processes.here().first:
        _LOG.warning(
            f"{run.path}: its state.json has no fingerprint of the {' and the '.join(lacking)} it was begun with, "
            "so that is not compared; see for yourself that it is the same."
        )
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
    return ManyTaskTrainer(
        task_names=prepared.task_names,
        route_by_task=config.routes_by_task,
        loss=prepared.kind.loss,
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
        data_collator=Collator(pad_token_id=prepared.kind.tokenizer.pad_token_id),
        callbacks=[recorder, *([Reporter(report)] if report else []), *callbacks],
    )


def _save_result(prepared: Prepared, run: RunFolder, model: PeftModel) -> None:
    """Place `adapter/` in the run folder, with tokenizer and record of its prompts, and tasks.json beside it."""
    partial = run.path / "adapter.partial"
    remove(partial)
    save_adapter(model, str(partial))
    config, kind = prepared.config, prepared.kind
    kind.tokenizer.save_pretrained(str(partial))
    if (prompts := kind.prompts(prepared.splits.train, date=config.date)) is not None:
        prompts.write(partial)
    run.place_folder("adapter", partial)
    facts = {
        task.name: {"expert": index, "train_rows": len(task.rows), **kind.facts(task.name)}
        for index, task in enumerate(prepared.train)
    }
    write_json(run.path / "tasks.json", {"max_length": config.max_length, "tasks": facts})
