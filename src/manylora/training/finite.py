"""The first number of a training that is not finite ends it, before it reaches a weight or a file.

A loss of NaN makes every gradient NaN, one step makes every weight of the adapter so, and what is then saved replaces
what was good. transformers' own filter hides it: it shows the mean of the losses before. So the guard looks at the
losses and the gradient of each optimizer step before the step is made. On a GPU that is one number to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from manylora.errors import NonFiniteError
from manylora.evaluation.finite import BFLOAT16_ON_CPU, SHOWN, broken_weight, in_bfloat16_on_cpu

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = 20
"""Steps on end that float16's loss scaler may skip: it halves its 65,536 each time, and below 1 it no longer helps."""


class FiniteGuard(TrainerCallback):
    """Looks at each optimizer step of one training.

    Args:
        model: base and adapter.
        accelerator: of the trainer.
        task_names: names of the tasks, by index.
        origin: where a row comes from, by its "row" in a batch.
        autocast: whether it trains in bfloat16 autocast.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        accelerator: Accelerator,
        *,
        task_names: Sequence[str],
        origin: Callable[[int], str],
        autocast: bool,
    ) -> None:
        self.model, self.accelerator, self.task_names = model, accelerator, list(task_names)
        self.origin, self.autocast = origin, autocast
        self._flag: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor, Mapping[str, Tensor]]] = []
        self._skipped = 0

    def note(self, loss: Tensor, losses: Tensor, rows: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Remember a micro-batch until its step is made; nothing is read from the device.

        Args:
            loss: what is differentiated, a scalar.
            losses: of its items (answer tokens, or rows), (items,).
            rows: the row of the batch that an item stands in, (items,).
            inputs: the batch.
        """
        flag = ~loss.detach().isfinite()
        self._flag = flag if self._flag is None else self._flag | flag
        self._seen.append((losses.detach(), rows, inputs))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the step before."""
        self._flag, self._seen = None, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the step be made, or end the training.

        Raises:
            NonFiniteError: a loss or the gradient is not finite.
        """
        in_loss, in_gradient = self._look()
        scaler = self.accelerator.scaler
        if in_gradient and not in_loss and scaler is not None and scaler.is_enabled():
            self._skipped += 1  # the scaler leaves such a step out and tries a smaller scale
            in_gradient = self._skipped > PATIENCE
        elif not in_gradient:
            self._skipped = 0
        if in_loss or in_gradient:
            raise NonFiniteError(self._told(f"step {state.global_step + 1}", in_loss=in_loss))

    def check_validation(self, losses: Any, tasks: Any, origins: Sequence[str]) -> None:
        """The same of validation losses.

        Args:
            losses: one per row, (rows,), a numpy array.
            tasks: their tasks' indices, (rows,).
            origins: where the rows come from; empty where that is not known.

        Raises:
            NonFiniteError: one is not finite.
        """
        bad = (~torch.as_tensor(losses).isfinite()).nonzero()[:, 0].tolist()
        if not bad:
            return
        found = [
            (self.task_names[int(tasks[place])], origins[place] if origins else f"row {place}")
            for place in bad
        ]
        raise NonFiniteError(
            f"The validation loss of {_listed(found)} is not finite (NaN or infinity). {self._cause()}"
        )

    def _look(self) -> tuple[bool, bool]:
        """Whether a loss, and whether the gradient of the step is not finite, in any process."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # after clipping, which turns an infinite norm into NaN everywhere
        norm = torch.nn.utils.get_total_norm(gradients)
        in_loss = (
            torch.zeros_like(norm, dtype=torch.bool) if self._flag is None else self._flag.to(norm.device)
        )
        flags = torch.stack((in_loss.reshape(()), ~norm.isfinite())).float()
        if self.accelerator.num_processes > 1:  # else one would leave and the others wait for it
            flags = self.accelerator.reduce(flags, "sum")
        loss, gradient = flags.tolist()
        return loss > 0, gradient > 0

    def _told(self, step: str, *, in_loss: bool) -> str:
        found = self._rows(bad_only=in_loss)
        if self.accelerator.num_processes > 1:
            found = list(dict.fromkeys(gather_object(found)))
        what = "loss" if in_loss else "gradient"
        whose = f"of {_listed(found)} " if found else ""
        return f"At {step} the {what} {whose}is not finite (NaN or infinity), so the step was not made. {self._cause()}"

    def _rows(self, *, bad_only: bool) -> list[tuple[str, str]]:
        """Task and origin of the step's rows with a loss that is not finite, or of all."""
        found = []
        for losses, rows, inputs in self._seen:
            chosen = rows[~losses.isfinite()] if bad_only else rows
            for row in chosen.unique().tolist():
                number = int(inputs["row"][row]) if "row" in inputs else -1
                found.append((self.task_names[int(inputs["task"][row])], self.origin(number)))
        return list(dict.fromkeys(found))

    def _cause(self) -> str:
        """What is known of the cause, and what to try."""
        last = "What was saved before stays."
        if found := broken_weight(self.model):
            return f"{found} {last}"
        if self.autocast or in_bfloat16_on_cpu(self.model):
            return (
                f"{BFLOAT16_ON_CPU} Go on with --resume under that setting, or train anew in float32. {last}"
            )
        half = "--dtype bfloat16, " if self.accelerator.scaler is not None else ""
        return f"Train anew with {half}a lower --learning-rate or without these rows. {last}"


def _listed(found: Sequence[tuple[str, str]]) -> str:
    """ "task 'a' (a.jsonl:3, a.jsonl:7) and task 'b' (b.jsonl:1, and 4 more rows)"."""
    by_task: dict[str, list[str]] = {}
    for task, origin in found:
        by_task.setdefault(task, []).append(origin)
    parts = []
    for task, origins in list(by_task.items())[:SHOWN]:
        more = len(origins) - SHOWN
        shown = ", ".join(origins[:SHOWN]) + (
            f" and {more} more row{'' if more == 1 else 's'}" if more > 0 else ""
        )
        parts.append(f"task {task!r} ({shown})")
    others = len(by_task) - SHOWN
    return ", ".join(parts) + (f" and {others} more task{'' if others == 1 else 's'}" if others > 0 else "")
