"""The adapted linear layer, and the bank of experts that one adapter adds to it.

Shape letters: T tokens (any leading dimensions), B examples, D in, O out, R rank, N experts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from manylora.adapters import ops
from manylora.adapters.config import ManyLoraConfig, RouterKind
from manylora.adapters.routing import Routes, RoutingState, in_backward
from manylora.adapters.targets import stores_transposed
from manylora.errors import NotMergeableError, RoutingError


class ExpertBank(nn.Module):
    """All parameters of one adapter in one layer, and the mathematics on them.

    One module without children: sharded training gathers parameters when the module that owns them is
    *called*, so nothing else may read them in a forward (and PEFT's FSDP policy wraps leaf modules that have
    a `.weight`).

    Args:
        in_features: D.
        out_features: O.
        rank: R.
        alpha: numerator of the scaling.
        config: the adapter's settings.
    """

    def __init__(
        self, *, in_features: int, out_features: int, rank: int, alpha: float, config: ManyLoraConfig
    ) -> None:
        super().__init__()
        self.layout = ops.Layout(num_experts=config.num_experts, rank=rank, share=config.share)
        self.router: RouterKind | None = config.router if config.num_experts > 1 else None
        self.takes_ids = config.router == "task"
        self.default_expert = config.default_expert
        self.dropout = config.lora_dropout
        self.scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.lora_A = nn.Parameter(torch.empty(self.layout.a_count * rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.layout.b_count * rank))
        # A router over one expert would never get a gradient: softmax of one number is 1.
        if self.router == "token":
            self.lora_router = nn.Parameter(torch.empty(config.num_experts, in_features))
        self.reset_parameters(identity=config.init_weights)

    def reset_parameters(self, *, identity: bool = True) -> None:
        """A_n and W_g kaiming-uniform(a=√5), every A_n drawn on its own; B zero, or drawn too (method.md)."""
        with torch.no_grad():
            for a_RD in self.lora_A.split(self.layout.rank):
                nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5))
            if self.router == "token":
                nn.init.kaiming_uniform_(self.lora_router, a=math.sqrt(5))
            for b_OR in self.lora_B.split(self.layout.rank, dim=1):
                if identity:
                    nn.init.zeros_(b_OR)
                else:
                    nn.init.kaiming_uniform_(b_OR, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """lora_A; code that asks a layer for its weight (its dtype, device, requires_grad) finds it here."""
        return self.lora_A

    @property
    def num_experts(self) -> int:
        """N."""
        return self.layout.num_experts

    def forward(self, x: Tensor, y: Tensor, routes: Routes | None) -> Tensor:
        """The base output with this adapter's contribution added.

        Args:
            x: the layer's input, (…, D); under the task router the first dimension counts the examples.
            y: the base layer's output, (…, O).
            routes: expert ids of the running call; None outside any call of the model.

        Raises:
            RoutingError: under the task router, ids are missing, too few or too many, or out of range.
        """
        x = x.to(self.lora_A.dtype)
        dropped = F.dropout(x, self.dropout, self.training)  # one mask for all experts
        if self.router == "token":
            w = ops.routing_weights(x, self.lora_router)
        else:
            choice = self.choice(routes)
            if choice is not None:
                return ops.add_static(
                    y, dropped, choice, self.lora_A, self.lora_B, layout=self.layout, scaling=self.scaling
                )
            assert routes is not None
            w = routes.weights(x, self.num_experts)
        return ops.add_dynamic(
            y, dropped, w, self.lora_A, self.lora_B, layout=self.layout, scaling=self.scaling
        )

    def choice(self, routes: Routes | None) -> ops.Choice | None:
        """The static routing of a call without a token router; None if the ids differ between examples.

        Raises:
            RoutingError: as in `forward`.
        """
        if not self.takes_ids:
            return "all"
        if routes is None and self.num_experts > 1 and in_backward():
            raise RoutingError(
                "A layer with a task router was run again during backward without its expert_ids; turn "
                "gradient checkpointing on through the model or the trainer, not around single layers."
            )
        if routes is not None and routes.given:
            routes.check(self.num_experts)
            return None if routes.expert is None and self.num_experts > 1 else (routes.expert or 0)
        if self.num_experts == 1:
            return 0
        if self.default_expert is None:
            raise RoutingError(
                "The task router needs expert_ids: call model(..., expert_ids=ids) or model.generate(..., "
                "expert_ids=ids), use `with model.route(ids):`, or set default_expert in the config."
            )
        return self.default_expert

    def merge_choice(self, routes: Routes | None) -> ops.Choice:
        """The static routing that merging takes.

        Raises:
            NotMergeableError: no single weight equals the adapter.
        """
        if self.router == "token":
            raise NotMergeableError(
                "router='token' weighs the experts anew for each token, so no single weight equals the "
                "adapter; keep it unmerged."
            )
        if self.router == "task":
            single = routes.single() if routes is not None else None
            if routes is not None and routes.given and single is None:
                raise NotMergeableError("route() names several experts; use `with model.route(n):` with one.")
            if single is None and self.default_expert is None:
                raise NotMergeableError(
                    "router='task' has one weight per expert; merge inside `with model.route(n):` "
                    "or set default_expert in the config."
                )
            if routes is not None:
                routes.check(self.num_experts)
            return single if single is not None else int(self.default_expert or 0)
        return "all"

    def delta(self, choice: ops.Choice) -> Tensor:
        """The weight (O, D) that a static routing adds to the base weight; computed in float32 at least."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.detach().to(wide), self.lora_B.detach().to(wide)
        return ops.static_delta(A, B, choice, layout=self.layout, scaling=self.scaling)

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        layout = self.layout
        return (
            f"num_experts={layout.num_experts}, rank={layout.rank}, share={layout.share!r}, "
            f"router={self.router!r}, scaling={self.scaling:g}, dropout={self.dropout}"
        )


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
        self.merged_choice: dict[str, ops.Choice] = {}
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
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def bank(self, adapter_name: str) -> ExpertBank:
        """The experts of one adapter in this layer."""
        bank = self.manylora_experts[adapter_name]
        assert isinstance(bank, ExpertBank)
        return bank

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus every active adapter's contribution: (…, O), in its dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            self._check_merged_ids()
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        routes = self.routing.current
        for name in self.active_adapters:
            if name in self.manylora_experts:
                y = self.manylora_experts[name](x, y, routes)
        return y

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
            if self.bank(name).takes_ids and self.bank(name).num_experts > 1:
                routes.check(self.bank(name).num_experts)
                if routes.single() != self.merged_choice[name]:
                    raise RoutingError(
                        f"Adapter {name!r} is merged with expert {self.merged_choice[name]}, but expert_ids "
                        "name another; call model.unmerge_adapter() first."
                    )
