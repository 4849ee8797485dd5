"""Classification: each task's labels, and rows that carry one.

One head serves all tasks. Its outputs are the labels of all tasks laid end to end; a row's loss and its prediction
look at those of the row's task alone.

Shape letters: B rows, T tokens, K tasks, C labels of all tasks together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from manylora.data import Encoded, Example, TaskData, check_token_rows, without_options
from manylora.errors import DataError
from manylora.training.batches import EncodedTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LABELS = 50
"""A task with more distinct answers is taken for one of free text. TREC's fine question types, the most that a
common benchmark has, are 50."""


@dataclass(frozen=True, kw_only=True)
class LabelSets:
    """The labels of each task, in the order of the head's outputs."""

    tasks: Mapping[str, Sequence[str]]
    majority: Mapping[str, str]
    """The most frequent label of each task's training rows; of several the first."""

    @classmethod
    def of(cls, train: TaskData) -> LabelSets:
        """The distinct answers of each task's training rows, sorted.

        Raises:
            DataError: a task has more than `MAX_LABELS` labels, or one alone.
        """
        counts = {task: Counter(sorted(map(label_of, rows))) for task, rows in train.items()}
        tasks = {task: list(found) for task, found in counts.items()}
        for task, labels in tasks.items():
            if len(labels) > MAX_LABELS:
                raise DataError(
                    f"Task {task!r} has {len(labels)} distinct answers (such as {labels[0][:40]!r}), more than "
                    f"{MAX_LABELS} labels, so it is not one of choosing; leave it out with --tasks, or train with "
                    "--task-type CAUSAL_LM."
                )
            if len(labels) == 1:
                raise DataError(
                    f"All training rows of task {task!r} have one label, {labels[0]!r}; there is nothing to choose. "
                    "Leave the task out with --tasks."
                )
        return cls(tasks=tasks, majority={task: found.most_common(1)[0][0] for task, found in counts.items()})

    @property
    def count(self) -> int:
        """C: labels of all tasks together."""
        return sum(map(len, self.tasks.values()))

    @property
    def numbers(self) -> dict[str, int]:
        """Task to its place among the tasks, which is its expert under the task router."""
        return {task: number for number, task in enumerate(self.tasks)}

    def first(self, task: str) -> int:
        """The head's output at which the labels of `task` begin."""
        names = list(self.tasks)
        return sum(len(self.tasks[name]) for name in names[: names.index(task)])

    def allowed(self) -> torch.Tensor:
        """(K, C): whether a label is of the task."""
        owner = [number for number, labels in enumerate(self.tasks.values()) for _ in labels]
        return torch.arange(len(self.tasks))[:, None] == torch.tensor(owner)[None, :]

    def check(self, data: TaskData, *, what: str) -> None:
        """Refuse rows of tasks that the head has no labels for.

        Raises:
            DataError: there are some.
        """
        if unknown := sorted(set(data) - set(self.tasks)):
            raise DataError(
                f"The {what} tasks {', '.join(unknown)} have no labels in the head; it knows {', '.join(self.tasks)}."
            )


def label_of(example: Example) -> str:
    """The row's answer as a label: white space at its ends and its runs inside do not count."""
    return " ".join(example.output.split())


def question_of(example: Example) -> str:
    """What a classifier reads: instruction and input, or the turns of a chat, as they stand and without a list of
    options: the head knows them.

    Raises:
        DataError: the row has tools, or turns that call them, which have no place in such a text.
    """
    if example.tools or any("tool_calls" in turn.fields for turn in example.messages):
        raise DataError(
            f"{example.origin or f'A row of task {example.task!r}'}: field 'tools' or 'tool_calls' is not read by a "
            "classifier; write it into the turns' text, or leave the row out."
        )
    parts = (
        [turn.content for turn in example.messages]
        if example.form == "chat"
        else [
            example.system,
            *(text for turn in example.history for text in turn),
            example.instruction,
            example.input,
        ]
    )
    return "\n\n".join(without_options(part) for part in parts if part.strip())


def encode_questions(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[tuple[list[int], bool]]:
    """The token ids of each row, special tokens included, and whether it was longer and lost its end."""
    texts = [question_of(example) for example in examples]
    whole = tokenizer(texts, truncation=False, padding=False).input_ids
    cut = tokenizer(texts, truncation=True, max_length=max_length, padding=False).input_ids
    return [(short, len(short) < len(long)) for short, long in zip(cut, whole, strict=True)]


def encode_labelled(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    labels: LabelSets,
    *,
    max_length: int,
    vocabulary: int | None = None,
) -> list[EncodedTask]:
    """Every row of every task, in order; `labels` of a row holds one number, the head's output for its label.

    Args:
        data: rows whose labels are among `labels`.
        tokenizer: the base's.
        labels: of every task.
        max_length: tokens that a row may have; the end of a longer one is cut.
        vocabulary: rows of the model's embedding; ids beyond are refused.

    Raises:
        DataError: a task, or a row's label, is not among `labels`; or a token has no row in the model.
    """
    labels.check(data, what="given")
    tasks = []
    for task, examples in data.items():
        place = {label: labels.first(task) + number for number, label in enumerate(labels.tasks[task])}
        if unknown := sorted({label_of(row) for row in examples} - set(place)):
            raise DataError(
                f"A row of task {task!r} has the label {unknown[0][:40]!r}, which the head does not know; it knows "
                f"{', '.join(place)}."
            )
        coded = encode_questions(examples, tokenizer, max_length=max_length)
        for example, (ids, _) in zip(examples, coded, strict=True):
            check_token_rows(ids, vocabulary, example, tokenizer)
        rows = [
            Encoded(
                input_ids=ids,
                labels=[place[label_of(row)]],
                truncated=cut,
                prompt_length=len(ids),
                origin=row.origin,
            )
            for row, (ids, cut) in zip(examples, coded, strict=True)
        ]
        tasks.append(EncodedTask(name=task, rows=rows))
    return tasks
