"""The page of `manylora analyze`: which matrices are alike, what training changed, gradients, gates."""

from __future__ import annotations

from pathlib import Path

from manylora.report.analyze_gates import gates_sections, gradient_sections
from manylora.report.analyze_rows import FOLDED, MATRICES, Row, known
from manylora.report.analyze_similarity import change_section, similarity_section
from manylora.report.common import counted, notes_of, read_recipe, signed
from manylora.report.files import mapping, mean, number, read_object, rows, text, whole
from manylora.report.page import Page, Section
from manylora.table import Column, Table


def analyze_page(folder: Path) -> Page:
    """The page of an analysis.

    Raises:
        RunError: analysis.json, or another file, is broken.
    """
    found = read_object(folder / "analysis.json")
    recipe = read_recipe(folder)
    sources, pairs, gates = (
        rows(found.get("sources")),
        rows(found.get("similarity")),
        rows(found.get("gates")),
    )
    change, gradients = rows(found.get("change")), mapping(found.get("gradients"))
    sections = (
        _sources_section(sources),
        similarity_section(pairs),
        change_section(change),
        *gradient_sections(gradients),
        *gates_sections(gates),
    )
    collapsed = [row for row in gates if row.get("collapsed") is True]
    return Page(
        kind="analyze",
        question=text(found.get("question") or "Which matrices are alike, and what did training change?"),
        summary=_summary(sources, pairs, change, gates),
        warnings=(*recipe.warnings, *([_collapse(collapsed, len(gates))] if collapsed else [])),
        sections=tuple(section for section in sections if section is not None),
        limits=(*_limits(sources, pairs, gradients, gates), *notes_of(found)),
        command=recipe.command,
        versions=recipe.versions,
        settings=recipe.settings,
    )


# ---- words


def _summary(sources: list[Row], pairs: list[Row], change: list[Row], gates: list[Row]) -> str:
    parts = []
    for matrix in MATRICES:
        values = [row for row in pairs if row.get("matrix") == matrix]
        cosine = mean(known(values, "mean_cosine"))
        random = mean(known(values, "baseline_cosine"))
        if cosine is not None:
            beside = "" if random is None else f" (random subspaces {signed(random, 2)})"
            parts.append(f"{matrix} {signed(cosine, 2)}{beside}")
    found = f"Mean cosine of the principal angles: {', '.join(parts)}. " if parts else ""
    if not found and change:
        found = f"{counted(len(change), 'change')} measured. "
    if not found and gates:
        found = f"{counted(len(gates), 'gate')} measured. "
    sizes = f"{counted(len(sources), 'adapter')}, {counted(len(pairs), 'pair')} of matrices"
    return f"{found}{sizes}." if sources or pairs else f"{found}Nothing else was measured."


def _collapse(collapsed: list[Row], total: int) -> str:
    where = list(dict.fromkeys(text(row.get("task")) for row in collapsed))
    tasks = ", ".join(where[:8]) + (", …" if len(where) > 8 else "")
    return (
        f"Router collapse: in {len(collapsed)} of {total} measured gates one expert takes nearly everything "
        f"(tasks {tasks})."
    )


def _limits(sources: list[Row], pairs: list[Row], gradients: Row, gates: list[Row]) -> tuple[str, ...]:
    seeds = list(dict.fromkeys(text(row.get("seed")) for row in sources if row.get("seed") is not None))
    found = [
        f"Numbers describe these {counted(len(sources), 'adapter')}"
        + (f" ({'seeds' if len(seeds) != 1 else 'seed'} {', '.join(seeds[:12])})" if seeds else "")
        + "; pairs of one adapter are not independent, so bands are spreads, not confidence intervals."
    ]
    if pairs:
        found.append(
            "Alike is measured, not why: matrices that began alike and hardly moved are alike too. Read similarity "
            "beside the initialisation and the change during training."
        )
    if gradients:
        found.append("Gradients are those of the given rows at one point of training.")
    if gates:
        found.append(
            "Gates are means over tokens of the given rows; a mean near uniform may hide sharp choices."
        )
    return tuple(found)


def _sources_section(sources: list[Row]) -> Section | None:
    if not sources:
        return None
    found = tuple(
        (
            text(row.get("name")),
            text(row.get("format")),
            text(row.get("tasks")) if row.get("tasks") else None,
            whole(row.get("seed")),
            number(row.get("score")),
            text(row.get("path")),
        )
        for row in sources
    )
    columns = tuple(Column(name=name) for name in ("name", "format", "tasks", "seed", "score", "path"))
    table = Table(name="sources", caption=counted(len(sources), "adapter"), columns=columns, rows=found)
    return Section(title="What was analyzed", tables=(table,), folded=len(sources) > FOLDED)
