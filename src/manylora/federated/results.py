"""What a federated run found, read from its folder: personal models, rounds, what travelled, and their tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from manylora.errors import RunError
from manylora.evaluation import ClientScores, Scores, delta_m, read_client_scores
from manylora.files import NanFloat, Record, check_noted, check_record, parse_json, reason
from manylora.table import Column, Table, Value

_KIB, _MIB = 1024.0, 1024.0**2
_KIB_COLUMNS = tuple(Column(name=f"KiB {way} a round", digits=1) for way in ("up", "down"))


class Round(Record):
    """One line of a federated run's metrics.jsonl; objects are by client."""

    step: int
    """Number of the round, from 1."""
    loss: float | None = None
    """Mean over the clients that counted, weighted by their rows."""
    update_norm: float | None = None
    """Norm of what is shared after the round minus before it."""
    asked: int | None = None
    """Clients that were asked."""
    up: dict[str, int] = Field(default_factory=dict)
    """Bytes of the answers that counted."""
    down: dict[str, int] = Field(default_factory=dict)
    losses: dict[str, float] = Field(default_factory=dict)
    shares: dict[str, float] = Field(default_factory=dict)
    """Of the round's change."""
    refused: dict[str, str] = Field(default_factory=dict)
    """Why an answer did not count."""


class _Sent(Round):
    """A line that must say what travelled."""

    up: dict[str, int]
    down: dict[str, int]
    loss: NanFloat = math.nan


@dataclass(frozen=True, kw_only=True)
class FederatedResult:
    """Personal models on their own tasks, and the rounds that led there."""

    clients: Mapping[str, Scores]
    alone: Mapping[str, Scores]
    """By client, of the model it would have without the others; empty where that was not trained."""
    rounds: Sequence[Round]

    @classmethod
    def of(cls, saved: ClientScores | None, rounds: Sequence[Round]) -> FederatedResult:
        """From a run's two files; where one client has all rows, its tasks stand for clients."""
        clients, alone = (saved.clients, saved.reference) if saved is not None else ({}, {})
        if len(clients) == 1:
            clients, alone = _by_task_alone(clients), _by_task_alone(alone)
        return cls(clients=clients, alone={n: own for n, own in alone.items() if n in clients}, rounds=rounds)

    @property
    def compared(self) -> bool:
        """Whether every client has a model of its own to compare with."""
        return bool(self.clients) and self.clients.keys() == self.alone.keys()

    def delta_m(self) -> float:
        """Δm% over tasks against the clients on their own, in per cent; negative where sharing is better.

        Raises:
            DataError: a score is missing on one side, or one of theirs is 0.
        """
        return delta_m(
            mean_by_task(own.by_task() for own in self.clients.values()),
            mean_by_task(own.by_task() for own in self.alone.values()),
        )

    def left_out(self) -> dict[str, list[tuple[int, str]]]:
        """Client to the rounds in which its answer did not count, and why."""
        found: dict[str, list[tuple[int, str]]] = {}
        for one in self.rounds:
            for name, why in one.refused.items():
                found.setdefault(name, []).append((one.step, why))
        return dict(sorted(found.items()))

    def sent(self) -> dict[str, tuple[list[int], list[int]]]:
        """Client to the bytes it sent and received in each round that it took part in."""
        names = dict.fromkeys(name for one in self.rounds for name in (*one.up, *one.down))
        return {
            name: (
                [one.up[name] for one in self.rounds if name in one.up],
                [one.down[name] for one in self.rounds if name in one.down],
            )
            for name in names
        }


def read_result(folder: Path) -> FederatedResult:
    """From a run folder's scores.json and metrics.jsonl.

    Raises:
        RunError: one of the two is missing or damaged.
    """
    return FederatedResult.of(read_client_scores(folder), read_rounds(folder / "metrics.jsonl"))


def read_rounds(path: Path) -> list[Round]:
    """The lines of metrics.jsonl.

    Raises:
        RunError: it is missing or damaged.
    """
    remedy = "put a copy of it back"
    check_noted(path)
    try:
        rows = [parse_json(line, finite=False) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({reason(error)}); {remedy}.") from error
    return [check_record(row, _Sent, source=path, remedy=remedy) for row in rows]


def mean_by_task(clients: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Each task's mean over the clients that hold it, by name."""
    found: dict[str, list[float]] = {}
    for own in clients:
        for task, value in own.items():
            found.setdefault(task, []).append(value)
    return {task: _mean(values) for task, values in sorted(found.items())}


def mean_score(scores: Iterable[Scores]) -> tuple[float, float]:
    """Mean over clients, each of which counts alike, and its standard error from the sampling of test rows."""
    found = list(scores)
    error = math.sqrt(math.fsum(own.standard_error**2 for own in found)) / max(1, len(found))
    return _mean([own.mean for own in found]), error


def clients_table(found: FederatedResult, *, traffic: bool = True) -> Table:
    """Personal models on their own tasks, one line per client, and the mean over clients below.

    Args:
        found: with a client at least.
        traffic: whether the sizes of messages have columns, else the standard error on its own and the difference.
    """
    sent = {name: (_mean(up) / _KIB, _mean(down) / _KIB) for name, (up, down) in found.sent().items()}
    means = (_mean([up for up, _ in sent.values()]), _mean([down for _, down in sent.values()]))
    nobody = (math.nan, math.nan)

    def row(
        name: str,
        metric: str,
        own: tuple[float, float],
        n: int,
        alone: tuple[float, float],
        kib: tuple[float, float],
    ) -> dict[str, Value]:
        cells: dict[str, Value] = {"client": name, "metric": metric, "score": own[0], "s.e.": own[1], "n": n}
        if found.alone:
            cells["local only"] = alone[0]
        if found.alone and not traffic:
            cells |= {"s.e. local only": alone[1], "difference": own[0] - alone[0]}
        return {**cells, "KiB up a round": kib[0], "KiB down a round": kib[1]} if sent and traffic else cells

    rows = [
        row(
            name,
            own.metric_label or "mixed",
            (own.mean, own.standard_error),
            own.n,
            mean_score([found.alone[name]]) if name in found.alone else nobody,
            sent.get(name, nobody),
        )
        for name, own in found.clients.items()
    ]
    alone = mean_score(found.alone.values()) if found.compared else nobody
    total = sum(own.n for own in found.clients.values())
    footer = row("mean", "", mean_score(found.clients.values()), total, alone, means)
    caption = "personal models on their own tasks"
    return Table.of("scores", caption, rows, columns=_KIB_COLUMNS, footer=[footer])


def traffic_table(found: FederatedResult) -> Table:
    """Bytes of each client's messages: means over the rounds it took part in, and all of them."""

    def row(name: str, up: float, down: float, total: float, rounds: int) -> dict[str, Value]:
        means = {"KiB up a round": up / _KIB, "KiB down a round": down / _KIB}
        return {"client": name, **means, "MiB in all": total / _MIB, "rounds": rounds}

    sent = found.sent()
    total = sum(sum(up) + sum(down) for up, down in sent.values())
    means = [_mean([_mean(ways[way]) for ways in sent.values() if ways[way]]) for way in (0, 1)]
    return Table.of(
        "traffic",
        "Messages by client: means over the rounds a client took part in",
        [
            row(name, _mean(up), _mean(down), sum(up) + sum(down), len(up))
            for name, (up, down) in sent.items()
        ],
        columns=_KIB_COLUMNS,
        footer=[row("all", means[0], means[1], total, len(found.rounds))],
    )


def shares_table(rounds: Sequence[Round]) -> Table:
    """How much of the rounds' changes each client had; without rows where nothing travels."""
    rows: list[dict[str, Value]] = []
    for name in sorted({name for one in rounds for name in one.shares}):
        own = [(one.shares[name], one.step) for one in rounds if name in one.shares]
        largest, when = max(own)
        average = 100 * _mean([share for share, _ in own])
        rows.append(
            {
                "client": name,
                "mean share, %": average,
                "largest, %": 100 * largest,
                "in round": when,
                "rounds": len(own),
            }
        )
    caption = (
        "Each client’s share of a round’s change: the norm of its weighted part among the sum of all parts"
    )
    return Table.of("shares", caption, rows, digits=1)


def _by_task_alone(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Each task as if it were a client."""
    return {task.task: Scores(tasks=(task,)) for own in scores.values() for task in own.tasks}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
