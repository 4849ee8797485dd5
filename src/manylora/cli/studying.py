"""What a person sees of a study: its cells, their progress, its tables and verdicts."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from manylora.cli.console import duration
from manylora.cli.tables import console

if TYPE_CHECKING:
    from manylora.studies import Cell, Progress, Study

_MIB = 2**20
_NONE = "–"
_COLUMN = 10
"""Characters of a column: "± 100.00" and the room beside it."""
_NAMED = 8
"""How many missing cells are named."""


class CellProgress:
    """One line for each cell that ends, on standard error."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers, self._done, self._total = workers, 0, 0

    def as_hooks(self) -> Progress:
        """For the runner."""
        from manylora.studies import Progress

        return Progress(began=self._began, ended=self._ended, failed=self._failed)

    def _began(self, cell: Cell, number: int, total: int) -> None:
        if number == 1:
            self._done, self._total = 0, total
            rows = "validation rows, to choose the learning rate" if cell.stage == "screen" else "test rows"
            beside = f"{self._workers} side by side, " if self._workers else ""
            self._print(f"{total} cells, {beside}scored on {rows}")

    def _ended(self, cell: Cell, seconds: float, left: float) -> None:
        self._done += 1
        self._print(f"{self._done}/{self._total}  {cell.id}  {seconds:.0f} s  {duration(left)} left")

    def _failed(self, cell: Cell, log: Path) -> None:
        self._done += 1
        self._print(f"{self._done}/{self._total}  {cell.id}  failed: {_last_line(log)}  (log: {log})")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1][:200] if lines else "it wrote nothing"


def print_study(summary: Mapping[str, Any]) -> None:
    """Table, learning rates, costs, curves, claims and notes of a study."""
    out = console()
    out.print(f"{summary['name']}: {summary['question']}" if summary["question"] else summary["name"])
    for table in _scores(summary, out.width):
        out.print(table)
    out.print(_costs(summary))
    if summary["curves"]:
        out.print(_curves(summary))
    for claim in summary["claims"]:
        out.print(f"• {claim['text']}", soft_wrap=True)
    for note in summary["notes"]:
        out.print(f"note: {note}", soft_wrap=True)
    if summary["missing"]:
        first, more = summary["missing"][:_NAMED], len(summary["missing"]) - _NAMED
        out.print(
            f"missing: {', '.join(first)}{f' and {more} more' if more > 0 else ''}",
            soft_wrap=True,
        )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _scores(summary: Mapping[str, Any], width: int) -> list[Table]:
    """Methods × tasks, the more of them as rows; as many columns beside each other as fit, the others below."""
    cells = {(row["method"], row["task"]): _estimate(row) for row in summary["table"]}
    cells |= {(row["method"], "Δm%"): _estimate(row) for row in summary["delta_m"]}
    methods = list(summary["methods"])
    tasks = list(dict.fromkeys(row["task"] for row in summary["table"]))
    tasks += ["Δm%"] if summary["delta_m"] else []
    n = max(row["n"] for row in summary["table"])
    title = "test score, mean ± 95 % interval over " + ("1 seed" if n == 1 else f"{n} seeds")
    if summary["delta_m"]:
        title += "; Δm%: mean relative loss against single-task training, lower is better"
    if len(methods) > len(tasks):
        corner, rows, columns = "method", methods, tasks
    else:
        corner, rows, columns = "task", tasks, methods
        cells = {(task, method): shown for (method, task), shown in cells.items()}
    first = min(max(map(len, (corner, *rows))), width // 3)
    beside = max(1, (width - first - 2) // _COLUMN)
    tables = []
    for start in range(0, len(columns), beside):
        shown = columns[start : start + beside]
        table = _table(title if start == 0 else "", corner, *map(_heading, shown))
        for row in rows:
            table.add_row(row, *(cells.get((row, column), _NONE) for column in shown))
        tables.append(table)
    return tables


def _heading(name: str) -> str:
    """A name broken after its hyphens and underscores, to fit a column."""
    lines = [""]
    for part in re.findall(r"[^-_]*[-_]?", name):
        if lines[-1] and len(lines[-1] + part) > _COLUMN - 1:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _estimate(row: Mapping[str, Any]) -> str:
    if row["low"] is None:
        return f"{row['mean']:.2f}"
    return f"{row['mean']:.2f}\n± {(row['high'] - row['low']) / 2:.2f}"


def _costs(summary: Mapping[str, Any]) -> Table:
    table = _table(
        "cost of a cell", "method", "learning rate", "parameters", "seconds", "(range)", "CPU s", "peak MiB"
    )
    for row in summary["costs"]:
        rate = summary["learning_rates"][row["method"]]
        table.add_row(
            row["method"],
            f"{rate:g}" if rate is not None else "default",
            f"{row['parameters']:,}",
            f"{row['seconds']:.1f}",
            f"{row['seconds_low']:.1f}–{row['seconds_high']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_bytes'] / _MIB:,.0f}",
        )
    return table


def _curves(summary: Mapping[str, Any]) -> Table:
    epochs = list(dict.fromkeys(row["epoch"] for row in summary["curves"]))
    table = _table("mean score after epochs (Δm% against single-task training of as many)", "method",
                   *(f"{epoch:g}" for epoch in epochs))  # fmt: skip
    rows = {(row["method"], row["epoch"]): row for row in summary["curves"]}
    for method in dict.fromkeys(row["method"] for row in summary["curves"]):
        shown = []
        for epoch in epochs:
            row = rows.get((method, epoch))
            if row is None:
                shown.append(_NONE)
                continue
            delta = row["delta_m"]
            shown.append(_estimate(row) + (f"\nΔ {delta['mean']:.1f} %" if delta else ""))
        table.add_row(method, *shown)
    return table


def print_cells_plan(study: Study, out: Path, *, workers: int) -> None:
    """The cells of a study, which are done, and about how long the others take."""
    from manylora.studies.cells import Cell, screening_cells
    from manylora.studies.estimate import estimate_seconds

    screening = screening_cells(study)
    final = [
        Cell(stage="final", method=name, seed=seed, learning_rate=None)
        for seed in study.seeds
        for name in study.names
    ]
    seconds, source = estimate_seconds(study, out)
    table = _table(f"{study.name}: {len(screening)} + {len(final)} cells", "method", "kind", "screening",
                   "final", "done", "s a cell")  # fmt: skip
    left = 0.0
    for method in study.methods:
        own = [cell for cell in (*screening, *final) if cell.method == method.name]
        done = sum(cell.result(out) is not None for cell in own)
        left += seconds[method.name] * (len(own) - done)
        table.add_row(
            method.name,
            method.kind,
            str(sum(cell.stage == "screen" for cell in own)),
            str(sum(cell.stage == "final" for cell in own)),
            str(done),
            f"{seconds[method.name]:.0f}",
        )
    printed = console()
    printed.print(table)
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
