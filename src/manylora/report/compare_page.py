"""The page of `manylora compare`: the claims and their verdicts, scores per task and method, what each method costs."""

from __future__ import annotations

import math
from pathlib import Path

from manylora.files import forgive_record
from manylora.report.common import (
    Environment,
    counted,
    first_few,
    mean,
    read_page_file,
    read_recipe,
    signed,
    text,
)
from manylora.report.page import Figure, Page, Section
from manylora.report.plots import (
    Intervals,
    Line,
    LinePanel,
    Lines,
    Point,
    Scatter,
    Series,
    Spot,
)
from manylora.studies.config import MEAN, SCREENING
from manylora.studies.costs import CELL_METRICS
from manylora.studies.records import ClaimTrial, CurveMean, Interval, Summary
from manylora.studies.tables import (
    cells_table,
    claims_table,
    costs_table,
    curves_table,
    delta_table,
    long_table,
    others_table,
    scores_table,
)


def compare_page(folder: Path) -> Page:
    """The page of a study's folder.

    Raises:
        RunError: study.json, or another file, is broken.
    """
    found = read_page_file(folder / "study.json")
    study = forgive_record(found, Summary) or Summary()
    recipe = read_recipe(folder, environment=forgive_record(found.get("environment"), Environment))
    sections = (
        _claims_section(study) if study.claims else None,
        _scores_section(study) if study.table else None,
        _delta_section(study) if study.delta_m else None,
        _curves_section(study) if study.curves else None,
        _cost_section(study) if study.cells else None,
        Section(title="All cells", tables=(cells_table(study),), folded=True) if study.cells else None,
    )
    missing = f"{counted(len(study.missing), 'cell')} not in these numbers: {text(study.missing)}."
    return Page(
        kind="compare",
        question=study.question or f"How do the methods of {study.name} compare?",
        summary=_summary(study),
        warnings=(*recipe.warnings, *([missing] if study.missing else [])),
        sections=tuple(section for section in sections if section is not None),
        limits=(*_limits(study), *study.notes),
        command=recipe.command or _command(folder),
        versions=recipe.versions,
        settings=recipe.settings or _settings(study),
    )


def _command(folder: Path) -> str:
    """What makes the study, or else its tables, from the files beside the page."""
    if (folder / "study.yaml").is_file():
        return "manylora compare study.yaml --out ."
    return "manylora compare --from-cells cells.jsonl" if (folder / "cells.jsonl").is_file() else ""


def _settings(study: Summary) -> tuple[tuple[str, str], ...]:
    rates = {name: rate for name, rate in study.learning_rates.items() if rate is not None}
    found = {
        "reference": study.reference,
        "seeds": study.seeds,
        "grid": study.grid,
        "screening seeds": study.screening_seeds,
        "learning rates": [f"{name} {rate:g}" for name, rate in rates.items()],
    }
    return tuple((name, text(value)) for name, value in found.items() if value)


# ---- words


def _summary(study: Summary) -> str:
    verdicts = [claim.verdict for claim in study.claims]
    counts = [
        f"{verdicts.count(name)} {name}"
        for name in ("supported", "not supported", "undecided")
        if name in verdicts
    ]
    found = f"Of {counted(len(study.claims), 'claim')}: {', '.join(counts)}. " if counts else ""
    means = [row for row in study.table if row.task == MEAN]
    if means:
        best = max(means, key=lambda row: row.mean)
        found += f"Highest mean: {best.method}, {signed(best.mean)}. "
    if not study.cells:
        return found + "No cell is finished yet."
    seeds = {cell.seed for cell in study.cells}
    methods = counted(len(study.by_method()), "method")
    return f"{found}{methods} × {counted(len(seeds), 'seed')}, {counted(len(study.cells), 'cell')}."


def _limits(study: Summary) -> tuple[str, ...]:
    """What the numbers do not show."""
    sizes = {len({cell.seed for cell in cells}) for cells in study.by_method().values()}
    found = []
    if sizes:
        span = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        seeds = first_few(dict.fromkeys(text(cell.seed) for cell in study.cells), 12)
        found.append(
            f"n is {span} {'seed' if span == '1' else 'seeds'} a method (seeds {seeds}). Intervals over so few seeds "
            "are wide, and intervals of two methods that overlap are no test: the claims are tested on paired "
            "differences."
        )
    if any(claim.verdict == "undecided" for claim in study.claims):
        found.append(
            "Undecided is not “no difference”: the study could hardly have seen one below “detectable”."
        )
    if sizes and min(sizes) < SCREENING and not study.notes:  # which have the study's own words on it
        found.append(
            f"With fewer than {SCREENING} seeds this is a screening: it can point at a difference, not confirm one."
        )
    against = f", against {study.reference}" if study.reference else ""
    found.append(
        f"Everything holds for this base, these tasks and this budget{against}; other models may differ."
    )
    return tuple(found)


# ---- sections


def _point(row: Interval | ClaimTrial, value: float) -> Point:
    if math.isnan(row.low) or math.isnan(row.high):
        return Point(value=value)
    return Point(value=value, low=row.low, high=row.high)


def _claims_section(study: Summary) -> Section:
    sentences = tuple((claim.verdict.capitalize(), claim.text) for claim in study.claims)
    drawn = [
        (f"{number}. {claim.claim or claim.text}", claim)
        for number, claim in enumerate(study.claims, 1)
        if not math.isnan(claim.difference)
    ]
    figure = Figure(
        name="claims",
        title="The difference behind each claim",
        caption="Mean difference over paired seeds and its 95 % interval; the line is no difference.",
        alt="; ".join(f"{c.claim or c.text}: {signed(c.difference, 2)}" for _, c in drawn[:12]) + ".",
        plot=Intervals(
            rows=tuple(name for name, _ in drawn),
            series=(Series(name="difference", points=tuple(_point(c, c.difference) for _, c in drawn)),),
            xlabel="difference in points",
            zero=True,
            sentences=True,
        ),
    )
    figures, tables = (figure,) if drawn else (), (claims_table(study),)
    return Section(title="Claims", points=sentences, figures=figures, tables=tables, folded=True)


def _scores_section(study: Summary) -> Section:
    known = {(row.method, row.task): row for row in study.table}
    methods = list(dict.fromkeys(row.method for row in study.table))
    tasks = [task for task in dict.fromkeys(row.task for row in study.table) if task != MEAN]
    tasks += [MEAN] if any(row.task == MEAN for row in study.table) else []
    points = {key: _point(row, row.mean) for key, row in known.items()}
    series = tuple(
        Series(name=method, points=tuple(points.get((method, task)) for task in tasks)) for method in methods
    )
    sizes = sorted({row.n for row in study.table if row.n is not None})
    n = "" if not sizes else f" (n = {sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''})"
    figure = Figure(
        name="scores",
        title="Score per task and method",
        caption=f"Mean over seeds{n} with its 95 % interval.",
        alt="Mean score: "
        + ", ".join(f"{m} {signed(known[m, MEAN].mean)}" for m in methods if (m, MEAN) in known)
        + ".",
        plot=Intervals(
            rows=tuple(tasks),
            series=series,
            xlabel="score",
            separated=int(MEAN in tasks),
            least=0.0,
            most=100.0,
        ),
    )
    others = (others_table(study),) if study.others else ()
    tables = (scores_table(study), long_table(study), *others)
    return Section(title="Scores", figures=(figure,), tables=tables)


def _delta_section(study: Summary) -> Section:
    figure = Figure(
        name="delta-m",
        title="Δm% against one LoRA per task",
        caption="Mean relative loss against a LoRA trained on each task alone, with its 95 % interval over seeds; "
        "lower is better, left of the line beats it.",
        alt=", ".join(f"{row.method} {signed(row.mean, 2)}" for row in study.delta_m) + ".",
        plot=Intervals(
            rows=tuple(row.method for row in study.delta_m),
            series=(Series(name="Δm%", points=tuple(_point(row, row.mean) for row in study.delta_m)),),
            xlabel="Δm%",
            zero=True,
        ),
    )
    return Section(title="Against single-task training", figures=(figure,), tables=(delta_table(study),))


def _curves_section(study: Summary) -> Section:
    """Mean score and Δm% against epochs, one curve per method."""
    points: dict[str, list[CurveMean]] = {}
    for row in sorted(study.curves, key=lambda row: row.epoch):
        points.setdefault(row.method, []).append(row)
    scores = tuple(_line(name, [(row.epoch, row) for row in own]) for name, own in points.items())
    deltas = {
        name: [(row.epoch, row.delta_m) for row in own if row.delta_m is not None]
        for name, own in points.items()
    }
    panels = [LinePanel(title="Mean score", lines=scores, ylabel="")]
    lines = tuple(_line(name, own) for name, own in deltas.items() if own)
    panels += [LinePanel(title="Δm% (lower is better)", lines=lines, ylabel="")] if lines else []
    figure = Figure(
        name="curves",
        title="What longer training does",
        caption="Means over seeds; the bands are their 95 % intervals, where more than one seed was scored.",
        alt="; ".join(f"{line.name} from {signed(line.y[0])} to {signed(line.y[-1])}" for line in scores)
        + ".",
        plot=Lines(panels=tuple(panels), xlabel="epoch"),
    )
    return Section(title="Over epochs", figures=(figure,), tables=(curves_table(study),), folded=True)


def _line(name: str, points: list[tuple[float, Interval]]) -> Line:
    known = not any(math.isnan(row.half) for _, row in points)
    return Line(
        name=name,
        x=tuple(x for x, _ in points),
        y=tuple(row.mean for _, row in points),
        low=tuple(row.low for _, row in points) if known else (),
        high=tuple(row.high for _, row in points) if known else (),
    )


def _cost_section(study: Summary) -> Section:
    """What a cell costs, and the mean score against the bytes that travel, or else against those of the adapter."""
    means = {row.method: row for row in study.table if row.task == MEAN}
    by_method = study.by_method()
    sent = {name: CELL_METRICS["bytes_sent"].of(cells) for name, cells in by_method.items()}
    travels = any(sent.values())
    spots = []
    for name, cells in by_method.items():
        parameters = mean(cell.parameters for cell in cells if cell.parameters is not None)
        size = sent[name] if travels else None if parameters is None else 4 * parameters
        if name in means and size is not None and size >= 0:
            spots.append(Spot(name=name, x=size / 2**20, y=_point(means[name], means[name].mean)))
    what = "MiB up and down a client and round" if travels else "adapter in MiB, 4 bytes a parameter"
    figure = Figure(
        name="quality-bytes",
        title="Quality against bytes",
        caption=f"Mean score with its 95 % interval over seeds; to the right: {what}.",
        alt="; ".join(f"{spot.name}: {signed(spot.y.value)} at {signed(spot.x, 2)} MiB" for spot in spots)
        + ".",
        plot=Scatter(spots=tuple(spots), xlabel=what, ylabel="mean score"),
    )
    figures = (figure,) if len(spots) > 1 else ()
    return Section(title="Cost", figures=figures, tables=(costs_table(study),))
