"""The adapted linear layer: the base layer's output plus what the banks of the active adapters add.

Shape letters: T tokens (any leading dimensions), B examples, D in, O out, R rank, N experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from manylora.adapters.bank import Bank, ExpertBank
from manylora.adapters.config import ManyLoraConfig
from manylora.adapters.layout import Choice
from manylora.adapters.routes import Routes
from manylora.adapters.routing import RoutingState
from manylora.adapters.targets import stores_transposed
from manylora.errors import NotMergeableError, RoutingError, TargetModulesError


class ManyLoraLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, transformers' Conv1D, or a quantised one) with one expert bank per adapter.

    Args:
        base_layer: the layer to adapt; it stays as it is.
        routing: where the running call's expert ids are found.
        kwargs: what PEFT knows of the base model's quantisation.
    """

    # From BaseTunerLayer, whose types are not published
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    active_adapters: list[str]
    quantization_backend: Any

    adapter_layer_names: tuple[str, ...] = ("manylora_experts",)
    other_param_names: tuple[str, ...] = ("merged_choice",)

    def __init__(self, base_layer: nn.Module, routing: RoutingState, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.routing = routing
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.manylora_experts = nn.ModuleDict()
        # A model in evaluation mode stays in it: no dropout by surprise
        self.training = self.manylora_experts.training = base_layer.training
        self.merged_choice: dict[str, Choice] = {}
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.stored_transposed = stores_transposed(self.get_base_layer())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, *, rank: int, alpha: float, config: ManyLoraConfig) -> None:
        """Add an adapter, or replace the one of that name."""
        self.manylora_experts[adapter_name] = ExpertBank(
            in_features=self.in_features,
            out_features=self.out_features,
            rank=rank,
            alpha=alpha,
            config=config,
            name=adapter_name,
        ).train(self.training)  # a model in evaluation mode stays wholly in it
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def bank(self, adapter_name: str) -> Bank:
        """The experts of one adapter in this layer."""
        bank = self.manylora_experts[adapter_name]
        assert isinstance(bank, Bank)
        return bank

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus every active adapter's contribution: (…, O), in its dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise TargetModulesError(
                f"A layer of class {type(self.get_base_layer()).__name__} returns a {type(y).__name__}, not one "
                "tensor, so it cannot carry an adapter; leave it out of target_modules."
            )
        if self.merged:
            self._check_merged_ids()
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        routes, in_place = self.routing.current, self._owns_output()
        if routes is not None and routes.adapters is not None:
            return self._mixed(x, y, routes)
        for name in self.active_adapters:
            if name in self.manylora_experts:
                y = self.manylora_experts[name](x, y, routes, in_place=in_place)
        return y

    def _mixed(self, x: Tensor, y: Tensor, routes: Routes) -> Tensor:
        """Each row's own adapter (PEFT's `adapter_names`), where this layer has it."""
        for part in routes.parts(x):
            if part.adapter in self.manylora_experts:
                rows_B = part.rows
                some = self.manylora_experts[part.adapter](x[rows_B], y[rows_B], part.routes)
                y = y.index_copy(0, rows_B, some)
        return y

    def _owns_output(self) -> bool:
        """Whether the base layer's output is new memory that nothing but this layer has seen.

        True of nn.Linear itself, which does not keep its output for backward, unless hooks or a replaced
        forward (as offloading makes) may have handed it on.
        """
        base, hooks = self.base_layer, torch.nn.modules.module
        return type(base) is nn.Linear and not (
            "forward" in vars(base)
            or base._forward_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or hooks._global_forward_hooks
            or hooks._global_backward_hooks
            or hooks._global_backward_pre_hooks
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' deltas to the base weight.

        Args:
            safe_merge: check the result for NaN and infinity before it is stored.
            adapter_names: which; None: the active ones.

        Raises:
            NotMergeableError: the delta depends on the input or on ids that are not given.
            NotMergeableError: also where `safe_merge` found a value that is not finite (worded as PEFT words it).
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.manylora_experts:
                continue
            bank = self.bank(name)
            choice = bank.merge_choice(self.routing.current)
            weight = self._base_weight_plus(bank.delta(choice))
            if safe_merge and not torch.isfinite(weight).all():
                raise NotMergeableError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken (or infinities); "
                    "merge an earlier checkpoint."
                )
            self.set_base_weight(weight)
            self.merged_choice[name] = choice
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged deltas out of the base weight again (to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            choice = self.merged_choice.pop(name)
            self.set_base_weight(self._base_weight_plus(-self.bank(name).delta(choice)))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging would add to the base weight, in its layout: (O, D), Conv1D (D, O).

        Raises:
            NotMergeableError: as in `merge`.
        """
        bank = self.bank(adapter_name)
        delta = bank.delta(bank.merge_choice(self.routing.current)).to(bank.lora_A.dtype)
        return delta.t() if self.stored_transposed else delta

    def _base_weight_plus(self, delta_OD: Tensor) -> Tensor:
        weight: Tensor = self.get_base_weight()
        delta = delta_OD.t() if self.stored_transposed else delta_OD
        return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)

    def _check_merged_ids(self) -> None:
        """Merged weights hold one expert: ids that name another cannot be followed."""
        routes = self.routing.current
        if routes is None or not routes.given:
            return
        for name in self.merged_adapters:
            if self.bank(name).chooses_by_ids:
                routes.check(self.bank(name).num_experts)
                if routes.single() != self.merged_choice[name]:
                    raise RoutingError(
                        f"Adapter {name!r} is merged with expert {self.merged_choice[name]}, but expert_ids "
                        "name another; call model.unmerge_adapter() first."
                    )
