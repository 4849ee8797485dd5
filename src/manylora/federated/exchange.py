"""What travels: the one object that decides what leaves a client, and what comes to it.

A state is a flat dict of matrices named "layer.part". Parts of a client's model, with their shapes:

    plain LoRA     A (K, D), B (O, K)
    factored       A (K, D), M (R, K), B1 (K, R), B2 (O, K), and frozen B0 (O, R)

"dB" is no part of the model but the product B2 B1 (O, R), the client's update of B0; "stack" is FLoRA's.
D in, O out, K the client's rank, R the intermediate rank that clients of unequal ranks have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from manylora.errors import AnswerError

if TYPE_CHECKING:
    from torch import Tensor

State: TypeAlias = "Mapping[str, Tensor]"
"""Name ("layer.part") to matrix."""

PLAIN = frozenset({"A", "B"})
FACTORED = frozenset({"A", "M", "B1", "B2", "B0"})
UPDATE = "dB"
STACK = "stack"
"""FLoRA's way down: the A's and B's of a whole round, as `stack_name` calls them."""


def split_name(name: str) -> tuple[str, str]:
    """ "layer.part" to its layer and its part."""
    layer, _, part = name.rpartition(".")
    return layer, part


def only(state: State, parts: Iterable[str]) -> dict[str, Tensor]:
    """The matrices of these parts, sorted by name."""
    wanted = frozenset(parts)
    return {name: state[name] for name in sorted(state) if split_name(name)[1] in wanted}


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Parts that go up to the server after local training, and parts that come down before it.

    A part that goes both ways goes up as its change against what came down: the receiver knows the rest, and a
    small difference survives rounding better than a large value.
    """

    up: frozenset[str] = frozenset()
    down: frozenset[str] = frozenset()

    def leaving(self, received: State, trained: State) -> dict[str, Tensor]:
        """What leaves a client, and nothing else does.

        Args:
            received: the parts that came down, as they came.
            trained: the client's whole state after local training.

        Returns:
            Changes of the parts in `up` (float32), the product B2 B1 as "dB".
        """
        values = dict(trained)
        if UPDATE in self.up:
            for layer in sorted({split_name(name)[0] for name in trained}):
                product = trained[f"{layer}.B2"].double() @ trained[f"{layer}.B1"].double()
                values[f"{layer}.{UPDATE}"] = product.float()
        chosen = only(values, self.up)
        return {
            name: (value.double() - received[name].double()).float() if self._both_ways(name) else value
            for name, value in chosen.items()
        }

    def arrived(self, received: State, sent: State) -> dict[str, Tensor]:
        """Undo `leaving` at the server: the client's own values of the parts in `up`, in float64.

        Args:
            received: what had been sent down to this client.
            sent: what came up from it.

        Raises:
            AnswerError: `sent` changes a matrix that was not sent down.
        """
        values = {}
        for name, value in sent.items():
            if not self._both_ways(name):
                values[name] = value.double()
            elif name in received:
                values[name] = received[name].double() + value.double()
            else:
                raise AnswerError(f"it changes {name!r}, which was not sent to it")
        return values

    def _both_ways(self, name: str) -> bool:
        part = split_name(name)[1]
        return part in self.up and part in self.down
