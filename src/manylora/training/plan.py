"""Plan, then apply: what a run will train, read and need, computed before a weight is touched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from manylora.adapters import ManyLoraConfig, load_balance
from manylora.errors import ConfigError
from manylora.training.models import base_location, head_modules, load_config, pick_device, pick_dtype
from manylora.training.pooling import pool_as_told

if TYPE_CHECKING:
    from manylora.training.config import TrainConfig

_MIB = 2**20
_ADAM_BYTES = 16
"""Per trainable float32 parameter: the weight, its gradient and Adam's two moments."""
_SLACK = 1.45
"""What a CPU's allocator holds over what is in use. Freed blocks between living ones are not given back; measured in
`benchmarks/memory.py` (docs/log.md): 1.4 to 1.5 times."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Counts of one task: rows of each split, share of truncated prompts, longest row and answer in tokens."""

    name: str
    train: int
    validation: int
    test: int
    truncated: float
    longest: int
    longest_answer: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Estimated peak memory of training in bytes, by cause."""

    base: int
    """Frozen weights."""
    adapter: int
    """Adapter weights, gradients and Adam's moments in float32."""
    activations: int
    """What one forward pass keeps for the backward pass, at the longest row of the data."""
    recomputed: int
    """With checkpointing, the activations of the one layer that the backward pass is in."""
    logits: int
    """The gradient of the logits, which lives beside them when the backward pass starts."""
    validation: int
    """What a forward pass over a validation batch needs, when nothing is kept for backward."""
    slack: int
    """What the allocator holds beyond all that, having freed it: nothing on a GPU, whose allocator reuses it."""
    process: int
    """What the process held before: Python, libraries, data."""

    @property
    def step(self) -> int:
        """The larger of what a training step and what a validation batch need for themselves."""
        return max(self.activations + self.recomputed + self.logits, self.validation)

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return self.base + self.adapter + self.step + self.slack + self.process


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do."""

    tasks: Sequence[TaskPlan]
    modules: Counter[str]
    """Kind of adapted layer ("q_proj") to how many get an adapter."""
    trainable: int
    """Parameters of the adapters."""
    total: int
    """Parameters of base and adapters."""
    steps: int
    warmup_steps: int
    tokens: int
    """Tokens that training reads, padding apart."""
    memory: MemoryPlan
    leaks: int
    """Test rows whose prompt also stands among the training rows."""
    dropped: int
    """Training and validation rows without an answer text, which are left out."""


def adapter_config(config: TrainConfig, *, task_names: Sequence[str]) -> ManyLoraConfig:
    """The PEFT configuration that a resolved `config` stands for."""
    if config.share is None or config.num_experts is None:
        raise ConfigError("share and num_experts are not set; call config.resolved() and give num_experts.")
    by_task = config.router == "task" and config.num_experts > 1
    return ManyLoraConfig(
        task_type=config.task_type,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        num_experts=config.num_experts,
        share=config.share,
        router=config.router,
        router_top_k=config.router_top_k,
        router_temperature=config.router_temperature,
        load_balance_weight=config.load_balance_weight,
        task_names=list(task_names) if by_task else None,
        target_modules=config.target_modules,
    )


def shadow_model(config: TrainConfig, adapter: ManyLoraConfig, *, labels: int = 0) -> PeftModel:
    """Base and adapters with shapes and types but no memory behind them (torch's meta device).

    Args:
        config: resolved.
        adapter: its PEFT configuration.
        labels: outputs of the classification head, where the task type asks for one.

    Raises:
        ModelError: unknown model.
        TargetModulesError: nothing to adapt.
    """
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    architecture = load_config(config.model, task_type=config.task_type)
    with torch.device("meta"):
        if config.task_type == "SEQ_CLS":
            architecture.num_labels = labels
            if architecture.pad_token_id is None:
                architecture.pad_token_id = 0
            base = AutoModelForSequenceClassification.from_config(architecture, dtype=dtype)
            pool_as_told(base, base_location(config.model))
            adapter.modules_to_save = head_modules(base)
        else:
            base = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
        return get_peft_model(base, adapter, low_cpu_mem_usage=True)


def count_modules(model: PeftModel) -> Counter[str]:
    """Adapted layers by the last part of their name."""
    suffix = ".manylora_experts"
    return Counter(
        name.removesuffix(suffix).rpartition(".")[2]
        for name, _ in model.named_modules()
        if name.endswith(suffix)
    )


def estimate_memory(
    model: PeftModel,
    *,
    rows: int,
    length: int,
    checkpointing: bool,
    validation_rows: int = 0,
    on_cpu: bool = True,
) -> MemoryPlan:
    """Run one forward pass on tensors without data and add up what autograd keeps.

    Args:
        model: from `shadow_model`; consumed.
        rows: rows of one forward pass.
        length: tokens of the longest row.
        checkpointing: whether activations are recomputed.
        validation_rows: rows of one validation batch; 0: there is no validation.
        on_cpu: whether the CPU's allocator serves the training.
    """
    parameters = list(model.parameters())
    base = sum(p.nbytes for p in parameters if not p.requires_grad)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    text = model.config.get_text_config()
    kept, logits_tensor = _kept_for_backward(model, rows=rows, length=length, checkpointing=False)
    logits = logits_tensor.nbytes
    recomputed = 0
    if checkpointing:
        recomputed = (kept - logits) // getattr(text, "num_hidden_layers", 1)
        kept, _ = _kept_for_backward(model, rows=rows, length=length, checkpointing=True)
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    outputs = text.vocab_size if logits_tensor.dim() == 3 else 0  # a classification head looks at one token
    # The logits, or in a layer the MLP's three wide tensors beside the stream and what is added to it.
    values = max(outputs + text.hidden_size, 3 * wide + 2 * text.hidden_size)
    per_token = values * logits_tensor.element_size()
    memory = MemoryPlan(
        base=base,
        adapter=trainable * _ADAM_BYTES,
        activations=kept,
        recomputed=recomputed,
        logits=logits,
        validation=validation_rows * length * per_token,
        slack=0,
        process=psutil.Process().memory_info().rss,
    )
    return replace(memory, slack=round((_SLACK - 1) * memory.step)) if on_cpu else memory


def _kept_for_backward(
    model: PeftModel, *, rows: int, length: int, checkpointing: bool
) -> tuple[int, torch.Tensor]:
    storages: dict[int, int] = {}
    alive: list[Any] = []  # a freed storage's address would be used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_shapes(model)
        model.train()
        if checkpointing:
            # the second is its name before transformers 5.23
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable()
            model.enable_input_require_grads()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        ids = torch.zeros(rows, length, dtype=torch.long)
        routing: dict[str, Any] = {}
        if model.active_peft_config.router == "task" and model.active_peft_config.num_experts > 1:
            routing["expert_ids"] = torch.zeros(rows, dtype=torch.long)
        if model.active_peft_config.task_type != "SEQ_CLS":
            routing["use_cache"] = False
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), load_balance(model):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **routing).logits
    kept = sum(size for address, size in storages.items() if address not in own)
    return kept + logits.nbytes, logits


def _give_shapes(model: torch.nn.Module) -> None:
    """Swap meta tensors for fake CPU ones: same shapes, still no data, but CPU kernels are chosen."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                table[name] = (
                    torch.nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
                )


def step_counts(rows: int, config: TrainConfig) -> tuple[int, int]:
    """Optimizer steps of a run over `rows` rows in all epochs together, and how many of them warm up."""
    steps = math.ceil(rows / config.rows_per_step)
    warmup = config.warmup or 0.0
    return steps, math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def _router(config: TrainConfig) -> str:
    options = [
        f"top {config.router_top_k}" if config.router_top_k is not None else "",
        f"temperature {config.router_temperature:g}" if config.router_temperature != 1 else "",
        f"load balance {config.load_balance_weight:g}" if config.load_balance_weight else "",
    ]
    given = ", ".join(option for option in options if option)
    return f"{config.router} ({given})" if given else config.router


def _step_text(memory: MemoryPlan) -> str:
    if memory.step == memory.validation:
        return f"a validation batch {memory.validation / _MIB:,.0f}"
    activations = memory.activations + memory.recomputed
    return f"activations {activations / _MIB:,.0f}, logits {memory.logits / _MIB:,.0f}"


def plan_lines(plan: Plan, config: TrainConfig) -> list[tuple[str, str]]:
    """The plan as label and text, for printing."""
    memory = plan.memory
    parts = (
        f"base {memory.base / _MIB:,.0f}, adapter {memory.adapter / _MIB:,.0f}, "
        f"{_step_text(memory)}, allocator's slack {memory.slack / _MIB:,.0f}, "
        f"process {memory.process / _MIB:,.0f}"
    )
    modules = ", ".join(f"{count} × {name}" for name, count in sorted(plan.modules.items()))
    lines = [
        ("model", config.model),
        (
            "adapter",
            f"share {config.share}, {config.num_experts} experts, router {_router(config)}, r {config.r}, "
            f"alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g}"
            if config.num_experts != 1
            else f"LoRA, r {config.r}, alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g}",
        ),
        ("modules", f"{sum(plan.modules.values())} layers: {modules}"),
        (
            "trainable",
            f"{plan.trainable:,} of {plan.total:,} parameters ({100 * plan.trainable / plan.total:.2f} %)",
        ),
        (
            "steps",
            f"{plan.steps:,} of {config.rows_per_step} rows ({config.epochs:g} epochs, {plan.warmup_steps} warm-up), "
            f"peak learning rate {config.learning_rate:g}, mixing {config.mixing}",
        ),
        ("tokens", f"{plan.tokens:,}"),
        ("memory", f"about {memory.total / _MIB:,.0f} MiB at the peak ({parts})"),
    ]
    if plan.dropped:
        lines.append(("warning", f"{plan.dropped} rows have no answer text to learn and are left out"))
    if plan.warmup_steps >= plan.steps > 1:
        lines.append(("warning", "the warm-up takes all steps: the peak learning rate is never reached"))
    if plan.leaks:
        lines.append(
            ("warning", f"{plan.leaks} test rows have a prompt that also stands among the training rows")
        )
    return lines
