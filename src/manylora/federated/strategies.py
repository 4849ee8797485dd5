"""Strategies as values: what travels, what is trained, how the server aggregates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manylora.federated import aggregate
from manylora.federated.aggregate import Aggregate
from manylora.federated.exchange import FACTORED, PLAIN, STACK, UPDATE, Exchange


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to learn from many clients; the rounds, the client and the accounting read nothing else."""

    name: str
    exchange: Exchange
    aggregate: Aggregate
    trains: frozenset[str] = PLAIN
    """Parts that local training changes."""
    factored: bool = False
    """The client's model is W0 + s (B0 + B2 B1) M A instead of W0 + s B A."""
    unequal: bool = False
    """Clients may differ in rank."""
    truncates: bool = False
    """What comes down has the largest rank; each client takes the first of its own."""
    restarts: bool = False
    """Clients fold what comes down into the base, and start each round with fresh factors."""
    feedback: bool = True
    """Rounding errors of a lossy wire are added to the next message; off where one message does not go on from
    the last."""
    pooled: bool = False
    """All rows in one place: no clients at all."""

    @property
    def parts(self) -> frozenset[str]:
        """Parts of a client's model."""
        return FACTORED if self.factored else PLAIN

    @property
    def private(self) -> frozenset[str]:
        """Parts that a client keeps from round to round. Its B2 starts at zero each round: its value is in B0."""
        return frozenset() if self.restarts else self.parts - self.exchange.down - {"B2"}

    @property
    def travels(self) -> bool:
        """Whether anything does."""
        return bool(self.exchange.up)

    @property
    def may_stand_still(self) -> bool:
        """Whether what travels may be unchanged although something was learnt: while B is zero A has no gradient, so
        a client's first step moves B alone."""
        return self.exchange.up == {"A"}

    @property
    def linear(self) -> bool:
        """Whether the new shared state is the old one and a sum over the clients of what each changed, so that the sum
        may be another one (`manylora.federated.robust`)."""
        return self.travels and self.aggregate in (aggregate.mean, aggregate.increment)

    @property
    def keeps_a(self) -> bool:
        """Whether each client has an A of its own, so that `a_init` and `a_state` mean something."""
        return "A" in self.private and "A" in self.trains


def _both(*parts: str) -> Exchange:
    return Exchange(up=frozenset(parts), down=frozenset(parts))


FED_ALORA = Strategy(name="fed-alora", exchange=_both("B"), aggregate=aggregate.mean)
"""arXiv 2509.25414, section 4.2: only B travels."""
FED_ALORA_UNEQUAL = Strategy(
    name="fed-alora",
    exchange=Exchange(up=frozenset({UPDATE}), down=frozenset({"B0"})),
    aggregate=aggregate.increment,
    trains=FACTORED - {"B0"},
    factored=True,
    unequal=True,
)
"""arXiv 2509.25414, section 4.3: up B2 B1, down B0."""
FEDSA = Strategy(name="fedsa", exchange=_both("A"), aggregate=aggregate.mean)
"""arXiv 2410.01463."""
FEDIT = Strategy(name="fedit", exchange=_both("A", "B"), aggregate=aggregate.mean)
"""arXiv 2305.05644."""
FFA = Strategy(name="ffa", exchange=_both("B"), aggregate=aggregate.mean, trains=frozenset({"B"}))
"""arXiv 2403.12313: A stays at an initial value that all have in common."""
LOCAL = Strategy(name="local", exchange=Exchange(), aggregate=aggregate.mean, unequal=True)
"""Nothing travels: each client on its own rows."""
CENTRALIZED = Strategy(name="centralized", exchange=Exchange(), aggregate=aggregate.mean, pooled=True)
"""The data travel: one model on all rows."""
ZERO_PADDING = Strategy(
    name="zero-padding",
    exchange=_both("A", "B"),
    aggregate=aggregate.padded_mean,
    unequal=True,
    truncates=True,
)
"""arXiv 2401.06432, without its pruning and weighting."""
FLORA = Strategy(
    name="flora",
    exchange=Exchange(up=PLAIN, down=frozenset({STACK})),
    aggregate=aggregate.stacked,
    unequal=True,
    restarts=True,
    feedback=False,
)
"""arXiv 2409.05976: the stack comes down, and the stacks a client missed."""
FLEXLORA = Strategy(
    name="flexlora",
    exchange=_both("A", "B"),
    aggregate=aggregate.svd_of_mean,
    unequal=True,
    truncates=True,
    feedback=False,
)
"""arXiv 2402.11505."""

STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (FED_ALORA, FEDSA, FEDIT, FFA, LOCAL, CENTRALIZED, ZERO_PADDING, FLORA, FLEXLORA)
}
"""By name, for equal ranks."""


def strategy_for(name: str, *, unequal: bool) -> Strategy:
    """The strategy of this name, in its form for unequal ranks where it has one of its own."""
    return FED_ALORA_UNEQUAL if unequal and name == FED_ALORA.name else STRATEGIES[name]
