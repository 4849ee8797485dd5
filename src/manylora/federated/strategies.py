"""The strategies that there are. To add one: a final subclass of `Strategy`, and its line in `STRATEGIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from manylora.federated import aggregate
from manylora.federated.aggregate import Answers
from manylora.federated.flora import FLORA
from manylora.federated.parts import FACTORED, PLAIN, UPDATE, State, split_name
from manylora.federated.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

_A, _B = frozenset({"A"}), frozenset({"B"})


@final
@dataclass(frozen=True, kw_only=True)
class Averaged(Strategy):
    """Every part that travels is averaged over the clients by itself."""

    linear: bool = True

    def aggregate(self, received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
        """Σ p_k X_k."""
        return aggregate.mean(received, answers, scaling)


@final
@dataclass(frozen=True, kw_only=True)
class SummedProducts(Strategy):
    """Clients of unequal ranks send the product B2 B1, which has the same shape at all of them."""

    linear: bool = True

    def leave(self, received: State, trained: State) -> dict[str, Tensor]:
        """B2 B1 of every layer, as "dB"."""
        products = {}
        for layer in sorted({split_name(name)[0] for name in trained}):
            b2_OK, b1_KR = trained[f"{layer}.B2"].double(), trained[f"{layer}.B1"].double()
            products[f"{layer}.{UPDATE}"] = (b2_OK @ b1_KR).float()
        return products

    def aggregate(self, received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
        """B0 + Σ p_k B2_k B1_k."""
        return aggregate.increment(received, answers, scaling)


@final
@dataclass(frozen=True, kw_only=True)
class Apart(Strategy):
    """Nothing travels."""

    def aggregate(self, received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
        """Nothing."""
        return {}


@final
@dataclass(frozen=True, kw_only=True)
class ZeroPadded(Strategy):
    """What comes down has the largest rank; each client takes the first components, as many as its own rank."""

    def aggregate(self, received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
        """Pad with zeros to the largest rank, then average."""
        return aggregate.padded_mean(received, answers, scaling)


@final
@dataclass(frozen=True, kw_only=True)
class Projected(Strategy):
    """As `ZeroPadded`, but the components are those of the sum of products, the largest first."""

    def aggregate(self, received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
        """The best factors of Σ p_k s B_k A_k."""
        return aggregate.svd_of_mean(received, answers, scaling)


FED_ALORA = Averaged(name="fed-alora", up=_B, down=_B, published=("B, both ways",))
"""arXiv 2509.25414, section 4.2: only B travels."""
FED_ALORA_UNEQUAL = SummedProducts(
    name="fed-alora", up=frozenset({UPDATE}), down=frozenset({"B0"}), parts=FACTORED, trains=FACTORED - {"B0"},
    unequal=True, published=("B2 up, B0 down", "B2 up, B0 down, and the r × rank terms of B1 and M"),
)  # fmt: skip
"""arXiv 2509.25414, section 4.3: up B2 B1, down B0."""
FEDSA = Averaged(name="fedsa", up=_A, down=_A, published=("A, both ways",))
"""arXiv 2410.01463."""
FEDIT = Averaged(name="fedit", up=PLAIN, down=PLAIN, published=("A and B, both ways",))
"""arXiv 2305.05644."""
FFA = Averaged(name="ffa", up=_B, down=_B, trains=_B, published=("B, both ways",))
"""arXiv 2403.12313: A stays at an initial value that all have in common."""
LOCAL = Apart(name="local", unequal=True)
"""Nothing travels: each client on its own rows."""
CENTRALIZED = Apart(name="centralized", pooled=True)
"""The data travel: one model on all rows."""
ZERO_PADDING = ZeroPadded(
    name="zero-padding", up=PLAIN, down=PLAIN, unequal=True,
    published=("A and B, up at each rank, down at the largest",),
)  # fmt: skip
"""arXiv 2401.06432, without its pruning and weighting."""
FLEXLORA = Projected(
    name="flexlora", up=PLAIN, down=PLAIN, unequal=True, feedback=False, published=("A and B, both ways",)
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
