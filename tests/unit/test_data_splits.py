"""The rows of a run: validation cuts, divided sources, leaks, and the options that a prompt lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manylora.data import Example, cut_validation, load_splits, options_of
from manylora.errors import ConfigError, DataError


def rows(n: int, *, task: str = "t", same: int = 1) -> list[Example]:
    """`n` examples, `same` of each prompt."""
    return [Example(task=task, instruction=f"{task} {i // same}", output=str(i)) for i in range(n)]


def write(path: Path, tasks: Sequence[str], *, n: int = 10, tag: str = "", output: str = "a") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"task": task, "instruction": f"{tag}{task}{i}", "output": output, "answer": "a"})
        for task in tasks
        for i in range(n)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the cut


@example(n=2, same=1, fraction=0.9, seed=0)  # all rows wanted
@example(n=8, same=4, fraction=0.1, seed=0)  # no prompt has few enough rows
@given(n=st.integers(1, 120), same=st.integers(1, 4), fraction=st.floats(0.01, 0.9), seed=st.integers(0, 5))
def test_cut_divides_the_rows_and_keeps_prompts_together(
    n: int, same: int, fraction: float, seed: int
) -> None:
    data = {"t": rows(n, same=same)}
    train, validation = cut_validation(data, fraction=fraction, per_task_max=20, seed=seed)
    held_out = validation.get("t", [])
    assert sorted(train["t"] + held_out, key=lambda row: int(row.output)) == data["t"]
    assert train["t"]
    assert bool(held_out) == (n >= 2)
    assert len(held_out) <= max(20, same - 1)
    if n > same:
        assert not {row.instruction for row in train["t"]} & {row.instruction for row in held_out}
    if same == 1 and n >= 2:
        assert len(held_out) == min(20, max(1, round(fraction * n)), n - 1)


def test_cut_is_the_tasks_own_affair() -> None:
    both = {"a": rows(30, task="a"), "b": rows(30, task="b")}
    _, together = cut_validation(both, seed=1)
    _, alone = cut_validation({"b": both["b"]}, seed=1)
    assert together["b"] == alone["b"]
    assert [row.output for row in together["a"]] != [row.output for row in together["b"]]
    assert cut_validation(both, seed=2)[1] != together
    assert cut_validation(both, seed=1)[1] == together


def test_no_cut_on_request_and_impossible_cuts() -> None:
    assert cut_validation({"t": rows(9)}, fraction=0, seed=0) == ({"t": rows(9)}, {})
    assert cut_validation({"t": rows(9)}, per_task_max=0, seed=0)[1] == {}
    for fraction in (1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            cut_validation({"t": rows(9)}, fraction=fraction, seed=0)
    with pytest.raises(ConfigError, match="per_task_max -1"):
        cut_validation({"t": rows(9)}, per_task_max=-1, seed=0)


# ---------------------------------------------------------------- whole runs


def test_file_alone_gives_a_cut_and_no_test(tmp_path: Path) -> None:
    splits = load_splits(data=write(tmp_path / "x.jsonl", ["a", "b"]), seed=0)
    assert {task: len(found) for task, found in splits.train.items()} == {"a": 9, "b": 9}
    assert {task: len(found) for task, found in splits.validation.items()} == {"a": 1, "b": 1}
    assert (splits.test, splits.leaks, splits.dropped) == ({}, 0, 0)
    cuts = [load_splits(data=tmp_path / "x.jsonl", seed=seed).validation for seed in (0, 1, 2)]
    assert cuts[0] == splits.validation
    assert cuts[0] != cuts[1] or cuts[1] != cuts[2]


def test_a_cut_that_takes_half_of_a_task_is_told(tmp_path: Path) -> None:
    rows = [{"task": "t", "instruction": f"q{i % 2}", "output": str(i)} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    splits = load_splits(data=tmp_path / "x.jsonl")
    assert (len(splits.train["t"]), len(splits.validation["t"])) == (20, 20)
    assert splits.notes == ("validation took 20 of the 40 rows of task t: rows of one prompt stay together",)


def test_divided_folder_gives_all_three(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / split / "x.jsonl", ["a"], tag=split)
    splits = load_splits(data=tmp_path)
    assert [len(part["a"]) for part in (splits.train, splits.validation, splits.test)] == [10, 10, 10]
    assert splits.validation["a"][0].instruction == "validationa0"
    assert splits.leaks == 0


def test_named_sources_win_over_the_folders_own(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "all" / split / "x.jsonl", ["a"], tag=split)
    other = write(tmp_path / "other.jsonl", ["a"], tag="other", n=3)
    splits = load_splits(data=tmp_path / "all", test=other, validation=other)
    assert len(splits.test["a"]) == len(splits.validation["a"]) == 3
    assert splits.leaks == 3  # test equals validation here


def test_leaks_count_test_rows_with_a_training_prompt(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ["a"], n=10)
    test = write(tmp_path / "test.jsonl", ["a", "b"], n=4)
    assert load_splits(data=train, test=test).leaks == 4  # b's prompts are its own


def test_tasks_without_test_rows_are_named(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ["a", "b", "c"])
    test = write(tmp_path / "test.jsonl", ["b"], tag="test")
    notes = load_splits(data=train, test=test).notes
    assert "no test rows for the tasks a, c" in notes
    assert not any("no test rows" in note for note in load_splits(data=train).notes)
    assert not any("no test rows" in note for note in load_splits(data=train, test=test, tasks=["b"]).notes)


def test_tasks_restrict_all_parts_and_test_may_lack_some(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ["a", "b", "c"])
    test = write(tmp_path / "test.jsonl", ["b", "d"], tag="test")
    splits = load_splits(data=train, test=test, tasks=["b", "a"])
    assert (list(splits.train), list(splits.validation), list(splits.test)) == (["b", "a"], ["b", "a"], ["b"])
    assert list(load_splits(data=train, test=test).test) == ["b", "d"]
    with pytest.raises(DataError, match=r"none of the tasks a, c\. Theirs: b, d\."):
        load_splits(data=train, test=test, tasks=["a", "c"])


def test_limit_counts_rows_per_task(tmp_path: Path) -> None:
    train = write(tmp_path / "x.jsonl", ["a", "b"])
    splits = load_splits(data=train, test=train, limit=4)
    assert {task: len(found) for task, found in splits.test.items()} == {"a": 4, "b": 4}
    assert sum(len(part["a"]) for part in (splits.train, splits.validation)) == 4


def test_rows_without_an_answer_text_are_dropped_from_training_only(tmp_path: Path) -> None:
    write(tmp_path / "some.jsonl", ["a"], n=8)
    empty = write(tmp_path / "empty.jsonl", ["a"], n=2, tag="empty", output="")
    splits = load_splits(data=tmp_path, test=empty, validation_fraction=0)
    assert (len(splits.train["a"]), splits.dropped, len(splits.test["a"])) == (8, 2, 2)
    with pytest.raises(DataError, match="Task 'a' has no row with an answer to train on"):
        load_splits(data=empty)


def test_embedded_suite_is_the_benchmark_whatever_the_seed() -> None:
    splits = load_splits(data="embedded", seed=1)
    sizes = [
        {len(found) for found in part.values()} for part in (splits.train, splits.validation, splits.test)
    ]
    assert sizes == [{300}, {50}, {200}]
    assert len(splits.train) == 8
    assert splits == load_splits(data="embedded", seed=2)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Is it?\nOPTIONS:\n- yes\n- no", ["yes", "no"]),
        ("Is it? OPTIONS:\n- yes\n- it is not possible to tell\n\n### Response:\n- a", None),
        ("Who?\n\nOPTIONS: \r\n- The baby cow \r\n- the farmer\r\n", ["The baby cow", "the farmer"]),
        ("OPTIONS:\n- old\n- older\nAnswer: old\nOPTIONS:\n- new\n- newer", ["new", "newer"]),
        ("OPTIONS:\n\n-  a-b - c\n- -1\nthe end", ["a-b - c", "-1"]),
        ("OPTIONS: a, b", []),
        ("OPTIONS:\nnone\n- a", []),
        ("Here are options:\n- a\n- b", []),
        ("", []),
    ],
)
def test_options(text: str, options: list[str] | None) -> None:
    assert options_of(text) == (["yes", "it is not possible to tell"] if options is None else options)
