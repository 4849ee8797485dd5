"""The two files in which scores are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from manylora.evaluation.score import Scores


def write_scores(folder: Path, scores: Scores, baselines: Mapping[str, Mapping[str, float]]) -> None:
    """Write predictions.jsonl and then scores.json."""
    from manylora.training import write_json, write_text

    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in scores.prediction_rows())
    write_text(folder / "predictions.jsonl", "".join(lines))
    write_json(folder / "scores.json", {**scores.to_dict(), "baselines": baselines})
