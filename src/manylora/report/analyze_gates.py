"""Gradients on the shared matrix, and what the routers do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from manylora.report.analyze_rows import (
    FOLDED,
    Row,
    known,
    layer_line,
    layers_of,
)
from manylora.report.common import signed
from manylora.report.files import mean, number, rows, text, whole
from manylora.report.heat import HeatMaps, HeatPanel
from manylora.report.page import Figure, Section
from manylora.report.plots import LinePanel, Lines, Shares, named_and_others
from manylora.table import Cell, Column, Table


def gradient_sections(gradients: Row) -> list[Section]:
    """One section for every adapter and matrix whose gradients were measured."""
    norms = _split(rows(gradients.get("norms")), "source", "matrix")
    conflict = _split(rows(gradients.get("conflict")), "source", "matrix")
    keys = list(dict.fromkeys([*norms, *conflict]))
    sections = []
    for source, matrix in keys:
        shared = matrix or text(gradients.get("shared", "?"))
        of = " · ".join(filter(None, (source, matrix))) if len(keys) > 1 else ""
        key = (source, matrix)
        sections.append(_gradient_section(norms.get(key, []), conflict.get(key, []), shared, of))
    return [section for section in sections if section is not None]


def gates_sections(gates: list[Row]) -> list[Section]:
    """One section for every adapter whose gates were measured."""
    split = _split(gates, "source")
    sections = [_gates_section(own, source if len(split) > 1 else "") for (source,), own in split.items()]
    return [section for section in sections if section is not None]


def _split(found: list[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the texts under `keys`, "" where there is none, in order of appearance."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        key = tuple("" if row.get(name) is None else text(row.get(name)) for name in keys)
        parts.setdefault(key, []).append(row)
    return parts


def _named(name: str, of: str) -> str:
    """A figure's or table's name with what tells it from others."""
    return "-".join([name, *re.findall(r"\w+", of)])


def _gradient_section(norms: list[Row], conflict: list[Row], shared: str, of: str) -> Section | None:
    """Norms per task and conflicts between tasks of one adapter on one matrix; `None` where none was measured.

    Args:
        norms: rows of analysis.json's gradients.
        conflict: likewise.
        shared: the matrix, "A" or "B".
        of: how names of figures and the title tell this adapter and matrix from others; may be empty.
    """
    figures = []
    tasks = list(dict.fromkeys(text(row.get("task")) for row in norms))
    lines = [
        line
        for task in tasks
        if (line := layer_line(task, [r for r in norms if text(r.get("task")) == task], "norm", band=False))
    ]
    lines, which = named_and_others(lines)
    if lines:
        figures.append(
            Figure(
                name=_named("gradient-norms", of),
                title=f"Gradient norm on the shared {shared}, per task",
                caption=f"{which}Mean over kinds of module. A task far above the others decides where the shared "
                "matrix goes.",
                alt="Mean norm: "
                + ", ".join(f"{line.name} {mean(line.y) or 0.0:.3g}" for line in lines if not line.aside)
                + ".",
                plot=Lines(
                    panels=(LinePanel(title="", lines=tuple(lines), ylabel="norm", least=0.0),),
                    xlabel="layer",
                    whole=True,
                ),
            )
        )
    values: dict[tuple[str, str], list[float]] = {}
    for row in conflict:
        cosine = number(row.get("cosine"))
        if cosine is not None:
            left, right = text(row.get("left")), text(row.get("right"))
            values.setdefault((left, right), []).append(cosine)
            values.setdefault((right, left), []).append(cosine)
    tables = []
    if values:
        names = list(dict.fromkeys(name for pair in values for name in pair))
        figures.append(_conflict_figure(values, names, shared, of))
        found: list[tuple[Cell, ...]] = []
        for place, left in enumerate(names):
            for right in names[place + 1 :]:
                own = values.get((left, right))
                if own:
                    found.append((left, right, mean(own), min(own), max(own), len(own)))
        columns = ("task", "other task", "mean cosine", "lowest", "highest", "matrices")
        tables.append(
            Table(
                name=_named("conflict", of),
                caption=f"Cosine between tasks’ gradients on the shared {shared}; below 0 they pull apart",
                columns=tuple(Column(name=name, digits=3) for name in columns),
                rows=tuple(found),
            )
        )
    if not figures:
        return None
    folded = bool(tables) and len(tables[0].rows) > FOLDED
    title = f"Gradients: {of}" if of else "Gradients"
    return Section(title=title, figures=tuple(figures), tables=tuple(tables), folded=folded)


def _conflict_figure(
    values: Mapping[tuple[str, str], list[float]], names: list[str], shared: str, of: str
) -> Figure:
    cells = tuple(
        tuple(None if left == right else mean(values.get((left, right), [])) for right in names)
        for left in names
    )
    lowest = min(values, key=lambda pair: mean(values[pair]) or 0.0)
    return Figure(
        name=_named("gradient-conflict", of),
        title=f"Do the tasks’ gradients on the shared {shared} agree?",
        caption="Mean cosine over layers and kinds of module; below 0 two tasks pull the matrix apart.",
        alt=f"Lowest mean cosine {signed(mean(values[lowest]) or 0.0, 2)}, between {lowest[0]} and {lowest[1]}.",
        plot=HeatMaps(
            panels=(HeatPanel(title="", values=cells),), rows=tuple(names), columns=tuple(names), ylabel="",
            scale="mean cosine", low=-1.0, high=1.0,
        ),
    )  # fmt: skip


def _gates_section(gates: list[Row], of: str) -> Section | None:
    """Mean gates per task of one adapter and how even they are; `None` where none was measured."""
    found: dict[str, list[list[float]]] = {}
    for row in gates:
        weights = row.get("weights")
        values = [number(value) for value in weights] if isinstance(weights, list) else []
        if values and all(value is not None for value in values):
            found.setdefault(text(row.get("task")), []).append([value or 0.0 for value in values])
    if not found:
        return None
    count = max(len(weights) for own in found.values() for weights in own)
    shares = {task: _mean_weights([w for w in own if len(w) == count]) for task, own in found.items()}
    shares = {task: weights for task, weights in shares.items() if weights}
    experts = tuple(f"expert {index}" for index in range(count))
    figures = [
        Figure(
            name=_named("gates", of),
            title="Mean gate per task",
            caption="Mean routing weight of each expert over tokens, layers and kinds of module.",
            alt="; ".join(
                f"{task}: " + ", ".join(f"{value:.2f}" for value in weights)
                for task, weights in list(shares.items())[:12]
            )
            + ".",
            plot=Shares(
                rows=tuple(shares), parts=experts, values=tuple(shares.values()), xlabel="routing weight"
            ),
        )
    ]
    spread = _entropy_figure(gates, count, of)
    if spread is not None:
        figures.append(spread)
    table_rows: list[tuple[Cell, ...]] = []
    for task, weights in shares.items():
        own = [row for row in gates if text(row.get("task")) == task]
        collapsed = sum(row.get("collapsed") is True for row in own)
        table_rows.append((task, *weights, mean(known(own, "entropy")), f"{collapsed} of {len(own)}"))
    columns = ("task", *experts, "mean entropy", "collapsed")
    table = Table(
        name=_named("gates", of),
        caption="Mean gates, their entropy, and how many of the routers have collapsed",
        columns=tuple(Column(name=name, digits=3) for name in columns),
        rows=tuple(table_rows),
    )
    title = f"Gates: {of}" if of else "Gates"
    return Section(title=title, figures=tuple(figures), tables=(table,), folded=len(table_rows) > FOLDED)


def _mean_weights(own: list[list[float]]) -> tuple[float, ...]:
    return tuple(mean(column) or 0.0 for column in zip(*own, strict=True)) if own else ()


def _entropy_figure(gates: list[Row], count: int, of: str) -> Figure | None:
    """Entropy of the mean gate as a share of the largest possible one, by task and layer."""
    layers = layers_of(gates)
    if len(layers) < 2 or count < 2:
        return None
    values: dict[tuple[str, int], list[float]] = {}
    for row in gates:
        weights, layer = row.get("weights"), whole(row.get("layer"))
        known = [number(value) for value in weights] if isinstance(weights, list) else []
        total = sum(value or 0.0 for value in known)
        if layer is None or total <= 0:
            continue
        parts = [value / total for value in known if value is not None and value > 0]
        entropy = -sum(part * math.log(part) for part in parts) / math.log(count)
        values.setdefault((text(row.get("task")), layer), []).append(entropy)
    tasks = list(dict.fromkeys(task for task, _ in values))
    cells = tuple(tuple(mean(values.get((task, layer), [])) for layer in layers) for task in tasks)
    return Figure(
        name=_named("gate-entropy", of),
        title="How evenly the experts are used, by task and layer",
        caption="Entropy of the mean gate divided by its largest value: 1 uses all experts alike, 0 one alone.",
        alt=f"Heat map of {len(tasks)} tasks by {len(layers)} layers.",
        plot=HeatMaps(
            panels=(HeatPanel(title="", values=cells),), rows=tuple(tasks), columns=tuple(map(str, layers)), ylabel="",
            scale="entropy / largest", column_label="layer",
        ),
    )  # fmt: skip
