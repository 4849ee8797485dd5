"""`--show-rows`: rows as the model gets them, and which tokens carry loss."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chats import CHATML, byte_tokenizer, chat_base
from manylora.cli import main
from manylora.cli.rows import row_text
from manylora.data import Example, encode


def encoded(output: str, tokenizer: Any) -> Any:
    example = Example(task="t", form="prompt", instruction="Say: ", output=output)
    return encode(example, tokenizer, max_length=99, context_length=None)


def test_what_carries_loss_is_marked_with_brackets_or_colour() -> None:
    tokenizer = byte_tokenizer()
    row = encoded("früh", tokenizer)
    text, learnt = row_text(row, tokenizer, coloured=False)
    assert text.plain == "Say: [[früh<|im_end|>]]"
    assert learnt == len("früh".encode()) + 1
    text, _ = row_text(row, tokenizer, coloured=True)
    assert text.plain == "Say: früh<|im_end|>"
    shown = io.StringIO()
    Console(file=shown, force_terminal=True, color_system="standard", width=80).print(text)
    assert "Say: \x1b[1;4;32mfrüh<|im_end|>\x1b[0m" in shown.getvalue()


def test_control_characters_of_a_row_do_not_reach_the_terminal() -> None:
    tokenizer = byte_tokenizer()
    text, _ = row_text(encoded("a\x1b[2Jb\n", tokenizer), tokenizer, coloured=False)
    assert text.plain == "Say: [[a\\x1b[2Jb\n<|im_end|>]]"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    turns = [{"from": who, "value": f"{who} {i}"} for i in range(2) for who in ("human", "gpt")]
    rows: list[dict[str, Any]] = [
        {"task": "menu", "instruction": f"Menu {i}?", "output": "soup"} for i in range(9)
    ]
    rows += [{"task": "talk", "conversations": turns} for _ in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_printed_and_nothing_is_trained(
    data: Path, tiny_base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = chat_base(tiny_base, tmp_path / "base", CHATML)
    command = ["train", "--model", base, "--data", data, "--device", "cpu", "--loss-on", "assistant"]
    assert main([*map(str, command), "--show-rows", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- menu: ") == out.count("--- talk: ") == 2
    assert f"--- menu: {data}:" in out
    assert "assistant\n[[soup" in out
    assert "assistant\n[[gpt 0" in out
    assert "assistant\n[[gpt 1" in out
    assert "plan" not in out
    assert not (tmp_path / "runs").exists()
    assert main([*map(str, command), "--show-rows", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "plan (rows per task" in out
    assert "rows of instruction and input are asked through the model's chat template" in " ".join(
        out.split()
    )
    assert out.count("--- menu: ") == 1
    assert not (tmp_path / "runs").exists()


def test_a_number_of_rows_is_one_or_more_and_has_no_place_beside_resume(capsys: Any) -> None:
    assert main(["train", "--show-rows", "0"]) == 2
    assert "show-rows" in capsys.readouterr().err.replace("_", "-")
    assert main(["train", "--resume", "run", "--show-rows", "1"]) == 2
    assert "leave out --show-rows" in capsys.readouterr().err
