"""Evaluate: rows → an answer to each → scores, of an adapter or of a bare model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from manylora.errors import ConfigError
from manylora.files import check_values

if TYPE_CHECKING:
    from manylora.data import TaskData
    from manylora.evaluation import Scores
    from manylora.jobs.progress import Progress
    from manylora.jobs.subject import Subject


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to score, on what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder. Default: none, the bare model is scored."""
    data: str | None = None
    """Test rows: "embedded", a file or folder of JSON, JSONL, CSV, TSV or Parquet, or a Hub data set id. Default: those
    of the adapter's run, else the embedded suite."""
    model: str | None = None
    """Base model. Default: the one the adapter was trained on, else the embedded one."""
    tasks: list[str] | str | None = None
    """Only these tasks, as "a,b" or a YAML list. Default: all; those of the run where its test rows are scored."""
    task_column: str | None = None
    """Column that names a row's task. Default: the column "task", else the file's name; the run's own where its test
    rows are scored."""
    limit: int | None = None
    """At most this many rows per task: a sample, the same each time, in which each answer keeps its share. Default:
    all; that of the run where its test rows are scored."""
    batch_size: int = 64
    """Rows per batch. It does not change the answers."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: per task what the run noted from its training rows, else 64."""
    max_length: int | None = None
    """Tokens a prompt may have; a longer one loses its beginning, which is said. Default: as in the adapter's training,
    else as many as the model reads."""
    rouge: Literal["all", "published"] | None = None
    """What ROUGE-1 counts as words: "all", those of every script; "published", runs of a-z and 0-9 alone. Default: that
    of the adapter's run, else all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: float32 on CPU, bfloat16 on a GPU that has it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    out: str | None = None
    """Folder for predictions.jsonl and scores.json; must not exist. Default: nothing is written."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("limit", "batch_size", "max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a value above 0.")


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
        _show_notes(notes, progress)
        subject = load_subject(config.adapter, model=config.model, dtype=config.dtype, device=config.device)
        kind = subject.kind.with_settings(
            source=str(config.adapter),
            **{
                name: getattr(config, name)
                for name in ("batch_size", "max_length", "max_new_tokens", "rouge")
            },
        )
        _show_notes([*_gaps(subject, config, test), *kind.remarks(test)], progress)
        scores = score_rows(kind, subject.model, test, progress=progress)
        baselines, beneath = kind.baselines(test, source=source, limit=limit), list[str]()
        if config.adapter is not None:  # of a bare model nobody expects that it has learnt
            router = getattr(subject.model.active_peft_config, "router", None)
            beneath = kind.notes(scores, baselines, test, router=router)
        progress.show_scores(scores, baselines, beneath)
        if folder is not None:
            write_scores(folder, scores, baselines, beneath)
    return scores


def _show_notes(notes: list[str], progress: Progress) -> None:
    for note in notes:
        progress.show_line(f"note: {note}")


def _gaps(subject: Subject, config: EvaluateConfig, test: TaskData) -> list[str]:
    """Sentences on what the rows lack, or ask in another form than the adapter was trained on."""
    from manylora.data import missing_tasks, single_answers

    found = missing_tasks(subject.kind.known_tasks, test) if config.tasks is None else []
    known = subject.prompts.tasks if subject.prompts else {}
    for task, rows in test.items():
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
        ConfigError: the run has no test rows.
    """
    from manylora.data import EMBEDDED, DataNotes, available_splits, load_examples
    from manylora.jobs.subject import config_of_run
    from manylora.training.config import as_list

    run = None if config.data is not None else config_of_run(config.adapter)
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
