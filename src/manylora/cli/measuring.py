"""What `analyze` measures on rows: gradients and gates, source by source, with the base model loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.adapters import put_weights, read_weights
from manylora.analysis import Gates, Gradients, LabelReader, Reader, Source, measure_gates, measure_gradients
from manylora.cli.classifying import Labelled, is_classifier
from manylora.cli.console import CountProgress
from manylora.cli.options import AnalyzeOptions
from manylora.cli.subjects import client_of, client_rows, load_subject, run_settings
from manylora.data import (
    EMBEDDED,
    DataNotes,
    TaskData,
    available_splits,
    encode,
    load_examples,
    load_splits,
    sample_rows,
    sample_tasks,
)
from manylora.data.sources import pick_tasks
from manylora.errors import ConfigError, ManyLoraError
from manylora.evaluation.generation import NO_LIMIT
from manylora.training import adapter_base_name, context_of, encode_labelled
from manylora.training.config import as_list

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.data import Encoded


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is to be measured, and whether the user asked for it by name."""

    gradients: bool
    gates: bool
    asked: bool


def measure(
    sources: Sequence[Source], options: AnalyzeOptions
) -> tuple[list[Gradients], list[Gates], list[str]]:
    """Gradients, gates, and notes on what could not be measured.

    Raises:
        ManyLoraError: what the user asked for by name (--measure, --data, --step) cannot be measured.
    """
    wanted = _Wanted(
        gradients=options.measure in ("auto", "all", "gradients"),
        gates=options.measure in ("auto", "all", "gates"),
        asked=options.measure != "auto" or options.data is not None or options.step is not None,
    )
    gradients: list[Gradients] = []
    gates: list[Gates] = []
    notes: list[str] = []
    for source in sources if options.measure != "none" else ():
        try:
            found, routed, more = _measure_one(source, options, wanted)
        except ManyLoraError as error:
            if wanted.asked:
                raise
            notes.append(f"{source.name}: gradients and gates were not measured: {error}")
            continue
        gradients += found
        gates += routed
        notes += more
    return gradients, gates, notes


def _measure_one(
    source: Source, options: AnalyzeOptions, wanted: _Wanted
) -> tuple[list[Gradients], list[Gates], list[str]]:
    notes = []
    has_router = source.router == "token"
    shares = source.share != "none" or source.num_experts == 1
    if wanted.gradients and not shares:
        notes.append(f"{source.name}: its experts share no matrix, so tasks cannot conflict on one.")
    if wanted.gates and not has_router:
        notes.append(f"{source.name}: it has no token router, so it has no gates to look at.")
    with_gates = wanted.gates and has_router
    with_gradients = wanted.gradients and shares
    if not with_gates and not with_gradients:
        return [], [], notes if wanted.asked else []
    examples = _rows(source, options, left_out := DataNotes())
    notes += [f"{source.name}: {line}" for line in left_out.lines()]
    if len(examples) < 2 and with_gradients:
        notes.append(
            f"{source.name}: gradient conflict needs rows of two tasks; there is one ({', '.join(examples)})."
        )
        with_gradients = False
    if not with_gates and not with_gradients:
        return [], [], notes if wanted.asked else []
    read = _choosing if is_classifier(str(source.folder)) else _writing
    model, rows, reader = read(source, options, examples)
    if options.step is not None:
        _put_snapshot(model, source, options.step)
    count = sum(map(len, rows.values()))
    gradients, gates = [], []
    if with_gradients:
        progress = CountProgress(f"{source.name}: gradients of rows", count)
        gradients.append(measure_gradients(model, rows, reader, source=source.name, on_progress=progress))
    if with_gates:
        progress = CountProgress(f"{source.name}: gates of rows", count)
        gates += measure_gates(model, rows, reader, source=source.name, on_progress=progress)
    return gradients, gates, notes if wanted.asked else []


def _writing(
    source: Source, options: AnalyzeOptions, examples: TaskData
) -> tuple[PeftModel, dict[str, list[Encoded]], Reader]:
    """A language model, the rows as it reads them, and how."""
    subject = load_subject(
        str(source.folder), model=options.model, dtype=options.dtype, device=options.device
    )
    context = context_of(subject.model.config)
    rows = {
        task: [
            encode(
                row,
                subject.tokenizer,
                max_length=subject.max_length or context or NO_LIMIT,
                context_length=context,
                vocabulary=subject.model.get_input_embeddings().weight.shape[0],
            )
            for row in given
        ]
        for task, given in examples.items()
    }
    reader = Reader(
        pad_token_id=subject.tokenizer.pad_token_id or 0,
        experts=subject.experts,
        batch_size=options.batch_size,
    )
    return subject.model, rows, reader


def _choosing(
    source: Source, options: AnalyzeOptions, examples: TaskData
) -> tuple[PeftModel, dict[str, list[Encoded]], Reader]:
    """The same of a classifier."""
    head = Labelled.of(str(source.folder))
    model, tokenizer = head.load(
        str(source.folder), model=options.model, dtype=options.dtype, device=options.device
    )
    context = context_of(model.config)
    tasks = encode_labelled(
        examples, tokenizer, head.labels, max_length=head.max_length, context_length=context
    )
    reader = LabelReader(
        pad_token_id=tokenizer.pad_token_id,
        experts={task: number for number, task in enumerate(head.labels.tasks)}
        if source.router == "task"
        else None,
        batch_size=options.batch_size,
        labels=head.labels,
    )
    return model, {task.name: task.rows for task in tasks}, reader


def _rows(source: Source, options: AnalyzeOptions, notes: DataNotes) -> TaskData:
    """Training rows: those named, else the run's own, else the embedded suite for the embedded base.

    Raises:
        ConfigError: there are none to take.
    """
    tasks, limit = as_list(options.tasks), options.limit
    if options.data is not None:
        splits = available_splits(options.data)
        return load_examples(
            options.data,
            task_column=options.task_column,
            tasks=tasks,
            split="train" if "train" in splits else None,
            limit=limit,
            notes=notes,
        )
    if (client := client_of(str(source.folder))) is not None:
        folder, name, reference = client
        _, train = client_rows(folder, name, reference=reference, part="train")
        return sample_tasks(pick_tasks(train, tasks, source=source.name) if tasks else train, limit)
    run = run_settings(str(source.folder))
    if run.get("data"):
        names = ("data", "test", "validation", "tasks", "task_column", "seed", "validation_fraction", "limit")
        train = load_splits(**{name: run[name] for name in names if name in run}).train
        if unknown := [task for task in tasks or () if task not in train]:
            raise ConfigError(f"The run has no task {unknown[0]!r}; its tasks: {', '.join(train)}.")
        return {task: sample_rows(train[task], limit, task=task) for task in tasks or train}
    if (options.model or adapter_base_name(source.folder)) == EMBEDDED:
        notes.others.append("it comes from no run; what is measured is measured on the embedded suite's rows")
        return load_examples(EMBEDDED, tasks=tasks, split="train", limit=limit)
    raise ConfigError(f"{source.name} comes from no run; give rows of its tasks with --data.")


def _put_snapshot(model: PeftModel, source: Source, step: int) -> None:
    if step not in source.snapshots:
        raise ConfigError(
            f"{source.name} kept no weights of step {step}; it kept "
            f"{', '.join(map(str, source.snapshots)) or 'none (train with --keep-adapters 4)'}."
        )
    put_weights(model, read_weights(source.snapshots[step]), source=source.snapshots[step])
