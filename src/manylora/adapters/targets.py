"""Which layers get an adapter: every name must match something, or nothing starts.

PEFT itself only fails when *no* name matches; a mistyped entry beside a good one would train half a model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import psutil
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora.adapters.config import ManyLoraConfig, rank_of
from manylora.adapters.layout import Layout
from manylora.adapters.patterns import check_time, expressions_of
from manylora.errors import ConfigError, TargetModulesError

Matches = Callable[[ManyLoraConfig, str], Any]

_BYTES = 4
"""Of a number of an adapter, which is made in float32."""
_TOO_MUCH = 1.25
"""Times all memory: some of it may be elsewhere, as in the training's own check."""

_HEADS = {"classifier", "score", "qa_outputs"}
"""What PEFT itself adds to modules_to_save by the task type, whichever of them the model has."""


def is_linear(module: nn.Module) -> bool:
    """Whether the module can carry an adapter: nn.Linear, Conv1D, or a quantised linear layer."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(base)
    return backend is not None and backend.layer_type == "linear"


def stores_transposed(module: nn.Module) -> bool:
    """Whether the layer's weight is (D, O) instead of (O, D), as transformers' Conv1D (GPT-2) keeps it."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, Conv1D)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, without the insides of layers that are adapted already."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        found[name] = module
        if isinstance(module, BaseTunerLayer):
            inside.append(name + ".")
    return found


def default_targets(
    model: nn.Module, defaults: Iterable[str] | str | None, model_type: str
) -> set[str] | str:
    """PEFT's usual targets for this architecture, those of them that the model has.

    Raises:
        TargetModulesError: PEFT knows none for this architecture, or the model has none of them.
    """
    if isinstance(defaults, str):
        return defaults
    names = candidates(model)
    present = {target for target in defaults or () if any(_ends_with(name, target) for name in names)}
    if not present:
        raise TargetModulesError(
            f"There are no default target_modules for architecture {model_type!r}. Use 'all-linear' or pick "
            f"from this model's linear layers, which end in {_ends(names)}."
        )
    return present


def leave_out_others(config: ManyLoraConfig, model: nn.Module) -> None:
    """Take out of resolved "all-linear" targets what is excluded, and what only derives from nn.Linear.

    A subclass with a forward of its own need not compute W x: Llama 4's router returns two tensors.
    """
    if isinstance(config.target_modules, set):
        names = dict(model.named_modules())
        excluded = config.exclude_modules if isinstance(config.exclude_modules, set) else set()
        config.target_modules = {
            name for name in config.target_modules if name not in excluded and is_plain(names[name])
        }


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer's output is known to be W x + b: by its class, or as a quantised layer's."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if type(base).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return resolve_quantization_backend(base) is not None


def check_targets(config: ManyLoraConfig, model: nn.Module, matches: Matches) -> dict[str, nn.Module]:
    """The layers that will get an adapter; every target, layer index and pattern must match one.

    Args:
        config: the adapter's settings, "all-linear" already resolved.
        model: the base model, unchanged so far.
        matches: PEFT's own rule, so that what is checked is what will happen.

    Returns:
        Name to layer.

    Raises:
        TargetModulesError: a target matches no module, or one that is not linear.
        ConfigError: a pattern for ranks or alphas matches no target, a module to save none of the model's, or a token
            none of its embedding's; an expression takes too long; the adapter is larger than all memory.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:  # PEFT's own way to load an adapter without layers
        return {}
    names = candidates(model)
    check_expressions(config, list(names))
    targeted = [name for name in names if matches(config, name)]
    if not isinstance(config.target_modules, str):
        missing = sorted(
            target
            for target in config.target_modules or ()
            if not any(_ends_with(name, target) for name in names)
        )
        if missing:
            raise TargetModulesError(
                f"target_modules {_shown(missing)} match no layer of this model. "
                f"Its linear layers end in {_ends(names)}; pick from those or use 'all-linear'."
            )
    if not targeted:
        raise TargetModulesError(
            f"target_modules {_shown(config.target_modules)} match no layer of this model{_filters(config)}. "
            f"Its linear layers end in {_ends(names)}; pick from those or use 'all-linear'."
        )
    others = sorted(name for name in targeted if not is_linear(names[name]))
    if others:
        raise TargetModulesError(
            f"target_modules {_shown(config.target_modules)} match {others[0]!r}, which is no linear layer "
            f"but {type(names[others[0]]).__name__}. This model's linear layers end in {_ends(names)}."
        )
    _check_layers(config, targeted, matches)
    _check_patterns(config, targeted)
    for saved in config.modules_to_save or ():
        if saved not in _HEADS and not any(name.endswith(saved) for name in names):  # PEFT's rule
            raise ConfigError(
                f"modules_to_save {saved!r} matches no module of this model; its parts are "
                f"{sorted({name.rpartition('.')[2] for name in names if not name.rpartition('.')[2].isdigit()})}."
            )
    _check_tokens(config, model, names)
    found = {name: names[name] for name in targeted}
    _check_size(config, found)
    return found


def check_expressions(config: PeftConfig, names: Collection[str]) -> None:
    """Refuse regular expressions that backtrack on any of the names for too long; PEFT matches without a limit.

    Raises:
        ConfigError: naming the setting.
    """
    check_time(expressions_of(vars(config)), names)


def _check_tokens(config: ManyLoraConfig, model: nn.Module, names: dict[str, nn.Module]) -> None:
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    lists = tokens if isinstance(tokens, dict) else {"": tokens}
    for target, indices in lists.items():
        if target:
            modules = [module for name, module in names.items() if _ends_with(name, target)]
        else:
            find = getattr(model, "get_input_embeddings", None)
            modules = [find()] if find is not None else []
        if not modules:
            raise ConfigError(f"trainable_token_indices names {target!r}, which is no module of this model.")
        for module in modules:
            rows = int(getattr(getattr(module, "weight", None), "shape", (0,))[0])
            if outside := [index for index in indices if index >= rows]:
                raise ConfigError(
                    f"trainable_token_indices names the token {outside[0]}, but {target or 'the input embedding'} has "
                    f"{rows} rows, 0 to {rows - 1}."
                )


def _check_size(config: ManyLoraConfig, found: dict[str, nn.Module]) -> None:
    """Refuse an adapter that no memory holds before the first of its matrices is made; on meta, all is free."""
    counts = Layout(num_experts=config.num_experts, rank=1, share=config.share)
    routers = config.num_experts if config.router == "token" and config.num_experts > 1 else 0
    numbers = 0
    for name, module in found.items():
        if any(parameter.is_meta for parameter in module.parameters()):
            continue
        rank = rank_of(config, name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        inputs, outputs = _get_in_out_features(base)
        numbers += (counts.a_count * rank + routers) * inputs + counts.b_count * rank * outputs
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if numbers * _BYTES > _TOO_MUCH * there:
        raise ConfigError(
            f"an adapter of r={config.r} with num_experts={config.num_experts} takes {numbers * _BYTES / 2**20:,.0f} "
            f"MiB on this model, and there are {there / 2**20:,.0f}; lower r, ranks in rank_pattern, or num_experts."
        )


def _check_layers(config: ManyLoraConfig, targeted: list[str], matches: Matches) -> None:
    layers = config.layers_to_transform
    if layers is None:
        return
    for index in [layers] if isinstance(layers, int) else layers:
        one = copy.copy(config)
        one.layers_to_transform = [index]
        if not any(matches(one, name) for name in targeted):
            raise TargetModulesError(
                f"layers_to_transform {index} matches no target; this model has no such layer with "
                f"{_shown(config.target_modules)}."
            )


def _check_patterns(config: ManyLoraConfig, targeted: list[str]) -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in targeted):
                raise ConfigError(
                    f"{setting} key {key!r} matches none of the adapted layers, which end in "
                    f"{sorted({name.rpartition('.')[2] for name in targeted})}."
                )


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _ends(names: dict[str, nn.Module]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in names.items() if is_linear(module)})


def _shown(targets: Iterable[str] | str | None) -> str:
    return repr(targets) if isinstance(targets, str) or targets is None else repr(sorted(targets))


def _filters(config: ManyLoraConfig) -> str:
    parts = [
        f"{setting}={getattr(config, setting)!r}"
        for setting in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if getattr(config, setting)
    ]
    return f" once {' and '.join(parts)} is applied" if parts else ""
