"""`manylora evaluate`: score an adapter, or a bare model, on test rows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.options import EvaluateOptions
from manylora.cli.parsing import parse
from manylora.errors import ConfigError, RunError

if TYPE_CHECKING:
    from manylora.cli.subjects import Subject
    from manylora.data import TaskData

DESCRIPTION = """\
Generate an answer to every test row, greedily, and print a table of scores per task.

  manylora evaluate --adapter runs/train-001                         the test rows of that run
  manylora evaluate --adapter runs/train-001 --data flan8/test       other rows
  manylora evaluate --data embedded                                  the bare base model, zero-shot

ROUGE-1 and exact match for every row; accuracy where the rows carry a gold `answer` (commonsense and math
files); option accuracy where a prompt lists OPTIONS. A classifier (train --task-type SEQ_CLS) chooses instead of
writing, and is scored by accuracy."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    options, _ = parse(EvaluateOptions, arguments, verb="evaluate", description=DESCRIPTION)
    if options.out is not None:
        if Path(options.out).exists():
            raise RunError(f"{options.out} exists already; choose another --out.")
        Path(options.out).mkdir(parents=True)  # at once, so that hours of answers are not lost to a bad name
    try:
        return _evaluate(options)
    except BaseException:
        if options.out is not None:
            with contextlib.suppress(OSError):
                Path(options.out).rmdir()  # only while it is empty
        raise


def _evaluate(options: EvaluateOptions) -> int:
    from manylora.cli.classifying import evaluate_classifier, is_classifier
    from manylora.cli.scoring import score, suite_baselines
    from manylora.cli.subjects import load_subject, run_settings
    from manylora.cli.tables import print_scores
    from manylora.evaluation import CONSTANT, chance_notes, constant_scores, wordless, write_scores

    data, limit, test, notes = _rows(options)
    for note in notes:
        print(f"note: {note}")
    if is_classifier(options.adapter):
        return evaluate_classifier(options, test)
    rouge = options.rouge or run_settings(options.adapter).get("rouge", "all")
    subject = load_subject(options.adapter, model=options.model, dtype=options.dtype, device=options.device)
    for note in (*_gaps(subject, options, test), *wordless(test, rouge=rouge)):
        print(f"note: {note}")
    scores = score(
        subject.model,
        subject.tokenizer,
        test,
        answer_tokens=dict.fromkeys(test, options.max_new_tokens)
        if options.max_new_tokens
        else subject.answer_tokens,
        batch_size=options.batch_size,
        max_length=options.max_length or subject.max_length,
        experts=subject.experts,
        rouge=rouge,
    )
    baselines = suite_baselines(data, list(test), limit=limit, rouge=rouge)
    beneath: list[str] = []
    if options.adapter is not None:  # of a bare model nobody expects that it has learnt
        router = getattr(subject.model.active_peft_config, "router", None)
        beside = baselines or {CONSTANT: constant_scores(test, rouge=rouge)}
        beneath = chance_notes(scores, beside, router=router)
    print_scores(scores, baselines, beneath)
    if options.out is not None:
        folder = Path(options.out)
        write_scores(folder, scores, baselines, beneath)
        print(f"written to {folder}")
    return 0


def _gaps(subject: Subject, options: EvaluateOptions, test: TaskData) -> list[str]:
    """Sentences on what the rows lack, or ask in another form than the adapter was trained on."""
    from manylora.data import missing_tasks, single_answers

    found = missing_tasks(subject.answer_tokens, test) if options.tasks is None else []
    known = subject.prompts.tasks if subject.prompts else {}
    for task, rows in test.items():
        forms = {row.form for row in rows}
        if task in known and known[task].form not in forms:
            found.append(
                f"the rows of task {task} are of the form {', '.join(sorted(forms))}, but it was trained on "
                f"{known[task].form}"
            )
    return [*found, *single_answers(test, what="test")]


def _rows(options: EvaluateOptions) -> tuple[str, int | None, TaskData, list[str]]:
    """Source, limit and rows to score: those named, else the test rows of the adapter's run, as the run read them; and
    what is left out.

    Raises:
        ConfigError: the run has no test rows, or there is no run to ask.
    """
    from manylora.cli.subjects import client_of, run_settings
    from manylora.data import EMBEDDED, DataNotes, available_splits, load_examples
    from manylora.training.config import as_list

    if options.data is None and (client := client_of(options.adapter)) is not None:
        return _rows_of_client(options, *client)
    run = {} if options.data is not None else run_settings(options.adapter)
    if options.data is None and options.adapter is not None and not run:
        raise ConfigError(
            f"{options.adapter} lies in no run, so its test rows are unknown; give rows to score with --data "
            f"(--data {EMBEDDED} for the embedded suite)."
        )
    data = str(options.data or run.get("test") or run.get("data") or EMBEDDED)
    if run and not run.get("test") and "test" not in available_splits(data):
        raise ConfigError(f"The run of {options.adapter} has no test rows; give rows to score with --data.")
    tasks = as_list(options.tasks)
    limit, notes = options.limit or run.get("limit"), DataNotes()
    test = load_examples(
        data,
        task_column=options.task_column or run.get("task_column"),
        tasks=tasks,
        split="test",
        limit=limit,
        notes=notes,
    )
    order = tasks or run.get("tasks") or list(test)
    return data, limit, {task: test[task] for task in order if task in test}, notes.lines()


def _rows_of_client(
    options: EvaluateOptions, run: Path, name: str, reference: bool
) -> tuple[str, int | None, TaskData, list[str]]:
    """`_rows` of a client of a federated run: the test rows that the run scored it on."""
    from manylora.cli.subjects import client_rows
    from manylora.data import sample_tasks
    from manylora.data.sources import pick_tasks
    from manylora.training.config import as_list

    if options.task_column is not None:
        raise ConfigError("--task-column is about rows that are named; give them with --data.")
    config, test = client_rows(run, name, reference=reference)
    data = str(config.test or config.data)
    if tasks := as_list(options.tasks):
        test = pick_tasks(test, tasks, source=f"client {name}")
    return data, options.limit or config.limit, sample_tasks(test, options.limit), []
