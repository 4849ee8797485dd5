"""Gradient norms and gradient conflict between tasks on the shared matrix, measured on given rows.

A task's gradient is that of its mean loss over answer tokens (a classifier's: over rows). Two tasks conflict in a
module where the cosine of their gradients on its shared matrix is negative: a step that helps one costs the other.
At a minimum of the sum of all losses the gradients add up to zero, so that after training conflict is what one must
expect (two tasks: cosine −1); compare earlier steps, or two adapters at the same step.

The rows are a sample. Beside the cosine between tasks stands that between the two halves of each task's own rows: where
that is low, the rows are too few to say anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from manylora.adapters import ExpertBank, ManyLoraLinear
from manylora.analysis.batches import Reader, TaskRows, only_trainable
from manylora.analysis.places import Place, locate
from manylora.analysis.records import Conflict, GradientNorm, Gradients
from manylora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """A matrix that all tasks share."""

    matrix: str
    name: str
    parameter: torch.nn.Parameter


def shared_matrices(model: PeftModel) -> list[_Shared]:
    """The shared matrix of every adapted module: A or B, or both where there is one expert.

    Raises:
        ConfigError: the experts share none.
    """
    adapter, found = str(model.active_adapter), []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ManyLoraLinear) and adapter in module.manylora_experts:
            bank = module.bank(adapter)
            assert isinstance(bank, ExpertBank)
            if bank.layout.a_count == 1:
                found.append(_Shared(matrix="A", name=name, parameter=bank.lora_A))
            if bank.layout.b_count == 1:
                found.append(_Shared(matrix="B", name=name, parameter=bank.lora_B))
        elif isinstance(module, LoraLayer) and adapter in module.lora_A:
            found.append(_Shared(matrix="A", name=name, parameter=module.lora_A[adapter].weight))
            found.append(_Shared(matrix="B", name=name, parameter=module.lora_B[adapter].weight))
    if not found:
        raise ConfigError("The experts of this adapter share no matrix, so tasks cannot conflict on one.")
    return found


def measure_gradients(
    model: PeftModel,
    rows: TaskRows,
    reader: Reader,
    *,
    source: str,
    on_progress: Callable[[int], None] | None = None,
) -> Gradients:
    """Norms and cosines of the tasks' gradients on the model's shared matrices.

    The model is left as it was. Dropout is off.

    Args:
        model: base with the adapter active.
        rows: of at least one task.
        reader: how the model is given them.
        source: name of the adapter in the result.
        on_progress: called with the rows done.

    Raises:
        ConfigError: no shared matrix.
        RoutingError: a task has no expert.
    """
    shared = shared_matrices(model)
    gradients: dict[str, list[Tensor]] = {}
    halves: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    done = 0
    with only_trainable(model, [one.parameter for one in shared]):
        for task, encoded in rows.items():
            sums, counts = [], []
            for half in (encoded[::2], encoded[1::2]):
                total, count = _summed(model, half, reader, task, shared)
                sums.append(total)
                counts.append(count)
                done += len(half)
                if on_progress is not None:
                    on_progress(done)
            both = max(1, sum(counts))
            gradients[task] = [(one + other) / both for one, other in zip(*sums, strict=True)]
            halves[task] = (sums[0], sums[1])
    kinds = {one.matrix for one in shared}
    result = Gradients(
        source=source,
        shared="A and B" if len(kinds) > 1 else kinds.pop(),
        rows={task: len(encoded) for task, encoded in rows.items()},
    )
    _fill(result, shared, gradients, halves)
    return result


def _summed(
    model: PeftModel, rows: Sequence, reader: Reader, task: str, shared: Sequence[_Shared]
) -> tuple[list[Tensor], int]:
    """Gradient of the summed loss on every shared matrix, flat and in float64, and how many losses were summed."""
    count = 0
    for one in shared:
        one.parameter.grad = None
    for batch in reader.batches(rows):
        loss, tokens = reader.loss(model, batch, task)
        loss.backward()
        count += tokens
    return [
        torch.zeros(one.parameter.numel(), dtype=torch.float64)
        if one.parameter.grad is None
        else one.parameter.grad.detach().to("cpu", torch.float64).flatten()
        for one in shared
    ], count


def _fill(
    result: Gradients,
    shared: Sequence[_Shared],
    gradients: dict[str, list[Tensor]],
    halves: dict[str, tuple[list[Tensor], list[Tensor]]],
) -> None:
    where = locate({one.name for one in shared})
    whole = Place(layer=None, module="all")
    parts = [([index], one.matrix, one.name, where[one.name]) for index, one in enumerate(shared)]
    parts += [
        ([i for i, one in enumerate(shared) if one.matrix == matrix], matrix, "", whole)
        for matrix in sorted({one.matrix for one in shared})
    ]
    for indices, matrix, name, place in parts:
        at: dict[str, Any] = {"matrix": matrix, "name": name, "layer": place.layer, "module": place.module}
        flat = {task: torch.cat([values[i] for i in indices]) for task, values in gradients.items()}
        norms = [
            GradientNorm(source=result.source, task=task, norm=float(value.norm()), **at)
            for task, value in flat.items()
        ]
        pairs = [(left, right, flat[left], flat[right]) for left, right in itertools.combinations(flat, 2)]
        own = [
            (task, task, torch.cat([one[i] for i in indices]), torch.cat([other[i] for i in indices]))
            for task, (one, other) in halves.items()
        ]
        conflict, within = (
            [
                Conflict(source=result.source, left=left, right=right, cosine=cosine, **at)
                for left, right, one, other in found
                if (cosine := _cosine(one, other)) is not None
            ]
            for found in (pairs, own)
        )
        (result.norms if name else result.overall_norms).extend(norms)
        (result.conflict if name else result.overall_conflict).extend(conflict)
        (result.within if name else result.overall_within).extend(within)


def _cosine(one: Tensor, other: Tensor) -> float | None:
    """None where either is zero."""
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size > 0 else None
