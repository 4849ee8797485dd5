"""Tables, Δm% and verdicts from cells written by hand, whose answers are known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.cli import main
from manylora.errors import ConfigError, RunError
from manylora.studies.cells import choose_rates
from manylora.studies.config import Study, parse_study
from manylora.studies.results import CellResult, pack_scores, read_cells, unpack_scores, write_cells
from manylora.studies.summary import summarise as summarise_cells

TASKS = ("a", "b")


def cell(method: str, seed: int, scores: dict[str, float], **more: Any) -> dict[str, Any]:
    """A final cell; each task has four rows, of which two lie 5 above the score and two 5 below."""
    return {
        "stage": "final",
        "method": method,
        "seed": seed,
        "learning_rate": 0.01,
        "scores": scores,
        "parameters": 10,
        "seconds": 2.0 + seed,
        "evaluation_seconds": 1.0,
        "peak_bytes": 100 + seed,
        "threads": 1,
        "workers": 1,
        "resumed": False,
        "examples": {task: pack_scores([s - 5, s + 5, s - 5, s + 5]) for task, s in scores.items()},
        **more,
    }


def results(rows: list[dict[str, Any]]) -> list[CellResult]:
    return [CellResult.model_validate(row) for row in rows]


def summarise(one: Study, rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """What study.json would hold."""
    found: dict[str, Any] = json.loads(json.dumps(summarise_cells(one, results(rows), facts).to_dict()))
    return found


def study(**more: Any) -> Any:
    return parse_study({"name": "hand", "methods": ["alora", "lora", "lora-per-task"], "seeds": 5, **more})


def by_hand() -> list[dict[str, Any]]:
    cells = []
    for seed, wobble in enumerate((-0.2, -0.1, 0.0, 0.1, 0.2)):
        cells.append(cell("lora-per-task", seed, {"a": 50.0, "b": 80.0}))
        cells.append(cell("alora", seed, {"a": 60.0 + wobble, "b": 60.0}))
        cells.append(cell("lora", seed, {"a": 55.0, "b": 60.0 + 2 * wobble}))
    return cells


def test_the_table_has_every_task_and_the_mean() -> None:
    summary = summarise(study(), by_hand(), {})
    assert summary["kind"] == "compare"
    assert summary["tasks"] == ["a", "b"]
    rows = {(row["method"], row["task"]): row for row in summary["table"]}
    assert set(rows) == {(m, t) for m in ("alora", "lora", "lora-per-task") for t in (*TASKS, "mean")}
    assert rows["alora", "a"]["mean"] == pytest.approx(60.0)
    assert rows["alora", "mean"]["mean"] == pytest.approx(60.0)
    assert rows["lora", "mean"]["mean"] == pytest.approx(57.5)
    # s of (-0.2 … 0.2) is sqrt(0.1 / 4); t(0.975, 4) is 2.7764
    half = 2.7764451 * (0.1 / 4 / 5) ** 0.5
    assert rows["alora", "a"]["high"] == pytest.approx(60.0 + half, abs=1e-6)
    assert rows["alora", "a"]["n"] == 5


def test_delta_m_by_hand() -> None:
    summary = summarise(study(), by_hand(), {})
    deltas = {row["method"]: row for row in summary["delta_m"]}
    # alora: +20 % on a, -25 % on b; lora: +10 % and -25 %
    assert deltas["alora"]["mean"] == pytest.approx(-100 * (0.2 - 0.25) / 2)
    assert deltas["lora"]["mean"] == pytest.approx(-100 * (0.1 - 0.25) / 2)
    assert deltas["lora-per-task"]["mean"] == 0.0


def test_claims_by_hand() -> None:
    summary = summarise(
        study(
            contrasts=[
                {"first": "alora", "second": "lora", "text": "Sharing helps"},
                {"first": "alora", "second": "lora-per-task", "claim": "no worse"},
                {"first": "alora", "second": "lora", "task": "b"},
            ]
        ),
        by_hand(),
        {},
    )
    helps, no_worse, on_b = summary["claims"]
    assert helps["verdict"] == "supported"
    assert helps["difference"] == pytest.approx(2.5)
    assert helps["text"].startswith(
        "Sharing helps: supported. The difference is +2.50 points (95 % over 5 seeds"
    )
    assert helps["n"] == 5
    assert helps["bootstrap"][0] > 0
    # alora and lora-per-task: 60 against 65, exact but for the wobble
    assert no_worse["difference"] == pytest.approx(-5.0)
    assert no_worse["verdict"] == "not supported"
    assert no_worse["p_holm"] is None
    assert on_b["difference"] == pytest.approx(0.0)
    assert on_b["verdict"] == "not supported"  # a gain of a point is excluded


def test_a_difference_without_any_spread_is_undecided() -> None:
    cells = [
        cell(name, seed, {"a": score})
        for name, score in (("alora", 60.0), ("lora", 50.0))
        for seed in range(5)
    ]
    summary = summarise(parse_study({"name": "flat", "methods": ["alora", "lora"], "seeds": 5}), cells, {})
    (claim,) = summary["claims"]
    assert claim["verdict"] == "undecided"
    assert "without any spread" in claim["text"]


def test_costs_leave_out_the_time_of_a_cell_that_was_killed() -> None:
    cells = by_hand()
    next(c for c in cells if c["method"] == "alora" and c["seed"] == 4)["resumed"] = True
    costs = {row["method"]: row for row in summarise(study(), cells, {})["costs"]}
    assert costs["alora"]["seconds"] == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert costs["lora"]["seconds"] == pytest.approx((2 + 3 + 4 + 5 + 6) / 5)
    assert costs["alora"]["peak_bytes"] == 104


def test_what_is_missing_is_said_and_the_rest_compared() -> None:
    cells = [c for c in by_hand() if (c["method"], c["seed"]) != ("lora", 3)]
    summary = summarise(study(), cells, {})
    assert summary["missing"] == ["lora seed 3"]
    claim = next(c for c in summary["claims"] if c["second"] == "lora")
    assert claim["n"] == 4
    assert not any("screening" in note for note in summary["notes"])
    few = summarise(study(seeds=2), cells, {})
    assert any("a screening" in note for note in few["notes"])


def test_without_cells_there_is_nothing_to_say() -> None:
    with pytest.raises(RunError, match="no cell"):
        summarise(study(), [], {})
    odd = [cell("alora", 0, {"a": 9.0}), cell("lora", 0, {"b": 9.0})]
    with pytest.raises(RunError, match="has the tasks"):
        summarise(study(), odd, {})


def test_curves_compare_like_with_like() -> None:
    curve = [{"epoch": e, "scores": {"a": 50.0 + e, "b": 60.0}} for e in (1.0, 2.0)]
    single = [{"epoch": e, "scores": {"a": 50.0, "b": 60.0}} for e in (1.0, 2.0)]
    cells = [
        cell("alora", 0, {"a": 52.0, "b": 60.0}, curve=curve),
        cell("lora-per-task", 0, {"a": 50.0, "b": 60.0}, curve=single),
    ]
    summary = summarise(study(seeds=1), cells, {})
    rows = {(row["method"], row["epoch"]): row for row in summary["curves"]}
    assert rows["alora", 1.0]["mean"] == pytest.approx(55.5)
    assert rows["alora", 2.0]["delta_m"]["mean"] == pytest.approx(-100 * 0.04 / 2)
    assert rows["alora", 2.0]["tasks"] == {"a": 52.0, "b": 60.0}


def test_the_learning_rate_is_the_best_on_validation_rows() -> None:
    grid = study(learning_rates=[0.1, 0.01, 0.001], screening_seeds=[7, 8])
    scores = {"alora": (10.0, 30.0, 20.0), "lora": (30.0, 30.0, 20.0), "lora-per-task": (1.0, 2.0, 3.0)}
    rows = [
        {"stage": "screen", "method": m, "seed": s, "learning_rate": r, "scores": {"a": v, "b": v + 2}}
        for m, values in scores.items()
        for r, v in zip((0.1, 0.01, 0.001), values, strict=True)
        for s in (7, 8)
    ]
    # of equals the smaller
    assert choose_rates(grid, results(rows)) == {"alora": 0.01, "lora": 0.01, "lora-per-task": 0.001}
    finals = [{**c, "learning_rate": choose_rates(grid, results(rows))[c["method"]]} for c in by_hand()]
    summary = summarise(grid, rows + finals, {})
    assert summary["at_the_edge"] == ["lora-per-task"]
    assert {"method": "alora", "learning_rate": 0.1, "validation": 11.0, "n": 2} in summary["screening"]
    # a rate whose cells are not all done cannot be chosen
    assert choose_rates(grid, results(rows[:-1]))["lora-per-task"] == 0.01
    with pytest.raises(RunError, match="method lora-per-task has no learning rate"):
        choose_rates(grid, results([row for row in rows if row["method"] != "lora-per-task"]))


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 100.0]), max_size=40))
def test_right_and_wrong_pack_into_bits(scores: list[float]) -> None:
    packed = pack_scores(scores)
    assert unpack_scores(packed) == scores
    assert len(packed) <= 6 + 4 * -(-len(scores) // 24)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_other_scores_pack_into_hundredths(scores: list[float]) -> None:
    assert unpack_scores(pack_scores(scores)) == pytest.approx(scores, abs=0.00501, rel=0)
    others = [score - 50 for score in scores]
    assert unpack_scores(pack_scores(others)) == pytest.approx(others, abs=0.00501, rel=0)


@pytest.mark.parametrize("text", ["", "b8:", "x3:AAAA", "b3", "h2:AAA=", "h2:!!!!"])
def test_damaged_scores_are_refused(text: str) -> None:
    with pytest.raises(RunError, match="no packed scores"):
        unpack_scores(text)


def test_the_tables_rebuild_from_the_cells_to_the_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = by_hand()
    write_cells(tmp_path / "cells.jsonl", study(), results(cells), {"manylora": "x"})
    printed, written = [], []
    for number in range(2):
        out = tmp_path / f"out{number}"
        assert main(["compare", "--from-cells", str(tmp_path / "cells.jsonl"), "--out", str(out)]) == 0
        printed.append(capsys.readouterr().out.replace(str(out), "OUT"))
        written.append((out / "study.json").read_bytes())
    assert printed[0] == printed[1]
    assert written[0] == written[1]
    summary = json.loads(written[0])
    assert summary == json.loads(json.dumps(summarise(study(), cells, {"manylora": "x"})))
    assert "alora scores higher than lora: supported" in printed[0]
    shuffled = cells.copy()
    random.Random(0).shuffle(shuffled)
    head, rows = read_cells(tmp_path / "cells.jsonl")
    assert [row.to_dict() for row in rows] == cells
    assert head["study"]["name"] == "hand"
    again = summarise(study(), shuffled, {"manylora": "x"})
    assert again["claims"] == summary["claims"]
    assert {(r["method"], r["task"], r["mean"]) for r in again["table"]} == {
        (r["method"], r["task"], r["mean"]) for r in summary["table"]
    }


def test_a_broken_cells_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cells.jsonl"
    for text, said in (("{", "is damaged"), ("{}\n", "is no cells file"), ("", "is no cells file")):
        path.write_text(text, encoding="utf-8")
        assert main(["compare", "--from-cells", str(path)]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert main(["compare", "--from-cells", str(tmp_path / "none.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_methods_of_a_study_are_measured_alike() -> None:
    with pytest.raises(
        ConfigError, match=r"rouge differs between the methods \(alora published, lora all\); give it"
    ):
        parse_study({"name": "x", "methods": {"alora": {"rouge": "published"}, "lora": None}})
    parse_study({"name": "x", "methods": ["alora", "lora"], "settings": {"rouge": "published"}})


def test_cells_of_different_metrics_are_pointed_out() -> None:
    cells = by_hand()
    assert not any("different metrics" in note for note in summarise(study(), cells, {})["notes"])
    newer = [{**row, "metrics": {"a": "rouge1_all", "b": "accuracy"}} for row in cells]
    assert not any("different metrics" in note for note in summarise(study(), newer, {})["notes"])
    notes = summarise(study(), [*newer[:3], *cells[3:]], {})["notes"]
    assert (
        "Cells were scored by different metrics: a (rouge1_all, that of an earlier version); b (accuracy, that of an "
        "earlier version). Run them again."
    ) in notes
