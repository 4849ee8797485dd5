"""Plan, then apply: what a run will train, read and need, computed before a weight is touched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from manylora.adapters import ManyLoraConfig
from manylora.errors import ConfigError
from manylora.training.memory import MemoryPlan
from manylora.training.models import base_location, head_modules, load_config, pick_device, pick_dtype
from manylora.training.pooling import pool_as_told

if TYPE_CHECKING:
    from manylora.training.config import TrainConfig

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
    memory: MemoryPlan
    leaks: int
    """Test rows whose prompt also stands among the training rows."""
    dropped: int
    """Training and validation rows without an answer text, which are left out."""
    notes: Sequence[str] = ()
    """What else a reader should know of the rows."""


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
    return f"forward {memory.forward / _MIB:,.0f}, backward on top {memory.backward / _MIB:,.0f}"


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
    return [*lines, *(("note", note) for note in plan.notes)]
