"""Classification: each task's labels, rows that carry one, and a trainer whose loss chooses among the task's own.

One head serves all tasks. Its outputs are the labels of all tasks laid end to end; a row's loss and its prediction
look at those of the row's task alone.

Shape letters: B rows, T tokens, K tasks, C labels of all tasks together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from manylora.data import Encoded, Example, TaskData, check_token_rows, without_options
from manylora.errors import DataError
from manylora.training.batches import Collator, EncodedTask
from manylora.training.finite import refuse_output
from manylora.training.models import context_of
from manylora.training.trainer import ManyTaskTrainer

if TYPE_CHECKING:
    from peft import PeftModel
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
    context_length: int | None,
    vocabulary: int | None = None,
) -> list[EncodedTask]:
    """Every row of every task, in order; `labels` of a row holds one number, the head's output for its label.

    Args:
        data: rows whose labels are among `labels`.
        tokenizer: the base's.
        labels: of every task.
        max_length: tokens that a row may have; the end of a longer one is cut.
        context_length: tokens that the model can read, where it has such a limit.
        vocabulary: rows of the model's embedding; ids beyond are refused.

    Raises:
        DataError: a task, or a row's label, is not among `labels`; or a token has no row in the model.
    """
    labels.check(data, what="given")
    length = min(max_length, context_length or max_length)
    tasks = []
    for task, examples in data.items():
        place = {label: labels.first(task) + number for number, label in enumerate(labels.tasks[task])}
        if unknown := sorted({label_of(row) for row in examples} - set(place)):
            raise DataError(
                f"A row of task {task!r} has the label {unknown[0][:40]!r}, which the head does not know; it knows "
                f"{', '.join(place)}."
            )
        coded = encode_questions(examples, tokenizer, max_length=length)
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


@dataclass(frozen=True, kw_only=True)
class LabelCollator(Collator):
    """As `Collator`, but `labels` is (B,): the head's output that is right."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and stack; see the class."""
        batch = super().__call__(rows)
        return {**batch, "labels": batch["labels"][:, 0]}


class LabelTrainer(ManyTaskTrainer):
    """A `ManyTaskTrainer` of rows that carry one label: an item of the loss is a row, not a token."""

    def __init__(self, *, labels: LabelSets, **options: Any):
        super().__init__(**options)
        self.allowed_KC = labels.allowed()
        self._loss_shifts_labels = False

    def _token_losses(
        self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of every row among its own task's labels, and the rows' numbers, both (B,)."""
        routing = {"expert_ids": inputs["task"]} if self.route_by_task else {}
        logits_BC = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **routing
        ).logits
        own = among(logits_BC, inputs["task"], self.allowed_KC)
        losses = F.cross_entropy(own, inputs["labels"], reduction="none")
        return losses, torch.arange(len(losses), device=losses.device)


def among(logits_BC: torch.Tensor, task_B: torch.Tensor, allowed_KC: torch.Tensor) -> torch.Tensor:
    """The logits in float32, (B, C), with -inf at other tasks' labels."""
    return logits_BC.float().masked_fill(~allowed_KC.to(logits_BC.device)[task_B], -torch.inf)


@torch.no_grad()
def predict_labels(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    labels: LabelSets,
    *,
    max_length: int,
    batch_size: int,
) -> dict[str, list[str]]:
    """The most likely label of every row among its task's own, per task and in order.

    Raises:
        DataError: a task is not among `labels`.
        NonFiniteError: the model's output is NaN.
    """
    labels.check(data, what="test")
    model.eval()
    allowed_KC, names = labels.allowed(), [label for own in labels.tasks.values() for label in own]
    config = model.active_peft_config
    route = getattr(config, "router", None) == "task" and config.num_experts > 1
    length = min(max_length, context_of(model.config) or max_length)
    chosen: dict[str, list[str]] = {}
    for task, examples in data.items():
        number = list(labels.tasks).index(task)
        coded = [ids for ids, _ in encode_questions(examples, tokenizer, max_length=length)]
        found = [""] * len(coded)
        for part, batch in _batches(coded, batch_size, pad_token_id=tokenizer.pad_token_id):
            task_B = torch.full((len(part),), number, device=model.device)
            routing = {"expert_ids": task_B} if route else {}
            logits = model(**{name: t.to(model.device) for name, t in batch.items()}, **routing).logits
            own = among(logits, task_B, allowed_KC)
            if bad := own.isnan().any(-1).nonzero()[:, 0].tolist():
                refuse_output(model, [examples[part[row]].origin or f"a row of task {task!r}" for row in bad])
            for place, best in zip(part, own.argmax(-1).tolist(), strict=True):
                found[place] = names[best]
        chosen[task] = found
    return chosen


def _batches(
    coded: Sequence[list[int]], size: int, *, pad_token_id: int
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Rows of about one length together: where each stands, and what the model reads."""
    order = sorted(range(len(coded)), key=lambda place: len(coded[place]))
    collate = Collator(pad_token_id=pad_token_id)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = collate([{"input_ids": coded[place], "labels": [], "task": 0} for place in part])
        yield part, {name: batch[name] for name in ("input_ids", "attention_mask")}
