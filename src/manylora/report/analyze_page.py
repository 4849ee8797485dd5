"""The page of `manylora analyze`: which matrices are alike, what training changed, gradients, gates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from manylora.analysis.records import Findings, Gates
from manylora.analysis.routers import ALL
from manylora.analysis.tables import (
    change_table,
    conflict_table,
    cosines_table,
    gates_table,
    norms_table,
    similarity_by_module_table,
    similarity_table,
    sources_table,
)
from manylora.report.analyze_figures import (
    MATRICES,
    change_layers_figure,
    change_steps_figure,
    conflict_figure,
    entropy_figure,
    gates_figure,
    norms_figure,
    similarity_layers_figure,
    similarity_maps_figure,
)
from manylora.report.common import (
    FOLDED,
    counted,
    first_few,
    mean,
    read_if_there,
    read_recipe,
    signed,
    text,
)
from manylora.report.page import Figure, Page, Section
from manylora.table import Table


def analyze_page(folder: Path) -> Page:
    """The page of an analysis.

    Raises:
        RunError: analysis.json, or another file, is broken.
    """
    found = read_if_there(folder / "analysis.json", Findings) or Findings()
    recipe = read_recipe(folder)
    gates = [one for one in found.gates if one.task != ALL]
    sections = (
        _section("What was analyzed", [], sources_table(found.sources, paths=True)),
        _section(
            "Similarity",
            [similarity_layers_figure(found.similarity), similarity_maps_figure(found.similarity)],
            similarity_table(found.similarity),
            similarity_by_module_table(found.similarity),
        ),
        _section(
            "Change during training",
            [change_layers_figure(found.change), change_steps_figure(found.change)],
            change_table(found.change, per_module=len(found.sources) == 1),
        ),
        *_gradient_sections(found),
        *_gates_sections(found),
    )
    collapsed = [one for one in gates if one.collapsed]
    return Page(
        kind="analyze",
        question="Which matrices are alike, and what did training change?",
        summary=_summary(found, gates),
        warnings=(*recipe.warnings, *([_collapse(collapsed, len(gates))] if collapsed else [])),
        sections=tuple(section for section in sections if section is not None),
        limits=(*_limits(found), *found.notes),
        command=recipe.command,
        versions=recipe.versions,
        settings=recipe.settings,
    )


# ---- words


def _summary(found: Findings, gates: list[Gates]) -> str:
    parts = []
    for matrix in MATRICES:
        own = [pair for pair in found.similarity if pair.matrix == matrix]
        if own:
            cosine, random = mean(pair.mean_cosine for pair in own), mean(p.baseline_cosine for p in own)
            parts.append(f"{matrix} {signed(cosine or 0.0, 2)} (random subspaces {signed(random or 0.0, 2)})")
    words = f"Mean cosine of the principal angles: {', '.join(parts)}. " if parts else ""
    if not words and found.change:
        words = f"{counted(len(found.change), 'change')} measured. "
    if not words and gates:
        words = f"{counted(len(gates), 'gate')} measured. "
    sizes = f"{counted(len(found.sources), 'adapter')}, {counted(len(found.similarity), 'pair')} of matrices"
    return f"{words}{sizes}." if found.sources or found.similarity else f"{words}Nothing else was measured."


def _collapse(collapsed: list[Gates], total: int) -> str:
    tasks = first_few(dict.fromkeys(one.task for one in collapsed), 8)
    return (
        f"Router collapse: in {len(collapsed)} of {total} measured gates one expert takes nearly everything "
        f"(tasks {tasks})."
    )


def _limits(found: Findings) -> tuple[str, ...]:
    seeds = list(dict.fromkeys(text(one.seed) for one in found.sources if one.seed is not None))
    limits = [
        f"Numbers describe these {counted(len(found.sources), 'adapter')}"
        + (f" ({'seeds' if len(seeds) != 1 else 'seed'} {', '.join(seeds[:12])})" if seeds else "")
        + "; pairs of one adapter are not independent, so bands are spreads, not confidence intervals."
    ]
    if found.similarity:
        limits.append(
            "Alike is measured, not why: matrices that began alike and hardly moved are alike too. Read similarity "
            "beside the initialisation and the change during training."
        )
    if found.gradients:
        limits.append("Gradients are those of the given rows at one point of training.")
    if found.gates:
        limits.append(
            "Gates are means over tokens of the given rows; a mean near uniform may hide sharp choices."
        )
    return tuple(limits)


# ---- sections


def _section(title: str, figures: list[Figure | None], *tables: Table) -> Section | None:
    """What there is to show; None where that is nothing."""
    drawn = tuple(figure for figure in figures if figure)
    kept = tuple(table for table in tables if table.rows)
    folded = any(len(table.rows) > FOLDED for table in kept)
    return Section(title=title, figures=drawn, tables=kept, folded=folded) if drawn or kept else None


def _gradient_sections(found: Findings) -> list[Section | None]:
    """One section for every adapter and matrix whose gradients were measured."""
    parts = [
        (one, matrix)
        for one in found.gradients
        for matrix in dict.fromkeys(
            [*(row.matrix for row in one.norms), *(row.matrix for row in one.conflict)]
        )
    ]
    sections = []
    for one, matrix in parts:
        of = " · ".join(filter(None, (one.source, matrix))) if len(parts) > 1 else ""
        norms = [row for row in one.norms if row.matrix == matrix]
        conflict = [row for row in one.conflict if row.matrix == matrix]
        shared = matrix or one.shared
        figures = [
            norms_figure(norms, shared, name=_named("gradient-norms", of)),
            conflict_figure(conflict, shared, name=_named("gradient-conflict", of)),
        ]
        tables = (norms_table(one, matrix), cosines_table(one, matrix), conflict_table(one, matrix))
        renamed = [_renamed(table, of) for table in tables]
        sections.append(_section(f"Gradients: {of}" if of else "Gradients", figures, *renamed))
    return sections


def _gates_sections(found: Findings) -> list[Section | None]:
    """One section for every adapter whose gates were measured."""
    sources = list(dict.fromkeys(one.source for one in found.gates))
    sections = []
    for source in sources:
        of = source if len(sources) > 1 else ""
        own = [one for one in found.gates if one.source == source]
        experts = max(len(one.weights) for one in own)
        own = [one for one in own if len(one.weights) == experts]
        per_task = [one for one in own if one.task != ALL]
        figures = [
            gates_figure(per_task, name=_named("gates", of)),
            entropy_figure(per_task, name=_named("gate-entropy", of)),
        ]
        table = _renamed(gates_table(own), of)
        sections.append(_section(f"Gates: {of}" if of else "Gates", figures, table))
    return sections


def _named(name: str, of: str) -> str:
    """A figure's or table's name with what tells it from others."""
    return "-".join([name, *re.findall(r"\w+", of)])


def _renamed(table: Table, of: str) -> Table:
    return replace(table, name=_named(table.name, of))
