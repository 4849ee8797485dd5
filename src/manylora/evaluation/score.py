"""Predictions to scores: one task's, and those of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from manylora.data import Example, TaskData, Words, answer_text, options_of, prompt_text
from manylora.errors import DataError
from manylora.evaluation.metrics import Answered, has_word, leading_metric, measure_row
from manylora.evaluation.rules import AnswerRule, rules_for
from manylora.evaluation.scores import Estimate, ScoredExample, Scores, TaskScore
from manylora.evaluation.statistics import standard_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    rows = []
    for index, (example, prediction, rule) in enumerate(zip(examples, predictions, rules, strict=True)):
        answered = Answered(
            prediction=prediction.strip(),
            reference=_reference(task, index, example, tokenizer),
            prompt=(prompt := prompt_text(example)),
            options=options_of(prompt),
            answer=example.answer,
            rule=rule,
            strictly=strictly,
            rouge=rouge,
        )
        rows.append(
            ScoredExample(
                task=task,
                index=index,
                prompt=prompt,
                prediction=answered.prediction,
                reference=answered.reference,
                answer=example.answer,
                metrics=measure_row(answered),
                origin=example.origin,
            )
        )
    return sum_examples(task, rows)


def sum_examples(task: str, rows: Sequence[ScoredExample]) -> TaskScore:
    """A task's score from its scored rows, of which there is at least one."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    metrics = {name: estimate([row.metrics[name] for row in rows if name in row.metrics]) for name in names}
    main = leading_metric(list(metrics))
    return TaskScore(
        task=task,
        n=len(rows),
        metric=main,
        score=metrics[main].mean,
        standard_error=metrics[main].standard_error,
        metrics=metrics,
        examples=tuple(rows),
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


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of some values, of which there is at least one."""
    return Estimate(
        mean=math.fsum(values) / len(values), standard_error=standard_error(values), n=len(values)
    )
