"""What a person sees: error lines, where the report is, a duration."""

from __future__ import annotations

import sys
from pathlib import Path

from manylora.errors import explain

_LONGEST = 2_000
"""Characters of an error line; a name or value in it may be a stranger's and of any length."""


def complain(line: str) -> None:
    """Print one error line to standard error."""
    text = " ".join(line.split())
    shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    print(f"manylora: {shown}", file=sys.stderr, flush=True)


class LiveLine:
    """Lines on standard error, of which a terminal overwrites the one that is passing."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self._clear = "\r\x1b[K" if self.live else ""

    def overwrite(self, line: str) -> None:
        """Show a line until the next; a file or pipe does not get it."""
        if self.live:
            print(f"{self._clear}{line}", end="", file=sys.stderr, flush=True)

    def print(self, line: str) -> None:
        """Print a line that stays."""
        print(f"{self._clear}{line}", file=sys.stderr, flush=True)


def draw_report(folder: Path, *, show: bool = True) -> None:
    """Write report.html into a folder whose result stands already, and print (`show`) its path.

    A page that cannot be drawn costs one line of warning, never the result.
    """
    try:
        from manylora.report import write_report

        page = write_report(folder)
        if show:
            print(f"report: {page}")
    except Exception as error:
        reason = " ".join((explain(error) or f"{type(error).__name__}: {error}").split())
        if show:
            complain(
                f"no report was drawn ({reason}); the results are whole. Again: python -m manylora.report {folder}"
            )


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
