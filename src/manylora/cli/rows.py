"""Rows as the model gets them: their tokens as text, and which of them carry loss (`manylora train --show-rows`)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from manylora.cli.tables import console
from manylora.data import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from manylora.data import Encoded
    from manylora.training import Prepared, TaskKind

_LEARNT = "bold green underline"
_OPEN, _CLOSE = "[[", "]]"
"""Around what carries loss, where there is no colour to say it."""


def print_rows(prepared: Prepared, count: int) -> None:
    """The first `count` training rows of each task, special tokens included."""
    out = console()
    coloured = out.is_terminal and out.color_system is not None and not out.no_color
    marked = "in colour" if coloured else f"in {_OPEN} {_CLOSE}"
    out.print(f"training rows as the model gets them; what carries loss stands {marked}", soft_wrap=True)
    for task in prepared.train:
        for number, row in enumerate(task.rows[:count], start=1):
            text, learnt = row_text(row, prepared.kind.tokenizer, coloured=coloured)
            facts = [f"{len(row.input_ids)} tokens", _target(row, prepared.kind, learnt)]
            facts += ["cut"] if row.truncated else []
            place = row.origin or f"row {number}"
            out.print(f"\n--- {task.name}: {place} ({', '.join(facts)})", soft_wrap=True)
            out.print(text, soft_wrap=True)


def _target(row: Encoded, kind: TaskKind, learnt: int) -> str:
    label = kind.answer_label(row)
    return f"{learnt} with loss" if label is None else f"label {label!r}"


def row_text(row: Encoded, tokenizer: PreTrainedTokenizerBase, *, coloured: bool) -> tuple[Text, int]:
    """The tokens of a row as text, those that carry loss marked, and how many they are."""
    whole = len(row.labels) == len(row.input_ids)  # a classifier's row has one label
    learnt = [whole and label != IGNORED_LABEL for label in (row.labels if whole else row.input_ids)]
    text = Text()
    for own, piece in _pieces(row.input_ids, learnt, tokenizer):
        if coloured:
            text.append(piece, style=_LEARNT if own else "")
        else:
            text.append(f"{_OPEN}{piece}{_CLOSE}" if own else piece)
    return text, sum(learnt)


def _pieces(
    ids: Sequence[int], learnt: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[bool, str]]:
    """The text in pieces that are learnt as a whole, or not at all."""
    pieces, place, before = [], 0, ""
    for own, run in groupby(learnt):
        place += len(list(run))
        # From the beginning each time: some tokenizers drop the blank before the first word of what they decode.
        text = str(tokenizer.decode(list(ids[:place]), skip_special_tokens=False))
        pieces.append((own, _printable(text[len(before) :])))
        before = text
    return pieces


def _printable(text: str) -> str:
    """The text without control characters, which would move a terminal's cursor."""
    return "".join(
        repr(char)[1:-1] if unicodedata.category(char) == "Cc" and char not in "\n\t" else char
        for char in text
    )
