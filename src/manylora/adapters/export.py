"""An adapter as plain LoRAs: settings and weights in, settings and weights out; no disk, no model.

Under static routing an expert, or all of them alike, is exactly one LoRA; what stands for a token router (`collapse`)
is an approximation. Inference servers read less of a LoRA's settings than PEFT
does: vLLM and SGLang scale every layer by lora_alpha / r, whatever `alpha_pattern` and (SGLang) `use_rslora` say.
So an exported LoRA has one scaling for all layers, written as a plain alpha; where the layers' scalings differ,
their ratio goes into B.

Shape letters: D in, O out, R rank, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from peft import LoraConfig
from torch import Tensor

from manylora.adapters.collapse import Fitted
from manylora.adapters.config import ManyLoraConfig, alpha_of, scaling_of
from manylora.adapters.layout import Choice, Layout
from manylora.errors import ConfigError, ModelError, NotMergeableError

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in a saved adapter."""

Collapsed = Mapping[str, Tensor | Fitted]
"""Module name to mean routing weights (N,) or fitted factors: a token router collapsed."""

_BANK = ".manylora_experts."
_LEAVES = {"lora_A", "lora_B", "lora_router"}
_BIASES = {"manylora_only": "lora_only"}

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, kw_only=True)
class PlainLora:
    """One LoRA as PEFT saves it."""

    config: LoraConfig
    weights: dict[str, Tensor]
    """`base_model.model.<module>.lora_A.weight` (R, D) and `….lora_B.weight` (O, R), and whatever the config's
    `bias` and `modules_to_save` add."""

    @property
    def rank(self) -> int:
        """The largest rank of any layer: what a server's --max-lora-rank must allow."""
        return max([self.config.r, *self.config.rank_pattern.values()])


@dataclass(frozen=True, kw_only=True)
class _Bank:
    """One layer's parameters and how they are stacked."""

    A: Tensor
    B: Tensor
    layout: Layout
    scaling: float


def expert_names(config: ManyLoraConfig) -> list[str]:
    """One name per expert of a task router: its task's, or "expert-0" and so on where tasks have no names."""
    return list(config.task_names or [f"expert-{n}" for n in range(config.num_experts)])


def export_lora(
    config: ManyLoraConfig, weights: Mapping[str, Tensor], choice: Choice | Collapsed
) -> PlainLora:
    """The plain LoRA that an adapter is under one routing.

    Args:
        config: the adapter's settings.
        weights: the adapter's saved weights.
        choice: an expert's index (task router), "all" (uniform router, or one expert), both exact; or what
            stands for a token router per module, an approximation.

    Returns:
        A LoRA of rank R; of rank N·R where nothing is shared and `choice` names no expert.

    Raises:
        NotMergeableError: "all" or an index with a token router.
        ConfigError: no such expert.
        ModelError: the weights are not those of such an adapter.
    """
    single = config.num_experts == 1
    if config.router == "token" and not single and not isinstance(choice, Mapping):
        raise NotMergeableError(
            "router='token' weighs the experts anew for each token, so no LoRA equals the adapter; collapse it "
            "on a task's data."
        )
    if isinstance(choice, int) and not 0 <= choice < config.num_experts:
        raise ConfigError(
            f"Expert {choice} is none of the adapter's, which are 0 to {config.num_experts - 1}."
        )
    banks, others = _banks(config, weights)
    scalings = {bank.scaling for bank in banks.values()}
    scaling = scalings.pop() if len(scalings) == 1 else scaling_of(config, config.lora_alpha, config.r)
    ranks: dict[str, int] = {}
    exported: dict[str, Tensor] = {}
    for module, bank in banks.items():
        A, B = _factors(module, bank, choice)
        if bank.scaling != scaling:
            B = rescaled(B, bank.scaling / scaling)
        ranks[module] = A.shape[0]
        # copies: views of one stacked matrix share their memory, which safetensors does not store
        exported[f"{PREFIX}{module}.lora_A.weight"] = A.clone(memory_format=torch.contiguous_format)
        exported[f"{PREFIX}{module}.lora_B.weight"] = B.clone(memory_format=torch.contiguous_format)
    return PlainLora(config=_lora_config(config, ranks, scaling), weights={**exported, **others})


def pattern(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """PEFT's `rank_pattern` or `alpha_pattern` that gives every module its value.

    By the last part of a name where all modules that end so agree, else by full names.
    """
    by_end: dict[str, set[Value]] = {}
    for module, value in values.items():
        by_end.setdefault(_end(module), set()).add(value)
    ends = {end: found.pop() for end, found in by_end.items() if len(found) == 1}
    full = {module: value for module, value in values.items() if _end(module) not in ends}
    # PEFT takes the first key that a name ends with, so the longest stand first
    return {
        **{end: value for end, value in ends.items() if value != default},
        **dict(sorted(full.items(), key=lambda item: (-len(item[0]), item[0]))),
    }


def rescaled(B: Tensor, factor: float) -> Tensor:
    """B times a number, rounded once."""
    return (B.to(torch.promote_types(B.dtype, torch.float32)) * factor).to(B.dtype)


def plain_number(value: float) -> float | int:
    """An integer where the value is one: vLLM declares lora_alpha as an integer."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def _banks(
    config: ManyLoraConfig, weights: Mapping[str, Tensor]
) -> tuple[dict[str, _Bank], dict[str, Tensor]]:
    """Module → its bank, and the weights that belong to no bank (biases, modules_to_save)."""
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        module, mark, leaf = key.removeprefix(PREFIX).rpartition(_BANK)
        if not mark:
            others[key] = tensor
        elif leaf not in _LEAVES:
            raise ModelError(
                f"The adapter's weight {key!r} has no counterpart in a plain LoRA; it cannot be exported."
            )
        else:
            found.setdefault(module, {})[leaf] = tensor
    if not found:
        raise ModelError("The adapter's weights hold no expert; save the adapter again.")
    return {module: _bank(config, module, parts) for module, parts in found.items()}, others


def _bank(config: ManyLoraConfig, module: str, parts: Mapping[str, Tensor]) -> _Bank:
    if not {"lora_A", "lora_B"} <= parts.keys():
        raise ModelError(f"The adapter's weights of {module!r} are incomplete; save the adapter again.")
    A, B = parts["lora_A"], parts["lora_B"]
    layout = Layout.of_matrices(A, B, num_experts=config.num_experts, share=config.share)
    if layout is None:
        raise ModelError(
            f"The weights of {module!r} have shapes {tuple(A.shape)} and {tuple(B.shape)}, which are not those of "
            f"{config.num_experts} experts with share={config.share!r}; the adapter's files do not belong together."
        )
    scaling = scaling_of(config, alpha_of(config, module), layout.rank)
    return _Bank(A=A, B=B, layout=layout, scaling=scaling)


def _factors(module: str, bank: _Bank, choice: Choice | Collapsed) -> tuple[Tensor, Tensor]:
    """A (R', D) and B (O, R') of the layer."""
    layout = bank.layout
    if not isinstance(choice, Mapping) or layout.num_experts == 1:
        return layout.static_factors(bank.A, bank.B, "all" if isinstance(choice, Mapping) else choice)
    collapsed = choice.get(module)
    if isinstance(collapsed, Fitted):
        return collapsed.A.to(bank.A.dtype), collapsed.B.to(bank.B.dtype)
    if collapsed is None or collapsed.shape != (layout.num_experts,):
        raise ModelError(
            f"There are no routing weights (N = {layout.num_experts}) for {module!r}; measure them anew."
        )
    wide = torch.promote_types(bank.A.dtype, torch.float32)
    A, B = layout.weighted_factors(bank.A.to(wide), bank.B.to(wide), collapsed.to(wide))
    return A.to(bank.A.dtype), B.to(bank.B.dtype)


def _lora_config(config: ManyLoraConfig, ranks: Mapping[str, int], scaling: float) -> LoraConfig:
    rank = max(ranks.values())
    rank_pattern = pattern(ranks, rank)
    # Servers want names that have weights: a regular expression, or names of which some are excluded, become those.
    named = not isinstance(config.target_modules, str) and config.target_modules is not None
    by_name = named and not config.exclude_modules
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
        r=rank,
        lora_alpha=plain_number(scaling * rank),
        rank_pattern=rank_pattern,
        alpha_pattern={key: plain_number(scaling * value) for key, value in rank_pattern.items()},
        lora_dropout=config.lora_dropout,
        target_modules=sorted(config.target_modules or ()) if by_name else sorted(ranks),
        layers_to_transform=config.layers_to_transform if by_name else None,
        layers_pattern=config.layers_pattern if by_name else None,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
        bias=_BIASES.get(config.bias, config.bias),
        fan_in_fan_out=config.fan_in_fan_out,
    )
