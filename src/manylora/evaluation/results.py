"""The two files in which scores are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from manylora.evaluation.score import Scores
from manylora.files import Record, json_text, read_record, write_json, write_text

if TYPE_CHECKING:
    from manylora.training import RunFolder

_REMEDY = "put a copy of it back, or score the adapter again with manylora evaluate"


class _Estimate(Record):
    mean: float
    standard_error: float | None
    n: int


class _Task(Record):
    task: str
    n: int
    metric: str
    score: float
    standard_error: float | None
    metrics: dict[str, _Estimate]


class _Scores(Record):
    tasks: list[_Task] = Field(min_length=1)
    baselines: dict[str, dict[str, float]] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class _ClientScores(Record):
    clients: dict[str, _Scores]
    reference: dict[str, _Scores] = Field(default_factory=dict)


def write_scores(
    folder: Path,
    scores: Scores,
    baselines: Mapping[str, Mapping[str, float]],
    notes: Sequence[str] = (),
) -> None:
    """Write predictions.jsonl and then scores.json, with what is to be said of the scores."""
    lines = (json_text(row) + "\n" for row in scores.prediction_rows())
    write_text(folder / "predictions.jsonl", "".join(lines))
    write_json(folder / "scores.json", {**scores.to_dict(), "baselines": baselines, "notes": list(notes)})


def read_scores(run: RunFolder) -> tuple[Scores, dict[str, dict[str, float]], list[str]]:
    """Scores, baselines and notes of a run's scores.json.

    Raises:
        RunError: it is missing or damaged.
    """
    found = read_record(run.path / "scores.json", _Scores, remedy=_REMEDY)
    return Scores.from_dict(found.model_dump()), found.baselines, found.notes


def read_client_scores(run: Path) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Scores by client of a federated run's scores.json, and those of its reference.

    Raises:
        RunError: it is missing or damaged.
    """
    found = read_record(run / "scores.json", _ClientScores, remedy="put a copy of it back")
    clients, reference = (
        {name: Scores.from_dict(own.model_dump()) for name, own in part.items()}
        for part in (found.clients, found.reference)
    )
    return clients, reference
