"""What a token router does with each task: mean routing weight per expert, entropy, collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from manylora.analysis.places import Place, locate
from manylora.analysis.records import Gates

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.analysis.batches import Reader, TaskRows


ALL = "all tasks"
"""Task of the entries over all tasks, which count alike."""


def measure_gates(
    model: PeftModel,
    rows: TaskRows,
    reader: Reader,
    *,
    source: str,
    on_progress: Callable[[int], None] | None = None,
) -> list[Gates]:
    """Per task and module, and per module over all tasks (`ALL`); empty where there is no token router.

    Args:
        model: base with the adapter active.
        rows: per task.
        reader: how the model is given them.
        source: name of the adapter in the result.
        on_progress: called with the rows done.
    """
    import torch

    from manylora.adapters import gate_statistics

    config = model.active_peft_config
    if getattr(config, "router", None) != "token" or config.num_experts == 1:
        return []
    measured: dict[str, dict[str, tuple[list[float], float]]] = {}
    done, was_training = 0, model.training
    model.eval()
    try:
        for task, encoded in rows.items():
            with torch.no_grad(), gate_statistics(model) as statistics:
                for batch in reader.batches(encoded):
                    reader.logits(model, batch, task)
                    done += len(batch["input_ids"])
                    if on_progress is not None:
                        on_progress(done)
            measured[task] = {name: (layer.share, layer.entropy) for name, layer in statistics.layers.items()}
    finally:
        model.train(was_training)
    where = locate({name for layers in measured.values() for name in layers})
    found = []
    for name, place in where.items():
        per_task = {task: layers[name] for task, layers in measured.items() if name in layers}
        everything = (
            _mean([weights for weights, _ in per_task.values()]),
            math.fsum(entropy for _, entropy in per_task.values()) / len(per_task),
        )
        for task, (weights, entropy) in {**per_task, ALL: everything}.items():
            found.append(_gates(source, task, name, place, weights, entropy))
    return found


def mean_gates(gates: Sequence[Gates]) -> dict[tuple[str, str], tuple[list[float], float]]:
    """Source and task to mean weights and mean entropy over the modules."""
    groups: dict[tuple[str, str], list[Gates]] = {}
    for one in gates:
        groups.setdefault((one.source, one.task), []).append(one)
    return {
        key: (_mean([one.weights for one in group]), math.fsum(one.entropy for one in group) / len(group))
        for key, group in groups.items()
    }


def overall(gates: Sequence[Gates]) -> list[Gates]:
    """The mean over the modules of each source and task; collapsed where that mean is."""
    whole = Place(layer=None, module="all")
    return [
        _gates(source, task, "", whole, weights, entropy)
        for (source, task), (weights, entropy) in mean_gates(gates).items()
    ]


def differences(gates: Sequence[Gates]) -> dict[tuple[str, str], float]:
    """Source and task → how far its mean weights are from those over all tasks, mean over modules.

    The distance is half the sum of absolute differences: 0 where the router treats the task like all others.
    """
    everything = {(one.source, one.name): one.weights for one in gates if one.task == ALL}
    found: dict[tuple[str, str], list[float]] = {}
    for one in gates:
        mean = everything.get((one.source, one.name))
        if mean is None or len(mean) != len(one.weights):
            continue
        distance = math.fsum(abs(a - b) for a, b in zip(one.weights, mean, strict=True)) / 2
        found.setdefault((one.source, one.task), []).append(distance)
    return {key: math.fsum(values) / len(values) for key, values in found.items()}


def _gates(source: str, task: str, name: str, place: Place, weights: list[float], entropy: float) -> Gates:
    from manylora.adapters import COLLAPSED_ABOVE

    return Gates(
        source=source,
        task=task,
        layer=place.layer,
        module=place.module,
        name=name,
        weights=weights,
        entropy=entropy,
        collapsed=max(weights) > COLLAPSED_ABOVE,
    )


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
