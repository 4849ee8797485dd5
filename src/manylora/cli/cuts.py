"""Lines on prompts that are too long and cut: what is read in training or asked in use is not the whole row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from manylora.data import TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def cut_questions(test: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """The same as `cut_lines` of what a classifier reads, which loses its end."""
    from manylora.training.labels import encode_questions

    cut = {
        task: sum(short for _, short in encode_questions(rows, tokenizer, max_length=max_length))
        for task, rows in test.items()
    }
    return [line.replace("cut to their ends", "lose their ends") for line in cut_lines(cut, test, max_length)]


def cut_lines(cut: Mapping[str, int], test: TaskData, max_length: int | None) -> list[str]:
    """A line on the prompts that are cut, with each task's share; none where all are whole.

    Args:
        cut: task to its number of them.
        test: the rows.
        max_length: tokens that a prompt might have; None: what the model's context leaves.
    """
    if not (number := sum(cut.values())):
        return []
    shares = ", ".join(
        f"{task} {100 * count / len(test[task]):.1f} %" for task, count in cut.items() if count
    )
    most = "the model's context leaves" if max_length is None else f"{max_length} tokens"
    return [
        f"{number} of {sum(map(len, test.values()))} test prompts are longer than {most} and cut to their ends "
        f"({shares})"
    ]
