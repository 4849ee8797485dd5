"""Similarity of A's and of B's, and how training changed them: the paper's figures 1 and 2 on one's own adapters."""

from __future__ import annotations

import math

from manylora.report.analyze_rows import (
    MATRICES,
    Row,
    grid,
    group_of,
    known,
    layer_line,
    layers_of,
    modules_of,
    short_kinds,
)
from manylora.report.common import signed
from manylora.report.files import mean, number, text, whole
from manylora.report.heat import HeatMaps, HeatPanel
from manylora.report.page import Figure, Section
from manylora.report.plots import Line, LinePanel, Lines
from manylora.table import Cell, Column, Table

_MEASURES = ("similarity", "magnitude", "direction")


def similarity_section(pairs: list[Row]) -> Section | None:
    """Figures and a table of the pairs; `None` without one."""
    """Figures and a table of the pairs; `None` without one."""
    pairs = [
        row for row in pairs if number(row.get("mean_cosine")) is not None and row.get("matrix") in MATRICES
    ]
    if not pairs:
        return None
    groups = list(dict.fromkeys(map(group_of, pairs)))
    figures = [figure for figure in (_layer_figure(pairs, groups), _similarity_maps(pairs, groups)) if figure]
    found: list[tuple[Cell, ...]] = []
    for group in groups:
        for matrix in MATRICES:
            own = [row for row in pairs if row["matrix"] == matrix and group_of(row) == group]
            if own:
                found.append((group, matrix, *_statistics(own)))
    columns = (
        "pairs",
        "matrix",
        "mean cosine",
        "s.d.",
        "random",
        "mean squared cosine",
        "random squared",
        "matrices compared",
    )
    table = Table(
        name="similarity",
        caption="Similarity of subspaces by kind of pair: 1 is the same space; random is what unrelated ones have",
        columns=tuple(Column(name=name, digits=3) for name in columns),
        rows=tuple(found),
    )
    return Section(title="Similarity", figures=tuple(figures), tables=(table,))


def _statistics(own: list[Row]) -> tuple[Cell, ...]:
    values = known(own, "mean_cosine")
    middle = mean(values) or 0.0
    spread = (
        math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))
        if len(values) > 1
        else None
    )
    others = [mean(known(own, key)) for key in ("baseline_cosine", "mean_squared", "baseline_squared")]
    return (middle, spread, *others, len(values))


def _layer_figure(pairs: list[Row], groups: list[str]) -> Figure | None:
    panels = []
    for matrix in MATRICES:
        own = [row for row in pairs if row["matrix"] == matrix]
        lines = [layer_line(g, [row for row in own if group_of(row) == g], "mean_cosine") for g in groups]
        lines.append(layer_line("random subspaces", own, "baseline_cosine", band=False, aside=True))
        kept = tuple(line for line in lines if line is not None)
        if kept:
            panels.append(LinePanel(title=matrix, lines=kept, ylabel="mean cosine", least=0.0, most=1.05))
    if not panels:
        return None
    return Figure(
        name="similarity-layers",
        title="Similarity of A’s and of B’s, layer by layer",
        caption="Mean cosine of the principal angles over pairs and kinds of module; the band spans the lowest and the "
        "highest of them. Dashed: random subspaces of the same sizes.",
        alt=". ".join(f"{panel.title}: " + _ends(panel) for panel in panels) + ".",
        plot=Lines(panels=tuple(panels), xlabel="layer", whole=True),
    )


def _similarity_maps(pairs: list[Row], groups: list[str]) -> Figure | None:
    modules = modules_of(pairs)
    every = [row for row in pairs if whole(row.get("layer")) is not None]
    if not every:
        return None
    layers = [str(layer) for layer in layers_of(every)]
    panels = []
    for matrix in MATRICES:
        for group in groups:
            own = [row for row in every if row["matrix"] == matrix and group_of(row) == group]
            if own:
                names, values = grid(own, "mean_cosine", modules)
                at = dict(zip(names, values, strict=True))
                empty = (None,) * len(modules)
                shown = tuple(at.get(layer, empty) for layer in layers)
                panels.append(
                    HeatPanel(title=f"{matrix}: {group}" if len(groups) > 1 else matrix, values=shown)
                )
    return Figure(
        name="similarity-maps",
        title="Similarity by layer and kind of module",
        caption="Mean cosine over pairs. A bright column is a kind of module whose matrices came out alike.",
        alt=f"Heat maps of {len(layers)} layers by {len(modules)} kinds of module: "
        + ", ".join(panel.title for panel in panels)
        + ".",
        plot=HeatMaps(
            panels=tuple(panels), rows=tuple(layers), columns=short_kinds(modules), ylabel="layer", scale="mean cosine",
            beside=min(4, len(groups)) if len(groups) > 1 else 2,
        ),
    )  # fmt: skip


def change_section(change: list[Row]) -> Section | None:
    """Change by layer and by step; `None` where none was measured."""
    """Change by layer and by step; `None` where none was measured."""
    change = [row for row in change if row.get("matrix") in MATRICES]
    measures = [key for key in _MEASURES if known(change, key)]
    if not measures:
        return None
    whole_span = _longest(change)
    steps = _steps_in_words(whole_span)
    panels = []
    for key in measures:
        lines = [layer_line(m, [row for row in whole_span if row["matrix"] == m], key) for m in MATRICES]
        kept = tuple(line for line in lines if line is not None)
        if kept:
            panels.append(_measure_panel(key, kept))
    figures = []
    if panels:
        figures.append(
            Figure(
                name="change-layers",
                title="Change during training, layer by layer",
                caption=f"{steps}. Similarity is the mean cosine of before and after, magnitude the relative change of "
                "norms, direction 1 − cosine; means over adapters and kinds of module, bands their span.",
                alt=". ".join(f"{panel.title}: " + _ends(panel) for panel in panels) + ".",
                plot=Lines(panels=tuple(panels), xlabel="layer", whole=True),
            )
        )
    over = _over_time(change, measures)
    if over is not None:
        figures.append(over)
    found: list[tuple[Cell, ...]] = []
    for matrix in MATRICES:
        own = [row for row in whole_span if row["matrix"] == matrix]
        if own:
            found.append((matrix, *(mean(known(own, key)) for key in measures), len(own)))
    columns = tuple(Column(name=name, digits=3) for name in ("matrix", *measures, "matrices measured"))
    table = Table(name="change", caption=f"Mean change. {steps}", columns=columns, rows=tuple(found))
    return Section(title="Change during training", figures=tuple(figures), tables=(table,))


def _longest(change: list[Row]) -> list[Row]:
    """Of each source and matrix the rows from its first known step to its last."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for row in change:
        key = (text(row.get("source")), text(row.get("matrix")))
        span = (number(row.get("to_step")) or 0.0, -(number(row.get("from_step")) or 0.0))
        best[key] = max(best.get(key, span), span)
    return [
        row
        for row in change
        if best[text(row.get("source")), text(row.get("matrix"))]
        == (number(row.get("to_step")) or 0.0, -(number(row.get("from_step")) or 0.0))
    ]


def _steps_in_words(change: list[Row]) -> str:
    parts = []
    for matrix in MATRICES:
        own = [row for row in change if row.get("matrix") == matrix]
        spans = list(dict.fromkeys((text(row.get("from_step")), text(row.get("to_step"))) for row in own))
        if spans:
            more = ", and others" if len(spans) > 1 else ""
            parts.append(f"{matrix} from step {spans[0][0]} to {spans[0][1]}{more}")
    return "; ".join(parts) or "Steps unknown"


def _over_time(change: list[Row], measures: list[str]) -> Figure | None:
    panels = []
    for key in measures:
        lines = []
        for matrix in MATRICES:
            own = [
                row
                for row in change
                if row.get("matrix") == matrix and number(row.get("from_step")) is not None
            ]
            first = min(known(own, "from_step"), default=None)
            values: dict[float, list[float]] = {}
            for row in own:
                step, value = number(row.get("to_step")), number(row.get(key))
                if step is not None and value is not None and number(row.get("from_step")) == first:
                    values.setdefault(step, []).append(value)
            if len(values) > 1:
                ordered = sorted(values)
                y = tuple(mean(values[step]) or 0.0 for step in ordered)
                lines.append(Line(name=matrix, x=tuple(ordered), y=y))
        if lines:
            panels.append(_measure_panel(key, tuple(lines)))
    if not panels:
        return None
    return Figure(
        name="change-steps",
        title="Change against training step",
        caption="From the first known step to each later checkpoint; means over layers and kinds of module.",
        alt=". ".join(f"{panel.title}: {_ends(panel)}" for panel in panels) + ".",
        plot=Lines(panels=tuple(panels), xlabel="step", whole=True),
    )


def _measure_panel(key: str, lines: tuple[Line, ...]) -> LinePanel:
    most = 1.05 if key == "similarity" else None
    return LinePanel(title=key.capitalize(), lines=lines, ylabel="", least=0.0, most=most)


def _ends(panel: LinePanel) -> str:
    """The curves of a panel in words: their means."""
    return ", ".join(f"{line.name} {signed(mean(line.y) or 0.0, 2)} on average" for line in panel.lines)
