"""Rows of tasks as batches that a model reads: what gradients and gates have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from manylora.data import Encoded
from manylora.errors import RoutingError
from manylora.evaluation.finite import check_output
from manylora.training.batches import Collator
from manylora.training.labels import LabelSets
from manylora.training.losses import AnswerLoss, LabelLoss, Loss

TaskRows = Mapping[str, Sequence[Encoded]]
"""Task to its encoded rows."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a language model is given a task's rows."""

    pad_token_id: int
    experts: Mapping[str, int] | None = None
    """Task to expert under a task router, else None."""
    batch_size: int = 16
    loss_of: Loss = field(default_factory=AnswerLoss)
    """What is differentiated."""

    def batches(self, rows: Sequence[Encoded]) -> Iterator[dict[str, Tensor]]:
        """The rows in batches, those of like length together."""
        ordered = sorted(rows, key=lambda row: len(row.input_ids))
        collate = Collator(pad_token_id=self.pad_token_id)
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            yield collate([{"input_ids": row.input_ids, "labels": row.labels, "task": 0} for row in batch])

    def logits(self, model: PeftModel, batch: Mapping[str, Tensor], task: str) -> Tensor:
        """The model's output, (B, T, V); a classifier's, (B, C)."""
        ids = batch["input_ids"].to(model.device)
        routing: dict[str, Any] = {}
        if self.experts is not None:
            routing["expert_ids"] = torch.full((ids.shape[0],), self.expert(task))
        mask = batch["attention_mask"].to(model.device)
        output: Tensor = model(
            input_ids=ids, attention_mask=mask, **self.loss_of.head.options, **routing
        ).logits
        check_output(model, output, mask, f"rows of task {task!r}")
        return output

    def loss(self, model: PeftModel, batch: Mapping[str, Tensor], task: str) -> tuple[Tensor, int]:
        """Summed loss of the items (answer tokens, or rows), and their number."""
        logits = self.logits(model, batch, task)
        task_B = torch.full((len(logits),), self.loss_of.number(task), device=logits.device)
        losses, _ = self.loss_of(logits, batch["labels"], task_B)
        return losses.sum(), len(losses)

    def expert(self, task: str) -> int:
        """The expert of a task.

        Raises:
            RoutingError: it has none.
        """
        assert self.experts is not None
        if task not in self.experts:
            raise RoutingError(
                f"The adapter has no expert for the task {task!r}; it knows {', '.join(self.experts)}."
            )
        return self.experts[task]


@dataclass(frozen=True, kw_only=True)
class LabelReader(Reader):
    """How a classifier is given a task's rows (see `manylora.training.encode_labelled`)."""

    labels: LabelSets

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_of", LabelLoss(self.labels))


@contextmanager
def only_trainable(model: torch.nn.Module, chosen: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, the model is in evaluation mode (no dropout) and these parameters alone get gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    model.eval()
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter, wanted in before.items():
            parameter.grad = None
            parameter.requires_grad_(wanted)
