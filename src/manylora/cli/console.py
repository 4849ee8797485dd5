"""What a person sees: error lines, progress, tables."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from manylora.errors import ManyLoraError

_LONGEST = 2_000
"""Characters of an error line; a name or value in it may be a stranger's and of any length."""


def complain(line: str) -> None:
    """Print one error line to standard error."""
    text = " ".join(line.split())
    shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    print(f"manylora: {shown}", file=sys.stderr, flush=True)


def explain(error: BaseException) -> str | None:
    """The one line that a user needs, or `None` where the error is a bug of ours."""
    if isinstance(error, ManyLoraError):
        return str(error)
    if is_disk_full(error):
        return (
            f"the disk is full ({error}). What was written before is whole: free some space, then continue "
            "with --resume."
        )
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename or error}; choose a folder you may write to with --out."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU is out of memory; try a smaller --micro-batch-size, --gradient-checkpointing or "
            "a shorter --max-length."
        )
    return None


_DISK_FULL = (
    "No space left on device",
    "os error 28",
    "iostream error",
    "enforce fail at inline_container.cc",
)
"""How the system, safetensors (Rust) and torch.save (C++) word a write that failed."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error means a full disk or quota, also in the words of safetensors and torch."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(phrase in str(error) for phrase in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def draw_report(folder: Path) -> None:
    """Write report.html into a folder whose result stands already, and print its path.

    A page that cannot be drawn costs one line of warning, never the result.
    """
    try:
        from manylora.report import write_report

        print(f"report: {write_report(folder)}")
    except Exception as error:
        reason = " ".join((explain(error) or f"{type(error).__name__}: {error}").split())
        complain(
            f"no report was drawn ({reason}); the results are whole. Again: python -m manylora.report {folder}"
        )


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingProgress:
    """Live lines on standard error: step, tokens per second, losses.

    On a terminal the line of the current step overwrites itself; elsewhere, as in a log file, a line is printed
    every tenth of the run.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._start: tuple[float, int] | None = None
        self._last_printed = -1

    def __call__(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
        """Show a trainer's log; the first one starts the clock."""
        if self._start is None:
            self._start = (time.monotonic(), step)
        if "eval_mean_task_loss" in logs:
            tasks = _per_task(logs, "eval_loss/")
            self._print(f"step {step}/{steps}  validation loss {logs['eval_mean_task_loss']:.3f}  {tasks}")
        elif "loss" in logs:
            began, first = self._start
            left = (time.monotonic() - began) / max(1, step - first) * (steps - step)
            speed = logs.get("train_tokens_per_second")
            parts = [f"step {step}/{steps}", f"loss {logs['loss']:.3f}"]
            parts += [f"{speed:,.0f} tokens/s"] if speed else []
            parts += [f"{duration(left)} left"] if step > first else []
            line = "  ".join(parts)
            if self._live:
                print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            tenth = 10 * step // steps
            if tenth > self._last_printed:
                self._last_printed = tenth
                self._print(f"{line}  {_per_task(logs, 'loss/')}")

    def _print(self, line: str) -> None:
        clear = "\r\x1b[K" if self._live else ""
        print(f"{clear}{line}", file=sys.stderr, flush=True)


class CountProgress:
    """One overwritten line on a terminal, quarter steps elsewhere: "answers 640/1600"."""

    def __init__(self, what: str, total: int):
        self._what, self._total = what, total
        self._live = sys.stderr.isatty()
        self._quarter = 0

    def __call__(self, done: int) -> None:
        """Show that `done` of the total are done."""
        quarter = 4 * done // max(1, self._total)
        if self._live:
            end = "\n" if done >= self._total else ""
            print(f"\r\x1b[K{self._what} {done}/{self._total}", end=end, file=sys.stderr, flush=True)
        elif quarter > self._quarter:
            print(f"{self._what} {done}/{self._total}", file=sys.stderr, flush=True)
        self._quarter = quarter


def _per_task(logs: Mapping[str, float], prefix: str) -> str:
    losses = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
    return "(" + ", ".join(f"{task} {loss:.2f}" for task, loss in losses.items()) + ")" if losses else ""
