"""Rows of analysis.json: which kind of pair they are, and their means by layer and kind of module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from manylora.report.files import mean, number, text, whole
from manylora.report.plots import Line

MATRICES = ("A", "B")
FOLDED = 24
"""Rows of a table that is shown without a click."""
_ELSEWHERE = "–"
"""Where a matrix that belongs to no numbered layer stands."""

Row = dict[str, Any]
Values = tuple[tuple[float | None, ...], ...]


def _either(value: object, yes: str, no: str) -> str:
    """A word for true, one for false, "" for anything else."""
    return yes if value is True else no if value is False else ""


def group_of(row: Row) -> str:
    """What kind of pair a row compares: "different tasks, same init"."""
    if row.get("one_adapter") is True:
        return "experts of one adapter"
    known = [_either(row.get("same_task"), "same task", "different tasks")]
    known.append(_either(row.get("same_init"), "same init", "different init"))
    if any(known):
        return ", ".join(filter(None, known))
    left, _, expert = text(row.get("left")).partition("/")
    return (
        "experts of one adapter" if expert and left == text(row.get("right")).partition("/")[0] else "pairs"
    )


def known(found: Iterable[Row], key: str) -> list[float]:
    """The numbers under `key`."""
    return [value for row in found if (value := number(row.get(key))) is not None]


def layers_of(found: Iterable[Row]) -> list[int]:
    """The numbered layers, in order."""
    return sorted({layer for row in found if (layer := whole(row.get("layer"))) is not None})


def modules_of(found: Iterable[Row]) -> list[str]:
    """Kinds of module, in order of appearance."""
    return list(dict.fromkeys(text(row.get("module")) for row in found))


def _by_layer(found: list[Row], key: str) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    for row in found:
        layer, value = whole(row.get("layer")), number(row.get(key))
        if layer is not None and value is not None:
            values.setdefault(layer, []).append(value)
    return dict(sorted(values.items()))


def layer_line(
    name: str, found: list[Row], key: str, *, band: bool = True, aside: bool = False
) -> Line | None:
    """Mean by layer, with the span from the lowest to the highest value."""
    values = _by_layer(found, key)
    if not values:
        return None
    return Line(
        name=name,
        x=tuple(map(float, values)),
        y=tuple(mean(v) or 0.0 for v in values.values()),
        low=tuple(map(min, values.values())) if band else (),
        high=tuple(map(max, values.values())) if band else (),
        aside=aside,
    )


def grid(found: list[Row], key: str, modules: list[str], *, down: str = "layer") -> tuple[list[str], Values]:
    """Means by layer (or another key) and module; names of the rows, and the values."""
    names = [str(layer) for layer in layers_of(found)] if down == "layer" else []
    if down != "layer" or any(whole(row.get("layer")) is None for row in found):
        names = list(dict.fromkeys([*names, *(_row_name(row, down) for row in found)]))
    sums: dict[tuple[str, str], list[float]] = {}
    for row in found:
        value = number(row.get(key))
        if value is not None:
            sums.setdefault((_row_name(row, down), text(row.get("module"))), []).append(value)
    return names, tuple(tuple(mean(sums.get((name, module), [])) for module in modules) for name in names)


def _row_name(row: Row, key: str) -> str:
    value = row.get(key)
    return _ELSEWHERE if value is None else text(value)


def short_kinds(modules: list[str]) -> tuple[str, ...]:
    """ "q_proj" as "q"; whole names where two would fall together."""
    cut = [name.removesuffix("_proj") for name in modules]
    return tuple(cut if len(set(cut)) == len(cut) else modules)
