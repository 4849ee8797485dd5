"""What a cell found, how it is kept small enough to commit, and the file of all cells.

OUT/cells.jsonl     one line for the study, then one for each cell, per-example scores packed
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import ConfigDict, Field

from manylora.errors import ConfigError, RunError
from manylora.files import Record, Several, check_record, json_text, parse_json, reason, write_text
from manylora.studies.config import Study

Stage: TypeAlias = Literal["screen", "final"]
_REMEDY = "give a study's cells.jsonl"


class CurvePoint(Record):
    """Scores after some epochs of one training."""

    epoch: float
    scores: dict[str, float]


class _Which(Record):
    """Which cell of a study it is."""

    stage: Stage = "final"
    method: str
    seed: int | None = None
    learning_rate: float | None = None
    """None: the kind's own."""


class _Found(Record):
    """What a cell found, in memory and on disk."""

    scores: dict[str, float] = Field(min_length=1)
    """Task to main score, 0 to 100."""
    parameters: int | None = None
    """Trained ones, of all adapters together."""
    seconds: float | None = None
    """Of training alone."""
    cpu_seconds: float = 0.0
    """Processor time of training, which other programs on the machine disturb less."""
    evaluation_seconds: float = 0.0
    metrics: dict[str, str] = Field(default_factory=dict)
    """Task to what its score measures (`TaskScore.metric`)."""
    others: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Further metrics: name to task to mean."""
    resumed: bool = False
    """Whether the cell went on after a kill, so that `seconds` are not all of it."""


class Measured(_Found):
    """What a kind of cells returns, also as the measured.json of a run folder of it."""

    examples: dict[str, list[float]]
    """Task to every test row's score, in the order of the rows."""
    parameters: int
    seconds: float
    extra: dict[str, Any] = Field(default_factory=dict)
    """Anything else worth keeping, such as the scores after each epoch under "curve"."""


class CellResult(_Found, _Which):
    """A cell's result.json, and a line of cells.jsonl. What else a kind of cells keeps stays with it."""

    model_config = ConfigDict(extra="allow")

    peak_bytes: int | None = None
    threads: int = 1
    workers: int = 1
    """Cells that ran side by side."""
    bytes_up: float | None = None
    """Of a federated cell: mean of a message to the server,"""
    bytes_down: float | None = None
    """and of one from it."""
    curve: Several[CurvePoint] = ()
    examples: dict[str, str] = Field(default_factory=dict)
    """Task to the packed scores of its rows (`unpack_scores`)."""

    @property
    def mean(self) -> float:
        """Over tasks."""
        return math.fsum(self.scores.values()) / len(self.scores)

    def to_dict(self, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        """As it stands in a file, so that what an earlier version wrote comes out as it was."""
        return self.model_dump(exclude_unset=True, exclude=set(without))


class _Line(CellResult):
    """A cell of which a table can be made."""

    stage: Stage
    seed: int
    parameters: int
    seconds: float
    peak_bytes: int


def write_cells(path: Path, study: Study, results: Sequence[CellResult], facts: Mapping[str, Any]) -> None:
    """One line for the study, then one for each cell."""
    head = {"kind": "cells", "study": study.source, **facts}
    write_text(path, "".join(json_text(row) + "\n" for row in (head, *(r.to_dict() for r in results))))


def read_cells(path: Path) -> tuple[dict[str, Any], list[CellResult]]:
    """The first line and the cells of a file that `write_cells` wrote.

    Raises:
        ConfigError: it cannot be read or is no such file.
    """
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        how = "cannot be read" if isinstance(error, OSError) else "is damaged"
        raise ConfigError(f"{path} {how} ({reason(error)}); {_REMEDY}.") from error
    head = rows[0] if rows and isinstance(rows[0], dict) else {}
    if head.get("kind") != "cells" or not isinstance(head.get("study"), dict):
        raise ConfigError(f"{path} is no cells file; give a cells.jsonl that manylora compare wrote.")
    cells: list[CellResult] = []
    for number, row in enumerate(rows[1:], start=1):
        try:
            cells.append(check_record(row, _Line, source=f"cell {number} of {path}", remedy=_REMEDY))
        except RunError as error:
            raise ConfigError(str(error)) from error
    return head, cells


def pack_scores(scores: Sequence[float]) -> str:
    """Per-example scores as short text: a bit each where all are 0 or 100, else hundredths in two bytes, and where
    they are no scores of 0 to 100 at all, four bytes.

    >>> unpack_scores(pack_scores([0.0, 100.0, 100.0]))
    [0.0, 100.0, 100.0]
    """
    if all(score in (0.0, 100.0) for score in scores):
        bits = "".join("1" if score else "0" for score in scores)
        whole = bits.ljust(-(-len(bits) // 8) * 8, "0")
        data = bytes(int(whole[start : start + 8], 2) for start in range(0, len(whole), 8))
        return f"b{len(bits)}:" + base64.b64encode(data).decode()
    if not all(0 <= score <= 655 for score in scores):  # no score of 0 to 100, such as a perplexity
        return f"f{len(scores)}:" + base64.b64encode(struct.pack(f">{len(scores)}f", *scores)).decode()
    data = b"".join(round(100 * score).to_bytes(2, "big") for score in scores)
    return f"h{len(scores)}:" + base64.b64encode(data).decode()


def unpack_scores(text: str) -> list[float]:
    """What `pack_scores` wrote, to the nearest hundredth.

    Raises:
        RunError: it is no such text.
    """
    head, _, body = text.partition(":")
    try:
        data, count = base64.b64decode(body, validate=True), int(head[1:])
        if head[:1] == "b" and len(data) == -(-count // 8):
            bits = "".join(f"{byte:08b}" for byte in data)
            return [100.0 * (bit == "1") for bit in bits[:count]]
        if head[:1] == "f" and len(data) == 4 * count:
            return list(struct.unpack(f">{count}f", data))
        if head[:1] == "h" and len(data) == 2 * count:
            return [int.from_bytes(data[i : i + 2], "big") / 100 for i in range(0, len(data), 2)]
    except (ValueError, IndexError):
        pass
    raise RunError(f"{text[:20]!r} are no packed scores; the cells file is damaged.")
