"""Rows are dealt out once each, by seed, and as the named distribution says."""

from __future__ import annotations

from typing import Any

import pytest

from manylora.data import Example, partition
from manylora.errors import ConfigError, DataError


def data(**sizes: int) -> dict[str, list[Example]]:
    return {
        task: [Example(task=task, instruction=f"{task} {i}", output=str(i)) for i in range(size)]
        for task, size in sizes.items()
    }


def flat(parts: dict[str, dict[str, list[Example]]]) -> list[str]:
    return sorted(row.instruction for part in parts.values() for rows in part.values() for row in rows)


@pytest.mark.parametrize("by", ["task", "iid", "dirichlet"])
@pytest.mark.parametrize("clients", [1, 2, 3, 7])
def test_every_row_has_one_client(by: Any, clients: int) -> None:
    rows = data(a=20, b=9, c=40)
    parts = partition(rows, by=by, clients=clients, seed=4)
    assert len(parts) == clients
    assert flat(parts) == sorted(row.instruction for part in rows.values() for row in part)
    for part in parts.values():
        assert part
        for task, own in part.items():
            positions = [rows[task].index(row) for row in own]
            assert positions == sorted(positions)
            assert positions
    assert partition(rows, by=by, clients=clients, seed=4) == parts
    if by != "task" and clients > 1:
        assert partition(rows, by=by, clients=clients, seed=5) != parts


def test_one_client_per_task_by_default() -> None:
    parts = partition(data(verbs=3, nouns=2))
    assert {name: list(part) for name, part in parts.items()} == {"verbs": ["verbs"], "nouns": ["nouns"]}


def test_more_clients_than_tasks_split_a_task_evenly() -> None:
    parts = partition(data(a=10, b=4), clients=5)
    sizes = [{task: len(rows) for task, rows in part.items()} for part in parts.values()]
    assert sizes == [{"a": 4}, {"b": 2}, {"a": 3}, {"b": 2}, {"a": 3}]


def test_iid_parts_have_one_size_and_all_tasks() -> None:
    parts = partition(data(a=300, b=300), by="iid", clients=6)
    assert {sum(map(len, part.values())) for part in parts.values()} == {100}
    assert all(35 <= len(part["a"]) <= 65 for part in parts.values())


def test_a_small_alpha_concentrates() -> None:
    def largest_share(alpha: float) -> float:
        parts = partition(data(a=400, b=400, c=400), by="dirichlet", clients=4, alpha=alpha, seed=1)
        return max(len(part.get("a", ())) for part in parts.values()) / 400

    assert largest_share(100.0) < 0.35
    assert largest_share(0.1) > 0.6


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"clients": 0}, ConfigError),
        ({"by": "region"}, ConfigError),
        ({"by": "dirichlet", "alpha": 0.0}, ConfigError),
        ({"by": "iid", "clients": 8}, DataError),
        ({"clients": 6}, DataError),
        ({"by": "dirichlet", "clients": 7, "alpha": 1e-3}, DataError),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        partition(data(a=5, b=2), **arguments)
