"""How the experts are used: statistics of the routing weights, and the load-balance loss for own training loops.

Both work inside a `with` block and cost nothing outside it: the statistics are forward hooks that exist only
there.

Shape letters: T tokens (any leading dimensions), D in, N experts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from manylora.adapters.balance import LoadBalance
from manylora.adapters.bank import Bank
from manylora.adapters.layer import ManyLoraLinear
from manylora.adapters.routes import Routes
from manylora.adapters.routing import RoutingState, in_backward
from manylora.errors import RoutingError

COLLAPSED_ABOVE = 0.9
"""A token router counts as collapsed where one expert has more than this share of the weight. A convention of
ours; balanced would be 1/N."""


@dataclass(frozen=True, kw_only=True)
class LayerGates:
    """Use of the experts in one layer, over all tokens seen (padding left out where a mask was given)."""

    tokens: int
    share: list[float]
    """Mean routing weight of each expert."""
    first: list[float]
    """Share of the tokens whose largest weight is this expert's."""
    entropy: float
    """Mean entropy of a token's weights in nats: 0 where one expert has all, log N where all count alike."""
    collapsed: bool
    """Whether a token router gives one expert more than `COLLAPSED_ABOVE` of the weight."""
    share_by_task: dict[int, list[float]] = field(default_factory=dict)
    """`share` among the tokens of each task seen, by the id it was called with."""


class GateStatistics:
    """What `gate_statistics` has seen so far; readable during the block and after it."""

    def __init__(self) -> None:
        self._layers: dict[str, _Totals] = {}

    @property
    def layers(self) -> dict[str, LayerGates]:
        """Statistics by the name of the adapted layer in the base model.

        Raises:
            RoutingError: no forward has come by.
        """
        if not any(totals.seen for totals in self._layers.values()):
            raise RoutingError(
                "gate_statistics has seen no forward: call the model inside the block, in the same thread, with "
                "the adapter active and unmerged (a model compiled before is not seen; use the plain one)."
            )
        return {name: totals.read() for name, totals in self._layers.items() if totals.seen}

    @property
    def collapsed(self) -> list[str]:
        """Names of the layers whose token router has collapsed."""
        return [name for name, layer in self.layers.items() if layer.collapsed]


class _Totals:
    """Sums over one layer's tokens. A forward pre-hook, so that sharded parameters are there to read."""

    def __init__(self, *, num_experts: int, per_task: bool) -> None:
        self.n = num_experts
        self.per_task = per_task
        self.thread = threading.get_ident()
        self.router: str | None = None
        self.sums: Tensor | None = None  # share (N), first (N), entropy, tokens
        self.by_task: dict[int, Tensor] = {}  # share (N), tokens

    @property
    def seen(self) -> bool:
        return self.sums is not None

    @torch.no_grad()
    def __call__(self, bank: nn.Module, args: tuple[Tensor, Tensor, Routes | None]) -> None:
        assert isinstance(bank, Bank)
        if threading.get_ident() != self.thread or in_backward():  # another's call, or a checkpoint's rerun
            return
        x, _, routes = args
        self.router = bank.router
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        w_TN = bank.observed_weights(x, routes).to(wide)
        mask = None if routes is None or routes.call is None else routes.call.mask_for(x)
        real_T = (
            torch.ones(x.shape[:-1], device=x.device, dtype=wide) if mask is None else (mask != 0).to(wide)
        )
        real_T1 = real_T.to(x.device).unsqueeze(-1)
        first_TN = torch.zeros_like(w_TN).scatter(-1, w_TN.argmax(-1, keepdim=True), 1)
        entropy_T1 = -torch.xlogy(w_TN, w_TN).sum(-1, keepdim=True)
        every = torch.cat((w_TN, first_TN, entropy_T1, torch.ones_like(entropy_T1)), -1) * real_T1
        sums = every.reshape(-1, 2 * self.n + 2).sum(0)
        self.sums = sums if self.sums is None else self.sums + sums
        if self.per_task:
            self._add_tasks(w_TN, real_T1, x, routes)

    def _add_tasks(self, w_TN: Tensor, real_T1: Tensor, x: Tensor, routes: Routes | None) -> None:
        if routes is None or not routes.given:
            raise RoutingError(
                "gate_statistics(per_task=True) needs expert_ids in the call: the task's index of each example; "
                "routers other than 'task' only count by them."
            )
        if routes.expert is not None:
            ids_T = torch.full(x.shape[:-1], routes.expert, device=x.device)
        else:
            ids_T = routes.ids_for(x).expand(x.shape[:-1])
        rows = torch.cat((w_TN * real_T1, real_T1), -1).reshape(-1, self.n + 1)
        flat = ids_T.reshape(-1)
        for task in flat.unique().tolist():
            sums = rows[flat == task].sum(0)
            self.by_task[task] = self.by_task[task] + sums if task in self.by_task else sums

    def read(self) -> LayerGates:
        assert self.sums is not None
        *values, entropy, tokens = self.sums.tolist()
        count = max(tokens, 1)
        share, first = ([v / count for v in part] for part in (values[: self.n], values[self.n :]))
        tasks = {task: sums.tolist() for task, sums in sorted(self.by_task.items())}
        return LayerGates(
            tokens=int(tokens),
            share=share,
            first=first,
            entropy=entropy / count,
            collapsed=self.router == "token" and max(share) > COLLAPSED_ABOVE,
            share_by_task={task: [v / max(n, 1) for v in values] for task, (*values, n) in tasks.items()},
        )


@contextmanager
def gate_statistics(
    model: nn.Module, *, adapter_name: str | None = None, per_task: bool = False
) -> Iterator[GateStatistics]:
    """Watch how the experts are used by the forwards inside the block, in this thread, in training or evaluation.

    Args:
        model: an adapted model.
        adapter_name: whose experts; None: the first active adapter's.
        per_task: count by the ids given to the calls too.

    Raises:
        RoutingError: the model has no such adapter, or `per_task` and a call without ids.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: m for name, m in base.named_modules() if isinstance(m, ManyLoraLinear)}
    known = sorted({adapter for layer in layers.values() for adapter in layer.manylora_experts})
    if adapter_name is None:
        active = next((layer.active_adapters for layer in layers.values()), [])
        adapter_name = next((name for name in active if name in known), None)
    if adapter_name not in known:
        raise RoutingError(
            f"There is no adapter {adapter_name!r} in this model; it has {', '.join(known) or 'none'}."
        )
    statistics = GateStatistics()
    with ExitStack() as stack:
        for name, layer in layers.items():
            if adapter_name in layer.manylora_experts:
                bank = layer.bank(adapter_name)
                totals = _Totals(num_experts=bank.num_experts, per_task=per_task)
                statistics._layers[name] = totals
                stack.callback(bank.register_forward_pre_hook(totals).remove)
        yield statistics


@contextmanager
def load_balance(model: nn.Module) -> Iterator[LoadBalance]:
    """Collect what the load-balance loss needs from the forwards inside the block, in this thread.

    For code that computes its loss from the logits; where the model is given labels, its own loss has the term
    already, and inside this block it has not.

        with load_balance(model) as balance:
            logits = model(...).logits
        loss = own_loss(logits) + balance.loss()
    """
    states: list[RoutingState] = []
    for module in model.modules():
        if isinstance(module, ManyLoraLinear) and module.routing not in states:
            states.append(module.routing)
    balance = LoadBalance()
    with ExitStack() as stack:
        for state in states:
            stack.enter_context(state.collecting(balance))
        yield balance


def has_load_balance(model: nn.Module) -> bool:
    """Whether an active adapter of the model has a load-balance loss."""
    return any(
        layer.bank(name).load_balance_weight > 0
        for layer in model.modules()
        if isinstance(layer, ManyLoraLinear)
        for name in layer.active_adapters
        if name in layer.manylora_experts
    )
