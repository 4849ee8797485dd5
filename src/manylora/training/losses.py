"""The two losses of a batch: of its answers' tokens, or of its rows' labels.

Shape letters: B rows, T tokens, V vocabulary, K tasks, C labels of all tasks together.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manylora.training.heads import LABEL, LANGUAGE, Head
from manylora.training.labels import LabelSets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def narrow_head(self, model: nn.Module, labels_BT: Tensor) -> AbstractContextManager[None]:
        """While entered, the output layer of the model runs only where it has to; `__call__` takes what comes of it."""
        return nullcontext()


class AnswerLoss(Loss):
    """Of every token of an answer.

    Only positions that predict one reach the output layer and the float32 softmax: with a large vocabulary the logits
    of the prompt are most of a step's memory, and in a small model much of its time.
    """

    head = LANGUAGE
    shifts_labels = True

    @contextmanager
    def narrow_head(self, model: nn.Module, labels_BT: Tensor) -> Iterator[None]:
        """See `Loss`; the whole layer runs where it is adapted, quantised or wrapped, or no matrix product.

        Not through transformers' `logits_to_keep`, which takes the same positions of all rows.
        """
        output = cast("PreTrainedModel", model).get_output_embeddings()
        if type(output) is not nn.Linear:
            yield
            return

        def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *others = inputs
            if hidden.shape[:2] != labels_BT.shape:
                return inputs
            return (hidden[:, :-1][(labels_BT[:, 1:] != -100).to(hidden.device)], *others)

        hook = output.register_forward_pre_hook(select)
        try:
            yield
        finally:
            hook.remove()

    def __call__(self, logits: Tensor, labels_BT: Tensor, task_B: Tensor) -> tuple[Tensor, Tensor]:
        """See `Loss`; logits are (B, T, V), or (items, V) of a narrowed output layer."""
        targets = labels_BT[:, 1:].to(logits.device)
        counted = targets != -100
        if logits.dim() == 3:
            logits = logits[:, :-1][counted]
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(wide), targets[counted], reduction="none")
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
