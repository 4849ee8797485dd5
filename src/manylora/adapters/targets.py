"""Which layers get an adapter: every name must match something, or nothing starts.

PEFT itself only fails when *no* name matches; a mistyped entry beside a good one would train half a model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora.adapters.config import ManyLoraConfig
from manylora.errors import ConfigError, TargetModulesError

Matches = Callable[[ManyLoraConfig, str], Any]

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


def check_targets(config: ManyLoraConfig, model: nn.Module, matches: Matches) -> list[nn.Module]:
    """The layers that will get an adapter; every target, layer index and pattern must match one.

    Args:
        config: the adapter's settings, "all-linear" already resolved.
        model: the base model, unchanged so far.
        matches: PEFT's own rule, so that what is checked is what will happen.

    Raises:
        TargetModulesError: a target matches no module, or one that is not linear.
        ConfigError: a pattern for ranks or alphas matches no target, or a module to save none of the model's.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:  # PEFT's own way to load an adapter without layers
        return []
    names = candidates(model)
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
    return [names[name] for name in targeted]


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
