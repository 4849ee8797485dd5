"""Scores of a classifier: accuracy among each task's labels, the majority baseline, and a whole run in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.data import TaskData, prompt_text
from manylora.errors import ConfigError, DataError
from manylora.evaluation.chance import chance_notes
from manylora.evaluation.metrics import ACCURACY
from manylora.evaluation.score import ScoredExample, Scores, read_scores, sum_examples, write_scores
from manylora.training import RunFolder, TrainConfig
from manylora.training.config import filled

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.training import LabelSets, Prepared, TaskFacts


def score_labels(data: TaskData, predictions: Mapping[str, list[str]]) -> Scores:
    """Accuracy per task: 100 for a row whose label is predicted, else 0.

    Args:
        data: task to rows; a row's label is its output, white space normalised.
        predictions: task to labels, in the order of the rows.

    Raises:
        DataError: there is no task, or not one prediction per row.
    """
    if not data:
        raise DataError("There is no task to score. Give rows of at least one task.")
    from manylora.training import label_of

    tasks = []
    for task, rows in data.items():
        found = predictions.get(task, [])
        if len(found) != len(rows):
            raise DataError(
                f"Task {task!r} has {len(rows)} rows but {len(found)} predictions; give one per row."
            )
        examples = tuple(
            ScoredExample(
                task=task,
                index=index,
                prompt=prompt_text(row),
                prediction=label,
                reference=label_of(row),
                answer=None,
                metrics={ACCURACY: 100.0 * (label == label_of(row))},
                origin=row.origin,
            )
            for index, (row, label) in enumerate(zip(rows, found, strict=True))
        )
        tasks.append(sum_examples(task, examples))
    return Scores(tasks=tuple(tasks))


def majority_scores(labels: LabelSets, test: TaskData) -> dict[str, float]:
    """Task to the accuracy of its most frequent training label."""
    constant = {task: [labels.majority[task]] * len(rows) for task, rows in test.items()}
    return score_labels(test, constant).by_task()


def score_classifier(prepared: Prepared, run: RunFolder, model: PeftModel) -> Scores:
    """Score a finished classification run on its test rows; write predictions.jsonl and scores.json.

    scores.json holds the majority baseline beside the scores, and a note on tasks that are not above it.
    """
    from manylora.training import predict_labels

    labels, test = prepared.labels, prepared.splits.test
    assert labels is not None
    predictions = predict_labels(
        model,
        prepared.tokenizer,
        test,
        labels,
        max_length=prepared.config.max_length,
        batch_size=prepared.config.eval_batch_size,
    )
    scores, baselines = score_labels(test, predictions), {"majority": majority_scores(labels, test)}
    write_scores(run.path, scores, baselines, chance_notes(scores, baselines, router=prepared.config.router))
    return scores


def classify(
    config: TrainConfig,
    out: str | Path,
    *,
    report: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Scores:
    """Train a multi-task classifier and score it, from the start or from where an earlier call with `out` broke off.

    The order of the rows, the cut of validation rows and the head's first weights depend on the data and
    `config.seed` alone, so that all methods read the same batches.

    Args:
        config: with `task_type="SEQ_CLS"`.
        out: run folder; a finished one is read, not trained again.
        report: called with step, number of steps and the trainer's log.

    Raises:
        ConfigError: `config` is of another task type, or `out` holds a run with other settings.
        DataError: there are no test rows, or see `manylora.training.prepare`.
    """
    from manylora.training import finetune, prepare

    if config.task_type != "SEQ_CLS":
        raise ConfigError(f"task_type is {config.task_type}; classify trains classifiers, so give SEQ_CLS.")
    path = Path(out).expanduser()
    begun = (path / "state.json").is_file()
    run = RunFolder.open(path) if begun else None
    prepared = prepare(config)
    check_classes(prepared)
    if not prepared.splits.test:
        raise DataError("There are no test rows to score on; give them with the setting test.")
    settings = prepared.config.to_dict()
    if run is None:
        run = RunFolder.create(str(path), config=settings, seed=config.seed)
    elif filled(run.read_config()) != settings:
        raise ConfigError(f"{path} holds a run with other settings; give another folder.")
    else:
        if run.state.get("state") == "finished":
            return read_scores(run.path)
        run.lock()
    with run:
        try:
            scores = score_classifier(prepared, run, finetune(prepared, run, report=report))
            run.set_state("finished")
        except BaseException as error:
            with contextlib.suppress(OSError):
                run.set_state("failed", error=repr(error))
            raise
    return scores


def check_classes(prepared: Prepared) -> None:
    """Refuse, before anything is trained, test tasks that the head will not know.

    Raises:
        DataError: there are some.
    """
    assert prepared.labels is not None
    prepared.labels.check(prepared.splits.test, what="test")


def read_labels(facts: TaskFacts, *, source: Path) -> LabelSets:
    """The labels that a run noted in its tasks.json.

    Args:
        facts: what the file says.
        source: its path, for the error.

    Raises:
        DataError: it holds none.
    """
    from manylora.training import LabelSets

    for task, known in facts.tasks.items():
        if not known.labels or known.majority is None:
            raise DataError(f"{source} names no labels of task {task!r}; train the classifier again.")
    return LabelSets(
        tasks={task: list(known.labels or ()) for task, known in facts.tasks.items()},
        majority={task: known.majority or "" for task, known in facts.tasks.items()},
    )
