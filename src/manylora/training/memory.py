"""How much memory a training takes: one step is gone through on tensors without data, and what lives is added up."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manylora.adapters import load_balance
from manylora.errors import ConfigError
from manylora.training.heads import head_of
from manylora.training.reach import give_shapes, without_data

_ADAM_BYTES = 12
"""Per trainable float32 parameter: the weight and Adam's two moments; its gradient belongs to the step."""
_HOLES = 0.07
"""Share of all the bytes a step allocates, one after another, that a CPU's allocator holds beyond what lives.

glibc keeps freed blocks of up to 32 MiB and cuts them up for smaller ones, so each pass through a layer leaves holes
that the next does not fit into. Measured in `benchmarks/memory.py` (docs/log.md): 0.055 to 0.085; with an allocator
told to give blocks back at once (MALLOC_TOP_PAD_=0) there is no such excess."""
_TOO_MUCH = 1.25
"""A plan of so many times all memory is refused; the plan itself is good to 15 %."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Estimated peak memory of training in bytes, by cause."""

    base: int
    """Frozen weights."""
    adapter: int
    """Adapter weights and Adam's moments in float32."""
    forward: int
    """What a forward pass leaves for the backward pass, logits included, at the longest row of the data."""
    backward: int
    """What the backward pass needs beyond that where most is alive; with checkpointing, the layer it computes again."""
    validation: int
    """What a forward pass over a validation batch needs, when nothing is kept for backward."""
    slack: int
    """What the allocator holds beyond all that, having freed it: nothing on a GPU, whose allocator reuses it."""
    process: int
    """What the process held before: Python, libraries, data."""

    @property
    def step(self) -> int:
        """The larger of what a training step and what a validation batch need for themselves."""
        return max(self.forward + self.backward, self.validation)

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return self.base + self.adapter + self.step + self.slack + self.process


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block, while they live.

    Args:
        model: whose parameters and buffers do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.allocated = 0
        own = (*model.parameters(), *model.buffers())
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it made."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._sizes[storage._cdata] = size
        self.now += size
        self.allocated += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, address: int) -> None:
        self.now -= self._sizes.pop(address)


def estimate_memory(
    model: PeftModel,
    *,
    rows: int,
    length: int,
    answer: int,
    checkpointing: bool,
    validation_rows: int = 0,
    on_cpu: bool = True,
) -> MemoryPlan:
    """Go through one training step, and one validation batch, on tensors without data.

    Args:
        model: from `shadow_model`; consumed.
        rows: rows of one forward pass.
        length: tokens of the longest row.
        answer: tokens of the longest answer.
        checkpointing: whether activations are recomputed.
        validation_rows: rows of one validation batch; 0: there is no validation.
        on_cpu: whether the CPU's allocator serves the training.

    Raises:
        MemoryUnknownError: the step cannot be simulated, as that of a base whose operators have results that depend
            on data; the training itself may well run.
    """
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    try:
        with without_data():
            step, forward, validation = _simulated(
                model,
                rows=rows,
                length=length,
                answer=answer,
                checkpointing=checkpointing,
                validation_rows=validation_rows,
            )
    except Exception as error:  # whatever a library says of an operator without a rule
        raise MemoryUnknownError(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    return MemoryPlan(
        base=sum(p.nbytes for p in parameters if not p.requires_grad),
        adapter=trainable * _ADAM_BYTES,
        forward=forward,
        backward=step.peak - forward,
        validation=validation.peak,
        slack=round(_HOLES * max(step.allocated, validation.allocated)) if on_cpu else 0,
        process=psutil.Process().memory_info().rss,
    )


def _simulated(
    model: PeftModel, *, rows: int, length: int, answer: int, checkpointing: bool, validation_rows: int
) -> tuple[LiveBytes, int, LiveBytes]:
    """A training step, the bytes that its forward pass left, and a validation batch."""
    give_shapes(model)
    model.train()
    if checkpointing:
        # the second is its name before transformers 5.23
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable()
        model.enable_input_require_grads()
    step = LiveBytes(model)
    with step:
        loss = training_loss(model, rows=rows, length=length, answer=answer)
        forward = step.now
        loss.backward()
        del loss
    validation = LiveBytes(model)
    if validation_rows:
        model.eval()
        with torch.no_grad(), validation:
            training_loss(model, rows=validation_rows, length=length, answer=answer)
    return step, forward, validation


class MemoryUnknownError(Exception):
    """A step cannot be simulated; the message is the reason. No user's error: the plan says so and goes on."""


def check_memory(plan: MemoryPlan, *, device: torch.device) -> None:
    """Refuse what cannot fit, rather than be ended by the system half-way.

    Raises:
        ConfigError: the plan is more than 1.25 times all memory of the machine or of the GPU.
    """
    needed, there = plan.total, psutil.virtual_memory().total + psutil.swap_memory().total
    if device.type == "cuda":
        needed, there = plan.total - plan.process, torch.cuda.get_device_properties(device).total_memory
    if needed > _TOO_MUCH * there:
        raise ConfigError(
            f"the training needs about {needed / 2**20:,.0f} MiB, {plan.base / 2**20:,.0f} of them for the base, and "
            f"there are {there / 2**20:,.0f}; take a smaller --model, lower --r, --batch-size, --eval-batch-size or "
            "--max-length, or take --micro-batch-size or --gradient-checkpointing."
        )


def training_loss(model: PeftModel, *, rows: int, length: int, answer: int) -> torch.Tensor:
    """The trainer's loss of a batch of equal rows: over the last `answer` tokens of each, or over one label each."""
    head = head_of(model.active_peft_config.task_type)
    ids = torch.zeros(rows, length, dtype=torch.long)
    routing: dict[str, Any] = {}
    if model.active_peft_config.routes_by_task:
        routing["expert_ids"] = torch.zeros(rows, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # as in any batch of unequal rows: transformers leaves out a mask that hides nothing
    with load_balance(model) as balance:
        logits = model(input_ids=ids, attention_mask=mask, **head.options, **routing).logits
    return head.sample_loss(logits, answer=answer) + balance.loss()
