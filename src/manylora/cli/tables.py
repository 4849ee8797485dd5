"""Plans and scores as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from manylora.evaluation import Loss, Scores, read_scores, scores_table

if TYPE_CHECKING:
    from manylora.training import Plan, RunFolder, TrainConfig

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

    table = Table(title="plan (rows per task; lengths in tokens)", title_justify="left")
    table.add_column("task", overflow="fold")
    for heading in ("train", "valid.", "test", "cut prompts", "longest row", "longest answer"):
        table.add_column(heading, justify="right")
    for task in plan.tasks:
        table.add_row(
            task.name,
            f"{task.train:,}",
            f"{task.validation:,}",
            f"{task.test:,}",
            f"{100 * task.truncated:.1f} %",
            f"{task.longest:,}",
            f"{task.longest_answer:,}",
        )
    out = console()
    out.print(table)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for label, text in plan_lines(plan, config):
        lines.add_row(label, text)
    out.print(lines)


def print_scores(
    scores: Scores, baselines: Mapping[str, Mapping[str, float]], notes: Sequence[str] = ()
) -> None:
    """The table of scores, with the baselines as further columns, and what is to be said of them."""
    console().print(scores_table(scores, title="test scores", extra=baselines))
    for note in notes:
        print(note)


def print_loss(before: Scores, after: Scores, loss: Loss, *, title: str) -> None:
    """Scores of an adapter and of its LoRAs per task, and the points lost with the paired standard error."""
    table = Table(title=title, title_justify="left")
    table.add_column("task", overflow="fold")
    for heading in ("adapter", "LoRAs", "points lost", "s.e.", "n"):
        table.add_column(heading, justify="right")
    new = after.by_task()
    for task in before.tasks:
        lost = loss.tasks[task.task]
        table.add_row(
            task.task,
            f"{task.score:.1f}",
            f"{new[task.task]:.1f}",
            f"{lost.mean:.1f}",
            f"{lost.standard_error:.1f}",
            str(lost.n),
        )
    table.add_section()
    table.add_row(
        "mean", f"{before.mean:.1f}", f"{after.mean:.1f}", f"{loss.mean:.1f}", f"{loss.standard_error:.1f}",
        str(before.n),
    )  # fmt: skip
    console().print(table)


def print_saved_scores(folder: RunFolder) -> None:
    """The table of a finished run, from its scores.json; nothing where the run had no test rows."""
    if not (folder.path / "scores.json").is_file():
        return
    print_scores(*read_scores(folder))
