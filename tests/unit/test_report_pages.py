"""The page of each verb: what it says, and that a folder with less in it gives a smaller page and never a crash."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manylora.errors import RunError
from manylora.report import Page, write_report
from manylora.report.writing import build_page, kind_of
from report_folders import TASKS, analyze_folder, compare_folder, federate_folder, train_folder, write

MAKERS: dict[str, Callable[[Path], Path]] = {
    "train": train_folder,
    "federate": federate_folder,
    "analyze": lambda folder: analyze_folder(folder, layers=3, modules=("q_proj", "v_proj"), tasks=TASKS[:3]),
    "compare": lambda folder: compare_folder(folder, methods=("lora", "alora"), tasks=TASKS[:2]),
}


def figures(page: Page) -> set[str]:
    return {figure.name for section in page.sections for figure in section.figures}


def table(page: Page, name: str, *, by: str | None = None) -> dict[str, dict[str, Any]]:
    """Rows, each a heading to its cell, by their first cell or another."""
    (found,) = (one for section in page.sections for one in section.tables if one.name == name)
    headings = [column.name for column in found.columns]
    rows = [dict(zip(headings, row, strict=True)) for row in (*found.rows, *found.footer)]
    return {str(row[by or headings[0]]): row for row in rows}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_kind_is_found_out(kind: str, tmp_path: Path) -> None:
    assert kind_of(MAKERS[kind](tmp_path)) == kind


def test_a_train_page_says_what_was_reached_and_how_to_repeat_it(tmp_path: Path) -> None:
    train_folder(tmp_path)
    saved = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    page = build_page(tmp_path)
    mean = sum(task["score"] for task in saved) / 8
    assert f"{mean:.1f}" in page.summary
    assert "1,600 test rows, one run with seed 0" in page.summary
    assert page.command == f"manylora train --out {tmp_path}"
    assert ("num_experts", "3") in page.settings
    assert ("torch", "2.13.0+cpu") in page.versions
    assert figures(page) == {"scores", "loss", "loss-per-task"}
    rows = table(page, "scores")
    assert rows["story_sum"]["score"] == next(task["score"] for task in saved if task["task"] == "story_sum")
    assert rows["mean"]["score"] == pytest.approx(mean)
    assert rows["mean"]["s.e."] == pytest.approx(
        sum(task["standard_error"] ** 2 for task in saved) ** 0.5 / 8
    )
    assert "no verdict" in page.limits[0]


def test_a_federate_page_compares_with_clients_on_their_own(tmp_path: Path) -> None:
    federate_folder(tmp_path)
    saved = json.loads((tmp_path / "scores.json").read_text())
    own, alone = (
        {name: one["tasks"][0]["score"] for name, one in saved[side].items()}
        for side in ("clients", "reference")
    )
    page = build_page(tmp_path)
    delta = -100 * sum((own[name] - alone[name]) / alone[name] for name in own) / 8
    assert f"Δm% {delta:,.2f}".replace("-", "−") in page.summary
    assert table(page, "scores")["story_sum"]["difference"] == pytest.approx(
        own["story_sum"] - alone["story_sum"]
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    total = sum(sum(line[way].values()) for line in lines for way in ("up", "down"))
    assert table(page, "traffic")["all"]["MiB in all"] == pytest.approx(total / 2**20)
    assert figures(page) == {"scores", "rounds", "quality-bytes"}
    shares = table(page, "shares")
    assert sum(row["mean share, %"] for row in shares.values()) == pytest.approx(100)
    name, row = max(shares.items(), key=lambda item: item[1]["largest, %"])
    assert row["largest, %"] == pytest.approx(100 * max(lines[0]["shares"].values()))
    assert lines[row["in round"] - 1]["shares"][name] == pytest.approx(row["largest, %"] / 100)
    for line in lines:
        del line["shares"]  # a run of an earlier version
    write(tmp_path, metrics_jsonl=lines)
    assert all(one.name != "shares" for section in build_page(tmp_path).sections for one in section.tables)


def test_refused_answers_and_one_client_for_all_rows(tmp_path: Path) -> None:
    page = build_page(federate_folder(tmp_path / "many", 40))
    assert page.warnings[0].startswith("20 answers did not count, the first in round 1 from client-")
    one = federate_folder(tmp_path / "one")
    saved = json.loads((one / "scores.json").read_text())
    tasks = [client["tasks"][0] for client in saved["clients"].values()]
    write(one, scores_json={"clients": {"all": {"tasks": tasks}}, "reference": {}})
    assert list(table(build_page(one), "scores")) == [*TASKS, "mean"]


def test_an_analyze_page_groups_pairs_and_warns_of_collapse(tmp_path: Path) -> None:
    MAKERS["analyze"](tmp_path)
    saved = json.loads((tmp_path / "analysis.json").read_text())
    saved["gates"][0]["collapsed"] = True
    write(tmp_path, analysis_json=saved)
    page = build_page(tmp_path)
    assert figures(page) == {
        "similarity-layers", "similarity-maps", "change-layers", "change-steps", "gradient-norms", "gradient-conflict",
        "gates", "gate-entropy",
    }  # fmt: skip
    (similarity,) = (one for section in page.sections for one in section.tables if one.name == "similarity")
    found = {row[:2]: row[2] for row in similarity.rows}
    assert len(found) == 6
    values = [pair["mean_cosine"] for pair in saved["similarity"]
              if pair["matrix"] == "A" and pair["same_init"] and not pair["same_task"]]  # fmt: skip
    assert found["A", "other task, same init"].mean == pytest.approx(sum(values) / len(values))
    assert "collapse" in page.warnings[0]
    assert TASKS[0] in page.warnings[0]
    assert (
        table(page, "change", by="matrix")["A"]["direction"]
        < table(page, "change", by="matrix")["B"]["direction"]
    )


def test_a_compare_page_leads_with_the_verdicts(tmp_path: Path) -> None:
    page = build_page(
        compare_folder(tmp_path, methods=("lora", "moelora", "alora"), tasks=TASKS[:2], seeds=2)
    )
    assert page.question == "Should several LoRAs share A, B or nothing?"
    assert page.sections[0].title == "Claims"
    assert [head for head, _ in page.sections[0].points] == ["Supported", "Supported"]
    assert "Of 2 claims: 2 supported." in page.summary
    assert any("fewer than 5 seeds" in limit for limit in page.limits)
    assert table(page, "cost")["lora"]["parameters"] == 240_000
    assert figures(page) == {"claims", "scores", "delta-m", "quality-bytes"}
    more = {
        "curves": [
            {"method": "lora", "epoch": epoch, "mean": 50.0 + epoch, "low": None, "high": None, "n": 1,
             "delta_m": {"mean": -epoch, "low": -9, "high": 9, "n": 2}} for epoch in (1, 2)
        ],
        "notes": ["2 seeds: a screening."], "missing": ["lora seed 3"],
    }  # fmt: skip
    page = build_page(
        compare_folder(tmp_path / "long", methods=("lora", "alora"), tasks=TASKS[:2], more=more)
    )
    assert "curves" in figures(page)
    assert "2 seeds: a screening." in page.limits
    assert "lora seed 3" in page.warnings[0]
    sent = compare_folder(tmp_path / "sent", methods=("fedit", "fed-alora"), tasks=TASKS[:2])
    study = json.loads((sent / "study.json").read_text())
    for cell in study["cells"]:
        cell |= {"bytes_up": 2**20, "bytes_down": 2**21}
    write(sent, study_json=study)
    assert table(build_page(sent), "cost")["fedit"]["MiB sent a client and round"] == pytest.approx(3.0)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_folder_with_less_in_it_gives_a_smaller_page(kind: str, tmp_path: Path) -> None:
    folder = MAKERS[kind](tmp_path)
    main = {"analyze": "analysis.json", "compare": "study.json"}.get(kind)
    for path in sorted(folder.rglob("*.json*")):
        if path.name not in (main, "state.json"):
            path.unlink()
    if main:
        (folder / main).write_text("{}", encoding="utf-8")
    page = build_page(folder)
    assert page.summary
    assert not figures(page)
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<h1>" in html
    assert "What this does not show" in html


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("seed", range(6))
def test_values_of_wrong_types_anywhere_give_a_page(kind: str, seed: int, tmp_path: Path) -> None:
    """Every twentieth value of every file becomes something else."""
    draw = random.Random(f"{kind}{seed}")
    strange: list[Any] = [None, "text", -1, 1e308, [], {}, [[]], {"a": []}, True, "<b>", [1, "x"], 0]

    def spoilt(value: Any, depth: int = 0) -> Any:
        if depth and draw.random() < 0.05:
            return draw.choice(strange)
        if isinstance(value, dict):
            return {key: spoilt(item, depth + 1) for key, item in value.items()}
        return [spoilt(item, depth + 1) for item in value] if isinstance(value, list) else value

    folder = MAKERS[kind](tmp_path)
    for path in sorted(folder.rglob("*.json")):
        path.write_text(json.dumps(spoilt(json.loads(path.read_text()))), encoding="utf-8")
    for path in sorted(folder.rglob("*.jsonl")):
        lines = [json.dumps(spoilt(json.loads(line))) for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines), encoding="utf-8")
    if not seed:  # the drawing costs the most of it
        write_report(folder)
    assert build_page(folder).summary


def test_a_failed_run_says_so_first(tmp_path: Path) -> None:
    page = build_page(train_folder(tmp_path, state="failed"))
    assert page.warnings == ("This run failed: the disk is full. What it wrote before stands below.",)
    assert "no test rows were scored" in page.summary
    assert figures(page) == {"loss", "loss-per-task"}


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/x/bin/manylora", "train", "--data", "my rows"], "manylora train --data 'my rows'"),
        (["/x/manylora/cli/__main__.py", "train"], "manylora train"),
        (["benchmarks/pair.py", "--out", "x"], "python benchmarks/pair.py --out x"),
        (None, ""),
        ([1, 2], ""),
    ],
)
def test_the_command_stands_as_one_types_it(words: Any, command: str, tmp_path: Path) -> None:
    train_folder(tmp_path)
    write(tmp_path, environment_json={"command": words})
    assert build_page(tmp_path).command == command


def run(*folders: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manylora.report", *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_pages_are_drawn_anew_by_a_command(tmp_path: Path) -> None:
    folder = train_folder(tmp_path / "run", state="failed")
    done = run(folder)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'report.html'}\n")
    (folder / "config.yaml").write_text("[", encoding="utf-8")
    done = run(folder)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "config.yaml" in done.stderr


def test_a_folder_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no page to draw"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "study.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunError, match=r"study\.json holds list"):
        write_report(tmp_path)
