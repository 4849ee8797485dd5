"""transformers' Trainer with what many tasks need: task ids, losses per task, checkpoints one can trust."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from manylora.adapters import check_finite, has_load_balance, load_balance, loading
from manylora.errors import RunError
from manylora.files import Record, read_record
from manylora.training.config import TrainConfig
from manylora.training.finite import FiniteGuard
from manylora.training.losses import AnswerLoss, Loss
from manylora.training.processes import Processes, wait_for_all
from manylora.training.runs import RunFolder
from manylora.training.trainer_options import reporters

_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
"""The argument's name: the first since transformers 5.23, the second before."""

LOSSES = "losses.json"
"""File of a checkpoint: what has been added up since the last log."""
_REMOVE = "remove that checkpoint to go on from an older one or anew"

SELECTION = "eval_mean_task_loss"
"""What `keep="best"` minimises: the validation loss, averaged within each task and then over tasks."""


class _Losses(Record):
    """What has been added up since the last log."""

    tasks: list[list[float]] | None
    """Sum of the losses and number of the items of each task; None before the first batch."""
    loss: float
    """Sum of the steps' losses."""
    logged_loss: float
    """The same of all steps up to the last log."""
    logged_step: int


class ManyTaskTrainer(Trainer):
    """A Trainer whose batches carry `task`, (B,): the index of each row's task.

    Args:
        task_names: names of the tasks, by index.
        route_by_task: pass `task` on as `expert_ids`.
        loss: of a batch.
        options: what `transformers.Trainer` takes; the data sets are `EncodedRows`.
    """

    guard: FiniteGuard | None = None
    loss: Loss = AnswerLoss()

    def __init__(self, *, task_names: Sequence[str], route_by_task: bool, loss: Loss, **options: Any):
        super().__init__(compute_metrics=self._validation_losses, **options)
        self.loss, self._loss_shifts_labels = loss, loss.shifts_labels
        self.remove_callback(PrinterCallback)  # our reporters print instead
        self.task_names = list(task_names)
        self.route_by_task = route_by_task
        # The loss below is normalised over all micro-batches of a step, in training; the Trainer must not do it again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.balanced = has_load_balance(self.model)
        self.began = False
        """Whether a first batch of rows has been read: what fails before that is the checkpoint."""
        self._sums: torch.Tensor | None = None
        self.guard = FiniteGuard(
            self.model,
            self.accelerator,
            task_names=task_names,
            origin=self.train_dataset.origin,
            autocast=self.args.bf16,
        )
        self.add_callback(self.guard)
        self._restored: _Losses | None = None
        self.add_callback(_LossesRestored(self))

    def _item_losses(
        self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of every item and the row it stands in, both (items,); see `Loss`."""
        routing = {"expert_ids": inputs["task"]} if self.route_by_task else {}
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.loss.narrow_head(self.accelerator.unwrap_model(model), inputs["labels"]):
            logits = model(**read, **self.loss.head.options, **routing).logits
        return self.loss(logits, inputs["labels"], inputs["task"])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the items of the whole optimizer step, with the load-balance loss where asked for."""
        self.began = True
        with load_balance(model) if self.balanced else nullcontext() as balance:
            losses, rows = self._item_losses(model, inputs)
        self._add_up(inputs["task"][rows], losses.detach())
        items = losses.numel() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / items
        if balance is not None:  # weighted by items, as the losses of a step's micro-batches are
            loss = loss + balance.loss() * (losses.numel() / items)
        if num_items_in_batch is not None:  # those of all processes, over which DDP averages the gradients
            loss = loss * self.accelerator.num_processes
        if self.guard is not None and model.training:
            self.guard.note(loss, losses, rows, inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed loss and number of items of each row, (B, 2), with its task, (B,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, rows = self._item_losses(model, inputs)
        sums = torch.zeros(
            len(inputs["task"]), 2, dtype=torch.float64 if losses.device.type != "mps" else None
        )
        sums = sums.to(losses.device)
        sums.index_add_(0, rows, torch.stack((losses, torch.ones_like(losses)), 1).to(sums.dtype))
        return losses.mean(), sums, inputs["task"]

    def _validation_losses(self, prediction: Any) -> dict[str, float]:
        sums, tasks = prediction.predictions, prediction.label_ids
        if self.guard is not None:
            rows = self.eval_dataset
            known = len(sums) == len(rows)
            self.guard.check_validation(
                sums[:, 0], tasks, [rows.origin(rows.order[i]) for i in range(len(rows))] if known else []
            )
        means = {}
        for index, name in enumerate(self.task_names):
            total, count = sums[tasks == index].sum(0) if (tasks == index).any() else (0.0, 0.0)
            if count:
                means[name] = float(total / count)
        metrics = {f"loss/{name}": value for name, value in means.items()}
        return {"mean_task_loss": sum(means.values()) / max(1, len(means)), **metrics}

    def _add_up(self, tasks: torch.Tensor, losses: torch.Tensor) -> None:
        if self._sums is None:
            self._sums = torch.zeros(len(self.task_names), 2, device=losses.device)
        self._sums.index_add_(0, tasks, torch.stack((losses.float(), torch.ones_like(losses.float())), 1))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter alone; the inherited way asks the Hub about the base's vocabulary at every checkpoint."""
        save_adapter(self.model, output_dir, state_dict=state_dict)

    # What is added up for the next log is in no checkpoint of transformers: a run that was killed between a log and a
    # checkpoint would go on to log other losses than an unbroken one.

    def _save_rng_state(self, output_dir: str) -> None:
        """Write losses.json, too."""
        super()._save_rng_state(output_dir)
        sums = None if self._sums is None else self.accelerator.reduce(self._sums.clone(), "sum").tolist()
        loss = float(self.accelerator.reduce(self._tr_loss.detach().clone(), "mean"))
        if self.args.should_save:
            found = {
                "tasks": sums,
                "loss": loss,
                "logged_loss": self._total_loss_scalar,
                "logged_step": self._globalstep_last_logged,
            }
            (Path(output_dir) / LOSSES).write_text(json.dumps(found), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint):  # an error about the weights names the checkpoint
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / LOSSES
        if not path.is_file():  # checkpoints of earlier versions have none
            return
        found = read_record(path, _Losses, remedy=_REMOVE)
        shape = [len(row) for row in found.tasks or []]
        if found.tasks is not None and shape != [2] * len(self.task_names):
            raise RunError(
                f"{path} is damaged (it has {shape} sums of {len(self.task_names)} tasks); {_REMOVE}."
            )
        self._restored = found

    def restore_losses(self) -> None:
        """Go on with the sums of the checkpoint, once the loop has set its own to zero."""
        found, self._restored = self._restored, None
        if found is None:
            return
        device = self.args.device
        if found.tasks is not None:
            sums = torch.tensor(found.tasks, dtype=torch.float32, device=device)
            self._sums = sums if self.args.process_index == 0 else torch.zeros_like(sums)
        self._tr_loss = torch.tensor(found.loss, device=device)
        self._total_loss_scalar = found.logged_loss
        self._globalstep_last_logged = found.logged_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training loss of each task since the last log; make the summary's loss that of the whole run."""
        if "train_loss" in logs:  # transformers divides by the steps since the resume
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums.clone(), "sum")
            for name, (total, count) in zip(self.task_names, sums.tolist(), strict=True):
                if count:
                    logs[f"loss/{name}"] = total / count
            self._sums.zero_()
        super().log(logs, start_time)


def save_adapter(model: Any, folder: str | None, *, state_dict: dict[str, Any] | None = None) -> None:
    """Write the active adapter, unless a weight of it is not finite: nothing good is replaced by that.

    Raises:
        ModelError: naming the weight.
    """
    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    check_finite(weights, "The trained adapter")
    # else PEFT asks the Hub about the base
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)


class _LossesRestored(TrainerCallback):
    def __init__(self, trainer: ManyTaskTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.restore_losses()


class RunRecorder(TrainerCallback):
    """Write metrics and completion markers; validate and save at the very last step."""

    def __init__(self, run: RunFolder, *, keep_best: bool):
        self.run, self.keep_best = run, keep_best

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let each process draw dropout masks of its own; a resumed run reads its generators' states after this."""
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Have the last step validated, whatever the interval."""
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Save what is validated where the best is to be kept."""
        if self.keep_best:
            control.should_save = True
        return control

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Append to `metrics.jsonl`."""
        if state.is_world_process_zero and logs:
            self.run.append_metrics({"step": state.global_step, **logs})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The checkpoint is whole, with the states of all processes' generators: say so, then drop older ones."""
        wait_for_all()
        if state.is_world_process_zero:
            keep = [state.best_global_step] if self.keep_best and state.best_global_step else []
            self.run.mark_complete(state.global_step, keep=keep)


class Reporter(TrainerCallback):
    """Hand each log to a function, with what a progress display needs."""

    def __init__(self, report: Callable[[int, int, Mapping[str, float]], None]):
        self.report = report

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Pass step, number of steps and the log on."""
        if state.is_world_process_zero and logs:
            self.report(state.global_step, state.max_steps, logs)


def training_arguments(
    config: TrainConfig,
    run: RunFolder,
    *,
    steps: int,
    warmup_steps: int,
    steps_per_epoch: int,
    validate: bool,
) -> TrainingArguments:
    """What a resolved `config` means to transformers.

    The rows come in the order the plan fixed, over all epochs, so the Trainer sees one long epoch.
    """
    processes = Processes.here()
    micro = processes.rows_per_pass(config)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    half = (
        config.dtype
        if config.dtype != "auto"
        else "bfloat16"
        if on_gpu and torch.cuda.is_bf16_supported()
        else ""
    )
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.rows_per_step // (micro * processes.count),
        per_device_eval_batch_size=config.eval_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        **{_CHECKPOINTING: config.gradient_checkpointing},
        bf16=half == "bfloat16",
        fp16=half == "float16",
        use_cpu=not on_gpu,
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=10,
        logging_first_step=True,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if validate else "no",
        eval_steps=config.eval_steps or steps_per_epoch,
        metric_for_best_model=SELECTION if validate else None,
        greater_is_better=False if validate else None,
        save_strategy="steps",
        save_steps=config.save_steps or steps_per_epoch,
        save_total_limit=None,  # RunRecorder removes old checkpoints, after the marker of the new one
        run_name=run.path.name,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        logging_nan_inf_filter=False,  # it shows the mean of earlier losses in place of NaN
    )
    arguments.report_to = reporters(config)  # it adds Kubeflow of itself where that is about
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # with more, the Trainer would multiply the batch behind the plan's back
    return arguments
