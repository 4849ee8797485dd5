"""Evaluate: rows → an answer to each → scores, of an adapter or of a bare model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.errors import ConfigError
from manylora.files.settings import Count
from manylora.training.settings import (
    AdapterAnswerSettings,
    BatchSettings,
    DataSettings,
    ModelSettings,
    ScoringSettings,
    TemplateSettings,
)

if TYPE_CHECKING:
    from pathlib import Path

    from manylora.data import TaskData
    from manylora.evaluation import Scores
    from manylora.jobs.progress import Progress
    from manylora.jobs.subject import Subject
    from manylora.training import TaskKind


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(
    ModelSettings, DataSettings, TemplateSettings, AdapterAnswerSettings, ScoringSettings, BatchSettings
):
    """What to score, on what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder. Default: none, the bare model is scored."""
    model: str | None = None
    """Default: the one the adapter was trained on, else the embedded one."""
    data: str | None = None
    """Default: the test rows of the adapter's run, with its --tasks and --task-column, else the embedded suite."""
    limit: Count | None = None
    """Default: that of the adapter's run for its test rows, else all."""
    out: str | None = None
    """Folder for predictions.jsonl and scores.json; must not exist. Default: nothing is written."""


def evaluate(config: EvaluateConfig, *, progress: Progress) -> Scores:
    """Answer every row, greedily, and score the answers; write them where `config.out` says.

    Raises:
        ModelError, DataError, ConfigError, RoutingError: what is wrong with the input.
        RunError: `config.out` exists.
    """
    from manylora.evaluation import write_scores
    from manylora.jobs.session import reserved_folder
    from manylora.jobs.subject import load_subject, score_rows

    with reserved_folder(config.out) as folder:
        source, limit, test, notes = _rows(config)
        progress.show_notes(notes)
        subject = load_subject(config.adapter, model=config.model, dtype=config.dtype, device=config.device)
        kind = subject.kind.with_settings(
            source=str(config.adapter),
            template=None if config.template == "auto" else config.template,
            **{
                name: getattr(config, name)
                for name in ("batch_size", "max_length", "max_new_tokens", "rouge")
            },
        )
        progress.show_notes([*_gaps(subject, config, test), *kind.remarks(test)])
        scores = score_rows(kind, subject.model, test, progress=progress)
        baselines, beneath = kind.baselines(test, source=source, limit=limit), list[str]()
        if config.adapter is not None:  # of a bare model nobody expects that it has learnt
            router = getattr(subject.model.active_peft_config, "router", None)
            beneath = kind.notes(scores, baselines, test, router=router)
        progress.show_scores(scores, baselines, beneath)
        if folder is not None:
            write_scores(folder, scores, baselines, beneath)
    return scores


def _gaps(subject: Subject[TaskKind], config: EvaluateConfig, test: TaskData) -> list[str]:
    """Sentences on what the rows lack, or ask in another form than the adapter was trained on."""
    from manylora.data import missing_tasks, single_answers

    found = missing_tasks(subject.kind.known_tasks, test) if config.tasks is None else []
    known = subject.prompts.tasks if subject.prompts else {}
    for task, rows in subject.kind.apply_template(test).items():
        forms = {row.form for row in rows}
        if task in known and known[task].form not in forms:
            found.append(
                f"the rows of task {task} are of the form {', '.join(sorted(forms))}, but it was trained on "
                f"{known[task].form}"
            )
    return [*found, *single_answers(test, what="test")]


def _rows(config: EvaluateConfig) -> tuple[str, int | None, TaskData, list[str]]:
    """Source, limit and rows to score: those named, else the test rows of the adapter's run, as the run read them; and
    what is left out.

    Raises:
        ConfigError: the run has no test rows, or there is no run to ask.
    """
    from manylora.data import EMBEDDED, DataNotes, available_splits, load_examples
    from manylora.jobs.subject import client_of
    from manylora.training import config_of_run
    from manylora.training.config import as_list

    if config.data is None and (client := client_of(config.adapter)) is not None:
        return _rows_of_client(config, *client)
    run = None if config.data is not None else config_of_run(config.adapter)
    if config.data is None and config.adapter is not None and run is None:
        raise ConfigError(
            f"{config.adapter} lies in no run, so its test rows are unknown; give rows to score with --data "
            f"(--data {EMBEDDED} for the embedded suite)."
        )
    data = config.data or (run and (run.test or run.data)) or EMBEDDED
    if run and not run.test and "test" not in available_splits(data):
        raise ConfigError(f"The run of {config.adapter} has no test rows; give rows to score with --data.")
    tasks = as_list(config.tasks)
    limit, notes = config.limit or (run.limit if run else None), DataNotes()
    test = load_examples(
        data,
        task_column=config.task_column or (run.task_column if run else None),
        tasks=tasks,
        split="test",
        limit=limit,
        notes=notes,
    )
    order = tasks or as_list(run.tasks if run else None) or list(test)
    return data, limit, {task: test[task] for task in order if task in test}, notes.lines()


def _rows_of_client(
    config: EvaluateConfig, run: Path, name: str, reference: bool
) -> tuple[str, int | None, TaskData, list[str]]:
    """`_rows` of a client of a federated run: the test rows that the run scored it on."""
    from manylora.data import sample_tasks
    from manylora.data.sources import pick_tasks
    from manylora.jobs.subject import client_rows
    from manylora.training.config import as_list

    if config.task_column is not None:
        raise ConfigError("--task-column is about rows that are named; give them with --data.")
    settings, test = client_rows(run, name, reference=reference)
    data = str(settings.test or settings.data)
    if tasks := as_list(config.tasks):
        test = pick_tasks(test, tasks, source=f"client {name}")
    return data, config.limit or settings.limit, sample_tasks(test, config.limit), []
