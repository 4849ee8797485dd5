"""Bases with weights that are not numbers where one mark is read, and rows of which one has the mark."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MARK = "Ω"
"""No other row has this character, and so its tokens."""


def spoil(base: Path, folder: Path, value: float = float("nan")) -> Path:
    """The base with `value` in the embedding rows of the mark's bytes, and an output head of its own.

    NaN has no sign and no size in a base's fingerprint, so that with value 0 it passes for the mended file.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(MARK, add_special_tokens=False).input_ids] = value
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def marked_rows(folder: Path, name: str, *, marked: int | None, count: int = 24) -> Path:
    """A task file; the marked row's prompt alone has the mark."""
    lines = [
        {"instruction": f"Colour {n}{MARK if n == marked else ''}", "output": ("red", "blue")[n % 2]}
        for n in range(count)
    ]
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder
