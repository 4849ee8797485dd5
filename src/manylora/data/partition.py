"""Which client holds which rows: one data set dealt out to the clients of a federated run.

A partition is a pure function of the rows and its arguments, so every machine that holds the data can work out
its own share.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from manylora.data.examples import Example, TaskData
from manylora.errors import ConfigError, DataError

Partition: TypeAlias = Literal["task", "iid", "dirichlet"]

PARTITIONS: tuple[Partition, ...] = ("task", "iid", "dirichlet")
"""How rows can be dealt out."""

_TRIES = 200
"""Draws of a Dirichlet partition until every client has a row."""


def partition(
    data: TaskData, *, by: Partition = "task", clients: int | None = None, alpha: float = 0.5, seed: int = 0
) -> dict[str, dict[str, list[Example]]]:
    """Deal the rows of `data` out to clients; each row goes to exactly one.

    - "task": the tasks go round; with more clients than tasks, the clients of one task split its rows evenly.
      As many clients as tasks (the default) are named after their tasks.
    - "iid": all rows are shuffled and dealt out evenly.
    - "dirichlet": each task's rows are split by shares drawn from Dirichlet(alpha) over the clients (Hsu et al.
      2019, arXiv 1909.06335, over tasks in place of classes); a small alpha leaves each client few tasks. Drawn
      anew until every client has a row.

    Args:
        data: task to rows.
        by: one of `PARTITIONS`.
        clients: number of clients. Default: one per task.
        alpha: concentration of "dirichlet".
        seed: of the shuffles and draws.

    Returns:
        Client name to its rows by task; within a task in the order of `data`. No list is empty.

    Raises:
        ConfigError: an argument cannot be.
        DataError: there are too few rows for so many clients.
    """
    number = len(data) if clients is None else clients
    if by not in PARTITIONS:
        raise ConfigError(f"partition {by!r} is unknown; choose from {', '.join(PARTITIONS)}.")
    if number < 1:
        raise ConfigError(f"clients is {number}; give 1 or more.")
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"dirichlet alpha {alpha} must be above 0 and finite, such as 0.5.")
    rows = sum(map(len, data.values()))
    if rows < number:
        raise DataError(f"{rows} training rows cannot be dealt out to {number} clients; give more rows.")
    deal = {"task": _by_task, "iid": _iid, "dirichlet": lambda *given: _dirichlet(*given, alpha=alpha)}[by]
    shares = deal(data, number, random.Random(f"{seed}:partition:{by}:{number}"))
    names = _names(data, by, number)
    parts = {name: _pick(data, share) for name, share in zip(names, shares, strict=True)}
    if empty := [name for name, part in parts.items() if not part]:
        raise DataError(
            f"{len(empty)} of {number} clients would have no row (such as {empty[0]}); take fewer clients."
        )
    return parts


_Share: TypeAlias = Mapping[str, Sequence[int]]
"""Task to positions of rows."""


def _names(data: TaskData, by: Partition, number: int) -> list[str]:
    if by == "task" and number == len(data):
        return list(data)
    width = max(3, len(str(number)))
    return [f"client-{index + 1:0{width}d}" for index in range(number)]


def _pick(data: TaskData, share: _Share) -> dict[str, list[Example]]:
    return {task: [data[task][i] for i in sorted(share[task])] for task in data if share.get(task)}


def _by_task(data: TaskData, number: int, generator: random.Random) -> list[_Share]:
    tasks = list(data)
    if number <= len(tasks):
        return [{task: range(len(data[task])) for task in tasks[k::number]} for k in range(number)]
    shares: list[_Share] = [{} for _ in range(number)]
    for index, task in enumerate(tasks):
        holders = range(index, number, len(tasks))
        order = generator.sample(range(len(data[task])), len(data[task]))
        for place, client in enumerate(holders):
            shares[client] = {task: order[place :: len(holders)]}
    return shares


def _iid(data: TaskData, number: int, generator: random.Random) -> list[_Share]:
    every = [(task, i) for task, rows in data.items() for i in range(len(rows))]
    generator.shuffle(every)
    return [_grouped(every[k::number]) for k in range(number)]


def _dirichlet(data: TaskData, number: int, generator: random.Random, *, alpha: float) -> list[_Share]:
    for _ in range(_TRIES):
        dealt: list[list[tuple[str, int]]] = [[] for _ in range(number)]
        for task, rows in data.items():
            weights = [generator.gammavariate(alpha, 1.0) for _ in range(number)]
            if not sum(weights) > 0:  # a tiny alpha underflows: all to one client, as in its limit
                weights[generator.randrange(number)] = 1.0
            owners = generator.choices(range(number), weights, k=len(rows))
            for i, owner in enumerate(owners):
                dealt[owner].append((task, i))
        if all(dealt):
            return [_grouped(rows) for rows in dealt]
    raise DataError(
        f"{_TRIES} draws from Dirichlet({alpha:g}) left one of {number} clients without rows each time; "
        "take fewer clients or a larger alpha."
    )


def _grouped(rows: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for task, i in rows:
        grouped.setdefault(task, []).append(i)
    return grouped
