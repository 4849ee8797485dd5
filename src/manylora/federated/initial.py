"""Where every matrix begins: a function of the seed, so that equal beginnings need not travel.

Shape letters: D in, O out, K the client's rank, R the intermediate rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Shapes: TypeAlias = Mapping[str, tuple[int, int]]
"""Layer to (O, D)."""


def part_shape(part: str, *, layer: tuple[int, int], rank: int, intermediate: int) -> tuple[int, int]:
    """Shape of one part of a client's model in one (O, D) layer; see `manylora.federated.exchange`."""
    out_features, in_features = layer
    return {
        "A": (rank, in_features),
        "B": (out_features, rank),
        "M": (intermediate, rank),
        "B1": (rank, intermediate),
        "B2": (out_features, rank),
        "B0": (out_features, intermediate),
        "dB": (out_features, intermediate),
    }[part]


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
    """A, M and B1 kaiming-uniform(a=√5), that is within ±1/√(columns); B, B2 and B0 zero (method.md).

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
    state = {}
    for layer in sorted(shapes):
        for part in sorted(parts):
            rows, columns = part_shape(part, layer=shapes[layer], rank=rank, intermediate=intermediate)
            if part in ("A", "M", "B1"):
                largest = part_shape(part, layer=shapes[layer], rank=largest_rank, intermediate=intermediate)
                generator = torch.Generator().manual_seed(seed_of(seed, "initial", part, layer, who))
                drawn = torch.rand(largest, generator=generator)[:rows, :columns]
                state[f"{layer}.{part}"] = (2 * drawn - 1) / math.sqrt(columns)
            else:
                state[f"{layer}.{part}"] = torch.zeros(rows, columns)
    return state
