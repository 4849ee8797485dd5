"""The page of `manylora compare`: the claims and their verdicts, scores per task and method, what each method costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manylora.report.common import counted, notes_of, point_of, read_recipe, signed
from manylora.report.compare_claims import claims_section
from manylora.report.compare_costs import cost_section
from manylora.report.compare_curves import curves_section
from manylora.report.files import mapping, mean, number, numbers, read_object, rows, text, whole
from manylora.report.page import Figure, Page, Section
from manylora.report.plots import Intervals, Series
from manylora.table import Column, Table

_MEAN = "mean"


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
        claims_section(claims),
        _scores_section(table, _order(study, table, "task")),
        _delta_section(rows(study.get("delta_m"))),
        curves_section(study),
        cost_section(cells, table, rows(study.get("costs"))),
        _cells_section(cells),
    )
    return Page(
        kind="compare",
        question=text(study.get("question") or f"How do the methods of {name} compare?"),
        summary=_summary(study, cells, claims, table),
        warnings=(*recipe.warnings, *_missing(study)),
        sections=tuple(section for section in sections if section is not None),
        limits=(*_limits(cells, claims, reference, noted=bool(notes_of(study))), *notes_of(study)),
        command=recipe.command or _command(folder),
        versions=recipe.versions,
        settings=recipe.settings or _settings(study),
    )


def _command(folder: Path) -> str:
    """What makes the study, or else its tables, from the files beside the page."""
    if (folder / "study.yaml").is_file():
        return "manylora compare study.yaml --out ."
    return "manylora compare --from-cells cells.jsonl" if (folder / "cells.jsonl").is_file() else ""


def _settings(study: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    names = ("reference", "seeds", "grid", "screening_seeds", "learning_rates")
    return tuple((name.replace("_", " "), text(study[name])) for name in names if study.get(name))


def _order(study: Mapping[str, Any], table: list[dict[str, Any]], key: str) -> list[str]:
    """Tasks in the study's order, then others, the mean last."""
    listed = study.get("tasks")
    named = [text(task) for task in listed] if isinstance(listed, list) else []
    found = dict.fromkeys([*named, *(text(row.get(key)) for row in table)])
    present = {text(row.get(key)) for row in table}
    tasks = [task for task in found if task in present and task != _MEAN]
    return [*tasks, *([_MEAN] if _MEAN in present else [])]


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


def _limits(
    cells: list[dict[str, Any]], claims: list[dict[str, Any]], reference: str, *, noted: bool
) -> tuple[str, ...]:
    """What the numbers do not show; `noted`: the study has its own words on its number of seeds."""
    by_method: dict[str, set[str]] = {}
    for cell in cells:
        by_method.setdefault(text(cell.get("method")), set()).add(text(cell.get("seed")))
    sizes = {len(seeds) for seeds in by_method.values()}
    found = []
    if sizes:
        span = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        found.append(
            f"n is {span} {'seed' if span == '1' else 'seeds'} a method"
            + (f" (seeds {', '.join(_distinct(cells, 'seed')[:12])})" if cells else "")
            + ". Intervals over so few seeds are wide, and intervals of two methods that overlap are no test: "
            "the claims are tested on paired differences."
        )
    if any(text(claim.get("verdict")) == "undecided" for claim in claims):
        found.append(
            "Undecided is not “no difference”: the study could hardly have seen one below “detectable”."
        )
    if sizes and min(sizes) < 5 and not noted:
        found.append(
            "With fewer than 5 seeds this is a screening: it can point at a difference, not confirm one."
        )
    found.append(
        f"Everything holds for this base, these tasks and this budget{f', against {reference}' if reference else ''}; "
        "other models may differ."
    )
    return tuple(found)


# ---- sections


def _scores_section(table: list[dict[str, Any]], tasks: list[str]) -> Section | None:
    if not table:
        return None
    methods = list(dict.fromkeys(text(row.get("method")) for row in table))
    known = {(text(row.get("method")), text(row.get("task"))): row for row in table}
    series = tuple(
        Series(
            name=method,
            points=tuple(
                point_of(known[method, task]) if (method, task) in known else None for task in tasks
            ),
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
    point = None if row is None else point_of(row)
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
            series=(Series(name="Δm%", points=tuple(point_of(row) for row in delta)),),
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
