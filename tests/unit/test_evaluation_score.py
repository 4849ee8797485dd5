"""From predictions to task scores, their mean, rows for files and the table."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from manylora.data import Example, Message
from manylora.errors import DataError, RunError
from manylora.evaluation import (
    Estimate,
    Gain,
    Scores,
    gains_line,
    gains_of,
    read_scores,
    score_all,
    score_task,
    scores_table,
    wordless,
)

CHOICE = "Is it?\n\nOPTIONS:\n- yes\n- no"


def rows(*outputs: str, instruction: str = "Say it.", answers: list[str] | None = None) -> list[Example]:
    return [
        Example(
            task="t",
            instruction=instruction,
            output=output,
            answer=answers[i] if answers else None,
            origin=f"t.jsonl:{i + 1}",
        )
        for i, output in enumerate(outputs)
    ]


def test_a_task_without_labels_is_scored_by_rouge1() -> None:
    score = score_task("t", rows("the cat sat on", "a dog"), [" the cat \n", "a dog"])
    half = 100 * 2 / 3
    assert (score.metric, score.n) == ("rouge1_all", 2)
    assert score.score == pytest.approx((half + 100) / 2)
    assert score.standard_error == pytest.approx((100 - half) / 2)  # sd / sqrt(2) of two values
    assert score.metrics["exact_match"] == Estimate(mean=50.0, standard_error=50.0, n=2)
    assert set(score.metrics) == {"rouge1_all", "exact_match"}
    assert score.examples[0].prediction == "the cat"


def test_option_accuracy_stands_where_the_prompt_lists_options() -> None:
    examples = [*rows("yes", "no", "no", instruction=CHOICE), *rows("free text")]
    score = score_task("t", examples, ["Yes", "no", "no way", "free text"])
    assert score.metrics["option_accuracy"].mean == pytest.approx(100 * 2 / 3)
    assert score.metrics["option_accuracy"].n == 3
    assert score.metrics["exact_match"].mean == 50.0
    assert "option_accuracy" not in score.examples[3].metrics


def test_options_are_found_in_the_input_and_in_a_chat() -> None:
    in_input = Example(task="t", instruction="Choose.", input=CHOICE, output="no")
    chat = Example(task="t", form="chat", messages=(Message(role="user", content=CHOICE),), output="no")
    for example in (in_input, chat):
        assert score_task("t", [example], ["no"]).metrics["option_accuracy"].mean == 100.0


def test_labels_are_scored_by_rule() -> None:
    examples = rows(*["the correct answer is true"] * 4, answers=["true", "true", "false", "false"])
    predictions = ["true", "it is false", "false", "dunno"]
    score = score_task("boolq", examples, predictions)
    assert (score.metric, score.score) == ("accuracy", 50.0)
    assert [row.metrics["accuracy"] for row in score.examples] == [100.0, 0.0, 100.0, 0.0]
    assert score.standard_error == pytest.approx(100 * math.sqrt(0.25 / 3))
    assert "rouge1_all" in score.metrics


def test_ending_labels_are_scored_though_their_file_is_missing() -> None:
    examples = rows(
        *[f"the correct answer is ending{i}" for i in (1, 2, 3, 4)], answers=["ending1", "ending2"] * 2
    )
    score = score_task("hellaswag", examples, [example.output for example in examples])
    assert score.score == 50.0


def test_the_strict_reading_stands_beside_the_published_one() -> None:
    examples = rows("r", "r", answers=["A", "B"])
    score = score_task("AQuA", examples, ["According to this", "According to this the answer is (B)"])
    assert score.score == 50.0
    assert score.metrics["strict_accuracy"].mean == 50.0
    assert [row.metrics["strict_accuracy"] for row in score.examples] == [0.0, 100.0]


def test_labels_of_no_known_form_are_scored_by_their_output() -> None:
    assert score_task("t", rows("yes it is", answers=["yes"]), ["yes it is"]).metric == "rouge1_all"


def test_a_row_with_a_label_alone_is_compared_with_it() -> None:
    score = score_task("t", rows("", answers=["42"]), ["42"])
    assert (score.score, score.metrics["exact_match"].mean, score.examples[0].reference) == (
        100.0,
        100.0,
        "42",
    )


@pytest.mark.parametrize(
    ("examples", "predictions", "message"),
    [
        ([], [], "no rows"),
        (rows("a", "b"), ["a"], "2 rows but 1 predictions"),
        (rows(" "), ["a"], r"t\.jsonl:1 has no reference"),
        (
            [*rows("a", answers=["1"]), *rows("b")],
            ["1", "2"],
            r"1 of 2 rows have no answer \(such as t\.jsonl:1\)",
        ),
    ],
)
def test_what_cannot_be_scored_is_an_error(
    examples: list[Example], predictions: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        score_task("t", examples, predictions)


def two_tasks() -> Scores:
    data = {
        "verdict": rows("yes", "no", "no", instruction=CHOICE),
        "sum": rows("5", "6", "7", "8", answers=["5", "6", "7", "8"]),
    }
    return score_all(data, {"sum": ["5", "6", "7", "9"], "verdict": ["yes", "yes", "no"]})


def test_the_mean_is_over_tasks_with_the_error_of_independent_tasks() -> None:
    scores = two_tasks()
    assert scores.by_task() == {"verdict": pytest.approx(200 / 3), "sum": 75.0}
    assert scores.mean == pytest.approx((200 / 3 + 75) / 2)  # not weighted by rows
    assert scores.standard_error == pytest.approx(
        math.hypot(*(task.standard_error for task in scores.tasks)) / 2
    )
    assert scores.n == 7


def test_score_all_needs_predictions_for_every_task() -> None:
    with pytest.raises(DataError, match=r"\['b'\] have no predictions"):
        score_all({"a": rows("x"), "b": rows("x")}, {"a": ["x"]})
    with pytest.raises(DataError, match="no task"):
        score_all({}, {})


def test_scores_survive_json() -> None:
    scores = two_tasks()
    saved = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert saved["tasks"][1]["score"] == 75.0
    back = Scores.model_validate(saved)
    assert back.to_dict() == scores.to_dict()
    assert back.mean == scores.mean


def test_one_example_has_no_standard_error_in_json_and_table() -> None:
    scores = score_all({"t": rows("a")}, {"t": ["a"]})
    assert math.isnan(scores.standard_error)
    saved = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert saved["tasks"][0]["standard_error"] is None
    assert math.isnan(Scores.model_validate(saved).tasks[0].standard_error)
    assert cells(scores)[-1] == ["mean", "ROUGE-1", "100.00", "–", "1", "100.00"]


def test_prediction_rows_hold_what_was_asked_said_and_expected() -> None:
    lines = [json.loads(json.dumps(row)) for row in two_tasks().prediction_rows()]
    assert len(lines) == 7
    assert lines[3] == {
        "task": "sum",
        "index": 0,
        "origin": "t.jsonl:1",
        "prompt": "### Instruction:\nSay it.\n\n### Response:\n",
        "prediction": "5",
        "reference": "5",
        "answer": "5",
        "rouge1_all": 100.0,
        "exact_match": 100.0,
        "accuracy": 100.0,
    }


def cells(scores: Scores, **options: object) -> list[list[str]]:
    table = scores_table(scores, **options)  # type: ignore[arg-type]
    return [table.words(row) for row in (*table.rows, *table.footer)]


def test_the_table_has_a_line_per_task_and_the_mean_last() -> None:
    extra = {"majority": {"verdict": 33.3, "sum": 25.0}, "keyword": {"verdict": 40.0}}
    assert cells(two_tasks(), baselines=extra) == [
        ["verdict", "ROUGE-1", "66.67", "33.33", "3", "66.67", "66.67", "33.30", "40.00"],
        ["sum", "accuracy", "75.00", "25.00", "4", "75.00", "–", "25.00", "–"],
        ["mean", "mixed", "70.83", "20.83", "7", "70.83", "–", "29.15", "–"],
    ]


def test_the_table_of_eight_long_names_fits_eighty_characters() -> None:
    data = {f"linguistic_acceptance_{i}": rows("yes", "no", instruction=CHOICE) for i in range(8)}
    scores = score_all(data, {name: ["yes", "no"] for name in data})
    extra = {"majority": dict.fromkeys(data, 50.0)}
    out = io.StringIO()
    Console(file=out, width=80).print(scores_table(scores, title="test scores", baselines=extra))
    text = out.getvalue()
    assert all(f" {name} " in text for name in data)
    assert "majority" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_two_readings_of_rouge1_have_names_of_their_own() -> None:
    examples, answers = rows("лес", "a dog"), ["лес", "a dog"]
    every, published = (score_task("t", examples, answers, rouge=rouge) for rouge in ("all", "published"))
    assert (every.metric, every.score) == ("rouge1_all", 100.0)
    assert (published.metric, published.score) == ("rouge1", 50.0)
    assert "rouge1" not in every.metrics
    assert "rouge1_all" not in published.metrics
    assert cells(Scores(tasks=(published,)))[-1][1] == "ROUGE-1 a–z"


def test_references_without_a_word_are_pointed_out() -> None:
    data = {"sign": rows("+", "-", "plus"), "word": rows("да"), "label": rows("+", answers=["A"])}
    assert wordless(data) == [
        "2 of 3 test answers of task sign have no word that ROUGE-1 counts; look at exact match"
    ]
    assert len(wordless(data, rouge="published")) == 2


def test_an_answer_in_turn_fields_needs_the_tokenizer_that_words_it() -> None:
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    example = Example(
        task="t", form="chat", messages=(Message(role="user", content="?"),), answer_fields=call
    )
    with pytest.raises(
        DataError, match=r"Row 0 of task 't' has an answer with tool_calls.*Give the tokenizer"
    ):
        score_task("t", [example], ["f"])


@pytest.mark.parametrize("name", ["standard_error", "metrics"])
def test_scores_that_lost_a_field_are_damaged(name: str, tmp_path: Path) -> None:
    row = score_task("t", rows("a b", "c"), ["a b", "d"]).model_dump()
    (tmp_path / "scores.json").write_text(json.dumps({"tasks": [row]}), encoding="utf-8")
    assert read_scores(tmp_path).tasks[0].score == 50.0
    del row[name]
    (tmp_path / "scores.json").write_text(json.dumps({"tasks": [row]}), encoding="utf-8")
    with pytest.raises(RunError, match=rf"scores\.json is damaged \(tasks\.0: .*{name} is missing\)"):
        read_scores(tmp_path)


def test_what_training_changed_is_counted_row_by_row() -> None:
    data = {"t": rows("yes", "no", "yes", "no"), "u": rows("a b", "c d")}
    before = score_all(data, {"t": ["yes", "yes", "no", "?"], "u": ["a x", "c d"]})
    after = score_all(data, {"t": ["no", "no", "yes", "no"], "u": ["a b", "c d"]})
    gains = gains_of(before, after)
    assert gains["t"] == Gain(before=25.0, became_right=75.0, became_wrong=25.0, right=75.0)
    assert gains["u"] == Gain(before=75.0, became_right=50.0, became_wrong=0.0, right=100.0)
    assert gains_line(gains, after) == (
        "Of 6 test rows the model answered 2 rightly before this training and 5 after it: 4 became right, "
        "1 became wrong."
    )
    assert gains_line({}, after) == ""
    table = scores_table(after, gains=gains)
    head = [column.name for column in table.columns]
    assert [table.rows[0][head.index(name)] for name in ("before", "became right", "score")] == [
        25.0,
        75.0,
        75.0,
    ]
    assert table.footer[0][head.index("before")] == 50.0
