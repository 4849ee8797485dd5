"""The two files in which scores are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from manylora.evaluation.score import Scores


def write_scores(
    folder: Path,
    scores: Scores,
    baselines: Mapping[str, Mapping[str, float]],
    notes: Sequence[str] = (),
) -> None:
    """Write predictions.jsonl and then scores.json, with what is to be said of the scores."""
    from manylora.training import json_text, write_json, write_text

    lines = (json_text(row) + "\n" for row in scores.prediction_rows())
    write_text(folder / "predictions.jsonl", "".join(lines))
    write_json(folder / "scores.json", {**scores.to_dict(), "baselines": baselines, "notes": list(notes)})
