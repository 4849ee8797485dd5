"""The figures of an analysis: the paper's figures 1 and 2 on one's own adapters, gradients, and what routers do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Protocol, TypeVar

from manylora.analysis.records import Change, Conflict, Gates, GradientNorm, PairSimilarity
from manylora.analysis.routers import mean_gates
from manylora.analysis.summary import pair_label
from manylora.report.common import mean, signed
from manylora.report.heat import HeatMaps, HeatPanel
from manylora.report.page import Figure
from manylora.report.plots import Line, LinePanel, Lines, Shares, named_and_others

MATRICES = ("A", "B")
MEASURES = ("similarity", "magnitude", "direction")


class _InLayer(Protocol):
    @property
    def layer(self) -> int | None: ...


Row = TypeVar("Row", bound=_InLayer)


def layer_line(
    name: str,
    rows: Iterable[Row],
    value_of: Callable[[Row], float | None],
    *,
    band: bool = True,
    aside: bool = False,
) -> Line | None:
    """Mean by layer, with the span from the lowest to the highest value; `None` where no numbered layer has one."""
    found: dict[int, list[float]] = {}
    for row in rows:
        value = value_of(row)
        if row.layer is not None and value is not None and not math.isnan(value):
            found.setdefault(row.layer, []).append(value)
    values = dict(sorted(found.items()))
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


def _kept(lines: Iterable[Line | None]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line is not None)


def _ends(panel: LinePanel) -> str:
    """The curves of a panel in words: their means."""
    return ", ".join(f"{line.name} {signed(mean(line.y) or 0.0, 2)} on average" for line in panel.lines)


# ---- similarity


def similarity_layers_figure(pairs: Sequence[PairSimilarity]) -> Figure | None:
    """Similarity of A's and of B's, layer by layer."""
    groups = list(dict.fromkeys(map(pair_label, pairs)))
    panels = []
    for matrix in MATRICES:
        own = [pair for pair in pairs if pair.matrix == matrix]
        of_groups = [(group, [pair for pair in own if pair_label(pair) == group]) for group in groups]
        lines = _kept(
            [
                *(layer_line(group, some, lambda pair: pair.mean_cosine) for group, some in of_groups),
                layer_line(
                    "random subspaces", own, lambda pair: pair.baseline_cosine, band=False, aside=True
                ),
            ]
        )
        if lines:
            panels.append(LinePanel(title=matrix, lines=lines, ylabel="mean cosine", least=0.0, most=1.05))
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


def similarity_maps_figure(pairs: Sequence[PairSimilarity]) -> Figure | None:
    """Similarity by layer and kind of module, one map for every matrix and kind of pair."""
    layered = [pair for pair in pairs if pair.layer is not None]
    if not layered:
        return None
    groups = list(dict.fromkeys(map(pair_label, layered)))
    modules = list(dict.fromkeys(pair.module for pair in layered))
    layers = sorted({pair.layer for pair in layered if pair.layer is not None})
    panels = []
    for matrix in MATRICES:
        for group in groups:
            values: dict[tuple[int | None, str], list[float]] = {}
            for pair in layered:
                if pair.matrix == matrix and pair_label(pair) == group:
                    values.setdefault((pair.layer, pair.module), []).append(pair.mean_cosine)
            if values:
                shown = tuple(tuple(mean(values.get((layer, m), [])) for m in modules) for layer in layers)
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
            panels=tuple(panels), rows=tuple(map(str, layers)), columns=short_kinds(modules), ylabel="layer",
            scale="mean cosine", beside=min(4, len(groups)) if len(groups) > 1 else 2,
        ),
    ) if panels else None  # fmt: skip


def short_kinds(modules: list[str]) -> tuple[str, ...]:
    """ "q_proj" as "q"; whole names where two would fall together."""
    cut = [name.removesuffix("_proj") for name in modules]
    return tuple(cut if len(set(cut)) == len(cut) else modules)


# ---- change


def change_layers_figure(changes: Sequence[Change]) -> Figure | None:
    """Change over the longest span that is known of each adapter and matrix, layer by layer."""
    spans: dict[tuple[str, str], tuple[int, int]] = {}
    for one in changes:
        span = (one.to_step, -one.from_step)
        spans[one.source, one.matrix] = max(spans.get((one.source, one.matrix), span), span)
    longest = [one for one in changes if spans[one.source, one.matrix] == (one.to_step, -one.from_step)]
    panels = []
    for key in MEASURES:
        lines = _kept(
            layer_line(matrix, [one for one in longest if one.matrix == matrix], attrgetter(key))
            for matrix in MATRICES
        )
        if lines:
            panels.append(_measure_panel(key, lines))
    if not panels:
        return None
    return Figure(
        name="change-layers",
        title="Change during training, layer by layer",
        caption=f"{_steps_in_words(longest)}. Similarity is the mean cosine of before and after, magnitude the "
        "relative change of norms, direction 1 − cosine; means over adapters and kinds of module, bands their span.",
        alt=". ".join(f"{panel.title}: " + _ends(panel) for panel in panels) + ".",
        plot=Lines(panels=tuple(panels), xlabel="layer", whole=True),
    )


def _steps_in_words(changes: Sequence[Change]) -> str:
    parts = []
    for matrix in MATRICES:
        spans = list(dict.fromkeys((one.from_step, one.to_step) for one in changes if one.matrix == matrix))
        if spans:
            more = ", and others" if len(spans) > 1 else ""
            parts.append(f"{matrix} from step {spans[0][0]} to {spans[0][1]}{more}")
    return "; ".join(parts) or "Steps unknown"


def change_steps_figure(changes: Sequence[Change]) -> Figure | None:
    """Change from the first known step to each later one."""
    panels = []
    for key in MEASURES:
        lines = _kept(_steps_line(matrix, changes, attrgetter(key)) for matrix in MATRICES)
        if lines:
            panels.append(_measure_panel(key, lines))
    if not panels:
        return None
    return Figure(
        name="change-steps",
        title="Change against training step",
        caption="From the first known step to each later checkpoint; means over layers and kinds of module.",
        alt=". ".join(f"{panel.title}: {_ends(panel)}" for panel in panels) + ".",
        plot=Lines(panels=tuple(panels), xlabel="step", whole=True),
    )


def _steps_line(
    matrix: str, changes: Sequence[Change], value_of: Callable[[Change], float | None]
) -> Line | None:
    own = [one for one in changes if one.matrix == matrix]
    first = min((one.from_step for one in own), default=0)
    values: dict[int, list[float]] = {}
    for one in own:
        value = value_of(one)
        if one.from_step == first and value is not None:
            values.setdefault(one.to_step, []).append(value)
    steps = sorted(values)
    if len(steps) < 2:
        return None
    return Line(name=matrix, x=tuple(map(float, steps)), y=tuple(mean(values[step]) or 0.0 for step in steps))


def _measure_panel(key: str, lines: tuple[Line, ...]) -> LinePanel:
    most = 1.05 if key == "similarity" else None
    return LinePanel(title=key.capitalize(), lines=lines, ylabel="", least=0.0, most=most)


# ---- gradients


def norms_figure(norms: Sequence[GradientNorm], shared: str, *, name: str) -> Figure | None:
    """Gradient norm by layer, one curve per task."""
    tasks = list(dict.fromkeys(row.task for row in norms))
    lines, which = named_and_others(
        _kept(
            layer_line(task, [row for row in norms if row.task == task], lambda row: row.norm, band=False)
            for task in tasks
        )
    )
    if not lines:
        return None
    return Figure(
        name=name,
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


def conflict_figure(conflict: Sequence[Conflict], shared: str, *, name: str) -> Figure | None:
    """Mean cosine between tasks' gradients, tasks by tasks."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in conflict:
        values.setdefault((row.left, row.right), []).append(row.cosine)
        values.setdefault((row.right, row.left), []).append(row.cosine)
    if not values:
        return None
    names = list(dict.fromkeys(name for pair in values for name in pair))
    cells = tuple(
        tuple(None if left == right else mean(values.get((left, right), [])) for right in names)
        for left in names
    )
    lowest = min(values, key=lambda pair: mean(values[pair]) or 0.0)
    return Figure(
        name=name,
        title=f"Do the tasks’ gradients on the shared {shared} agree?",
        caption="Mean cosine over layers and kinds of module; below 0 two tasks pull the matrix apart.",
        alt=f"Lowest mean cosine {signed(mean(values[lowest]) or 0.0, 2)}, between {lowest[0]} and {lowest[1]}.",
        plot=HeatMaps(
            panels=(HeatPanel(title="", values=cells),), rows=tuple(names), columns=tuple(names), ylabel="",
            scale="mean cosine", low=-1.0, high=1.0,
        ),
    )  # fmt: skip


# ---- gates


def gates_figure(gates: Sequence[Gates], *, name: str) -> Figure | None:
    """Mean routing weight of each expert, per task; all gates have the same experts."""
    shares = {task: tuple(weights) for (_, task), (weights, _) in mean_gates(gates).items()}
    if not shares:
        return None
    experts = len(next(iter(shares.values())))
    return Figure(
        name=name,
        title="Mean gate per task",
        caption="Mean routing weight of each expert over tokens, layers and kinds of module.",
        alt="; ".join(
            f"{task}: " + ", ".join(f"{value:.2f}" for value in weights)
            for task, weights in list(shares.items())[:12]
        )
        + ".",
        plot=Shares(
            rows=tuple(shares),
            parts=tuple(f"expert {index}" for index in range(experts)),
            values=tuple(shares.values()),
            xlabel="routing weight",
        ),
    )


def entropy_figure(gates: Sequence[Gates], *, name: str) -> Figure | None:
    """Entropy of the mean gate as a share of the largest possible one, by task and layer."""
    layers = sorted({one.layer for one in gates if one.layer is not None})
    values: dict[tuple[str, int], list[float]] = {}
    for one in gates:
        total = math.fsum(one.weights)
        if one.layer is None or total <= 0 or len(one.weights) < 2:
            continue
        parts = [weight / total for weight in one.weights if weight > 0]
        entropy = -sum(part * math.log(part) for part in parts) / math.log(len(one.weights))
        values.setdefault((one.task, one.layer), []).append(entropy)
    tasks = list(dict.fromkeys(task for task, _ in values))
    if len(layers) < 2 or not tasks:
        return None
    cells = tuple(tuple(mean(values.get((task, layer), [])) for layer in layers) for task in tasks)
    return Figure(
        name=name,
        title="How evenly the experts are used, by task and layer",
        caption="Entropy of the mean gate divided by its largest value: 1 uses all experts alike, 0 one alone.",
        alt=f"Heat map of {len(tasks)} tasks by {len(layers)} layers.",
        plot=HeatMaps(
            panels=(HeatPanel(title="", values=cells),), rows=tuple(tasks), columns=tuple(map(str, layers)), ylabel="",
            scale="entropy / largest", column_label="layer",
        ),
    )  # fmt: skip
