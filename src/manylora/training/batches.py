"""From examples to padded batches: encoded rows, their order over a whole run, and the collator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from manylora.data import Encoded, LossOn, TaskData, encode
from manylora.errors import RoutingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedRows(Dataset):
    """Encoded rows in the order in which they are read; one row may stand in the order many times.

    Args:
        rows: every distinct row.
        tasks: index of each row's task.
        order: indices into `rows`; by default each once.
        empty: rows of one token without loss to add at the end.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        tasks: Sequence[int],
        order: Sequence[int] | None = None,
        *,
        empty: int = 0,
    ):
        self.rows, self.tasks = rows, tasks
        self.order = list(range(len(rows))) if order is None else order
        self.empty = empty

    @classmethod
    def of(
        cls,
        tasks: Sequence[EncodedTask],
        names: Sequence[str],
        order: Sequence[int] | None = None,
        *,
        empty: int = 0,
    ) -> EncodedRows:
        """The rows of all `tasks` laid end to end; a task's index is its place in `names`."""
        rows = [row for task in tasks for row in task.rows]
        return cls(rows, [names.index(task.name) for task in tasks for _ in task.rows], order, empty=empty)

    def __len__(self) -> int:
        return len(self.order) + self.empty

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position >= len(self.order):
            return {"input_ids": self.rows[0].input_ids[:1], "labels": [-100], "task": 0, "row": -1}
        index = self.order[position]
        row = self.rows[index]
        return {"input_ids": row.input_ids, "labels": row.labels, "task": self.tasks[index], "row": index}

    def origin(self, row: int) -> str:
        """Where a row came from, by the "row" of a batch."""
        return (self.rows[row].origin or f"row {row}") if row >= 0 else "an empty row"


def longest_first(order: Sequence[int], lengths: Sequence[int], *, step: int) -> list[int]:
    """The same rows in every optimizer step, by falling length, so that rows of like length share a forward pass.

    Args:
        order: indices of rows over a whole run.
        lengths: tokens of each row.
        step: rows per optimizer step.
    """
    return [
        row
        for start in range(0, len(order), step)
        for row in sorted(order[start : start + step], key=lambda row: -lengths[row])
    ]


def rows_of_a_pass(order: Sequence[int], lengths: Sequence[int], *, step: int, overhead: float) -> int:
    """How many rows should share a forward pass so that all of them take the least time.

    Few rows of like length have little padding, but every pass costs something by itself.

    Args:
        order: see `longest_first`, as it orders.
        lengths: tokens of each row.
        step: rows per optimizer step.
        overhead: what a pass costs by itself, in tokens.

    Returns:
        A divisor of `step`.
    """

    def cost(rows: int) -> float:
        starts = range(0, len(order), rows)
        return sum(lengths[order[start]] * len(order[start : start + rows]) + overhead for start in starts)

    return min((rows for rows in range(step, 0, -1) if step % rows == 0), key=cost)


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pad rows on the right to the longest of a batch.

    A batch holds `input_ids`, `attention_mask` and `labels`, each (B, T), and (B,) each `task`, the index of a row's
    task, and `row`, its place in `EncodedRows.rows`; labels are -100 on the prompt and on padding.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and stack; see the class."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*v, *([fill] * (longest - len(v)))] for v in values], dtype=torch.long)

        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], -100),
            "task": torch.tensor([row["task"] for row in rows], dtype=torch.long),
            "row": torch.tensor([row.get("row", -1) for row in rows], dtype=torch.long),
        }


_ANSWER_MARGIN = 8
"""Tokens that an answer may be longer than the longest training answer of its task."""


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """One task's encoded rows and what a plan wants to know of them."""

    name: str
    rows: list[Encoded]

    @property
    def truncated(self) -> float:
        """Share of rows whose prompt was cut."""
        return sum(row.truncated for row in self.rows) / max(1, len(self.rows))

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((len(row.input_ids) for row in self.rows), default=0)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer, its end token included."""
        return max((len(row.input_ids) - row.prompt_length for row in self.rows), default=0)

    def answer_limit(self, *, fixed: int | None, context: int | None) -> int:
        """Tokens that a generated answer to a row of this task may have.

        Args:
            fixed: what the user says, for all tasks.
            context: tokens that the model reads; None where nothing says.
        """
        # Half of the context: one long training answer must not take the prompts' room.
        return fixed or min(self.longest_answer + _ANSWER_MARGIN, (context or 2**20) // 2)


def encode_tasks(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context_length: int | None,
    loss_on: LossOn = "answer",
    vocabulary: int | None = None,
) -> list[EncodedTask]:
    """Encode every row of every task, in order.

    Raises:
        DataError: an answer does not fit the model's context, or a token has no row in the model (see
            `manylora.data.encode`).
    """
    return [
        EncodedTask(
            name=task,
            rows=[
                encode(
                    example,
                    tokenizer,
                    max_length=max_length,
                    context_length=context_length,
                    loss_on=loss_on,
                    vocabulary=vocabulary,
                )
                for example in examples
            ],
        )
        for task, examples in data.items()
    ]


def data_fingerprint(tasks: Sequence[EncodedTask], *, mark: Callable[[Encoded], object]) -> str:
    """Short hash of the encoded rows, so that a resumed run notices changed data.

    Args:
        tasks: the rows.
        mark: what of a row counts besides its tokens.
    """
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(task.name.encode())
        for row in task.rows:
            digest.update(repr((row.input_ids, mark(row))).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class ExpertCollator:
    """Let another library's collator carry each row's expert to a task router, as `expert_ids`, (B,).

    For trainers outside this package, such as TRL's; with `remove_unused_columns=False`, which else drops the column.

    Args:
        collator: makes a batch of rows, one row of the batch per row (no packing).
        column: where a row says which expert is its own.

    Raises:
        RoutingError: a row has no such column, or the collator has packed rows together.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    column: str = "expert_ids"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate the rows without the column, then add it; see the class."""
        for row in rows:
            if self.column not in row:
                raise RoutingError(
                    f"A row has no column {self.column!r}, it has {sorted(row)}; add one to the data set and set "
                    "remove_unused_columns=False."
                )
        ids = torch.tensor([row[self.column] for row in rows], dtype=torch.long)
        batch = self.collator([{k: v for k, v in row.items() if k != self.column} for row in rows])
        count = batch["input_ids"].shape[0]
        if count != len(rows):
            raise RoutingError(
                f"The collator made {count} rows of {len(rows)} examples; turn packing and padding-free batches off "
                "under the task router."
            )
        return {**batch, "expert_ids": ids}
