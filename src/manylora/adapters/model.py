"""`ManyLoraModel`: the PEFT tuner that puts expert banks into a base model; `register` tells PEFT about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from manylora.adapters import targets
from manylora.adapters.arrival import check_finite, check_places, source
from manylora.adapters.balance import LoadBalance
from manylora.adapters.config import ManyLoraConfig, ManyLoraType, alpha_of, rank_of
from manylora.adapters.gates import GateStatistics, gate_statistics, load_balance
from manylora.adapters.layer import ManyLoraLinear
from manylora.adapters.mixed import check_adapter_names, saved_modules_follow
from manylora.adapters.quantised import keep_plain_layout
from manylora.adapters.routes import ExpertIds, Routes
from manylora.adapters.routing import RoutingState, install, uninstall
from manylora.errors import ManyLoraError

_BANK = f".{ManyLoraLinear.adapter_layer_names[0]}."
_SAVED = ".modules_to_save."
_WRAPPED = "_fsdp_wrapped_module."
"""What FSDP1 puts into the names of modules."""


class ManyLoraModel(BaseTuner):
    """A base model whose target layers carry adapters; made by `peft.get_peft_model`, not by hand."""

    prefix: str = "manylora_"
    tuner_layer_cls = ManyLoraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    routing: RoutingState

    @contextmanager
    def route(self, expert_ids: ExpertIds) -> Iterator[None]:
        """Use these expert ids for every call of the model inside the block, in this thread.

        For code that cannot pass `expert_ids` to the call. Ids given to a call go before these.

        Args:
            expert_ids: one index per example, (B,), one per token, (B, T), or one integer for all.

        Raises:
            RoutingError: the ids are not integers, or have not one or two dimensions.
        """
        with self.routing.routed(Routes(expert_ids)):
            yield

    def gate_statistics(
        self, *, adapter_name: str | None = None, per_task: bool = False
    ) -> AbstractContextManager[GateStatistics]:
        """Watch how the experts are used inside the block; see `manylora.adapters.gate_statistics`."""
        return gate_statistics(self.model, adapter_name=adapter_name, per_task=per_task)

    def load_balance(self) -> AbstractContextManager[LoadBalance]:
        """Collect the load-balance loss inside the block; see `manylora.adapters.load_balance`."""
        return load_balance(self)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's `merge_adapter`; every layer is asked before the first one is changed.

        Raises:
            NotMergeableError: the delta depends on the input or on ids that are not given.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    # What follows are the places where PEFT's BaseTuner asks its methods.

    def _prepare_adapter_config(
        self, peft_config: ManyLoraConfig, model_config: dict[str, Any]
    ) -> ManyLoraConfig:
        if peft_config.target_modules is None:
            model_type = str(model_config.get("model_type"))
            defaults = self.target_module_mapping.get(model_type)
            peft_config.target_modules = targets.default_targets(self.model, defaults, model_type)
        return peft_config

    def _prepare_model(self, peft_config: ManyLoraConfig, model: nn.Module) -> None:
        # Once per adapter, before a layer is touched: the plan is checked first, then the model is changed.
        all_linear = str(peft_config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        _maybe_include_all_linear_layers(peft_config, model)
        if all_linear:
            targets.leave_out_others(peft_config, model)
        found = targets.check_targets(peft_config, model, self._check_target_module_exists)
        peft_config.fan_in_fan_out = any(targets.stores_transposed(layer) for layer in found.values())
        keep_plain_layout(model)
        self.routing = install(model)

    def _create_and_replace(
        self,
        peft_config: ManyLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank, alpha = rank_of(peft_config, current_key), alpha_of(peft_config, current_key)
        if isinstance(target, ManyLoraLinear):
            target.update_layer(adapter_name, rank=rank, alpha=alpha, config=peft_config)
            return
        layer = ManyLoraLinear(target, self.routing, **get_quantization_kwargs(self))
        layer.set_adapter([adapter_name])
        layer.update_layer(adapter_name, rank=rank, alpha=alpha, config=peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is set active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # PEFT would copy the wrapper's `weight`, which is computed and no parameter, into what it unloads
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, *args: Any, state_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        found: dict[str, Any] = super()._get_adapter_state_dict(model, *args, state_dict=state_dict, **kwargs)
        # PEFT looks for the names of the layers, into which FSDP1 puts words of its own; the keys stay as they were
        return {**{key: value for key, value in state_dict.items() if _BANK in key}, **found}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        # The way back from above: PEFT leaves the keys of layers that FSDP1 has renamed as they are in the file
        named = {
            key.replace(_BANK, f"{_BANK}{adapter_name}.")
            if key in state_dict and _BANK in key
            else key: value
            for key, value in remapped.items()
        }
        # Here, because every way to load through PEFT comes by, and what it does not put anywhere it does not tell.
        check_finite(state_dict, source())
        check_places(cls._places(model, config, adapter_name), model, named)
        return named

    @staticmethod
    def _places(model: nn.Module, config: Any, adapter_name: str) -> list[str]:
        """The keys, as in the model, of an adapter's banks and of the biases that it trains."""
        layers = {
            name.replace(_WRAPPED, ""): module
            for name, module in model.named_modules()
            if isinstance(module, ManyLoraLinear) and adapter_name in module.manylora_experts
        }
        banks: dict[str, Any] = {  # Any: FSDP1 wraps a bank
            f"{name}{_BANK}{adapter_name}": layer.manylora_experts[adapter_name]
            for name, layer in layers.items()
        }
        places = [f"{name}.{leaf}" for name, bank in banks.items() for leaf in bank.leaves]
        if config.bias == "none":
            return places
        of_layers = {f"{name}.base_layer.bias" for name in layers}
        named = (name.replace(_WRAPPED, "") for name, _ in model.named_parameters())
        return places + [
            name
            for name in named
            if name in of_layers or (config.bias == "all" and name.endswith(".bias") and _SAVED not in name)
        ]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        model: nn.Module = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        uninstall(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_adapter_names(self, names)
        routes = self.routing.ambient.with_adapters(names)
        with self.routing.routed(routes), saved_modules_follow(self, self.routing):
            yield

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, ManyLoraLinear):
                names = module.active_adapters if adapter_names is None else adapter_names
                for name in names:
                    if name in module.manylora_experts and name not in module.merged_adapters:
                        module.bank(name).merge_choice(self.routing.current)


def register() -> None:
    """Enter the method into PEFT's tables; `peft.register_peft_method` only takes names of its closed enum.

    Raises:
        ManyLoraError: another package holds the name.
    """
    kind = ManyLoraType.MANYLORA
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, ManyLoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, ManyLoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, ManyLoraModel.prefix),
    ]
    for table, value in entries:
        if kind in table and table[kind] != value:
            raise ManyLoraError(f"PEFT type {kind.value!r} is taken by {table[kind]!r}; unload that package.")
    for table, value in entries:
        table[kind] = value
