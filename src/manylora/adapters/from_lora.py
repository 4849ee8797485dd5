"""Several plain LoRAs as one adapter with share "none" and a task router: the way back from `export`.

Pure functions: settings and weights in, settings and weights out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor

from manylora.adapters.config import ManyLoraConfig, alpha_of, rank_of, scaling_of
from manylora.adapters.export import PREFIX, PlainLora, pattern, plain_number, rescaled
from manylora.errors import ConfigError, ModelError

_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "trainable_token_indices", "use_rslora",
}  # fmt: skip
"""Settings of a LoRA that an expert can follow, or that only matter before and during its training."""

_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to start that leave the base weights alone; PiSSA, OLoRA and others change them when the LoRA is loaded."""

_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, kw_only=True)
class _Factors:
    A: Tensor
    """(R, D)"""
    B: Tensor
    """(O, R)"""
    scaling: float


def import_loras(loras: Mapping[str, PlainLora]) -> tuple[ManyLoraConfig, dict[str, Tensor]]:
    """One adapter whose experts are the given LoRAs, in their order.

    Unequal ranks are padded with zeros to the largest of a layer, unequal scalings go into B; both are exact.

    Args:
        loras: task name to LoRA.

    Returns:
        Settings (share "none", router "task") and weights, as PEFT saves them.

    Raises:
        ConfigError: there is no LoRA.
        ModelError: one is more than a plain LoRA, or they differ in base, layers or what they train besides.
    """
    if not loras:
        raise ConfigError("There is no LoRA to import; give at least one folder.")
    names = list(loras)
    first, *rest = names
    for name, lora in loras.items():
        check_plain(name, lora.config)
    read = {name: _split(name, lora) for name, lora in loras.items()}
    for name in rest:
        _check_alike(first, loras[first], name, loras[name])
        _check_same_layers(first, read[first][0], name, read[name][0])
        _check_same_others(first, read[first][1], name, read[name][1])
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    weights: dict[str, Tensor] = {}
    for module in read[first][0]:
        experts = [read[name][0][module] for name in names]
        rank, scaling, A, B = _stack(experts)
        ranks[module], alphas[module] = rank, plain_number(scaling * rank)
        weights[f"{PREFIX}{module}.manylora_experts.lora_A"] = A
        weights[f"{PREFIX}{module}.manylora_experts.lora_B"] = B
    config = _config([loras[name].config for name in names], names, ranks, alphas)
    return config, {**weights, **read[first][1]}


def check_plain(name: str, config: LoraConfig) -> None:
    """Refuse a LoRA with settings that an expert cannot follow (DoRA, embeddings, …).

    Raises:
        ModelError: naming the setting.
    """
    for setting in dataclasses.fields(LoraConfig):
        if setting.name in _UNDERSTOOD or not hasattr(config, setting.name):
            continue
        value, default = getattr(config, setting.name), _default(setting)
        if value and value != default:
            raise ModelError(
                f"{name} was made with {setting.name}={value!r}, more than plain LoRA; "
                "it cannot become an expert."
            )
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not 0 < alpha < math.inf:
            raise ModelError(
                f"{name} has lora_alpha={alpha!r}, which is no scale of an expert; leave it out."
            )
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ModelError(
            f"{name} was made with init_lora_weights={config.init_lora_weights!r}, which changes the base weights; "
            "convert it to plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)."
        )


def _default(setting: dataclasses.Field[Any]) -> Any:
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return setting.default


def _split(name: str, lora: PlainLora) -> tuple[dict[str, _Factors], dict[str, Tensor]]:
    """Module → factors, and the other weights."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in lora.weights.items():
        module, mark, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
        if not mark:
            others[key] = tensor
        elif leaf not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ModelError(
                f"{name} adapts {module!r}, which is no linear layer; experts sit on linear layers only."
            )
        else:
            pairs.setdefault(module, {})[leaf[0]] = tensor
    if not pairs:
        raise ModelError(f"{name} holds no LoRA weights.")
    return {module: _factors(name, lora.config, module, pair) for module, pair in pairs.items()}, others


def _factors(name: str, config: LoraConfig, module: str, pair: Mapping[str, Tensor]) -> _Factors:
    rank = rank_of(config, module)
    if pair.keys() != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
        shapes = {part: tuple(tensor.shape) for part, tensor in pair.items()}
        raise ModelError(
            f"{name} is damaged: {module!r} should have rank {rank}, but its weights are {shapes}."
        )
    return _Factors(A=pair["A"], B=pair["B"], scaling=scaling_of(config, alpha_of(config, module), rank))


def _check_alike(first: str, one: PlainLora, name: str, other: PlainLora) -> None:
    for setting, remedy in (
        ("base_model_name_or_path", "only LoRAs of one base can share an adapter"),
        ("task_type", "only LoRAs of one kind of model can share an adapter"),
        ("bias", "the experts of an adapter have their other trained weights in common"),
        ("trainable_token_indices", "the experts of an adapter have their trained token rows in common"),
        ("fan_in_fan_out", "only LoRAs of one base can share an adapter"),
    ):
        # LoRAs of an older PEFT have no token rows
        mine, theirs = getattr(one.config, setting, None), getattr(other.config, setting, None)
        if mine != theirs:
            raise ModelError(f"{first} has {setting} {mine!r} and {name} has {theirs!r}; {remedy}.")


def _check_same_layers(
    first: str, one: Mapping[str, _Factors], name: str, other: Mapping[str, _Factors]
) -> None:
    if one.keys() != other.keys():
        owner, module = min(
            [(first, module) for module in one.keys() - other.keys()]
            + [(name, module) for module in other.keys() - one.keys()]
        )
        raise ModelError(
            f"{first} and {name} adapt different layers ({module!r} is adapted by {owner} alone); "
            "give LoRAs with the same target_modules."
        )
    for module, factors in one.items():
        mine = (factors.A.shape[1], factors.B.shape[0])
        theirs = (other[module].A.shape[1], other[module].B.shape[0])
        if mine != theirs:
            raise ModelError(
                f"{first} has {module!r} with {mine[0]} inputs and {mine[1]} outputs, {name} with {theirs[0]} and "
                f"{theirs[1]}; only LoRAs of one base can share an adapter."
            )


def _check_same_others(first: str, one: Mapping[str, Tensor], name: str, other: Mapping[str, Tensor]) -> None:
    for key in sorted(one.keys() | other.keys()):
        if key not in one or key not in other or not torch.equal(one[key], other[key]):
            raise ModelError(
                f"{first} and {name} hold different weights of {key.removeprefix(PREFIX)!r} (bias or modules_to_save); "
                "the experts of an adapter have those in common."
            )


def _stack(experts: list[_Factors]) -> tuple[int, float, Tensor, Tensor]:
    """Rank, scaling, A (N·R, D) and B (O, N·R) of one layer."""
    rank = max(expert.A.shape[0] for expert in experts)
    scaling = experts[0].scaling
    stacked_A, stacked_B = [], []
    for expert in experts:
        missing = rank - expert.A.shape[0]
        B = expert.B
        if expert.scaling != scaling:
            B = rescaled(B, expert.scaling / scaling)
        stacked_A.append(F.pad(expert.A, (0, 0, 0, missing)))
        stacked_B.append(F.pad(B, (0, missing)))
    return rank, scaling, torch.cat(stacked_A), torch.cat(stacked_B, dim=1)


def _config(
    configs: list[LoraConfig], names: list[str], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> ManyLoraConfig:
    first = configs[0]
    rank = max(ranks.values())
    alpha = next(alphas[module] for module, found in ranks.items() if found == rank)
    same = isinstance(first.target_modules, (set, list)) and all(
        getattr(config, setting) == getattr(first, setting) for config in configs for setting in _TARGETING
    )
    targeting = {setting: getattr(first, setting) for setting in _TARGETING} if same else {}
    return ManyLoraConfig(
        **{"target_modules": sorted(ranks), **targeting},
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        auto_mapping=first.auto_mapping,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        rank_pattern=pattern(ranks, rank),
        alpha_pattern=pattern(alphas, alpha),
        lora_dropout=first.lora_dropout,
        modules_to_save=first.modules_to_save,
        trainable_token_indices=getattr(first, "trainable_token_indices", None),
        bias={"lora_only": "manylora_only"}.get(first.bias, first.bias),
        fan_in_fan_out=first.fan_in_fan_out,
        num_experts=len(names),
        share="none",
        router="task",
        task_names=names,
    )
