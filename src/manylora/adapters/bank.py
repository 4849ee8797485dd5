"""The bank of experts that one adapter adds to a layer: its parameters, and the mathematics on them.

`ExpertBank` is the usual one, `FactoredBank` that of a federated client with a rank of its own.

Shape letters: T tokens (any leading dimensions), B examples, D in, O out, R rank, N experts, K a client's own rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manylora.adapters import ops
from manylora.adapters.balance import RouterCall
from manylora.adapters.config import ManyLoraConfig, RouterKind, scaling_of
from manylora.adapters.layout import Choice, Layout
from manylora.adapters.routes import Routes
from manylora.adapters.routing import in_backward
from manylora.errors import ConfigError, NotMergeableError, RoutingError


class Bank(nn.Module, ABC):
    """All parameters of one adapter in one layer, and the mathematics on them.

    One module without children: sharded training gathers parameters when the module that owns them is
    *called*, so nothing else may read them in a forward (and PEFT's FSDP policy wraps leaf modules that have
    a `.weight`).

    A subclass is final. It gives `lora_A`, `lora_B` and, with a token router, `lora_router`, as parameters or computed.
    """

    lora_A: Tensor  # noqa: N815 - PEFT's name
    """The A's, one above the other: (nA·R, D)."""
    lora_B: Tensor  # noqa: N815
    """The B's side by side: (O, nB·R)."""
    lora_router: Tensor
    """W_g, (N, D)."""
    layout: Layout
    scaling: float
    dropout: float
    name: str
    """The adapter's."""
    takes_ids: bool
    """Whether `expert_ids` are looked at, and checked."""
    default_expert: int | None
    router: RouterKind | None = None
    """None with one expert, which a router would give no gradient: softmax of one number is 1."""
    top_k: int | None = None
    temperature: float = 1.0
    load_balance_weight: float = 0.0

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """A parameter: code that asks a layer for its weight (its dtype, device, requires_grad) finds it here."""

    @property
    @abstractmethod
    def leaves(self) -> tuple[str, ...]:
        """Names of what a saved bank consists of."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The matrices that its product consists of, by the letters that they have in the method."""

    @abstractmethod
    def reset_parameters(self, *, identity: bool = True) -> None:
        """Draw what is drawn and zero what begins at zero; the adapter is the identity, or (False) is not."""

    @property
    def num_experts(self) -> int:
        """N."""
        return self.layout.num_experts

    @property
    def chooses_by_ids(self) -> bool:
        """Whether `expert_ids` choose between experts: a task router over more than one."""
        return self.takes_ids and self.num_experts > 1

    def forward(self, x: Tensor, y: Tensor, routes: Routes | None, *, in_place: bool = False) -> Tensor:
        """The base output with this adapter's contribution added.

        Args:
            x: the layer's input, (…, D); under the task router the first dimension counts the examples.
            y: the base layer's output, (…, O).
            routes: expert ids of the running call; None outside any call of the model.
            in_place: whether y is the caller's alone, so that the sum may be written into it.

        Raises:
            RoutingError: under the task router, ids are missing, too few or too many, or out of range.
        """
        layout, scaling = self.layout, self.scaling
        choice = None if self.router == "token" else self.choice(routes)
        A, B, router = self._operands(x.device)
        dropout = self.dropout if self.training else 0.0
        if self.num_experts == 1 and dropout:
            x, dropout = F.dropout(x.to(A.dtype), dropout), 0.0  # PEFT's LoRA to the mask
        if choice is not None and ops.computation() != "reference":
            a_RD, b_OR = layout.static_factors(A, B, choice)
            h_TR, _ = ops.project(x, a_RD, None, dropout=dropout)
            return ops.add_static(y, h_TR, b_OR, scaling=scaling, in_place=in_place)
        apart = router is not None and self._chooses_in(A.dtype)
        u_TM, logits_TN = ops.project(x, A, None if apart else router, dropout=dropout)
        if apart:
            logits_TN = self._wide_logits(x)
        if logits_TN is not None and self.load_balance_weight:
            self._note(logits_TN, x, routes)
        w_TN = self.routing_weights(x, logits_TN, choice, routes)
        return ops.add_dynamic(y, u_TM, w_TN, B, layout=layout, scaling=scaling, in_place=in_place)

    def routing_weights(
        self, x: Tensor, logits_TN: Tensor | None, choice: Choice | None, routes: Routes | None
    ) -> Tensor:
        """How much each expert counts, broadcastable to (…, N)."""
        if logits_TN is not None:
            return ops.routing_weights(logits_TN, top_k=self.top_k, temperature=self.temperature)
        if choice is not None:
            return ops.choice_weights(choice, self.num_experts, like=x)
        assert routes is not None
        return routes.weights(x, self.num_experts)

    def _operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and W_g, in the lower precision where autocast asks for it, as it does for nn.Linear's weights."""
        A, B, router = self.lora_A, self.lora_B, self.lora_router if self.router == "token" else None
        lowered = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        if not lowered or A.dtype == torch.float64:
            return A, B, router
        dtype = torch.get_autocast_dtype(device.type)
        return A.to(dtype), B.to(dtype), None if router is None else router.to(dtype)

    def _chooses_in(self, dtype: torch.dtype) -> bool:
        """Whether a choice of k experts would be made from logits in less than float32.

        Weights that are a little off are a little error, but a choice that turns over is a large one, in the
        gradients above all; so Switch Transformers routes in float32 (2101.03961, section 2.4).
        """
        return self.top_k is not None and dtype.itemsize < 4

    def _wide_logits(self, x: Tensor) -> Tensor:
        """W_g x in float32, autocast or not; only x itself is kept for backward."""
        router_ND = self.lora_router.to(torch.promote_types(self.lora_router.dtype, torch.float32))
        with _without_autocast(x.device):
            return ops.project(x, router_ND, None, dropout=0.0)[0]

    def observed_weights(self, x: Tensor, routes: Routes | None) -> Tensor:
        """What `forward` weighs the experts with, (…, N); for statistics, so without gradients.

        Raises:
            RoutingError: as in `forward`.
        """
        with torch.no_grad():
            logits_TN = None
            if self.router == "token":
                dtype = self._operands(x.device)[0].dtype
                chooses = self._chooses_in(dtype)
                logits_TN = (
                    self._wide_logits(x) if chooses else F.linear(x.to(dtype), self.lora_router.to(dtype))
                )
            choice = None if self.router == "token" else self.choice(routes)
            w_TN = self.routing_weights(x, logits_TN, choice, routes)
            return w_TN.expand(*x.shape[:-1], self.num_experts)

    def choice(self, routes: Routes | None) -> Choice | None:
        """The static routing of a call without a token router; None if the ids differ between examples.

        Raises:
            RoutingError: as in `forward`.
        """
        if not self.takes_ids:
            return "all"
        if routes is None and self.chooses_by_ids and in_backward():
            raise RoutingError(
                "A layer with a task router was run again during backward without its expert_ids; turn "
                "gradient checkpointing on through the model or the trainer, not around single layers."
            )
        if routes is not None and routes.given:
            routes.check(self.num_experts)
            return None if routes.expert is None and self.chooses_by_ids else (routes.expert or 0)
        if self.num_experts == 1:
            return 0
        if self.default_expert is None:
            raise RoutingError(
                "The task router needs expert_ids: call model(..., expert_ids=ids) or model.generate(..., "
                "expert_ids=ids), use `with model.route(ids):`, or set default_expert in the config."
            )
        return self.default_expert

    def merge_choice(self, routes: Routes | None) -> Choice:
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

    def delta(self, choice: Choice) -> Tensor:
        """The weight (O, D) that a static routing adds to the base weight; computed in float32 at least."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.detach().to(wide), self.lora_B.detach().to(wide)
        return ops.static_delta(A, B, choice, layout=self.layout, scaling=self.scaling)

    def _note(self, logits: Tensor, x: Tensor, routes: Routes | None) -> None:
        """Leave the logits to the load-balance loss, if this call of the model asks for it."""
        call = None if routes is None else routes.call
        if call is None or call.gates is None:
            return
        if self.lora_router.requires_grad and not torch.is_grad_enabled():
            raise RoutingError(
                f"load_balance_weight={self.load_balance_weight:g} does not work with reentrant gradient "
                "checkpointing, whose first pass has no gradients; set use_reentrant to False."
            )
        call.gates.append(
            RouterCall(
                adapter=self.name,
                logits=logits,
                mask=call.mask_for(x),
                top_k=self.top_k,
                temperature=self.temperature,
                weight=self.load_balance_weight,
            )
        )

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        layout = self.layout
        return (
            f"num_experts={layout.num_experts}, rank={layout.rank}, share={layout.share!r}, "
            f"router={self.router!r}, scaling={self.scaling:g}, dropout={self.dropout}"
        )


@final
class ExpertBank(Bank):
    """N experts, each with a plain A and B, some of which they may share.

    Args:
        in_features: D.
        out_features: O.
        rank: R.
        alpha: numerator of the scaling.
        config: the adapter's settings.
        name: the adapter's.
    """

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_router: nn.Parameter

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        config: ManyLoraConfig,
        name: str = "default",
    ) -> None:
        super().__init__()
        n = config.num_experts
        self.name = name
        self.layout = Layout(num_experts=n, rank=rank, share=config.share)
        self.scaling = scaling_of(config, alpha, rank)
        self.dropout = config.lora_dropout
        self.router = config.router if n > 1 else None
        self.takes_ids = config.router == "task"
        self.default_expert = config.default_expert
        self.top_k = config.router_top_k
        self.temperature = config.router_temperature
        self.load_balance_weight = config.load_balance_weight
        self.lora_A = nn.Parameter(torch.empty(self.layout.a_count * rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.layout.b_count * rank))
        if self.router == "token":
            self.lora_router = nn.Parameter(torch.empty(n, in_features))
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
        """lora_A."""
        return self.lora_A

    @property
    def leaves(self) -> tuple[str, ...]:
        """lora_A, lora_B, and lora_router where there is one."""
        return ("lora_A", "lora_B", *(["lora_router"] if self.router == "token" else []))

    @property
    def parts(self) -> dict[str, Tensor]:
        """A and B."""
        return {"A": self.lora_A, "B": self.lora_B}


@final
class FactoredBank(Bank):
    """One expert of rank R whose two matrices are products, so that clients of unequal ranks train the same LoRA.

    y' = y + s · (B0 + B2 B1) (M A) x       (2509.25414, section 4.3)

    A_k (K, D), M (R, K), B1 (K, R) and B2 (O, K) are trained, B0 (O, R) is frozen: a buffer, so that no
    optimizer and no `requires_grad_` reaches it. All that is inherited reads the products.

    Args:
        like: the bank of one expert that this one stands in for; gives D, O, R, scaling and dropout.
        own_rank: K.

    Raises:
        ConfigError: `like` has several experts, or the rank is below 1.
    """

    def __init__(self, like: Bank, *, own_rank: int) -> None:
        if like.num_experts != 1:
            raise ConfigError(f"A factored bank has one expert, not {like.num_experts}; set num_experts=1.")
        if own_rank < 1:
            raise ConfigError(f"rank {own_rank} is no rank; give a positive integer.")
        super().__init__()
        self.layout, self.scaling, self.dropout, self.name = (
            like.layout,
            like.scaling,
            like.dropout,
            like.name,
        )
        self.takes_ids, self.default_expert = like.takes_ids, like.default_expert
        rank = like.layout.rank
        weight = like.lora_B
        in_features, out_features = like.lora_A.shape[1], weight.shape[0]
        self.A = nn.Parameter(weight.new_empty(own_rank, in_features))
        self.M = nn.Parameter(weight.new_empty(rank, own_rank))
        self.B1 = nn.Parameter(weight.new_empty(own_rank, rank))
        self.B2 = nn.Parameter(weight.new_zeros(out_features, own_rank))
        self.B0: Tensor
        self.register_buffer("B0", weight.new_zeros(out_features, rank))
        self.reset_parameters()

    @property
    def leaves(self) -> tuple[str, ...]:
        """A, M, B1, B2 and B0."""
        return ("A", "M", "B1", "B2", "B0")

    @property
    def parts(self) -> dict[str, Tensor]:
        """The same."""
        return {leaf: getattr(self, leaf) for leaf in self.leaves}

    def reset_parameters(self, *, identity: bool = True) -> None:
        """A, M and B1 kaiming-uniform(a=√5); B2 zero, or drawn too; B0 zero (method.md)."""
        with torch.no_grad():
            for matrix in (self.A, self.M, self.B1, *(() if identity else (self.B2,))):
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            if identity:
                nn.init.zeros_(self.B2)
            nn.init.zeros_(self.B0)

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """M A, (R, D)."""
        return self.M @ self.A

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """B0 + B2 B1, (O, R)."""
        return self.B0 + self.B2 @ self.B1

    @property
    def weight(self) -> Tensor:
        """The client's A: a parameter, as code that asks for a layer's weight expects."""
        return self.A


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block in which autocast lowers nothing on `device`."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
