"""What a person sees of a job while it works."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.console import LiveLine, duration
from manylora.jobs.progress import Progress

if TYPE_CHECKING:
    from manylora.evaluation import Baselines, Gains, Loss, Scores
    from manylora.federated import ClientData, FederateConfig, RoundsDisplay
    from manylora.training import Plan, TrainConfig


class ConsoleProgress(Progress):
    """Results on standard output, what is beside them and live lines on standard error."""

    def __init__(self) -> None:
        self._training = TrainingProgress()
        self._count = CountProgress("", 0)

    def show_line(self, line: str) -> None:
        """Print it."""
        print(line, flush=True)

    def show_warning(self, line: str) -> None:
        """Print it to standard error."""
        print(line, file=sys.stderr, flush=True)

    def show_plan(self, plan: Plan, config: TrainConfig) -> None:
        """Tables of rows, and of what will be trained."""
        from manylora.cli.tables import print_plan

        print_plan(plan, config)

    def show_folder(self, path: Path) -> None:
        """Its path; the clock of a training starts."""
        print(f"run folder: {path}", flush=True)
        self._training = TrainingProgress()

    def show_step(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
        """One live line."""
        self._training(step, steps, logs)

    def show_count(self, what: str, done: int, total: int) -> None:
        """One live line."""
        if (what, total) != (self._count.what, self._count.total) or done <= self._count.done:
            self._count = CountProgress(what, total)
        self._count(done)

    def show_scores(
        self, scores: Scores, baselines: Baselines, notes: Sequence[str], gains: Gains | None = None
    ) -> None:
        """The table, and the notes below it."""
        from manylora.cli.tables import console
        from manylora.evaluation import scores_table

        console().print(scores_table(scores, baselines=baselines, gains=gains))
        for note in notes:
            print(note)

    def show_loss(self, before: Scores, after: Scores, loss: Loss, *, title: str) -> None:
        """A table with a line per task."""
        from manylora.cli.tables import console
        from manylora.evaluation import loss_table

        console().print(loss_table(before, after, loss, title=title))

    def show_clients(self, config: FederateConfig, data: Mapping[str, ClientData]) -> None:
        """A table with a line per client."""
        from manylora.cli.federating import print_clients

        print_clients(config, data)

    def follow_rounds(self) -> RoundsDisplay:
        """A line per round."""
        from manylora.cli.federating import RoundsProgress

        return RoundsProgress()


class TrainingProgress:
    """Live lines on standard error: step, tokens per second, losses.

    On a terminal the line of the current step overwrites itself; elsewhere, as in a log file, a line is printed
    every tenth of the run.
    """

    def __init__(self) -> None:
        self._line = LiveLine()
        self._start: tuple[float, int] | None = None
        self._last_printed = -1

    def __call__(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
        """Show a trainer's log; the first one starts the clock."""
        if self._start is None:
            self._start = (time.monotonic(), step)
        if "eval_mean_task_loss" in logs:
            tasks = _per_task(logs, "eval_loss/")
            self._line.print(
                f"step {step}/{steps}  validation loss {logs['eval_mean_task_loss']:.3f}  {tasks}"
            )
        elif "loss" in logs:
            began, first = self._start
            left = (time.monotonic() - began) / max(1, step - first) * (steps - step)
            speed = logs.get("train_tokens_per_second")
            parts = [f"step {step}/{steps}", f"loss {logs['loss']:.3f}"]
            parts += [f"{speed:,.0f} tokens/s"] if speed else []
            parts += [f"{duration(left)} left"] if step > first else []
            line = "  ".join(parts)
            self._line.overwrite(line)
            tenth = 10 * step // steps
            if tenth > self._last_printed:
                self._last_printed = tenth
                self._line.print(f"{line}  {_per_task(logs, 'loss/')}")


class CountProgress:
    """One overwritten line on a terminal, quarter steps elsewhere: "answers 640/1600"."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self._line = LiveLine()
        self._quarter = 0

    def __call__(self, done: int) -> None:
        """Show that `done` of the total are done."""
        self.done = done
        quarter, line = 4 * done // max(1, self.total), f"{self.what} {done}/{self.total}"
        if done >= self.total if self._line.live else quarter > self._quarter:
            self._line.print(line)
        else:
            self._line.overwrite(line)
        self._quarter = quarter


def _per_task(logs: Mapping[str, float], prefix: str) -> str:
    losses = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
    return "(" + ", ".join(f"{task} {loss:.2f}" for task, loss in losses.items()) + ")" if losses else ""
