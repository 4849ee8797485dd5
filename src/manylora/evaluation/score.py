"""Predictions to scores: one task's, and the mean over tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from manylora.data import Example, TaskData, answer_text, options_of, prompt_text
from manylora.errors import DataError
from manylora.evaluation.metrics import exact_match, has_word, option_accuracy, rouge1
from manylora.evaluation.rules import AnswerRule, rules_for
from manylora.evaluation.statistics import standard_error
from manylora.training.settings import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACCURACY = "accuracy"
"""Share of rows that are right by the task's answer rule (see `manylora.evaluation.rules`)."""
STRICT_ACCURACY = "strict_accuracy"
"""The same under the rule's strict reading, where it has one (AQuA)."""
ROUGE1 = "rouge1_all"
"""ROUGE-1 over the words of every script."""
ROUGE1_PUBLISHED = "rouge1"
"""ROUGE-1 as published and as earlier versions measured it: words of a–z and 0–9 alone. A name of its own, so that
scores under the two are never taken for one."""
EXACT_MATCH = "exact_match"
OPTION_ACCURACY = "option_accuracy"
"""Share of rows that name the right option, over the rows whose prompt lists it under OPTIONS."""
_ROUGE_NAMES: Mapping[Words, str] = {"all": ROUGE1, "published": ROUGE1_PUBLISHED}


class Estimate(NamedTuple):
    """A mean over examples with its standard error (NaN for one example) and their number."""

    mean: float
    standard_error: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON-ready values."""
        return {"mean": self.mean, "standard_error": _or_none(self.standard_error), "n": self.n}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Estimate:
        """Read back what `to_dict` wrote."""
        return cls(saved["mean"], _or_nan(saved["standard_error"]), saved["n"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredExample:
    """One prediction beside what it was scored against."""

    task: str
    index: int
    """Position of the example in its task."""
    prompt: str
    prediction: str
    reference: str
    """The text that ROUGE-1 and exact match compare with: the output, or the answer where that is empty."""
    answer: str | None
    """Gold label, where the row has one."""
    metrics: Mapping[str, float]
    """Metric name to this example's value, 0 to 100."""
    origin: str = ""

    def to_dict(self) -> dict[str, Any]:
        """One line of `predictions.jsonl`."""
        return {
            "task": self.task,
            "index": self.index,
            "origin": self.origin,
            "prompt": self.prompt,
            "prediction": self.prediction,
            "reference": self.reference,
            "answer": self.answer,
            **self.metrics,
        }


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task's score: the mean of its main metric over its examples, 0 to 100."""

    task: str
    n: int
    metric: str
    """Main metric: `ACCURACY` where the rows have labels that an answer rule reads, else `ROUGE1` or, on demand,
    `ROUGE1_PUBLISHED`."""
    score: float
    standard_error: float
    """Of the mean over the examples, sd / sqrt(n) with ddof = 1; NaN where n is 1."""
    metrics: Mapping[str, Estimate]
    """Every metric measured, the main one included."""
    examples: tuple[ScoredExample, ...]
    """The rows behind the score, in the order of the data; empty in a score that was read back."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values, without the examples."""
        return {
            "task": self.task,
            "metric": self.metric,
            "score": self.score,
            "standard_error": _or_none(self.standard_error),
            "n": self.n,
            "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TaskScore:
        """Read back what `to_dict` wrote; there are no examples in it."""
        return cls(
            task=saved["task"],
            n=saved["n"],
            metric=saved["metric"],
            score=saved["score"],
            standard_error=_or_nan(saved["standard_error"]),
            metrics={name: Estimate.from_dict(estimate) for name, estimate in saved["metrics"].items()},
            examples=(),
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of several tasks."""

    tasks: tuple[TaskScore, ...]

    def __getitem__(self, task: str) -> TaskScore:
        """The score of a task."""
        for found in self.tasks:
            if found.task == task:
                return found
        raise KeyError(f"{task!r} was not scored; the tasks are {', '.join(self.by_task())}")

    @property
    def mean(self) -> float:
        """Mean over tasks of their main scores; every task counts alike."""
        return math.fsum(task.score for task in self.tasks) / len(self.tasks)

    @property
    def standard_error(self) -> float:
        """Standard error of `mean` from the sampling of test examples: sqrt(Σ se²) / number of tasks.

        It holds the tasks and the trained model fixed, so it says nothing about seeds.
        """
        return math.sqrt(math.fsum(task.standard_error**2 for task in self.tasks)) / len(self.tasks)

    @property
    def n(self) -> int:
        """Examples of all tasks together."""
        return sum(task.n for task in self.tasks)

    def by_task(self) -> dict[str, float]:
        """Task to its main score."""
        return {task.task: task.score for task in self.tasks}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values, without the examples."""
        return {
            "mean": self.mean,
            "standard_error": _or_none(self.standard_error),
            "n": self.n,
            "tasks": self.to_rows(),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Scores:
        """Read back what `to_dict` wrote; there are no examples in it."""
        return cls(tasks=tuple(map(TaskScore.from_dict, saved["tasks"])))

    def to_rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per task."""
        return [task.to_dict() for task in self.tasks]

    def prediction_rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row per example, the lines of `predictions.jsonl`."""
        return [example.to_dict() for task in self.tasks for example in task.examples]


def score_task(
    task: str,
    examples: Sequence[Example],
    predictions: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rouge: Words = "all",
) -> TaskScore:
    """Score one task's predictions, which stand in the order of its examples.

    Args:
        task: its name.
        examples: its rows.
        predictions: what was answered.
        tokenizer: of the model that answered, whose chat template puts answers that call tools or think into words
            (`manylora.data.answer_text`). Default: rows have none.
        rouge: what ROUGE-1 takes for words (`rouge1`).

    Raises:
        DataError: there are no examples, not as many predictions, an example with neither output nor answer,
            only some examples with an answer, or answers that contradict the task's rule; or an answer that needs
            `tokenizer`.
    """
    if not examples:
        raise DataError(f"Task {task!r} has no rows to score. Give at least one.")
    if len(examples) != len(predictions):
        raise DataError(
            f"Task {task!r} has {len(examples)} rows but {len(predictions)} predictions. "
            "Give one prediction per row, in order."
        )
    rules: Sequence[AnswerRule | None] = rules_for(task, _answers(task, examples)) or [None] * len(examples)
    strictly = any(rule is not None and rule.read_strictly is not None for rule in rules)
    rows = tuple(
        _score_example(
            task,
            index,
            example,
            prediction.strip(),
            rule,
            strictly=strictly,
            reference=_reference(task, index, example, tokenizer),
            rouge=rouge,
        )
        for index, (example, prediction, rule) in enumerate(zip(examples, predictions, rules, strict=True))
    )
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    metrics = {name: _estimate([row.metrics[name] for row in rows if name in row.metrics]) for name in names}
    main = ACCURACY if ACCURACY in metrics else _ROUGE_NAMES[rouge]
    return TaskScore(
        task=task,
        n=len(rows),
        metric=main,
        score=metrics[main].mean,
        standard_error=metrics[main].standard_error,
        metrics=metrics,
        examples=rows,
    )


def score_all(
    data: TaskData,
    predictions: Mapping[str, Sequence[str]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rouge: Words = "all",
) -> Scores:
    """Score every task of `data`.

    Args:
        data: task to examples.
        predictions: task to predictions, in the order of the task's examples.
        tokenizer: see `score_task`.
        rouge: see `score_task`.

    Raises:
        DataError: there is no task, a task has no predictions, or see `score_task`.
    """
    if not data:
        raise DataError("There is no task to score. Give rows of at least one task.")
    missing = [task for task in data if task not in predictions]
    if missing:
        raise DataError(f"The tasks {missing} have no predictions. Those that have: {list(predictions)}.")
    return Scores(
        tasks=tuple(
            score_task(task, rows, predictions[task], tokenizer=tokenizer, rouge=rouge)
            for task, rows in data.items()
        )
    )


def _answers(task: str, examples: Sequence[Example]) -> list[str]:
    answers = [example.answer for example in examples if example.answer is not None]
    if answers and len(answers) < len(examples):
        without = next(example for example in examples if example.answer is None)
        raise DataError(
            f"Task {task!r}: {len(examples) - len(answers)} of {len(examples)} rows have no answer"
            f"{f' (such as {without.origin})' if without.origin else ''}, the others have one. "
            "Give every row of the task an answer, or none."
        )
    return answers


def wordless(data: TaskData, *, rouge: Words = "all") -> list[str]:
    """A sentence for each task with reference answers in which ROUGE-1 finds no word: it gives such rows 0, whatever is
    answered. Exact match sees them."""
    found = []
    for task, rows in data.items():
        empty = sum(row.answer is None and not has_word(row.answer_key, words=rouge) for row in rows)
        if empty:
            found.append(
                f"{empty} of {len(rows)} test answers of task {task} have no word that ROUGE-1 counts; look at exact "
                "match"
            )
    return found


def _reference(task: str, index: int, example: Example, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None and example.answer_fields:
        raise DataError(
            f"{example.origin or f'Row {index} of task {task!r}'} has an answer with "
            f"{', '.join(example.answer_fields)}, which a chat template puts into words. Give the tokenizer, too."
        )
    text = answer_text(example, tokenizer) if tokenizer is not None and example.has_answer else example.output
    reference = text.strip() or (example.answer or "").strip()
    if not reference:
        raise DataError(
            f"{example.origin or f'Row {index} of task {task!r}'} has no reference answer to score against. "
            "Give one or remove the row."
        )
    return reference


def _score_example(
    task: str,
    index: int,
    example: Example,
    prediction: str,
    rule: AnswerRule | None,
    *,
    strictly: bool,
    reference: str,
    rouge: Words,
) -> ScoredExample:
    prompt = prompt_text(example)
    metrics = {
        _ROUGE_NAMES[rouge]: rouge1(prediction, reference, words=rouge),
        EXACT_MATCH: exact_match(prediction, reference),
    }
    options = options_of(prompt)
    choice = option_accuracy(prediction, reference, options) if options else None
    if choice is not None:
        metrics[OPTION_ACCURACY] = choice
    if rule is not None and example.answer is not None:
        metrics[ACCURACY] = 100.0 * rule.correct(prediction, example.answer)
        if strictly:
            metrics[STRICT_ACCURACY] = 100.0 * rule.strictly_correct(prediction, example.answer)
    return ScoredExample(
        task=task,
        index=index,
        prompt=prompt,
        prediction=prediction,
        reference=reference,
        answer=example.answer,
        metrics=metrics,
        origin=example.origin,
    )


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(math.fsum(values) / len(values), standard_error(values), len(values))


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
