"""A metric is added in one place, and is then in every file and every table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.data import Example
from manylora.evaluation import METRICS, Metric, ScoredExample, score_all, scores_table, write_scores
from manylora.report.writing import build_page
from manylora.studies.config import parse_study
from manylora.studies.costs import CELL_METRICS, CellMetric, measure_cell
from manylora.studies.results import CellResult
from manylora.studies.summary import summarise
from manylora.studies.tables import costs_table, others_table
from manylora.table import Table
from report_folders import train_folder


@pytest.fixture
def _length() -> Iterator[None]:
    """A metric per example: how long the answer is beside the reference."""
    METRICS["length"] = Metric(
        label="length", measure=lambda row: min(100.0, 100.0 * len(row.prediction) / len(row.reference))
    )
    yield
    del METRICS["length"]


@pytest.fixture
def _energy() -> Iterator[None]:
    """A metric per cell."""
    CELL_METRICS["joules"] = CellMetric(
        heading="kJ",
        measure=lambda: 5000.0,
        read=lambda cell: (cell.model_extra or {}).get("joules"),
        unit=1000.0,
    )
    yield
    del CELL_METRICS["joules"]


def cell(table: Table, heading: str) -> object:
    """Of the first row."""
    return table.rows[0][[column.name for column in table.columns].index(heading)]


@pytest.mark.usefixtures("_length")
def test_a_metric_per_example_is_in_the_table_the_files_the_page_and_a_study(tmp_path: Path) -> None:
    rows = [Example(task="t", instruction="Say it.", input="", output=word) for word in ("four", "five")]
    scores = score_all({"t": rows}, {"t": ["four", "fi"]})
    assert cell(scores_table(scores), "length") == 75.0

    train_folder(tmp_path, ("t",))
    write_scores(tmp_path, scores, {})
    assert json.loads((tmp_path / "scores.json").read_text())["tasks"][0]["metrics"]["length"]["mean"] == 75.0
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["length"] for line in lines] == [100.0, 50.0]
    assert ScoredExample.model_validate(lines[1]) == scores["t"].examples[1]
    (on_page,) = (
        one for part in build_page(tmp_path).sections for one in part.tables if one.name == "scores"
    )
    assert cell(on_page, "length") == 75.0

    found = CellResult(
        method="lora", seed=0, scores=scores.by_task(), others=scores.other_metrics(), parameters=1, seconds=1.0,
        peak_bytes=1,
    )  # fmt: skip
    summary = summarise(parse_study({"name": "s", "methods": ["lora"], "seeds": 1}), [found], {})
    assert cell(others_table(summary), "length") == 75.0
    assert summary.to_dict()["others"][-1]["metric"] == "length"


@pytest.mark.usefixtures("_energy")
def test_a_metric_per_cell_is_in_the_result_and_in_the_table_of_costs() -> None:
    measured = measure_cell()
    assert measured["joules"] == 5000.0
    found = CellResult.model_validate(
        {"method": "lora", "seed": 0, "scores": {"t": 1.0}, "parameters": 1, "seconds": 1.0, **measured}
    )
    summary = summarise(parse_study({"name": "s", "methods": ["lora"], "seeds": 1}), [found], {})
    assert cell(costs_table(summary), "kJ") == 5.0
    assert summary.to_dict()["costs"][0]["joules"] == 5000.0
