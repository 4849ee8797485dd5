"""What a token router costs to give up: what stands for it on a task's data, and scores before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from manylora.data import TaskData, encode
from manylora.errors import ConfigError
from manylora.evaluation.generation import NO_LIMIT, context_of
from manylora.evaluation.score import estimate
from manylora.evaluation.scores import Estimate, Scores
from manylora.files import Record
from manylora.table import Table, Value

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from manylora.adapters import Collapse, Fitted, How

# torch and the adapters are imported by the functions that need them, as everywhere in this room.

MEMORY = 2 * 2**30
"""Bytes that sums over tokens may take; where a model's layers need more, its rows are read several times."""


def collapse_router(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    *,
    how: How,
    max_length: int | None,
    batch_size: int = 16,
    memory: int = MEMORY,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Tensor | Fitted]]:
    """Per task and adapted layer, what stands for the token router on the task's rows (`adapters.collapse`).

    All tokens count alike, those of the prompt and of the answer; padding does not count.

    Args:
        model: a model with a token router over several experts.
        tokenizer: the model's.
        data: task to rows, each with an answer.
        how: "mean": the mean routing weights; "fit": the nearest LoRA.
        max_length: tokens that a row may have, as in training. None: as many as the model's context has.
        batch_size: rows per forward pass.
        memory: bytes that the sums of one pass over a task's rows may take.
        on_progress: called with the readings done and their number.

    Returns:
        Task to module name to mean weights (N,) or fitted factors, in float64.

    Raises:
        ConfigError: the adapter has no token router.
        DataError: a row's answer does not fit the model's context.
        NonFiniteError: the model's output is NaN.
    """
    import torch

    from manylora.adapters import Collapse

    layers = _routed_layers(model)
    groups = _groups({name: Collapse(bank, how).memory() for name, bank in layers.items()}, memory)
    context = context_of(model.config)
    length, rows_known = max_length or context or NO_LIMIT, model.get_input_embeddings().weight.shape[0]
    done, total = 0, len(groups) * sum(map(len, data.values()))
    collapsed: dict[str, dict[str, Tensor | Fitted]] = {}
    was_training = model.training
    model.eval()
    try:
        for task, examples in data.items():
            rows = [
                encode(
                    row, tokenizer, max_length=length, context_length=context, vocabulary=rows_known
                ).input_ids
                for row in examples
            ]
            rows.sort(key=len)  # rows of like length share a batch
            collapsed[task] = {}
            for group in groups:
                sums = {name: Collapse(layers[name], how) for name in group}
                with _counting(model, sums) as read, torch.inference_mode():
                    for start in range(0, len(rows), batch_size):
                        batch = rows[start : start + batch_size]
                        read(batch, tokenizer.pad_token_id or 0)
                        done += len(batch)
                        if on_progress is not None:
                            on_progress(done, total)
                collapsed[task] |= {name: found.result() for name, found in sums.items()}
    finally:
        model.train(was_training)
    return collapsed


def _routed_layers(model: PeftModel) -> dict[str, Any]:
    """Module name to its bank, where that has a token router."""
    from manylora.adapters import ManyLoraLinear

    adapter = model.active_adapter
    layers = {
        name: layer.bank(adapter)
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, ManyLoraLinear)
        and adapter in layer.manylora_experts
        and layer.bank(adapter).router == "token"
    }
    if not layers:
        raise ConfigError("The adapter has no token router, so there is nothing to collapse.")
    return layers


def _groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in groups whose sizes add up to `most` at the most (a larger one stands alone)."""
    groups: list[list[str]] = []
    left = -1
    for name, size in sizes.items():
        if left < size:
            groups.append([])
            left = most
        groups[-1].append(name)
        left -= size
    return groups


@contextmanager
def _counting(
    model: PeftModel, sums: Mapping[str, Collapse]
) -> Iterator[Callable[[Sequence[Sequence[int]], int], None]]:
    """Gives a function that has the model read a batch; the layers in `sums` count its tokens."""
    import torch

    from manylora.evaluation.finite import check_output

    mask_T = torch.zeros(0, dtype=torch.bool)

    def hook_of(counted: Collapse) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            x_TD = inputs[0].flatten(0, -2)
            # a layer that sees other tokens than the batch's (an expert of a mixture of experts) counts all of its own
            counted.add(x_TD[mask_T] if x_TD.shape[0] == mask_T.shape[0] else x_TD)

        return hook

    def read(rows: Sequence[Sequence[int]], pad: int) -> None:
        nonlocal mask_T
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=model.device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device
        )
        mask_T = mask.flatten().bool()
        check_output(model, model(input_ids=ids, attention_mask=mask).logits, mask, "the rows to collapse on")

    modules = dict(model.get_base_model().named_modules())
    handles = [modules[name].register_forward_pre_hook(hook_of(counted)) for name, counted in sums.items()]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


class Loss(Record):
    """Points lost between two sets of scores of the same rows: before minus after, so a gain is negative."""

    tasks: dict[str, Estimate]
    """Task to its mean loss, with the standard error of the paired differences over its rows."""

    @property
    def mean(self) -> float:
        """Mean over tasks; every task counts alike."""
        return math.fsum(task.mean for task in self.tasks.values()) / len(self.tasks)

    @property
    def standard_error(self) -> float:
        """Of `mean`, from the sampling of rows: sqrt(Σ se²) / number of tasks."""
        return math.sqrt(math.fsum(task.standard_error**2 for task in self.tasks.values())) / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        error = self.standard_error
        return {
            "mean": self.mean,
            "standard_error": None if math.isnan(error) else error,
            "tasks": {name: task.model_dump() for name, task in self.tasks.items()},
        }


def paired_loss(before: Scores, after: Scores) -> Loss:
    """Compare two models' scores on the same rows, row by row, in each task's main metric."""
    lost: dict[str, Estimate] = {}
    for old, new in zip(before.tasks, after.tasks, strict=True):
        differences = [
            one.metrics[old.metric] - other.metrics[old.metric]
            for one, other in zip(old.examples, new.examples, strict=True)
        ]
        lost[old.task] = estimate(differences)
    return Loss(tasks=lost)


def loss_table(before: Scores, after: Scores, loss: Loss, *, title: str) -> Table:
    """Scores of an adapter and of its LoRAs per task, and the points lost with the paired standard error."""

    def row(task: str, old: float, new: float, lost: Estimate | Loss, n: int) -> dict[str, Value]:
        error = lost.standard_error
        return {"task": task, "adapter": old, "LoRAs": new, "points lost": lost.mean, "s.e.": error, "n": n}

    rows = [
        row(one.task, one.score, after[one.task].score, loss.tasks[one.task], one.n) for one in before.tasks
    ]
    footer = row("mean", before.mean, after.mean, loss, before.n)
    return Table.of("loss", title, rows, footer=[footer], digits=1)
