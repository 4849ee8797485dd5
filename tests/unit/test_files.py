"""The files room: bounded reading, whole and unlinked writing, checksums, settings as strict as the command line's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.errors import ConfigError, RunError
from manylora.files import (
    COMPLETE,
    append_line,
    build_config,
    changed_file,
    check_noted,
    check_values,
    dump_yaml,
    folder_sums,
    make_folder,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
    refuse_links,
    settings,
    write_json,
    write_text,
)

# ---- reading


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 100 + "]" * 100, "nested more than 64"),
        ("9" * 5000, "digits"),
        ("9" * 400, "integer of"),
        ("[NaN]", "nan"),
        ("-Infinity", "inf"),
        ("1e999", "inf"),
        (r'{"a": "\ud800"}', r"\\ud800"),
        (r'{"\udfff": 1}', r"\\udfff"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json_that_is_not_bounded_is_a_value_error(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new}\n  <<: [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "expands to more"),
        (MERGES, "merge keys expand"),
        ("&a [*a]", "nested more than"),
        ("[" * 50_000, "nested too deeply"),
        ("a: 2020-01-01", "holds a date"),
        ("a: !!set {b}", "holds a set"),
        ("a: " + "9" * 5000, "digits"),
        ("a: [", "no YAML"),
        ("a: 1\nb: 2\na: 3", "'a' stands twice"),
        ("a: !!python/object/apply:os.system [ls]", "no YAML"),
        ("a: 2020-13-45", "month"),
        ("? [a]\n: b", "no YAML"),
        ('a: "\\uDC00"', "half of a character"),
    ],
)
def test_yaml_that_is_not_bounded_is_a_value_error(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


def test_aliases_and_merges_of_ordinary_size_are_read() -> None:
    text = "common: &c {r: 8, alpha: 16}\none:\n  <<: *c\n  r: 4\ntwo: *c"
    assert parse_yaml(text) == {
        "common": {"r": 8, "alpha": 16},
        "one": {"r": 4, "alpha": 16},
        "two": {"r": 8, "alpha": 16},
    }


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc1e-.", max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text("abc", min_size=1), plain, max_size=4))
def test_what_is_dumped_is_read_back(values: dict[str, Any]) -> None:
    assert parse_yaml(dump_yaml(values)) == values


def test_numbers_may_be_written_as_people_write_them() -> None:
    assert parse_yaml("[1e-3, 1.5E+2, .5, 3]") == [0.001, 150.0, 0.5, 3]
    assert parse_yaml(dump_yaml({"model": "1e-3"})) == {"model": "1e-3"}
    assert parse_yaml("[0, -0, +3, 1_000, 1., 1_0.5, -.5, .5e3]") == [0, 0, 3, 1000, 1.0, 10.5, -0.5, 500.0]
    assert parse_yaml("[.inf, -.INF]") == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "text", ["1:30", "190:20:30.5", "0x10", "-0x1F", "0b11", "010", "0o17", "1e-3x", "+", "1e"]
)
def test_a_text_that_yaml_1_1_takes_for_another_number_is_a_text(text: str) -> None:
    assert parse_yaml(f"limit: {text}") == {"limit": text}
    assert parse_yaml(dump_yaml({"limit": text})) == {"limit": text}
    with pytest.raises(ConfigError, match=rf"count is '{re.escape(text)}', not a whole number"):
        build_config(Settings, parse_yaml(f"count: {text}"), source="x.yaml", remedy="mend it")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(raw)
    for read in (read_json, read_yaml):
        with contextlib.suppress(ValueError):
            read(path)


# ---- writing


def other_file(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere.txt"
    path.write_text("precious", encoding="utf-8")
    return path


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link(tmp_path: Path, link: Any) -> None:
    mine, run = other_file(tmp_path), tmp_path / "run"
    run.mkdir()
    link(mine, run / "state.json.partial")
    link(mine, run / "state.json")
    write_json(run / "state.json", {"state": "running"})
    assert read_json(run / "state.json") == {"state": "running"}
    assert not (run / "state.json").is_symlink()
    link(mine, run / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl is a link"):
        append_line(run / "metrics.jsonl", "{}")
    assert mine.read_text(encoding="utf-8") == "precious"


def test_a_pipe_or_folder_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "a.partial")
    with pytest.raises(RunError, match="no plain file"):
        append_line(tmp_path / "metrics.jsonl", "{}")
    write_text(tmp_path / "a", "text")
    (tmp_path / "b.partial").mkdir()
    write_text(tmp_path / "b", "text")
    assert (
        (tmp_path / "a").read_text(encoding="utf-8") == (tmp_path / "b").read_text(encoding="utf-8") == "text"
    )


def test_links_that_leave_a_folder_are_named_and_others_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "deep" / "er").mkdir(parents=True)
    (run / "file").write_text("x", encoding="utf-8")
    (run / "deep" / "inside").symlink_to("../file")
    (run / "itself").symlink_to("itself")
    refuse_links(run)
    (run / "deep" / "er" / "figures").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(RunError, match=r"er/figures is a link that leads out"):
        refuse_links(run)
    with pytest.raises(RunError, match="figures is a link"):
        make_folder(run / "deep" / "er" / "figures")


# ---- checksums


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("one", "sub/two"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    sums = folder_sums(tmp_path)
    assert set(sums) == {"one", "sub/two"}
    assert changed_file(tmp_path, sums) is None
    (tmp_path / "sub" / "two").write_text("twp", encoding="utf-8")
    assert changed_file(tmp_path, sums) == "sub/two"
    (tmp_path / "one").unlink()
    assert changed_file(tmp_path, sums) == "one"


def test_a_noted_file_is_checked_and_one_without_a_note_is_not(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter" / "weights"
    adapter.parent.mkdir()
    adapter.write_bytes(b"1234")
    check_noted(adapter)
    write_json(tmp_path / "state.json", {"files": folder_sums(tmp_path)})
    check_noted(adapter)
    adapter.write_bytes(b"1235")
    with pytest.raises(RunError, match=r"weights is broken or was changed.*state\.json"):
        check_noted(adapter)
    adapter.unlink()
    with pytest.raises(RunError, match="weights is missing"):
        check_noted(adapter)
    write_json(tmp_path / "state.json", {"files": {}})
    check_noted(adapter)
    write_text(tmp_path / "state.json", "{")
    check_noted(adapter)  # another program's: nothing beside it is a run's


def damage_notes(notes: Path, text: str | None) -> None:
    if text is None:
        notes.unlink()
    else:
        write_text(notes, text)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"files": []}', '{"files": null}', '{"files": {"x": 1}}']
)
def test_where_the_notes_are_lost_nothing_is_read_on_trust(tmp_path: Path, text: str | None) -> None:
    run = tmp_path / "run"
    client, checkpoint = run / "clients" / "ada", run / "checkpoints" / "checkpoint-2"
    weights = [run / "adapter" / "weights", client / "adapter" / "weights", checkpoint / "weights"]
    for path in (*weights, run / "config.yaml", run / "environment.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234")
    for folder in (client, checkpoint):
        write_json(folder / COMPLETE, {"files": folder_sums(folder)})
    names = ["config.yaml", "adapter/weights", f"clients/ada/{COMPLETE}"]
    write_json(run / "state.json", {"files": folder_sums(run, names)})
    shutil.copytree(run, tmp_path / "whole")
    (tmp_path / "link").symlink_to(run / "adapter")
    for path in weights:
        check_noted(path)

    damage_notes(run / "state.json", text)
    for path in (*weights[:2], tmp_path / "link" / "weights", run / "config.yaml"):
        with pytest.raises(
            RunError, match=r"state\.json is missing or broken .* Put a copy of it back, or copy"
        ):
            check_noted(path)
    shutil.copytree(run / "adapter", tmp_path / "alone")
    check_noted(tmp_path / "alone" / "weights")
    write_json(run / "state.json", {"state": "finished"})  # of an earlier version
    check_noted(weights[0])

    shutil.rmtree(run)
    shutil.copytree(tmp_path / "whole", run)
    for folder in (client, checkpoint):
        damage_notes(folder / COMPLETE, text)
    for path in weights[1:]:
        with pytest.raises(RunError, match=r"complete\.json is (missing|broken)"):
            check_noted(path)
    check_noted(weights[0])


def test_the_files_of_a_checkpoint_and_of_a_client_are_checked(tmp_path: Path) -> None:
    for folder in (tmp_path / "checkpoint-3", tmp_path / "ada" / "adapter"):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"1234")
        write_json(tmp_path / folder.relative_to(tmp_path).parts[0] / COMPLETE, {})
    checkpoint, client = tmp_path / "checkpoint-3", tmp_path / "ada"
    for folder, name in ((checkpoint, "weights"), (client, "adapter/weights")):
        check_noted(folder / name)  # of an earlier version
        write_json(folder / COMPLETE, {"files": folder_sums(folder, [name])})
        check_noted(folder / name)
        (folder / name).write_bytes(b"1235")
        with pytest.raises(RunError, match=r"weights is broken or was changed.*complete\.json"):
            check_noted(folder / name)


# ---- settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    kind: Literal["a", "b"] = "a"
    count: int = 1
    rate: float | None = None
    names: list[str] | str | None = None
    flag: bool = False
    path: str = "here"
    free: str = ""

    def __post_init__(self) -> None:
        check_values(self)
        if self.count < 1:
            raise ConfigError(f"count is {self.count}; give 1 or more.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "c"}, "kind is 'c', not one of 'a', 'b'; mend it"),
        ({"count": "1"}, "count is '1', not a whole number"),
        ({"count": True}, "count is True, not a whole number"),
        ({"count": 1.0}, r"count is 1\.0, not a whole number"),
        ({"count": None}, "count is null"),
        ({"count": [1]}, r"count is \[1\]"),
        ({"count": 0}, "count is 0; give 1 or more"),
        ({"count": 10**16}, "count is 1000.*at most"),
        ({"count": 10**5000}, "count is an integer of"),
        ({"rate": float("inf")}, "rate is inf, not a finite number or null"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": 1e300}, r"rate is 1e\+300; give a finite number"),
        ({"names": [1]}, r"names is \[1\], not a list of texts or text or null"),
        ({"flag": 1}, "flag is 1, not true or false"),
        ({"path": ""}, "path is empty"),
        ({"path": "a\udcff"}, r"path is 'a\\udcff', which holds"),
        ({"names": ["a\0"]}, r"names is 'a\\x00'"),
        ({"cuont": 2}, "there is no setting 'cuont'; did you mean count"),
        ({1: 2}, "there is no setting 1"),
    ],
)
def test_values_from_a_file_are_checked_like_given_ones(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml: {message}") as caught:
        build_config(Settings, values, source="run.yaml", remedy="mend it")
    assert "\n" not in str(caught.value)


def test_good_values_are_taken_as_they_are() -> None:
    values = {"kind": "b", "count": 3, "rate": 2, "names": ["x"], "flag": True, "free": ""}
    assert build_config(Settings, values, source="f", remedy="m") == Settings(**values)


@given(st.dictionaries(st.sampled_from([*Settings.__dataclass_fields__, "other"]), plain, max_size=3))
def test_any_values_give_settings_or_one_line(values: dict[str, Any]) -> None:
    found, error = None, ""
    try:
        found = build_config(Settings, json.loads(json.dumps(values)), source="f", remedy="m")
    except ConfigError as caught:
        error = str(caught)
    assert (found is None) == bool(error)
    assert "\n" not in error
    assert found is None or {key: getattr(found, key) for key in values} == values


@dataclass(frozen=True, kw_only=True)
class Sizes(settings.Settings):
    width: settings.Count | None = None
    share: Annotated[settings.Positive, settings.Bound(lambda value: value <= 1, "at most 1")] = 1.0


@dataclass(frozen=True, kw_only=True)
class Ends(settings.Settings):
    start: settings.CountOrZero = 0
    end: settings.CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start > self.end:
            raise ConfigError(f"start is {self.start}; give at most end, {self.end}.")


@dataclass(frozen=True, kw_only=True)
class Both(Sizes, Ends):
    width: settings.Count = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width is 0; give a value above 0"),
        ({"share": 0.0}, "share is 0.0; give a value above 0"),
        ({"share": 1.5}, "share is 1.5; give at most 1"),
        ({"end": -1}, "end is -1; give 0 or more"),
        ({"start": 2}, "start is 2; give at most end"),
        ({"share": float("nan")}, "share is nan"),
    ],
)
def test_each_group_checks_its_own_fields_wherever_it_is_part_of(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Both(**values)


def test_the_part_of_one_configuration_that_another_has() -> None:
    both = Both(start=1, end=2)
    assert both.to_dict() == {"start": 1, "end": 2, "width": 3, "share": 1.0}
    assert settings.settings_of(both, Ends) == Ends(start=1, end=2)
    assert list(settings.field_types(Both).items()) == [
        ("start", int), ("end", int), ("width", int), ("share", float),
    ]  # fmt: skip
