"""The page of `manylora compare`: the claims and their verdicts, scores per task and method, what each method costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from manylora.report.common import counted, notes_of, read_recipe, signed
from manylora.report.compare_curves import curves_section
from manylora.report.files import mapping, mean, number, numbers, read_object, rows, text, whole
from manylora.report.page import Figure, Page, Section
from manylora.report.plots import Intervals, Point, Scatter, Series, Spot
from manylora.report.tables import Cell, Column, Table

_MEAN = "mean"
_MIB = 1024.0**2
_BYTES = ("bytes", "bytes_up", "bytes_down")
"""What a federated cell may say of the messages of a client and round: both ways together, or each."""


def compare_page(folder: Path) -> Page:
    """The page of a study's folder.

    Raises:
        RunError: study.json, or another file, is broken.
    """
    study = read_object(folder / "study.json")
    recipe = read_recipe(folder, environment=mapping(study.get("environment")))
    cells, claims = rows(study.get("cells")), rows(study.get("claims"))
    table = [row for row in rows(study.get("table")) if number(row.get("mean")) is not None]
    reference, name = text(study.get("reference", "")), text(study.get("name", "this study"))
    sections = (
        _claims_section(claims),
        _scores_section(table, _order(study, table, "task")),
        _delta_section(rows(study.get("delta_m"))),
        curves_section(study),
        _cost_section(cells, table),
        _cells_section(cells),
    )
    return Page(
        kind="compare",
        question=text(study.get("question") or f"How do the methods of {name} compare?"),
        summary=_summary(study, cells, claims, table),
        warnings=(*recipe.warnings, *_missing(study)),
        sections=tuple(section for section in sections if section is not None),
        limits=(*_limits(cells, claims, reference), *notes_of(study)),
        command=recipe.command,
        versions=recipe.versions,
        settings=recipe.settings,
    )  # fmt: skip


def _order(study: Mapping[str, Any], table: list[dict[str, Any]], key: str) -> list[str]:
    """Tasks in the study's order, then others, the mean last."""
    listed = study.get("tasks")
    named = [text(task) for task in listed] if isinstance(listed, list) else []
    found = dict.fromkeys([*named, *(text(row.get(key)) for row in table)])
    present = {text(row.get(key)) for row in table}
    tasks = [task for task in found if task in present and task != _MEAN]
    return [*tasks, *([_MEAN] if _MEAN in present else [])]


def _point(row: Mapping[str, Any], value: str = "mean") -> Point | None:
    middle = number(row.get(value))
    if middle is None:
        return None
    return Point(value=middle, low=number(row.get("low")), high=number(row.get("high")))


# ---- words


def _missing(study: Mapping[str, Any]) -> tuple[str, ...]:
    missing = study.get("missing")
    if not isinstance(missing, list) or not missing:
        return ()
    return (f"{counted(len(missing), 'cell')} not in these numbers: {text(missing)}.",)


def _summary(
    study: Mapping[str, Any],
    cells: list[dict[str, Any]],
    claims: list[dict[str, Any]],
    table: list[dict[str, Any]],
) -> str:
    verdicts = [text(claim.get("verdict")) for claim in claims]
    counts = [
        f"{verdicts.count(name)} {name}"
        for name in ("supported", "not supported", "undecided")
        if name in verdicts
    ]
    found = f"Of {counted(len(claims), 'claim')}: {', '.join(counts)}. " if counts else ""
    means = [row for row in table if text(row.get("task")) == _MEAN]
    if means:
        best = max(means, key=lambda row: number(row["mean"]) or 0.0)
        found += f"Highest mean: {text(best.get('method'))}, {signed(number(best['mean']) or 0.0)}. "
    seeds, methods = _distinct(cells, "seed"), _distinct(cells, "method")
    return found + (
        f"{counted(len(methods), 'method')} × {counted(len(seeds), 'seed')}, {counted(len(cells), 'cell')}."
        if cells
        else "No cell is finished yet."
    )


def _distinct(cells: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(text(cell.get(key)) for cell in cells))


def _limits(cells: list[dict[str, Any]], claims: list[dict[str, Any]], reference: str) -> tuple[str, ...]:
    by_method: dict[str, set[str]] = {}
    for cell in cells:
        by_method.setdefault(text(cell.get("method")), set()).add(text(cell.get("seed")))
    sizes = {len(seeds) for seeds in by_method.values()}
    found = []
    if sizes:
        span = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        found.append(
            f"n is {span} seeds a method"
            + (f" (seeds {', '.join(_distinct(cells, 'seed')[:12])})" if cells else "")
            + ". Intervals over so few seeds are wide, and intervals of two methods that overlap are no test: "
            "the claims are tested on paired differences."
        )
    if sizes and min(sizes) < 5:
        found.append(
            "With fewer than 5 seeds this is a screening: it can point at a difference, not confirm one."
        )
    if any(text(claim.get("verdict")) == "undecided" for claim in claims):
        found.append(
            "Undecided is not “no difference”: the study could not have seen one below “detectable”."
        )
    found.append(
        f"Everything holds for this base, these tasks and this budget{f', against {reference}' if reference else ''}; "
        "other models may differ."
    )
    return tuple(found)


# ---- sections


def _claims_section(claims: list[dict[str, Any]]) -> Section | None:
    if not claims:
        return None
    sentences = tuple(
        (text(claim.get("verdict")).capitalize(), text(claim.get("text"), limit=600)) for claim in claims
    )
    drawn = [claim for claim in claims if number(claim.get("difference")) is not None]
    figures: tuple[Figure, ...] = ()
    if drawn:
        figures = (
            Figure(
                name="claims",
                title="The difference behind each claim",
                caption="Mean difference over paired seeds and its 95 % interval; the line is no difference.",
                alt="; ".join(
                    f"{_short_claim(claim)}: {signed(number(claim['difference']) or 0.0, 2)}"
                    for claim in drawn[:12]
                )
                + ".",
                plot=Intervals(
                    rows=tuple(f"{claims.index(claim) + 1}. {_short_claim(claim)}" for claim in drawn),
                    series=(Series(name="difference", points=tuple(_point(c, "difference") for c in drawn)),),
                    xlabel="difference in points",
                    zero=True,
                    sentences=True,
                ),
            ),
        )
    return Section(
        title="Claims", points=sentences, figures=figures, tables=(_claims_table(claims),), folded=True
    )


def _short_claim(claim: Mapping[str, Any]) -> str:
    """What is claimed, without the numbers that its sentence may have."""
    return text(claim.get("claim") or claim.get("text"))


def _claims_table(claims: list[dict[str, Any]]) -> Table:
    names = (
        "claim",
        "verdict",
        "difference",
        "low",
        "high",
        "p",
        "p (Holm)",
        "bootstrap low",
        "bootstrap high",
        "detectable",
        "n",
    )
    found: list[tuple[Cell, ...]] = []
    for claim in claims:
        span = claim.get("bootstrap")
        bootstrap = (
            [number(value) for value in span] if isinstance(span, list) and len(span) == 2 else [None, None]
        )
        values = [number(claim.get(key)) for key in ("difference", "low", "high", "p", "p_holm")]
        found.append(
            (
                _short_claim(claim),
                text(claim.get("verdict")),
                *values,
                *bootstrap,
                number(claim.get("detectable")),
                whole(claim.get("n")),
            )
        )
    return Table(
        name="claims",
        caption="Differences in points with 95 % intervals; p of the paired t test, and after Holm’s correction",
        columns=tuple(Column(name=name, digits=4 if name.startswith("p") else 2) for name in names),
        rows=tuple(found),
    )  # fmt: skip


def _scores_section(table: list[dict[str, Any]], tasks: list[str]) -> Section | None:
    if not table:
        return None
    methods = list(dict.fromkeys(text(row.get("method")) for row in table))
    known = {(text(row.get("method")), text(row.get("task"))): row for row in table}
    series = tuple(
        Series(
            name=method,
            points=tuple(_point(known[method, task]) if (method, task) in known else None for task in tasks),
        )
        for method in methods
    )
    sizes = sorted({size for row in table if (size := whole(row.get("n"))) is not None})
    n = "" if not sizes else f" (n = {sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''})"
    figure = Figure(
        name="scores",
        title="Score per task and method",
        caption=f"Mean over seeds{n} with its 95 % interval.",
        alt="Mean score: "
        + ", ".join(
            f"{method} {signed(number(known[method, _MEAN]['mean']) or 0.0)}"
            for method in methods
            if (method, _MEAN) in known
        )
        + ".",
        plot=Intervals(
            rows=tuple(tasks),
            series=series,
            xlabel="score",
            separated=int(_MEAN in tasks),
            least=0.0,
            most=100.0,
        ),
    )
    cells = tuple(
        (task, *(_with_half(known.get((method, task))) for method in methods))
        for task in tasks
        if task != _MEAN
    )
    footer = tuple(
        (task, *(_with_half(known.get((method, task))) for method in methods))
        for task in tasks
        if task == _MEAN
    )
    shown = Table(
        name="scores",
        caption=f"Mean ± half of the 95 % interval over seeds{n}",
        columns=tuple(Column(name=name) for name in ("task", *methods)),
        rows=cells,
        footer=footer,
    )
    return Section(title="Scores", figures=(figure,), tables=(shown, _long_table(table)))


def _with_half(row: Mapping[str, Any] | None) -> str:
    point = None if row is None else _point(row)
    if point is None:
        return "–"
    if point.low is None or point.high is None:
        return f"{point.value:.2f}"
    return f"{point.value:.2f} ± {(point.high - point.low) / 2:.2f}"


def _long_table(table: list[dict[str, Any]]) -> Table:
    return Table(
        name="scores-long",
        caption="The same, one line per method and task",
        columns=tuple(Column(name=name) for name in ("method", "task", "mean", "low", "high", "n")),
        rows=tuple(
            (
                text(row.get("method")),
                text(row.get("task")),
                number(row.get("mean")),
                number(row.get("low")),
                number(row.get("high")),
                whole(row.get("n")),
            )
            for row in table
        ),
        hidden=True,
    )


def _delta_section(delta: list[dict[str, Any]]) -> Section | None:
    delta = [row for row in delta if number(row.get("mean")) is not None]
    if not delta:
        return None
    figure = Figure(
        name="delta-m",
        title="Δm% against one LoRA per task",
        caption="Mean relative loss against a LoRA trained on each task alone, with its 95 % interval over seeds; "
        "lower is better, left of the line beats it.",
        alt=", ".join(f"{text(row.get('method'))} {signed(number(row['mean']) or 0.0, 2)}" for row in delta)
        + ".",
        plot=Intervals(
            rows=tuple(text(row.get("method")) for row in delta),
            series=(Series(name="Δm%", points=tuple(_point(row) for row in delta)),),
            xlabel="Δm%",
            zero=True,
        ),
    )
    table = Table(
        name="delta-m",
        caption="Δm% with its 95 % interval",
        columns=tuple(Column(name=name) for name in ("method", "Δm%", "low", "high", "n")),
        rows=tuple(
            (
                text(row.get("method")),
                number(row.get("mean")),
                number(row.get("low")),
                number(row.get("high")),
                whole(row.get("n")),
            )
            for row in delta
        ),
    )
    return Section(title="Against single-task training", figures=(figure,), tables=(table,))


def _cost_section(cells: list[dict[str, Any]], table: list[dict[str, Any]]) -> Section | None:
    methods = _distinct(cells, "method")
    if not methods:
        return None
    by_method = {name: [cell for cell in cells if text(cell.get("method")) == name] for name in methods}
    found: list[tuple[Cell, ...]] = []
    sent = {name: _mean_of(by_method[name], _bytes_of) for name in methods}
    for name in methods:
        own = by_method[name]
        parameters = _mean_of(own, lambda cell: number(cell.get("parameters")))
        seconds = _mean_of(own, lambda cell: number(cell.get("seconds")))
        peak = _mean_of(own, lambda cell: number(cell.get("peak_bytes")))
        row: tuple[Cell, ...] = (
            name,
            None if parameters is None else round(parameters),
            seconds,
            None if peak is None else peak / _MIB,
            *((None if sent[name] is None else (sent[name] or 0.0) / _MIB,) if any(sent.values()) else ()),
            len(own),
        )
        found.append(row)
    columns = [
        Column(name="method"), Column(name="trainable parameters"), Column(name="seconds", digits=1),
        Column(name="peak MiB", digits=0),
        *([Column(name="MiB sent a client and round")] if any(sent.values()) else []), Column(name="cells"),
    ]  # fmt: skip
    costs = Table(
        name="cost",
        caption="What a cell costs, mean over its method’s cells",
        columns=tuple(columns),
        rows=tuple(found),
    )
    return Section(title="Cost", figures=_quality(by_method, table, sent), tables=(costs,))


def _quality(
    by_method: Mapping[str, list[dict[str, Any]]],
    table: list[dict[str, Any]],
    sent: Mapping[str, float | None],
) -> tuple[Figure, ...]:
    """Mean score against the bytes that travel where cells say so, else against the bytes of the adapter."""
    means = {text(row.get("method")): row for row in table if text(row.get("task")) == _MEAN}
    travels = any(sent.values())
    spots = []
    for name, cells in by_method.items():
        point = _point(means[name]) if name in means else None
        size = sent[name] if travels else _mean_of(cells, lambda cell: number(cell.get("parameters")))
        if point is not None and size is not None and size >= 0:
            spots.append(Spot(name=name, x=(size if travels else 4 * size) / _MIB, y=point))
    if len(spots) < 2:
        return ()
    what = "MiB up and down a client and round" if travels else "adapter in MiB, 4 bytes a parameter"
    return (
        Figure(
            name="quality-bytes",
            title="Quality against bytes",
            caption=f"Mean score with its 95 % interval over seeds; to the right: {what}.",
            alt="; ".join(f"{spot.name}: {signed(spot.y.value)} at {signed(spot.x, 2)} MiB" for spot in spots)
            + ".",
            plot=Scatter(spots=tuple(spots), xlabel=what, ylabel="mean score"),
        ),
    )


def _bytes_of(cell: Mapping[str, Any]) -> float | None:
    known = [value for key in _BYTES if (value := number(cell.get(key))) is not None]
    return sum(known) if known else None


def _mean_of(cells: list[dict[str, Any]], read: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    return mean(value for cell in cells if (value := read(cell)) is not None)


def _cells_section(cells: list[dict[str, Any]]) -> Section | None:
    if not cells:
        return None
    return Section(
        title="All cells",
        tables=(
            Table(
                name="cells",
                caption=f"{counted(len(cells), 'cell')}: every method and seed",
                columns=(
                    Column(name="method"),
                    Column(name="seed"),
                    Column(name="learning rate", digits=6),
                    Column(name="mean score"),
                    Column(name="seconds", digits=1),
                ),
                rows=tuple(
                    (
                        text(cell.get("method")),
                        whole(cell.get("seed")),
                        number(cell.get("learning_rate")),
                        mean(numbers(cell.get("scores")).values()),
                        number(cell.get("seconds")),
                    )
                    for cell in cells
                ),
            ),
        ),
        folded=True,
    )
