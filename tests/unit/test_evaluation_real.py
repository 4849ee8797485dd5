"""The real reasoning and FLAN files: their own outputs, scored as if a model had written them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manylora.data import load_examples
from manylora.evaluation import rules_for, score_all, score_task

ROOT = os.environ.get("MANYLORA_DATA")
pytestmark = pytest.mark.skipif(not ROOT, reason="MANYLORA_DATA is not set")

COMMONSENSE = {
    "boolq": ("boolean", 3270),
    "piqa": ("solution", 1838),
    "social_i_qa": ("answer", 1954),
    "ARC-Challenge": ("answer", 1172),
    "ARC-Easy": ("answer", 2376),
    "openbookqa": ("answer", 500),
    "winogrande": ("option", 1267),
}
# Outputs are rationales of another model, which often reach another result than the label.
MATH = {
    "AddSub": ("number", 395, 93.67),
    "MultiArith": ("number", 600, 93.33),
    "SVAMP": ("number", 1000, 80.30),
    "SingleEq": ("number", 508, 95.28),
    "gsm8k": ("number", 1319, 58.45),
    "AQuA": ("letter", 254, 42.91),
}


@pytest.mark.parametrize("task", COMMONSENSE)
def test_every_commonsense_output_gives_its_own_label(task: str) -> None:
    rule, n = COMMONSENSE[task]
    rows = load_examples(Path(ROOT or "") / "reasoning" / "commonsense" / f"{task}.test.json")[task]
    found = rules_for(task, [row.answer or "" for row in rows])
    assert found is not None
    assert {each.name for each in found} == {rule}
    score = score_task(task, rows, [row.output for row in rows])
    assert (score.n, score.metric, score.score) == (n, "accuracy", 100.0)
    wrong = score_task(task, rows, ["The Correct Answer"] * n)
    assert wrong.score == 0.0


@pytest.mark.parametrize("task", MATH)
def test_the_share_of_math_outputs_that_agree_with_their_label(task: str) -> None:
    rule, n, share = MATH[task]
    rows = load_examples(Path(ROOT or "") / "reasoning" / "math" / f"{task}.test.json")[task]
    found = rules_for(task, [row.answer or "" for row in rows])
    assert found is not None
    assert {each.name for each in found} == {rule}
    score = score_task(task, rows, [row.output for row in rows])
    assert score.n == n
    assert score.score == pytest.approx(share, abs=0.005)
    assert score_task(task, rows, [row.answer or "" for row in rows]).score == 100.0
    if task == "AQuA":  # words with capitals A to E mislead the published reading
        assert score.metrics["strict_accuracy"].mean == pytest.approx(48.43, abs=0.005)


def test_flan_references_score_full_marks_and_name_an_option_wherever_options_are_listed() -> None:
    data = load_examples(Path(ROOT or "") / "flan8" / "test")
    scores = score_all(data, {task: [row.output for row in rows] for task, rows in data.items()})
    assert scores.mean == pytest.approx(100.0)
    counted = {task.task: task.metrics["option_accuracy"].n for task in scores.tasks if len(task.metrics) > 2}
    assert set(data) - set(counted) == {"structure_to_text", "text_formatting"}
    assert set(counted.values()) == {200}
