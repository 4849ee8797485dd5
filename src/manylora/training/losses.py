"""The two losses of a batch: of its answers' tokens, or of its rows' labels.

Shape letters: B rows, T tokens, V vocabulary, K tasks, C labels of all tasks together.
"""

from __future__ import annotations

import abc

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.training.heads import LABEL, LANGUAGE, Head
from manylora.training.labels import LabelSets


class Loss(abc.ABC):
    """What a model's output is compared with."""

    head: Head
    shifts_labels: bool
    """Whether a label is that of the next token."""

    @abc.abstractmethod
    def __call__(self, logits: Tensor, labels_BT: Tensor, task_B: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each item that counts and the row it stands in, both (items,), in float32 at least.

        Args:
            logits: the model's.
            labels_BT: of the batch, -100 where nothing counts.
            task_B: index of each row's task.
        """

    def number(self, task: str) -> int:
        """The index of a task among those that the loss tells apart."""
        return 0


class AnswerLoss(Loss):
    """Of every token of an answer.

    Only positions with a label reach the float32 softmax: with a large vocabulary the logits of the prompt are most of
    a step's memory.
    """

    head = LANGUAGE
    shifts_labels = True

    def __call__(self, logits: Tensor, labels_BT: Tensor, task_B: Tensor) -> tuple[Tensor, Tensor]:
        """See `Loss`; logits are (B, T, V)."""
        targets = labels_BT[:, 1:].to(logits.device)
        counted = targets != -100
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits[:, :-1][counted].to(wide), targets[counted], reduction="none")
        return losses, counted.nonzero()[:, 0]


class LabelLoss(Loss):
    """Of every row, among the labels of its own task; the head's output for a row's label stands first in the row.

    Args:
        labels: of the tasks, in the order of their indices.
    """

    head = LABEL
    shifts_labels = False

    def __init__(self, labels: LabelSets) -> None:
        self.labels, self.allowed_KC = labels, labels.allowed()

    def number(self, task: str) -> int:
        """See `Loss`."""
        return self.labels.numbers[task]

    def __call__(self, logits: Tensor, labels_BT: Tensor, task_B: Tensor) -> tuple[Tensor, Tensor]:
        """See `Loss`; logits are (B, C)."""
        own = among(logits, task_B, self.allowed_KC)
        losses = F.cross_entropy(own, labels_BT[:, 0].to(own.device), reduction="none")
        return losses, torch.arange(len(losses), device=losses.device)


def among(logits_BC: Tensor, task_B: Tensor, allowed_KC: Tensor) -> Tensor:
    """The logits in float32, (B, C), with -inf at other tasks' labels."""
    return logits_BC.float().masked_fill(~allowed_KC.to(logits_BC.device)[task_B], -torch.inf)
