"""What a source holds is read, refused or named: nothing is left out in silence."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_files import ROW, write, write_csv
from manylora.data import DataNotes, load_examples
from manylora.errors import ConfigError, DataError


def notes_on(source: Path, **more: Any) -> list[str]:
    notes = DataNotes()
    load_examples(source, notes=notes, **more)
    return notes.lines()


def test_zipped_files_and_other_spellings_hold_the_same_rows(tmp_path: Path) -> None:
    lines = json.dumps(ROW) + "\n" + json.dumps({**ROW, "output": "ho"})
    table = 'instruction\toutput\n"Say\thi."\thi\nSay ho.\tho\n'
    write(tmp_path / "a.ndjson", lines)
    write(tmp_path / "b.tsv", table)
    for name, text in (
        ("c.jsonl.gz", lines),
        ("d.json.gz", json.dumps([ROW, {**ROW, "output": "ho"}])),
        ("e.csv.gz", "instruction,output\nSay hi.,hi\nSay ho.,ho\n"),
        ("f.test.tsv.GZ", table),
    ):
        write(tmp_path / "zipped" / name, gzip.compress(text.encode()))
    plain, zipped = load_examples(tmp_path), load_examples(tmp_path / "zipped", split="train")
    assert (list(plain), list(zipped)) == (["a", "b"], ["c", "d", "e"])
    assert list(load_examples(tmp_path / "zipped", split="test")) == ["f"]
    assert plain["b"][0].instruction == "Say\thi."
    for rows in (*plain.values(), *zipped.values()):
        assert [row.output for row in rows] == ["hi", "ho"]
    assert zipped["c"][1].origin == f"{tmp_path / 'zipped' / 'c.jsonl.gz'}:2"


def test_what_a_folder_holds_besides_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "deeper/c.jsonl", "empty/notes.txt", ".hidden/d.jsonl"):
        write(tmp_path / name, [ROW])
    for name in ("b.jsonl.zst", "table.xlsx", "README.md", "LICENSE"):
        write(tmp_path / name, "x")
    assert list(load_examples(tmp_path)) == ["a"]
    assert notes_on(tmp_path) == ["left out: b.jsonl.zst, table.xlsx, deeper/"]


def test_a_folder_of_folders_is_a_task_each(tmp_path: Path) -> None:
    for name in ("sums/part-0.jsonl", "sums/part-1.jsonl", "tales/train.jsonl", "tales/test.jsonl"):
        write(tmp_path / name, [{**ROW, "output": name}])
    write(tmp_path / "more" / "hard" / "train" / "x.jsonl", [ROW])
    train = load_examples(tmp_path, split="train")
    assert {task: len(rows) for task, rows in train.items()} == {"more/hard": 1, "tales": 1}
    assert list(load_examples(tmp_path, split="test")) == ["tales"]
    assert {task: len(rows) for task, rows in load_examples(tmp_path / "sums").items()} == {
        "part-0": 1,
        "part-1": 1,
    }
    (tmp_path / "tales" / "test.jsonl").unlink()
    (tmp_path / "tales" / "train.jsonl").rename(tmp_path / "tales" / "part.jsonl")
    (tmp_path / "more" / "hard" / "train" / "x.jsonl").unlink()
    assert {task: len(rows) for task, rows in load_examples(tmp_path).items()} == {"sums": 2, "tales": 1}


def test_folders_within_a_split_are_tasks_too(tmp_path: Path) -> None:
    for name in ("train/sums/a.jsonl", "train/tales/a.jsonl", "test/sums/a.jsonl"):
        write(tmp_path / name, [ROW])
    assert list(load_examples(tmp_path, split="train")) == ["sums", "tales"]
    assert list(load_examples(tmp_path, split="test")) == ["sums"]


def test_a_link_back_is_not_followed_for_ever(tmp_path: Path) -> None:
    write(tmp_path / "sums" / "a.jsonl", [ROW])
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(load_examples(tmp_path)) == ["sums"]


def test_columns_that_nothing_reads_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{**ROW, "id": 3, "source": "cola", "task": "t", "empty": None}])
    assert notes_on(path) == ["columns not used: id, source"]
    assert notes_on(path, task_column="source") == ["columns not used: id, task"]


def test_broken_and_oversized_zips_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(json.dumps(ROW).encode())
    for name, data in (
        ("half.jsonl.gz", whole[:-9]),
        ("text.jsonl.gz", b"{}"),
        ("bits.jsonl.gz", whole[:12] + b"\xff" * 9),
    ):
        with pytest.raises(DataError, match=rf"{name} is not a whole gzip file \(.*\)\. Write it again\.$"):
            load_examples(write(tmp_path / name, data))
    free = SimpleNamespace(available=4 * 2**20)  # stands for a small machine
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    bomb = write(tmp_path / "bomb.jsonl.gz", gzip.compress(b"\n" * 2**23))
    assert bomb.stat().st_size < 2**14
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz holds more than 0\.0 GiB .*quarter of the free"):
        load_examples(bomb)


def test_a_cell_of_any_length_is_read(tmp_path: Path) -> None:
    long = "so it goes on " * 10_000
    before = csv.field_size_limit()
    path = write_csv(
        tmp_path / "x.csv", [{"instruction": long, "output": "a"}, {"instruction": "b", "output": "c"}]
    )
    assert [row.instruction for row in load_examples(path)["x"]] == [long, "b"]
    assert csv.field_size_limit() == before


def test_blank_cells_are_missing_fields(tmp_path: Path) -> None:
    table = write(
        tmp_path / "x.csv",
        "instruction,output,prompt,completion\nName a fruit,pear,,\n,,Name a tree:, elm\n",
    )
    assert [(row.form, row.instruction, row.output) for row in load_examples(table)["x"]] == [
        ("alpaca", "Name a fruit", "pear"),
        ("prompt", "Name a tree:", " elm"),
    ]
    with pytest.raises(DataError, match=r"x\.csv:2: field 'instruction' is empty"):
        load_examples(write(tmp_path / "x.csv", "instruction,output\n,pear\n"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [ROW])
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(path)


def test_impossible_file_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read|does not exist"):
        load_examples(tmp_path / ("x" * 5000))


def test_unknown_task_lists_the_known(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{**ROW, "task": task} for task in "ab"])
    with pytest.raises(DataError, match=r"has no rows of task 'c'\. Its tasks: a, b\."):
        load_examples(path, tasks=["a", "c"])


def test_missing_task_column_names_the_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [ROW])
    with pytest.raises(DataError, match="the fields 'instruction', 'output' but no task column 'kind'"):
        load_examples(path, task_column="kind")


@pytest.mark.parametrize(
    "setting",
    [
        {"split": "eval"},
        {"limit": 0},
        {"tasks": []},
        {"tasks": ["a", "a"]},
        {"tasks": "a"},
        {"tasks": 3},
        {"tasks": [3]},
    ],
)
def test_impossible_setting(tmp_path: Path, setting: dict[str, Any]) -> None:
    path = write(tmp_path / "x.jsonl", [ROW])
    with pytest.raises(ConfigError, match=next(iter(setting))):
        load_examples(path, **setting)


@pytest.mark.parametrize(
    ("marked", "unmarked"),
    [("a.train.jsonl", "a.jsonl"), ("b.train.jsonl", "a.jsonl"), ("train/a.jsonl", "b.jsonl")],
)
def test_unmarked_files_beside_training_files_are_named(tmp_path: Path, marked: str, unmarked: str) -> None:
    write(tmp_path / marked, [ROW])
    write(tmp_path / unmarked, [{**ROW, "output": "other"}])
    notes = DataNotes()
    found = load_examples(tmp_path, split="train", notes=notes)
    assert [row.output for rows in found.values() for row in rows] == ["hi"]
    assert notes.lines() == [f"left out: {unmarked}"]


def test_unmarked_files_beside_test_files_are_for_training(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [ROW])
    write(tmp_path / "a.test.jsonl", [{**ROW, "output": "other"}])
    notes = DataNotes()
    assert load_examples(tmp_path, split="train", notes=notes)["a"][0].output == "hi"
    assert notes.lines() == []


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path: Path, name: str) -> None:
    line = '{"instruction": "q", "output": "x", "output": "y"}'
    path = write(tmp_path / name, f"[{line}]" if name == "x.json" else line)
    with pytest.raises(DataError, match="the key 'output' stands twice"):
        load_examples(path)


@pytest.mark.parametrize(
    ("field", "value"), [("weight", 0), ("weight", 0.0), ("train", False), ("trainable", "false")]
)
def test_a_row_that_is_switched_off_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    path = write(tmp_path / "x.jsonl", [ROW, {**ROW, field: value}])
    with pytest.raises(DataError, match=rf"x.jsonl:2: field '{field}' .* Remove the row"):
        load_examples(path)
    assert load_examples(write(tmp_path / "y.jsonl", [{**ROW, field: 1}]))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Jboolq", "a\u202eb", "a\x85b", "tab\tbed"])
def test_a_task_name_that_commands_a_terminal_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"task": name, "instruction": "Say yes.", "output": "yes"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds the control character") as found:
        load_examples(path)
    assert str(found.value).isprintable()
    path.write_text(json.dumps({**row, "task": "日本語 [red] é"}) + "\n", encoding="utf-8")
    assert list(load_examples(path)) == ["日本語 [red] é"]
