"""What `analyze` finds: of matrices alone, and, source by source with the base model loaded, of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from manylora.adapters import put_weights, read_weights
from manylora.analysis import (
    Analysis,
    Gates,
    Gradients,
    RandomBaseline,
    Reader,
    Source,
    changes,
    measure_gates,
    measure_gradients,
    similarities,
)
from manylora.data import (
    EMBEDDED,
    DataNotes,
    TaskData,
    available_splits,
    load_examples,
    sample_rows,
    sample_tasks,
)
from manylora.data.sources import pick_tasks
from manylora.errors import ConfigError, ManyLoraError
from manylora.files import write_json
from manylora.jobs.subject import client_of, client_rows, load_subject
from manylora.training import adapter_base_name, config_of_run
from manylora.training.config import as_list
from manylora.training.prepared import all_rows

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.jobs.progress import Progress
    from manylora.jobs.session import Session
    from manylora.jobs.settings import AnalyzeConfig


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is to be measured, and whether the user asked for it by name."""

    gradients: bool
    gates: bool
    asked: bool


def analyse(sources: Sequence[Source], config: AnalyzeConfig, *, progress: Progress) -> Analysis:
    """Everything that the sources, and rows where `config` asks for them, tell.

    Raises:
        ModelError, ConfigError, DataError: the adapters cannot be compared, or what was asked for cannot be measured.
    """
    similarity = similarities(sources, baseline=RandomBaseline(seed=config.seed))
    change = [one for source in sources for one in changes(source)]
    notes = []
    if not similarity:
        notes.append("similarity: there is one A and one B; give a second adapter to compare with.")
    if not change:
        notes.append("change: no run kept weights of earlier steps; train with --keep-adapters 4.")
    gradients, gates, more = _measure(sources, config, progress)
    return Analysis(
        sources=[source.facts() for source in sources],
        similarity=similarity,
        change=change,
        gradients=gradients,
        gates=gates,
        baseline_seed=config.seed,
        notes=[*notes, *more],
    )


def conclude(found: Analysis, session: Session) -> None:
    """Write analysis.json and finish the run."""
    write_json(session.path / "analysis.json", found.to_dict())
    session.finish()


def _measure(
    sources: Sequence[Source], config: AnalyzeConfig, progress: Progress
) -> tuple[list[Gradients], list[Gates], list[str]]:
    """Gradients, gates, and notes on what could not be measured.

    Raises:
        ManyLoraError: what the user asked for by name (--measure, --data, --step) cannot be measured.
    """
    wanted = _Wanted(
        gradients=config.measure in ("auto", "all", "gradients"),
        gates=config.measure in ("auto", "all", "gates"),
        asked=config.measure != "auto" or config.data is not None or config.step is not None,
    )
    gradients: list[Gradients] = []
    gates: list[Gates] = []
    notes: list[str] = []
    for source in sources if config.measure != "none" else ():
        try:
            found, routed, more = _measure_one(source, config, wanted, progress)
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
    source: Source, config: AnalyzeConfig, wanted: _Wanted, progress: Progress
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
    examples = _rows(source, config, left_out := DataNotes())
    notes += [f"{source.name}: {line}" for line in left_out.lines()]
    if len(examples) < 2 and with_gradients:
        notes.append(
            f"{source.name}: gradient conflict needs rows of two tasks; there is one ({', '.join(examples)})."
        )
        with_gradients = False
    if not with_gates and not with_gradients:
        return [], [], notes if wanted.asked else []
    subject = load_subject(str(source.folder), model=config.model, dtype=config.dtype, device=config.device)
    model, kind = subject.model, subject.kind
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = {task.name: task.rows for task in kind.encode(examples, vocabulary=vocabulary)}
    reader = Reader(
        pad_token_id=kind.tokenizer.pad_token_id or 0,
        experts=kind.experts,
        batch_size=config.batch_size,
        loss_of=kind.loss,
    )
    if config.step is not None:
        _put_snapshot(model, source, config.step)
    count = sum(map(len, rows.values()))
    gradients, gates = [], []
    if with_gradients:
        show = partial(progress.show_count, f"{source.name}: gradients of rows", total=count)
        gradients.append(measure_gradients(model, rows, reader, source=source.name, on_progress=show))
    if with_gates:
        show = partial(progress.show_count, f"{source.name}: gates of rows", total=count)
        gates += measure_gates(model, rows, reader, source=source.name, on_progress=show)
    return gradients, gates, notes if wanted.asked else []


def _rows(source: Source, config: AnalyzeConfig, notes: DataNotes) -> TaskData:
    """Training rows: those named, else the run's own, else the embedded suite for the embedded base.

    Raises:
        ConfigError: there are none to take.
    """
    tasks, limit = as_list(config.tasks), config.limit
    if config.data is not None:
        splits = available_splits(config.data)
        return load_examples(
            config.data,
            task_column=config.task_column,
            tasks=tasks,
            split="train" if "train" in splits else None,
            limit=limit,
            notes=notes,
        )
    if (client := client_of(str(source.folder))) is not None:
        folder, name, reference = client
        _, train = client_rows(folder, name, reference=reference, part="train")
        return sample_tasks(pick_tasks(train, tasks, source=source.name) if tasks else train, limit)
    if (run := config_of_run(str(source.folder))) is not None:
        train = all_rows(run).train
        if unknown := [task for task in tasks or () if task not in train]:
            raise ConfigError(f"The run has no task {unknown[0]!r}; its tasks: {', '.join(train)}.")
        return {task: sample_rows(train[task], limit, task=task) for task in tasks or train}
    if (config.model or adapter_base_name(source.folder)) == EMBEDDED:
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
