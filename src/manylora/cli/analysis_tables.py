"""What `analyze` found, on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manylora.analysis.routers import ALL
from manylora.analysis.summary import spread
from manylora.analysis.tables import (
    change_table,
    cosines_table,
    gates_table,
    norms_table,
    similarity_by_module_table,
    similarity_table,
    sources_table,
)
from manylora.cli.tables import console
from manylora.table import Table

if TYPE_CHECKING:
    from manylora.analysis import Analysis, Gates, Gradients

_RELIABLE = 0.5
"""Cosine of two halves of a task's rows below which its gradient is mostly noise: a convention of ours."""


def print_analysis(found: Analysis) -> None:
    """Every table that there is something for, then warnings, then what could not be looked at."""
    out = console()
    shown: list[Table | str] = [
        sources_table(found.sources),
        similarity_table(found.similarity),
        similarity_by_module_table(found.similarity),
        change_table(found.change, per_module=len(found.sources) == 1),
    ]
    for one in found.gradients:
        shown.append(norms_table(one))
        for matrix in ("A", "B"):
            shown += [cosines_table(one, matrix), *_conflict_lines(one, matrix)]
    shown += [gates_table(found.gates), *_collapse_warnings(found.gates)]
    for part in [*shown, *(f"note: {note}" for note in found.notes)]:
        if isinstance(part, str):
            out.print(part, soft_wrap=True)
        elif part.rows:
            out.print(part)


def _conflict_lines(one: Gradients, matrix: str) -> list[str]:
    """One line on all pairs and modules, and a warning where the rows say little."""
    pairs = [found.cosine for found in one.overall_conflict if found.matrix == matrix]
    if not pairs:
        return []
    single = [found.cosine for found in one.conflict if found.matrix == matrix]
    negative = sum(cosine < 0 for cosine in single)
    over = spread(pairs)
    deviation = "" if math.isnan(over.deviation) else f" ± {over.deviation:.3f}"
    lines = [
        f"{matrix}: mean cosine {over.mean:.3f}{deviation} over {len(pairs)} pairs of tasks; negative in "
        f"{negative} of {len(single)} pairs × modules ({100 * negative / len(single):.0f} %)"
    ]
    halves = [found.cosine for found in one.overall_within if found.matrix == matrix]
    noisy = sum(cosine < _RELIABLE for cosine in halves)
    if noisy:
        lines.append(
            f"warning: {one.source}: the gradients on {matrix} of a task's two halves of rows have a cosine below "
            f"{_RELIABLE} for {noisy} of {len(halves)} tasks: so few rows say little. Raise --limit."
        )
    return lines


def _collapse_warnings(gates: Sequence[Gates]) -> list[str]:
    lines = []
    for source in dict.fromkeys(gate.source for gate in gates):
        group = [gate for gate in gates if gate.source == source and gate.task == ALL]
        collapsed = [gate for gate in group if gate.collapsed]
        if collapsed:
            names = ", ".join(gate.name for gate in collapsed[:3]) + (", …" if len(collapsed) > 3 else "")
            lines.append(
                f"warning: {source}: the router has collapsed onto one expert in {len(collapsed)} of {len(group)} "
                f"modules ({names}); try train --load-balance-weight 0.01 or fewer experts."
            )
    return lines
