"""What a token router costs to give up: mean routing weights of a task's data, and scores before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.data import TaskData, encode
from manylora.errors import ConfigError
from manylora.evaluation.score import Estimate, Scores
from manylora.evaluation.statistics import standard_error

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# torch and the adapters are imported by the functions that need them, as everywhere in this room.


def mean_gates(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    *,
    max_length: int,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Per task and adapted layer, the mean of the router's weights over the tokens of the task's rows.

    All tokens count alike, those of the prompt and of the answer; padding does not count.

    Args:
        model: a model with a token router over several experts.
        tokenizer: the model's.
        data: task to rows, each with an answer.
        max_length: tokens that a row may have, as in training.
        batch_size: rows per forward pass.
        on_progress: called with the number of rows done.

    Returns:
        Task to module name to weights (N,), float64, each summing to 1.

    Raises:
        ConfigError: the adapter has no token router.
        DataError: a row's answer does not fit the model's context.
    """
    import torch

    context = getattr(model.config, "max_position_embeddings", None)
    done = 0
    gates: dict[str, dict[str, Tensor]] = {}
    was_training = model.training
    model.eval()
    with _watched(model) as watch, torch.inference_mode():
        for task, examples in data.items():
            rows = [
                encode(row, tokenizer, max_length=max_length, context_length=context).input_ids
                for row in examples
            ]
            rows.sort(key=len)  # rows of like length share a batch
            watch.begin()
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                watch.read(model, batch, tokenizer.pad_token_id or 0)
                done += len(batch)
                if on_progress is not None:
                    on_progress(done)
            gates[task] = watch.means()
    model.train(was_training)
    return gates


class _Watch:
    """Sums routing weights of every adapted layer while a model reads."""

    def __init__(self) -> None:
        self.mask_T: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def begin(self) -> None:
        self.sums, self.counts = {}, {}

    def read(self, model: PeftModel, rows: Sequence[Sequence[int]], pad: int) -> None:
        import torch

        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=model.device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device
        )
        self.mask_T = mask.flatten().bool()
        model(input_ids=ids, attention_mask=mask)

    def take(self, name: str, weights: Tensor) -> None:
        """Add one layer's routing weights (…, N) of the batch that is being read."""
        w_TN = weights.flatten(0, -2).double()
        assert self.mask_T is not None
        if w_TN.shape[0] == self.mask_T.shape[0]:
            w_TN = w_TN[
                self.mask_T
            ]  # else a layer that sees other tokens (an expert of a mixture): all of them
        self.sums[name] = self.sums.get(name, 0) + w_TN.sum(0).cpu()
        self.counts[name] = self.counts.get(name, 0) + w_TN.shape[0]

    def means(self) -> dict[str, Tensor]:
        return {name: total / max(1.0, self.counts[name]) for name, total in self.sums.items()}


@contextmanager
def _watched(model: PeftModel) -> Iterator[_Watch]:
    from manylora.adapters import ManyLoraLinear
    from manylora.adapters.ops import routing_weights

    watch = _Watch()
    adapter = model.active_adapter

    def hook_of(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(layer: Any, inputs: tuple[Any, ...]) -> None:
            router = layer.bank(adapter).lora_router
            watch.take(name, routing_weights(inputs[0].to(router.dtype), router))

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_of(name))
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, ManyLoraLinear)
        and adapter in layer.manylora_experts
        and layer.bank(adapter).router == "token"
    ]
    if not handles:
        raise ConfigError("The adapter has no token router, so there are no routing weights to average.")
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Points lost between two sets of scores of the same rows: before minus after, so a gain is negative."""

    tasks: Mapping[str, Estimate]
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
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
        }


def paired_loss(before: Scores, after: Scores) -> Loss:
    """Compare two models' scores on the same rows, row by row, in each task's main metric."""
    lost: dict[str, Estimate] = {}
    for old, new in zip(before.tasks, after.tasks, strict=True):
        differences = [
            one.metrics[old.metric] - other.metrics[old.metric]
            for one, other in zip(old.examples, new.examples, strict=True)
        ]
        mean = math.fsum(differences) / len(differences)
        lost[old.task] = Estimate(mean, standard_error(differences), len(differences))
    return Loss(tasks=lost)
