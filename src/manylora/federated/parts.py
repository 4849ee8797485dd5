"""The parts of a client's model and of what travels: one table that says of each what it is and where it begins.

    plain LoRA     W0 + s B A
    factored       W0 + s (B0 + B2 B1) M A         (2509.25414, section 4.3)

D in, O out, K the client's own rank, R the intermediate rank that clients of unequal ranks have in common. A state is
a flat dict of matrices named "layer.part".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

State: TypeAlias = "Mapping[str, Tensor]"
"""Name ("layer.part") to matrix."""

Shapes: TypeAlias = Mapping[str, tuple[int, int]]
"""Layer to (O, D)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of matrix."""

    axes: str
    """Letters of its two sizes."""
    components: Literal[0, 1]
    """Which axis counts rank components. int8 has a scale for each; whoever takes a smaller rank takes the first."""
    side: Literal["A", "B"]
    """Which matrix of the plain LoRA it is or belongs to."""
    drawn: bool = False
    """Whether it begins kaiming-uniform(a=√5), that is within ±1/√(columns); else with zeros (method.md)."""
    absorbed: bool = False
    """Whether its value has moved into another part when a round ends, so that it begins at zero in the next."""
    factors: tuple[str, str] | None = None
    """It is the product of these two: no part of a model, but a way to send them."""

    def shape(self, *, layer: tuple[int, int], rank: int, intermediate: int) -> tuple[int, int]:
        """Its shape in an (O, D) layer, at a client of rank K; `intermediate` is R."""
        sizes = {"O": layer[0], "D": layer[1], "K": rank, "R": intermediate}
        return sizes[self.axes[0]], sizes[self.axes[1]]


PARTS: Mapping[str, Part] = {
    "A": Part(axes="KD", components=0, side="A", drawn=True),
    "M": Part(axes="RK", components=0, side="A", drawn=True),
    "B": Part(axes="OK", components=1, side="B"),
    "B1": Part(axes="KR", components=0, side="B", drawn=True),
    "B2": Part(axes="OK", components=1, side="B", absorbed=True),  # into B0
    "B0": Part(axes="OR", components=1, side="B"),
    "dB": Part(axes="OR", components=1, side="B", factors=("B2", "B1")),
}

PLAIN = frozenset({"A", "B"})
FACTORED = frozenset({"A", "M", "B1", "B2", "B0"})
UPDATE = "dB"
"""B2 B1, a client's update of B0."""
STACK = "stack"
"""FLoRA's way down: the A's and B's of a whole round, named "round/layer.part"."""


def split_name(name: str) -> tuple[str, str]:
    """ "layer.part" to its layer and its part."""
    layer, _, part = name.rpartition(".")
    return layer, part


def select_parts(state: State, parts: Iterable[str]) -> dict[str, Tensor]:
    """The matrices of these parts, sorted by name."""
    wanted = frozenset(parts)
    return {name: state[name] for name in sorted(state) if split_name(name)[1] in wanted}


def norm(state: State) -> float:
    """Of all matrices together (Frobenius)."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in state.values()))


def component_axis(name: str) -> Literal[0, 1]:
    """The axis of a named matrix that counts rank components; rows where the part is none of ours."""
    part = PARTS.get(split_name(name)[1])
    return 0 if part is None else part.components


def truncated(state: State, rank: int) -> dict[str, Tensor]:
    """What a client of this rank takes of matrices of the largest: the first rows of A, the first columns of B.

    Parts that have the intermediate rank stay whole.
    """
    cut = {}
    for name, value in state.items():
        part = PARTS[split_name(name)[1]]
        if part.axes[part.components] == "K":
            value = value[:, :rank] if part.components else value[:rank]
        cut[name] = value.contiguous()
    return cut


def sent_as(part: str, *, layer: tuple[int, int], rank: int, intermediate: int) -> tuple[str, ...]:
    """The parts as which a part goes up: a product as its factors where they have fewer numbers."""
    factors = PARTS[part].factors
    if factors is None:
        return (part,)
    whole, apart = (
        sum(math.prod(PARTS[one].shape(layer=layer, rank=rank, intermediate=intermediate)) for one in form)
        for form in ((part,), factors)
    )
    return (part,) if whole < apart else factors


def seed_of(*words: object) -> int:
    """A seed below 2^32 from words and numbers."""
    text = ":".join(map(str, words))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def initial_state(
    parts: Iterable[str],
    shapes: Shapes,
    *,
    rank: int,
    largest_rank: int,
    intermediate: int,
    seed: int,
    who: str = "",
) -> dict[str, Tensor]:
    """Where every matrix begins: a function of the seed, so that equal beginnings need not travel.

    Of one seed and one `who`, the A of a smaller rank is the first rows of that of a larger one.

    Args:
        parts: which to draw.
        shapes: of the layers.
        rank: K.
        largest_rank: of all clients.
        intermediate: R.
        seed: of the run.
        who: whose draw it is; "" for the one that all have in common.
    """
    import torch

    state = {}
    for layer in sorted(shapes):
        for name in sorted(parts):
            part, size = PARTS[name], shapes[layer]
            rows, columns = part.shape(layer=size, rank=rank, intermediate=intermediate)
            if part.drawn:
                largest = part.shape(layer=size, rank=largest_rank, intermediate=intermediate)
                generator = torch.Generator().manual_seed(seed_of(seed, "initial", name, layer, who))
                drawn = torch.rand(largest, generator=generator)[:rows, :columns]
                state[f"{layer}.{name}"] = (2 * drawn - 1) / math.sqrt(columns)
            else:
                state[f"{layer}.{name}"] = torch.zeros(rows, columns)
    return state
