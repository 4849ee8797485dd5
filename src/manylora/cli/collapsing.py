"""A token router given up: measure it, build one LoRA per task, score both, refuse what loses too much."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.adapters import ManyLoraConfig, PlainLora, export_lora, import_loras, put_weights
from manylora.cli.console import CountProgress
from manylora.cli.options import ExportOptions
from manylora.cli.scoring import score
from manylora.cli.subjects import Subject, load_subject, run_settings
from manylora.cli.tables import print_loss
from manylora.data import DataNotes, TaskData, available_splits, load_examples, load_splits, sample_rows
from manylora.errors import ConfigError, NotMergeableError
from manylora.evaluation import Loss, Scores, collapse_router, paired_loss
from manylora.files import write_json
from manylora.training import RunFolder, TrainConfig
from manylora.training.config import as_list

if TYPE_CHECKING:
    from torch import Tensor


def collapse(
    options: ExportOptions,
    source: Path,
    config: ManyLoraConfig,
    weights: Mapping[str, Tensor],
    *,
    report_to: Path,
) -> tuple[dict[str, PlainLora], dict[str, str]]:
    """One LoRA per task that stands for the router on the task's rows, and a sentence on each; writes collapse.json.

    Raises:
        NotMergeableError: the LoRAs lose more than `options.max_loss` points, and `options.force` is not set.
        ConfigError: there are no rows to measure on.
    """
    measured, scored, origin = _rows(options, source)
    subject = load_subject(str(source), model=options.model, dtype=options.dtype, device=options.device)
    count = sum(map(len, measured.values()))
    progress = CountProgress("rows read", count)
    collapsed = collapse_router(
        subject.model,
        subject.tokenizer,
        measured,
        how=options.collapse,
        max_length=subject.max_length,
        on_progress=lambda done, total: progress(count * done // total),
    )
    loras = {task: export_lora(config, weights, found) for task, found in collapsed.items()}
    before, after = _compare(options, subject, source, loras, scored)
    loss = paired_loss(before, after)
    print_loss(before, after, loss, title=f"scores on {origin}")
    if loss.mean > options.max_loss and not options.force:
        raise NotMergeableError(
            f"The LoRAs lose {loss.mean:.2f} points (mean over {len(loras)} tasks), more than --max-loss "
            f"{options.max_loss:g}; nothing was written. Serve the adapter with PEFT, train with --router task "
            "for exact LoRAs, or raise --max-loss or give --force."
        )
    write_json(
        report_to / "collapse.json",
        {
            "data": origin,
            "collapse": options.collapse,
            "rows_measured": {task: len(rows) for task, rows in measured.items()},
            "before": before.to_dict(),
            "after": after.to_dict(),
            "loss": loss.to_dict(),
        },
    )
    return loras, {task: _note(options, before, after, loss, task, origin) for task in loras}


def _rows(options: ExportOptions, source: Path) -> tuple[TaskData, TaskData, str]:
    """Rows to collapse the router on, rows to score on, and what the latter are."""
    tasks = as_list(options.tasks)
    if options.data is not None:
        splits, notes = available_splits(options.data), DataNotes()
        measured, scored = (
            load_examples(
                options.data,
                task_column=options.task_column,
                tasks=tasks,
                split=split,
                limit=options.limit,
                notes=notes,
            )
            for split in ("train", "validation" if "validation" in splits else "train")
        )
        for note in notes.lines():
            print(f"note: {note}")
        origin = f"{'the validation rows of ' if 'validation' in splits else ''}{options.data}"
        return measured, {task: scored[task] for task in measured if task in scored}, origin
    if not (source.parent / "config.yaml").is_file():
        raise ConfigError(
            f"{options.adapter} has a token router, which no LoRA equals; give rows of its tasks with --data to "
            "measure an approximation on."
        )
    run = RunFolder(source.parent).config(TrainConfig, verb="train").to_dict()
    names = ("data", "test", "validation", "tasks", "task_column", "seed", "validation_fraction", "limit")
    splits_of_run = load_splits(**{name: run[name] for name in names if name in run})
    train, held_out = splits_of_run.train, splits_of_run.validation
    if unknown := [task for task in tasks or () if task not in train]:
        raise ConfigError(f"The run has no task {unknown[0]!r}; its tasks: {', '.join(train)}.")
    chosen = tasks or list(train)
    missing = [task for task in chosen if task not in held_out]
    if missing:
        raise ConfigError(
            f"The run has no validation rows of task {missing[0]!r}; give rows to score on with --data."
        )
    limit = options.limit
    return (
        {task: sample_rows(train[task], limit, task=task) for task in chosen},
        {task: sample_rows(held_out[task], limit, task=task) for task in chosen},
        "the run's validation rows",
    )


def _compare(
    options: ExportOptions, subject: Subject, source: Path, loras: Mapping[str, PlainLora], scored: TaskData
) -> tuple[Scores, Scores]:
    """Scores of the adapter and of the LoRAs, which stand beside it as the experts of a second adapter."""

    def scores(experts: Mapping[str, int] | None) -> Scores:
        return score(
            subject.model,
            subject.tokenizer,
            scored,
            answer_tokens=subject.answer_tokens,
            batch_size=options.batch_size,
            max_length=subject.max_length,
            experts=experts,
            rouge=run_settings(str(source)).get("rouge", "all"),
        )

    before = scores(None)
    config, weights = import_loras(loras)
    model = subject.model
    model.add_adapter("collapsed", config)
    put_weights(model, weights, source="The collapsed adapter", adapter="collapsed")
    model.set_adapter("collapsed")
    return before, scores({task: index for index, task in enumerate(loras)})


def _note(options: ExportOptions, before: Scores, after: Scores, loss: Loss, task: str, origin: str) -> str:
    how = (
        "the token router and the matrices next to it are replaced by the nearest LoRA"
        if options.collapse == "fit"
        else "the token router is replaced by its mean weights"
    )
    old, new = before.by_task()[task], after.by_task()[task]
    return (
        f"It approximates the adapter on this task: {how} on the task's rows. "
        f"Score of the adapter {old:.1f}, of this LoRA {new:.1f} ({origin}, n = {loss.tasks[task].n})."
    )
