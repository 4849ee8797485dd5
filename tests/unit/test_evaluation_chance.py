"""Tasks that were not learnt are said to be, under the table and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manylora.cli import main
from manylora.data import Example
from manylora.evaluation import chance_notes, constant_scores, score_all


def rows(*answers: str) -> list[Example]:
    return [Example(task="t", instruction=f"Say {n}", output=answer) for n, answer in enumerate(answers)]


def test_the_constant_answer_is_the_most_frequent_one() -> None:
    test = {"verdict": rows("yes", "no", "no", "no"), "other": rows("red", "blue")}
    assert constant_scores(test) == {"verdict": 75.0, "other": 50.0}
    train = {"verdict": rows("yes", "yes", "no")}
    assert constant_scores(test, train) == {"verdict": 25.0, "other": 50.0}


def test_a_task_is_learnt_where_it_stands_clearly_above_what_needs_no_model() -> None:
    answers = ["yes", "no"] * 50
    test = {"learnt": rows(*answers), "guessed": rows(*answers), "lucky": rows(*answers)}
    guesses = ["yes"] * 100
    scores = score_all(
        test,
        {
            "learnt": ["yes", "no"] * 40 + guesses[:20],  # 90 of 100, standard error 3
            "guessed": guesses,  # 50
            "lucky": ["yes", "no"] * 4
            + guesses[:92],  # 54, standard error 5: not above 50 as far as 100 rows tell
        },
    )
    (note,) = chance_notes(scores, {"majority": constant_scores(test)}, router="token")
    assert "guessed (50.0; majority 50.0), lucky (54.0; majority 50.0)" in note
    assert "learnt (" not in note
    assert "--router task" in note
    assert "--epochs" in note
    assert "\n" not in note
    (by_task,) = chance_notes(scores, {"majority": constant_scores(test)}, router="task")
    assert "--router task" not in by_task
    assert chance_notes(scores, {}, router="token") == []


def test_the_best_baseline_counts() -> None:
    test = {"t": rows(*["yes", "no"] * 50)}
    scores = score_all(test, {"t": ["yes", "no"] * 30 + ["yes"] * 40})
    assert chance_notes(scores, {"majority": {"t": 50.0}}) == []
    (note,) = chance_notes(scores, {"majority": {"t": 50.0}, "keyword": {"t": 76.0}})
    assert "t (80.0; keyword 76.0)" in note


def test_train_and_evaluate_say_it_alike_and_the_page_shows_it(
    tiny_base: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--model", tiny_base, "--data", small_data, "--epochs", "0.2", "--device", "cpu", "--out", run]
    assert main(["train", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    (note,) = saved["notes"]
    assert note.startswith("Not learnt")
    assert "swap (" in note
    assert note in printed
    assert printed.index("mean") < printed.index(note)
    assert note.split(". ")[0].split(" (")[0] in (run / "report.html").read_text(encoding="utf-8")
    assert main(["evaluate", "--adapter", str(run), "--device", "cpu", "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "scores.json").read_text(encoding="utf-8"))
    assert again["notes"][0].startswith("Not learnt")
    assert again["notes"][0] in capsys.readouterr().out
    assert main(["train", "--resume", str(run)]) == 0  # finished: shown again
    assert note in capsys.readouterr().out
    assert (
        main(["evaluate", "--model", str(tiny_base), "--data", str(small_data / "test"), "--device", "cpu"])
        == 0
    )
    assert "Not learnt" not in capsys.readouterr().out  # of a bare model nobody expects it
