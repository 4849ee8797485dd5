"""Where a module stands in a model: the number of its layer, and what kind it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manylora.files import whole_number


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one adapted module."""

    layer: int | None
    """Number of the layer; None outside any."""
    module: str
    """Kind: the end of the name, as long as it takes to tell the modules of one layer apart ("q_proj"; in GPT-2, which
    has two c_proj in a layer, "attn.c_proj" and "mlp.c_proj")."""


def locate(names: Iterable[str]) -> dict[str, Place]:
    """Place of every module, by its full name ("model.layers.3.self_attn.q_proj").

    The first number in a name is the layer's. Give all names that are to be compared at once: how short a kind can be
    depends on the others.
    """
    parts = {name: _split(name) for name in names}
    tails = {tail for _, tail in parts.values()}
    kinds = {tail: _shortest(tail, tails) for tail in tails}
    return {name: Place(layer=layer, module=kinds[tail]) for name, (layer, tail) in parts.items()}


def _split(name: str) -> tuple[int | None, tuple[str, ...]]:
    parts = tuple(name.split("."))
    for index, part in enumerate(parts[:-1]):
        if (layer := whole_number(part)) is not None:
            return layer, parts[index + 1 :]
    return None, parts


def _shortest(tail: tuple[str, ...], tails: Iterable[tuple[str, ...]]) -> str:
    for size in range(1, len(tail)):
        end = tail[-size:]
        if all(other == tail or other[-size:] != end for other in tails):
            return ".".join(end)
    return ".".join(tail)
