"""Plan, then apply: what a run will train, read and need, computed before a weight is touched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model

from manylora.adapters import ManyLoraConfig
from manylora.errors import ConfigError
from manylora.training.base_options import attention_options
from manylora.training.heads import head_of
from manylora.training.memory import MemoryPlan
from manylora.training.models import base_location, load_config, pick_device, pick_dtype
from manylora.training.reach import Reach, leave_out, reach_of
from manylora.training.task_weights import weights_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from manylora.training.config import TaskType, TrainConfig

_MIB = 2**20


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
    memory: MemoryPlan | str
    """What the training takes, or why that is not known."""
    leaks: int
    """Test rows whose prompt also stands among the training rows."""
    dropped: int
    """Training and validation rows without an answer text, which are left out."""
    notes: Sequence[str] = ()
    """What else a reader should know of the rows."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Targeted layers that cannot carry an adapter, with the reasons."""
    fused: Mapping[str, int] = field(default_factory=dict)
    """Fused parameters of the base, such as all experts' matrices in one ("experts.down_proj"), to their numbers:
    adapters go onto layers, so these get none."""


def adapter_config(config: TrainConfig, *, task_names: Sequence[str]) -> ManyLoraConfig:
    """The PEFT configuration that a resolved `config` stands for."""
    if config.share is None or config.num_experts is None:
        raise ConfigError("share and num_experts are not set; call config.resolved() and give num_experts.")
    adapter = ManyLoraConfig(
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
        task_names=list(task_names) if config.routes_by_task else None,
        target_modules=config.target_modules,
        base_quantization=config.quantize,
    )
    leave_out(
        adapter, _reach(config.model, config.task_type, load_config(config.model, task_type=config.task_type))
    )
    return adapter


def left_out_layers(config: TrainConfig, adapter: ManyLoraConfig) -> dict[str, str]:
    """The layers that `adapter_config` has excluded, with the reasons."""
    reach = _reach(config.model, config.task_type, load_config(config.model, task_type=config.task_type))
    return {name: reach.unfit[name] for name in sorted(adapter.exclude_modules or ()) if name in reach.unfit}


_REACHES: dict[tuple[str, str, str], Reach] = {}


def _reach(model: str, task_type: TaskType, architecture: PretrainedConfig) -> Reach:
    """Of one architecture, looked at once: a run asks several times."""
    key = (base_location(model), task_type, architecture.to_json_string())
    if key not in _REACHES:
        _REACHES[key] = reach_of(_shadow_base(model, task_type, architecture, labels=2, dtype=torch.float32))
    return _REACHES[key]


def _shadow_base(
    model: str,
    task_type: TaskType,
    architecture: PretrainedConfig,
    *,
    labels: int,
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    """The base on torch's meta device."""
    with torch.device("meta"):
        return head_of(task_type).shadow(
            architecture, location=base_location(model), labels=labels, dtype=dtype, **options
        )


def shadow_model(config: TrainConfig, adapter: ManyLoraConfig, *, labels: int = 2) -> PeftModel:
    """Base and adapters with shapes and types but no memory behind them (torch's meta device).

    Args:
        config: resolved.
        adapter: its PEFT configuration.
        labels: outputs of the classification head, where the task type asks for one.

    Raises:
        ModelError: unknown model.
        TargetModulesError: nothing to adapt.
        ConfigError: there is no such attention here.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    architecture = load_config(config.model, task_type=config.task_type)
    options = attention_options(
        config.attention, head_of(config.task_type), architecture, model=config.model, device=device
    )
    base = _shadow_base(config.model, config.task_type, architecture, labels=labels, dtype=dtype, **options)
    if parts := head_of(config.task_type).parts(base):
        adapter.modules_to_save = parts
    with torch.device("meta"):
        return get_peft_model(base, adapter, low_cpu_mem_usage=True)


def count_modules(model: PeftModel) -> Counter[str]:
    """Adapted layers by the last part of their name."""
    suffix = ".manylora_experts"
    return Counter(
        name.removesuffix(suffix).rpartition(".")[2]
        for name, _ in model.named_modules()
        if name.endswith(suffix)
    )


def count_fused(model: PeftModel) -> dict[str, int]:
    """Numbers in the base's stacks of matrices, (experts, in, out), by the last two parts of their names.

    A convolution's weight is another thing, and left out.
    """
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd) or "manylora_experts" in name:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                found[f"{name.rpartition('.')[2]}.{leaf}"] += parameter.numel()
    return dict(found)


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


def _memory_text(memory: MemoryPlan | str) -> str:
    if isinstance(memory, str):
        return f"not known: this base's step cannot be simulated ({memory})"
    parts = (
        f"base {memory.base / _MIB:,.0f}, adapter {memory.adapter / _MIB:,.0f}, "
        f"{_step_text(memory)}, allocator's slack {memory.slack / _MIB:,.0f}, "
        f"process {memory.process / _MIB:,.0f}"
    )
    return f"about {memory.total / _MIB:,.0f} MiB at the peak ({parts})"


def _fused_text(plan: Plan) -> str:
    share = 100 * sum(plan.fused.values()) / (plan.total - plan.trainable)
    return f"{', '.join(sorted(plan.fused))}: fused parameters and no layers, {share:.0f} % of the base"


def _left_out_text(left_out: Mapping[str, str]) -> str:
    parts = []
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, own in left_out.items() if own == reason]
        more = f" and {len(names) - 1} more" if names[1:] else ""
        parts.append(f"{names[0]}{more}: {reason}")
    return "; ".join(parts)


def _step_text(memory: MemoryPlan) -> str:
    if memory.step == memory.validation:
        return f"a validation batch {memory.validation / _MIB:,.0f}"
    return f"forward {memory.forward / _MIB:,.0f}, backward on top {memory.backward / _MIB:,.0f}"


def plan_lines(plan: Plan, config: TrainConfig) -> list[tuple[str, str]]:
    """The plan as label and text, for printing."""
    modules = ", ".join(f"{count} × {name}" for name, count in sorted(plan.modules.items()))
    lines = [
        ("model", config.model if config.quantize is None else f"{config.model}, in {config.quantize}"),
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
        *(
            [
                (
                    "early stop",
                    f"after {config.early_stopping} validations without a lower mean loss; the best is kept",
                )
            ]
            if config.early_stopping
            else []
        ),
        *(
            [("weights", weights_text({task.name: task.train for task in plan.tasks}, config))]
            if config.weights
            else []
        ),
        ("tokens", f"{plan.tokens:,}"),
        ("memory", _memory_text(plan.memory)),
    ]
    if plan.fused:
        lines.append(("no adapter", _fused_text(plan)))
    if plan.left_out:
        lines.append(("left out", _left_out_text(plan.left_out)))
    if plan.dropped:
        lines.append(("warning", f"{plan.dropped} rows have no answer text to learn and are left out"))
    if plan.warmup_steps >= plan.steps > 1:
        lines.append(("warning", "the warm-up takes all steps: the peak learning rate is never reached"))
    if plan.leaks:
        lines.append(
            ("warning", f"{plan.leaks} test rows have a prompt that also stands among the training rows")
        )
    return [*lines, *(("note", note) for note in plan.notes)]
