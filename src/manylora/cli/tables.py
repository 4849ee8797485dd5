"""Plans and scores on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as Grid

from manylora.table import Column, Table

if TYPE_CHECKING:
    from manylora.training import Plan, TrainConfig

_LEAST_WIDTH = 120
"""Columns of a table that goes to a file or pipe, which has no width of its own."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller what a reader who left means; rich would exit with 1."""
        raise BrokenPipeError


def console() -> Console:
    """Standard output, wide enough for our tables where it is no terminal."""
    found = _Console(highlight=False, markup=False)  # a task may be called "[red]"
    return found if found.is_terminal else _Console(highlight=False, markup=False, width=_LEAST_WIDTH)


def print_plan(plan: Plan, config: TrainConfig) -> None:
    """Rows per task, then what will be trained and what it needs."""
    from manylora.training import plan_lines

    out = console()
    out.print(plan_table(plan))
    lines = Grid.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for label, text in plan_lines(plan, config):
        lines.add_row(label, text)
    out.print(lines)


def plan_table(plan: Plan) -> Table:
    """Rows and lengths of each task."""
    return Table.of(
        "plan",
        "plan (rows per task; lengths in tokens)",
        [
            {
                "task": task.name,
                "train": task.train,
                "valid.": task.validation,
                "test": task.test,
                "cut prompts": 100 * task.truncated,
                "longest row": task.longest,
                "longest answer": task.longest_answer,
            }
            for task in plan.tasks
        ],
        columns=[Column(name="cut prompts", digits=1, unit=" %")],
    )
