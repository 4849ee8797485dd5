"""What a reader of rows leaves out, so that a plan can say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_SHOWN = 8
"""Names that one line lists."""
_LONGEST = 60
"""Characters of a name that are shown: a table without a header has a row of text for names."""


@dataclass(kw_only=True)
class DataNotes:
    """Notes on the rows of one run or evaluation; the functions that read fill it."""

    left_out: dict[str, None] = field(default_factory=dict)
    """Files and folders that stand in a source and are not read, in order."""
    unused: set[str] = field(default_factory=set)
    """Columns, and fields of turns, that nothing reads."""
    others: list[str] = field(default_factory=list)
    """Further sentences."""

    def lines(self) -> list[str]:
        """One line for each kind of note; empty where there is nothing to say."""
        found = []
        if self.left_out:
            found.append(f"left out: {listed(list(self.left_out))}")
        if self.unused:
            found.append(f"columns not used: {listed(sorted(self.unused))}")
        return [*found, *self.others]


def listed(names: Sequence[str]) -> str:
    """Names with commas between, the first few where there are many."""
    shown = ", ".join(map(_plain, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _plain(name: str) -> str:
    """The name as it may be printed on one line, whatever is in it."""
    shown = name if name.isprintable() else repr(name)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
