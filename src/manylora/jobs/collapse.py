"""A token router given up: measure it, build one LoRA per task, score both, refuse what loses too much."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.adapters import ManyLoraConfig, PlainLora, export_lora, import_loras, put_weights
from manylora.data import DataNotes, TaskData, available_splits, load_examples, sample_rows
from manylora.errors import ConfigError, NotMergeableError
from manylora.evaluation import Loss, Scores, collapse_router, paired_loss
from manylora.files import write_json
from manylora.jobs.subject import Subject, load_writer, score_rows
from manylora.training import Writing, config_of_run
from manylora.training.config import as_list
from manylora.training.prepared import all_rows

if TYPE_CHECKING:
    from torch import Tensor

    from manylora.jobs.progress import Progress
    from manylora.jobs.settings import ExportConfig


def collapse(
    config: ExportConfig,
    source: Path,
    adapter: ManyLoraConfig,
    weights: Mapping[str, Tensor],
    *,
    report_to: Path,
    progress: Progress,
) -> tuple[dict[str, PlainLora], dict[str, str]]:
    """One LoRA per task that stands for the router on the task's rows, and a sentence on each; writes collapse.json.

    Raises:
        NotMergeableError: the LoRAs lose more than `config.max_loss` points, and `config.force` is not set.
        ConfigError: there are no rows to measure on.
    """
    measured, scored, origin = _rows(config, source, progress)
    writer = load_writer(str(source), model=config.model, dtype=config.dtype, device=config.device)
    count = sum(map(len, measured.values()))
    collapsed = collapse_router(
        writer.model,
        writer.kind.tokenizer,
        writer.kind.apply_template(measured),
        how=config.collapse,
        max_length=writer.kind.max_length,
        on_progress=lambda done, total: progress.show_count("rows read", count * done // total, count),
    )
    loras = {task: export_lora(adapter, weights, found) for task, found in collapsed.items()}
    before, after = _compare(config, writer, loras, scored, progress)
    loss = paired_loss(before, after)
    progress.show_loss(before, after, loss, title=f"scores on {origin}")
    if loss.mean > config.max_loss and not config.force:
        raise NotMergeableError(
            f"The LoRAs lose {loss.mean:.2f} points (mean over {len(loras)} tasks), more than --max-loss "
            f"{config.max_loss:g}; nothing was written. Serve the adapter with PEFT, train with --router task "
            "for exact LoRAs, or raise --max-loss or give --force."
        )
    write_json(
        report_to / "collapse.json",
        {
            "data": origin,
            "collapse": config.collapse,
            "rows_measured": {task: len(rows) for task, rows in measured.items()},
            "before": before.to_dict(),
            "after": after.to_dict(),
            "loss": loss.to_dict(),
        },
    )
    return loras, {task: _note(config, before, after, loss, task, origin) for task in loras}


def _rows(config: ExportConfig, source: Path, progress: Progress) -> tuple[TaskData, TaskData, str]:
    """Rows to collapse the router on, rows to score on, and what the latter are."""
    tasks = as_list(config.tasks)
    if config.data is not None:
        splits, notes = available_splits(config.data), DataNotes()
        measured, scored = (
            load_examples(
                config.data,
                task_column=config.task_column,
                tasks=tasks,
                split=split,
                limit=config.limit,
                notes=notes,
            )
            for split in ("train", "validation" if "validation" in splits else "train")
        )
        progress.show_notes(notes.lines())
        origin = f"{'the validation rows of ' if 'validation' in splits else ''}{config.data}"
        return measured, {task: scored[task] for task in measured if task in scored}, origin
    run = config_of_run(str(source))
    if run is None:
        raise ConfigError(
            f"{config.adapter} has a token router, which no LoRA equals; give rows of its tasks with --data to "
            "measure an approximation on."
        )
    splits_of_run = all_rows(run)
    train, held_out = splits_of_run.train, splits_of_run.validation
    if unknown := [task for task in tasks or () if task not in train]:
        raise ConfigError(f"The run has no task {unknown[0]!r}; its tasks: {', '.join(train)}.")
    chosen = tasks or list(train)
    missing = [task for task in chosen if task not in held_out]
    if missing:
        raise ConfigError(
            f"The run has no validation rows of task {missing[0]!r}; give rows to score on with --data."
        )
    limit = config.limit
    return (
        {task: sample_rows(train[task], limit, task=task) for task in chosen},
        {task: sample_rows(held_out[task], limit, task=task) for task in chosen},
        "the run's validation rows",
    )


def _compare(
    config: ExportConfig,
    writer: Subject[Writing],
    loras: Mapping[str, PlainLora],
    scored: TaskData,
    progress: Progress,
) -> tuple[Scores, Scores]:
    """Scores of the adapter and of the LoRAs, which stand beside it as the experts of a second adapter."""
    model = writer.model

    def scores(experts: Mapping[str, int] | None) -> Scores:
        kind = dataclasses.replace(writer.kind, batch_size=config.batch_size, experts=experts)
        return score_rows(kind, model, scored, progress=progress)

    before = scores(None)
    collapsed, weights = import_loras(loras)
    model.add_adapter("collapsed", collapsed)
    put_weights(model, weights, source="The collapsed adapter", adapter="collapsed")
    model.set_adapter("collapsed")
    return before, scores({task: index for index, task in enumerate(loras)})


def _note(config: ExportConfig, before: Scores, after: Scores, loss: Loss, task: str, origin: str) -> str:
    how = (
        "the token router and the matrices next to it are replaced by the nearest LoRA"
        if config.collapse == "fit"
        else "the token router is replaced by its mean weights"
    )
    old, new = before.by_task()[task], after.by_task()[task]
    return (
        f"It approximates the adapter on this task: {how} on the task's rows. "
        f"Score of the adapter {old:.1f}, of this LoRA {new:.1f} ({origin}, n = {loss.tasks[task].n})."
    )
