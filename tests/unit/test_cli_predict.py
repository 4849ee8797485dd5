"""`manylora predict --file`: which rows are read, and what is said of those that are not."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from manylora.cli.predict import _named_lines
from manylora.errors import DataError
from manylora.jobs.predict import parse_rows

ROW = json.dumps({"instruction": "why?"}).encode() + b"\n"


def read(file: Path | str) -> list[str]:
    source, lines = _named_lines(str(file))
    return [example.instruction for _, example in parse_rows(lines, source=source)]


def test_zipped_rows_are_read_as_those_of_data_are(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(ROW + b"\n" + ROW))
    assert read(tmp_path / "rows.jsonl.gz") == ["why?", "why?"]


@pytest.mark.parametrize(
    "raw",
    [gzip.compress(ROW * 99)[:-9], ROW, b"", gzip.compress(ROW)[:12] + b"\xff" * 30],
    ids=["cut", "plain", "empty", "garbage"],
)
def test_what_is_not_a_whole_gzip_file_is_said_to_be_none(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(raw)
    if not raw:
        assert read(tmp_path / "rows.jsonl.gz") == []
        return
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz is not a whole gzip file"):
        read(tmp_path / "rows.jsonl.gz")


def test_gzip_under_another_name_or_on_standard_input_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(ROW))
    with pytest.raises(DataError, match=r"rows\.jsonl:1 is not valid JSON .* It is gzip: name the file"):
        read(tmp_path / "rows.jsonl")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress(ROW))))
    with pytest.raises(DataError, match=r"standard input:1 is not valid JSON .* It is gzip"):
        read("-")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(ROW)))
    assert read("-") == ["why?"]


@pytest.mark.parametrize(
    "line", [b"[" * 9999, b'{"a": ' + b"9" * 9999 + b"}", b'{"a": "\\ud800"}', b"\xff", b"{"]
)
def test_a_line_that_is_not_bounded_is_one_line(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(ROW + line + b"\n")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2 is not valid JSON \(.*\); write one object"
    ) as caught:
        read(tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value)


def test_a_line_without_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.jobs.predict.MOST_BYTES", 1000)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b" " * 10**6))
    with pytest.raises(DataError, match="a line of more than 1,000 bytes"):
        read(tmp_path / "rows.jsonl.gz")
