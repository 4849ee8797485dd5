"""Sources: every form of real input loads, and every kind of bad input is one line with the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_files import ROW, TURN, write, write_csv
from manylora import errors
from manylora.data import Message, available_splits, load_examples
from manylora.errors import DataError

# ---------------------------------------------------------------- forms


def test_all_file_kinds_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"task": "b", "instruction": "Add\n2 and 3,\u2028please", "input": 'a "quote"', "output": "5"},
        {"task": "a", "instruction": "Grüße 🎉", "input": "", "output": "ok"},
    ]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    unescaped = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    files = [
        tmp_path / "x.parquet",
        write(tmp_path / "x.jsonl", unescaped),
        write(tmp_path / "lines.json", unescaped + "\n\n"),
        write(tmp_path / "list.json", json.dumps(rows, indent=2)),
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + unescaped.replace("\n", "\r\n").encode()),
        write_csv(tmp_path / "x.csv", rows),
    ]
    for file in files:
        data = load_examples(file)
        got = [(e.task, e.instruction, e.input, e.output) for rows in data.values() for e in rows]
        assert got == [tuple(row.values()) for row in rows], file.name
        assert list(data) == ["b", "a"]


def test_origin_names_line_or_row(tmp_path: Path) -> None:
    lines = load_examples(write(tmp_path / "x.jsonl", "\n" + json.dumps(ROW) + "\n\n" + json.dumps(ROW)))["x"]
    assert [e.origin for e in lines] == [f"{tmp_path}/x.jsonl:2", f"{tmp_path}/x.jsonl:4"]
    table = write(tmp_path / "x.csv", 'instruction,output\n"two\nlines",a\nb,c\n')
    assert [e.origin for e in load_examples(table)["x"]] == [f"{table}:2", f"{table}:4"]
    listed = load_examples(write(tmp_path / "x.json", json.dumps([ROW, ROW])))["x"]
    assert listed[1].origin == f"{tmp_path}/x.json row 2"


def test_three_forms_in_one_file(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, TURN, {"role": "assistant", "content": "hello"}]
    rows = [
        {**ROW, "answer": 4},
        {"prompt": " verbatim ", "completion": "c", "messages": None},
        {"messages": chat, "prompt": None},
    ]
    alpaca, prompt, talk = load_examples(write(tmp_path / "mix.jsonl", rows))["mix"]
    assert (alpaca.form, alpaca.answer) == ("alpaca", "4")
    assert (prompt.form, prompt.instruction, prompt.output) == ("prompt", " verbatim ", "c")
    assert talk.form == "chat"
    assert talk.messages == (Message(role="system", content="Be brief."), Message(role="user", content="hi"))
    assert talk.output == "hello"


@pytest.mark.parametrize(("label", "text"), [(True, "true"), (4, "4"), (4.5, "4.5"), ("B", "B"), ("", None)])
def test_gold_label_becomes_text(tmp_path: Path, label: object, text: str | None) -> None:
    [example] = load_examples(write(tmp_path / "x.jsonl", [{**ROW, "answer": label}]))["x"]
    assert example.answer == text


def test_empty_answer_text_passes_beside_a_gold_label(tmp_path: Path) -> None:
    [example] = load_examples(write(tmp_path / "x.jsonl", [{**ROW, "output": "", "answer": "4"}]))["x"]
    assert (example.output, example.answer) == ("", "4")


def test_prompts_alone_load_for_prediction(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"instruction": "a"}, {"prompt": "b"}, {"messages": [TURN]}])
    rows = load_examples(path, require_output=False)["x"]
    assert [(row.form, row.output) for row in rows] == [("alpaca", ""), ("prompt", ""), ("chat", "")]
    assert len(rows[2].messages) == 1


# ---------------------------------------------------------------- tasks and splits


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("boolq.json", "boolq"),
        ("boolq.test.json", "boolq"),
        ("ARC-Easy-train.json", "ARC-Easy"),
        ("my_task_valid.json", "my_task"),
        ("qa-dev-00000-of-00002.json", "qa"),
        ("contest.json", "contest"),
        ("home/train.json", "home"),
        ("home/test/test.json", "home"),
    ],
)
def test_task_from_file_name(tmp_path: Path, name: str, task: str) -> None:
    assert list(load_examples(write(tmp_path / name, [ROW]))) == [task]


def test_task_column_before_task_field_before_file_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{**ROW, "task": " t ", "source": "s"}])
    assert list(load_examples(path)) == ["t"]
    assert list(load_examples(path, task_column="source")) == ["s"]


def test_tasks_are_picked_in_the_order_named_and_limited_each(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{**ROW, "task": t, "output": str(i)} for i, t in enumerate("abcabc")])
    data = load_examples(path, tasks=["c", "a"], limit=1)
    assert list(data) == ["c", "a"]
    assert [len(rows) for rows in data.values()] == [1, 1]
    assert data["c"][0].output in ("2", "5")


def test_folder_reads_its_own_files_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "deeper/c.jsonl"):
        write(tmp_path / name, [ROW])
    write(tmp_path / "notes.txt", "not data")
    assert list(load_examples(tmp_path)) == ["a", "b"]
    assert list(load_examples(tmp_path, split="test")) == ["a", "b"]  # not divided: read whole
    assert available_splits(tmp_path) == ()


@pytest.mark.parametrize(
    "names", [("q.train.json", "q-test.json", "q_dev.json"), ("train/q.json", "test/q.json", "dev/q.json")]
)
def test_folder_divided_by_names_or_subfolders(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name, output in zip(names, ("tr", "te", "va"), strict=True):
        write(tmp_path / name, [{**ROW, "output": output}])
    assert available_splits(tmp_path) == ("train", "validation", "test")
    for split, output in (("train", "tr"), ("test", "te"), ("validation", "va")):
        assert [row.output for row in load_examples(tmp_path, split=split)["q"]] == [output]
    with pytest.raises(DataError, match=r"holds several splits \(train, validation, test\)"):
        load_examples(tmp_path)


def test_plain_file_beside_a_test_file_is_the_training_split(tmp_path: Path) -> None:
    write(tmp_path / "q.json", [ROW])
    write(tmp_path / "q.test.json", [ROW, ROW])
    assert len(load_examples(tmp_path, split="train")["q"]) == 1
    assert len(load_examples(tmp_path, split="test")["q"]) == 2
    with pytest.raises(DataError, match=r"several splits \(test\) and files of none\. Say which"):
        load_examples(tmp_path)
    with pytest.raises(DataError, match="no validation split, only test"):
        load_examples(tmp_path, split="validation")


def test_file_named_directly_is_read_whatever_its_split(tmp_path: Path) -> None:
    path = write(tmp_path / "q.train.json", [ROW])
    assert list(load_examples(path, split="test")) == ["q"]


# ---------------------------------------------------------------- bad input

BAD_FILES: dict[str, tuple[str, str | bytes | list[Any], list[str]]] = {
    "empty": ("x.jsonl", "", ["x.jsonl is empty", "Fill it"]),
    "blank lines only": ("x.jsonl", "\n \n", ["x.jsonl is empty"]),
    "empty list": ("x.json", "[]", ["x.json holds no rows", "Fill it"]),
    "header only": ("x.csv", "instruction,output\n", ["x.csv holds no rows"]),
    "broken line": ("x.jsonl", '{"a": 1}\n\n{"a": ', ["x.jsonl:3", "not valid JSON"]),
    "two values on a line": ("x.jsonl", '{"a": 1} {"b": 2}', ["x.jsonl:1", "Extra data"]),
    "broken list": ("x.json", '[\n{"a": 1},\n{"a" 2}]', ["x.json:3", "not valid JSON", "delimiter"]),
    "cut off list": ("x.json", '[\n{"a": 1},\n', ["x.json:3", "not valid JSON"]),
    "huge nesting": ("x.jsonl", "[" * 100_000, ["x.jsonl:1", "not valid JSON"]),
    "huge number": ("x.jsonl", '{"a": ' + "9" * 5000 + "}", ["x.jsonl:1"]),
    "one object": ("x.json", '{\n"data": [{}]\n}', ["x.json holds one JSON value", "list of objects"]),
    "row is a list": ("x.jsonl", [["a"]], ["x.jsonl:1 is ['a'], not an object", '{"field": "text"']),
    "row is text in a list": ("x.json", '["a"]', ["x.json row 1 is 'a', not an object"]),
    "not UTF-8": ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}', ["x.jsonl:2 is not UTF-8 (byte 0xe9)", "Save"]),
    "UTF-16": ("x.csv", "a,b".encode("utf-16"), ["x.csv is UTF-16", "Save it as UTF-8"]),
    "lone surrogate": ("x.jsonl", [{**ROW, "output": "\ud83d"}], ["x.jsonl:1", "'output'", "\\ud83d"]),
    "too few cells": ("x.csv", "instruction,output\na,b\na\n", ["x.csv:3 has 1 cells", "header has 2"]),
    "too many cells": ("x.csv", "instruction,output\na,b,c\n", ["x.csv:2 has 3 cells", "double quotes"]),
    "open quote": ("x.csv", 'instruction,output\n"a,b\n', ["x.csv:2 is not valid CSV"]),
    "repeated column": ("x.csv", "output,output\na,b\n", ["x.csv:1", "empty or repeated"]),
    "not Parquet": ("x.parquet", "PAR1 no", ["x.parquet is not a readable Parquet file"]),
    "other suffix": ("x.txt", "a", ["x.txt is a .txt file", ".json, .jsonl, .csv, .parquet"]),
    "no prompt field": ("x.jsonl", [{"q": "a", "a": "b"}], ["'q', 'a'", "Accepted", "prompt, completion"]),
    "no fields": ("x.jsonl", [{}], ["x.jsonl:1 has no fields", "Accepted"]),
    "semicolons": ("x.csv", "instruction;output\na;b\n", ["'instruction;output'", "Accepted"]),
    "no output": ("x.jsonl", [{"instruction": "a"}], ["the fields 'instruction' but no 'output'"]),
    "no completion": ("x.jsonl", [{"prompt": "a", "output": "b"}], ["but no 'completion'"]),
    "number as output": ("x.jsonl", [{**ROW, "output": 4}], ["'output' is 4 (a number)", "text: '4'"]),
    "list as output": ("x.json", [{**ROW, "output": ["b"]}], ["'output' is ['b'] (a list)", "Write text"]),
    "null as output": ("x.jsonl", [{**ROW, "output": None}], ["'output' is None (null)"]),
    "boolean as input": ("x.jsonl", [{**ROW, "input": True}], ["'input' is True (a boolean)"]),
    "object as prompt": ("x.jsonl", [{"prompt": {}, "completion": "a"}], ["'prompt' is {} (an object)"]),
    "null as instruction": ("x.jsonl", [{**ROW, "instruction": None}], ["'instruction' is None (null)"]),
    "empty output": ("x.jsonl", [ROW, {**ROW, "output": " "}], ["x.jsonl:2", "'output' is empty", "remove"]),
    "empty prompt": ("x.jsonl", [{**ROW, "instruction": ""}], ["'instruction' is empty"]),
    "list as label": ("x.jsonl", [{**ROW, "answer": ["A"]}], ["'answer' is ['A'] (a list)"]),
    "task is a number": ("x.jsonl", [{**ROW, "task": 3}], ["task column 'task' is 3 (a number)", "another"]),
    "task is empty": ("x.jsonl", [{**ROW, "task": " "}], ["task column 'task' is empty"]),
    "task in some rows": ("x.jsonl", [{**ROW, "task": "a"}, ROW], ["x.jsonl:2", "no task column 'task'"]),
    "messages as text": ("x.jsonl", [{"messages": "hi"}], ["'messages' is 'hi', not a list", "Accepted"]),
    "no messages": ("x.jsonl", [{"messages": []}], ["'messages' is [], not a list"]),
    "user last": ("x.jsonl", [{"messages": [TURN, TURN]}], ["last message is the user's", "assistant's"]),
    "answer alone": ("x.jsonl", [{"messages": [{**TURN, "role": "assistant"}]}], ["only message"]),
    "unknown role": ("x.jsonl", [{"messages": [{**TURN, "role": "human"}]}], ["messages[0]", "'human'"]),
    "turn without content": ("x.jsonl", [{"messages": [TURN, {"role": "user"}]}], ["messages[1]", "{role, "]),
    "content is a list": ("x.jsonl", [{"messages": [{**TURN, "content": [1]}]}], ["'content' is [1]"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_line_with_place_and_remedy(tmp_path: Path, case: str) -> None:
    name, content, parts = BAD_FILES[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_path_guesses_what_was_meant(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [ROW])
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist\. Did you mean .*/train\.jsonl\?"):
        load_examples(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"does not exist\. Give a file, a folder or a Hub id"):
        load_examples(tmp_path / "nowhere" / "x")


def test_mistyped_path_below_an_existing_folder_never_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train.jsonl", [ROW])
    with pytest.raises(DataError, match="data/trian does not exist"):
        load_examples("data/trian")


def test_folder_without_data_names_what_is_read(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "a")
    (tmp_path / "math").mkdir()
    with pytest.raises(
        DataError, match=r"no data files\. Supported: \.json, \.jsonl, \.csv, \.parquet, .* as \.gz too\.$"
    ):
        load_examples(tmp_path)


# ---------------------------------------------------------------- the Hub


def test_hub_failure_is_one_line_with_the_id(tmp_path: Path) -> None:
    code = (
        "from manylora.data import load_examples\n"
        "from manylora.errors import DataError\n"
        "try: load_examples('nobody-here/no-such-set:cfg')\n"
        "except DataError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("nobody-here/no-such-set:cfg is no path here and could not be loaded")
    assert result.stdout.count("\n") == 1
    assert "local file or folder" in result.stdout


def test_hub_splits_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def fetch(path: str, name: str | None = None) -> Any:  # stands for the download alone
        asked.append((path, name))
        rows = {"train": [ROW, ROW], "dev": [{**ROW, "input": None}], "test": [{**ROW, "output": ""}]}
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    assert [row.origin for row in load_examples("owner/set", split="train")["set"]] == [
        "owner/set train row 1",
        "owner/set train row 2",
    ]
    assert load_examples("owner/set:cfg", split="validation")["set"][0].input == ""
    with pytest.raises(DataError, match="owner/set test row 1: field 'output' is empty"):
        load_examples("owner/set", split="test")
    with pytest.raises(DataError, match=r"owner/set holds several splits \(train, validation, test\)"):
        load_examples("owner/set")
    assert asked[:2] == [("owner/set", None), ("owner/set", "cfg")]


# ---------------------------------------------------------------- the embedded suite and the data root


def test_embedded_suite_by_split() -> None:
    data = load_examples("embedded", split="test", limit=3)
    assert len(data) == 8
    assert all(len(rows) == 3 for rows in data.values())
    first = next(iter(data))
    assert list(load_examples("embedded", split="train", tasks=[first])) == [first]
    with pytest.raises(DataError, match=r"no task 'nonsense'\. Its tasks: "):
        load_examples("embedded", split="test", tasks=["nonsense"])
    with pytest.raises(DataError, match="several splits"):
        load_examples("embedded")


def test_the_room_imports_no_heavy_library() -> None:
    # The package's own __init__ registers with PEFT, so an empty one stands in for it here.
    code = (
        "import sys, types\n"
        "root = sys.modules['manylora'] = types.ModuleType('manylora')\n"
        "root.__path__ = [sys.argv[1]]\n"
        "import manylora.data\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    package = str(Path(errors.__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", code, package], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(("kind", "value"), [("date32", 2**31 - 1), ("duration", 2**62)])
def test_a_parquet_date_that_python_cannot_hold_is_one_line(kind: str, value: int, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    far = pa.array([value], type=pa.duration("s") if kind == "duration" else pa.date32())
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"], "when": far}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet is not a readable Parquet file"):
        load_examples(tmp_path / "rows.parquet")
