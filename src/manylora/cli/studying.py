"""What a person sees of a study: its cells, their progress, its tables and verdicts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.console import duration
from manylora.cli.tables import console
from manylora.studies.cells import Cell, final_cells, screening_cells
from manylora.studies.runner import Progress
from manylora.table import Table, Value

if TYPE_CHECKING:
    from manylora.studies.config import Study
    from manylora.studies.records import Summary

_NAMED = 8
"""How many missing cells are named."""


class CellProgress(Progress):
    """One line for each cell that ends, on standard error."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers, self._done, self._total = workers, 0, 0

    def began(self, cell: Cell, number: int, total: int) -> None:
        """Before the first: how many there are."""
        if number == 1:
            self._done, self._total = 0, total
            rows = "validation rows, to choose the learning rate" if cell.stage == "screen" else "test rows"
            beside = f"{self._workers} side by side, " if self._workers else ""
            _print(f"{total} cells, {beside}scored on {rows}")

    def ended(self, cell: Cell, seconds: float, left: float) -> None:
        """Its time, and what is left."""
        self._done += 1
        _print(f"{self._done}/{self._total}  {cell.id}  {seconds:.0f} s  {duration(left)} left")

    def failed(self, cell: Cell, log: Path) -> None:
        """The last line of its log."""
        self._done += 1
        _print(f"{self._done}/{self._total}  {cell.id}  failed: {_last_line(log)}  (log: {log})")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1][:200] if lines else "it wrote nothing"


def print_study(summary: Summary) -> None:
    """Tables, claims and notes of a study."""
    from manylora.studies.tables import costs_table, curves_table, others_table, scores_table

    out = console()
    out.print(f"{summary.name}: {summary.question}" if summary.question else summary.name)
    out.print(scores_table(summary))
    if summary.others:
        out.print(others_table(summary))
    out.print(costs_table(summary))
    if summary.curves:
        out.print(curves_table(summary))
    for claim in summary.claims:
        out.print(f"• {claim.text}", soft_wrap=True)
    for note in summary.notes:
        out.print(f"note: {note}", soft_wrap=True)
    if summary.missing:
        first, more = ", ".join(summary.missing[:_NAMED]), len(summary.missing) - _NAMED
        out.print(f"missing: {first}{f' and {more} more' if more > 0 else ''}", soft_wrap=True)


def print_cells_plan(study: Study, out: Path, *, workers: int) -> None:
    """The cells of a study, which are done, and about how long the others take."""
    from manylora.studies.estimate import estimate_seconds

    screening = screening_cells(study)
    seconds, source = estimate_seconds(study, out)
    rows: list[dict[str, Value]] = []
    left = 0.0
    for method in study.methods:
        own = [cell for cell in (*screening, *final_cells(study)) if cell.method == method.name]
        done = sum(cell.result(out) is not None for cell in own)
        left += seconds[method.name] * (len(own) - done)
        rows.append(
            {
                "method": method.name,
                "kind": method.kind,
                "screening": sum(cell.stage == "screen" for cell in own),
                "final": sum(cell.stage == "final" for cell in own),
                "done": done,
                "s a cell": round(seconds[method.name]),
            }
        )
    printed = console()
    final = len(study.seeds) * len(study.methods)
    printed.print(Table.of("cells", f"{study.name}: {len(screening)} + {final} cells", rows))
    if screening:
        rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
        printed.print(
            f"learning rates {rates}, chosen on validation rows with seeds {', '.join(map(str, study.screening_seeds))}"
        )
    printed.print(f"seeds {', '.join(map(str, study.seeds))}; {len(study.claims)} claims:")
    for contrast in study.claims:
        printed.print(f"• {contrast.sentence}", soft_wrap=True)
    printed.print(
        f"about {left / 60:.0f} minutes of one core, {left / 60 / workers:.0f} minutes with {workers} cells side by "
        f"side ({source})"
    )
