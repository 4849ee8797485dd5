"""What a federated run shows: its clients, the live rounds, the table of results, and the bytes that travel."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from manylora.cli.console import duration
from manylora.cli.tables import console
from manylora.errors import DataError, RunError
from manylora.evaluation import Scores, delta_m, read_client_scores
from manylora.evaluation.table import METRIC_LABELS
from manylora.federated.config import FederateConfig
from manylora.federated.faults import clean_text
from manylora.federated.progress import RoundsDisplay
from manylora.files import parse_json, reason

if TYPE_CHECKING:
    from manylora.federated import ClientData

_MANY = 24
"""Clients that a table lists by name."""


class RoundsProgress(RoundsDisplay):
    """Live lines on standard error: one per client on a terminal (overwritten), one per round everywhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._began = time.monotonic()
        self._round, self._rounds, self._asked, self._done = 0, 0, 0, 0
        self._first = 0
        self._largest = ""

    def round_began(self, number: int, rounds: int, asked: int) -> None:
        """Start counting the round's clients."""
        self._round, self._rounds, self._asked, self._done = number, rounds, asked, 0
        self._first = self._first or number
        self._overwrite(f"round {number}/{rounds}  0/{asked} clients")

    def answered(self, client: str, loss: float, seconds: float) -> None:
        """One more client is done."""
        self._done += 1
        self._overwrite(
            f"round {self._round}/{self._rounds}  {self._done}/{self._asked} clients  {client}: loss {loss:.3f}"
        )

    def refused(self, client: str, reason: str) -> None:
        """Say whose answer does not count, and why."""
        self._print(f"  {client} does not count: {reason}")

    def noted(self, line: str) -> None:
        """Say it."""
        self._print(f"  {line}")

    def shared(self, number: int, shares: Mapping[str, float]) -> None:
        """Remember whose part of the round's change is the largest."""
        name = max(shares, key=lambda one: shares[one], default=None)
        self._largest = "" if name is None else f"  largest share {name} {100 * shares[name]:.0f} %"

    def round_ended(self, number: int, loss: float, update: float | None) -> None:
        """Sum the round up."""
        spent = time.monotonic() - self._began
        left = spent / max(1, number - self._first + 1) * (self._rounds - number)
        norm = "" if update is None else f"  update norm {update:.3g}"
        self._print(
            f"round {number}/{self._rounds}  loss {loss:.3f}{norm}  {self._done} of {self._asked} clients"
            f"{self._largest}  {duration(left)} left"
        )

    def scored(self, client: str, done: int, total: int) -> None:
        """One more personal model is scored."""
        self._overwrite(f"scored {done}/{total}  {client}")
        if done == total:
            self._print(f"scored {total} personal models")

    def _overwrite(self, line: str) -> None:
        if self._live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def _print(self, line: str) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self._live else ''}{line}", file=sys.stderr, flush=True)


def print_clients(config: FederateConfig, data: Mapping[str, ClientData]) -> None:
    """Who has what."""
    table = Table(title="clients", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    named = all(
        list(own.train) == [name] for name, own in data.items()
    )  # each client holds the task it is called by
    for heading in ("client",) if named else ("client", "tasks"):
        table.add_column(heading, overflow="fold")
    for heading in ("rows", "test rows", "rank"):
        table.add_column(heading, justify="right")
    for index, name in enumerate(sorted(data)):
        if index == _MANY:
            table.add_row(f"… {len(data) - _MANY} more")
            break
        own = data[name]
        table.add_row(
            name,
            *([] if named else [", ".join(own.train)]),
            f"{sum(map(len, own.train.values())):,}",
            f"{sum(map(len, own.test.values())):,}",
            str(config.rank_of(index)),
        )
    out = console()
    out.print(table)
    each = f"{config.local_steps} steps" if config.local_steps else f"{config.local_epochs:g} epochs"
    out.print(
        f"{config.strategy}, {config.rounds} rounds of {each}, participation {config.participation:g}, "
        f"wire {config.wire}, r {config.r}, alpha {config.lora_alpha:g}, learning rate {config.learning_rate:g}"
    )


def print_result(path: Path) -> None:
    """The table of a finished run, from its scores.json and metrics.jsonl.

    Raises:
        RunError: one of the two is missing or damaged.
    """
    scores, reference = read_client_scores(path)
    rounds = _rounds(path / "metrics.jsonl")
    up, down = _bytes_per_round(rounds)
    out = console()
    table = Table(
        title="personal models on their own tasks", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("client", overflow="fold")
    table.add_column("metric", no_wrap=True)
    for heading in ("score", "s.e.", "n", "local only", "KiB up\na round", "KiB down\na round"):
        table.add_column(heading, justify="right")
    if len(scores) == 1:  # all rows in one place: what differs are the tasks
        scores, reference = _as_clients(scores), _as_clients(reference)
    for index, (name, own) in enumerate(scores.items()):
        if index == _MANY:
            table.add_row(f"… {len(scores) - _MANY} more", *[""] * 7)
            break
        metrics = {METRIC_LABELS.get(task.metric, task.metric) for task in own.tasks}
        table.add_row(
            name,
            metrics.pop() if len(metrics) == 1 else "mixed",
            f"{own.mean:.2f}",
            f"{own.standard_error:.2f}",
            str(own.n),
            f"{reference[name].mean:.2f}" if name in reference else "–",
            _kib(up.get(name)),
            _kib(down.get(name)),
        )
    if scores:
        table.add_section()
        table.add_row(
            "mean",
            "",
            f"{_mean([own.mean for own in scores.values()]):.2f}",
            f"{math.sqrt(sum(own.standard_error**2 for own in scores.values())) / len(scores):.2f}",
            str(sum(own.n for own in scores.values())),
            f"{_mean([own.mean for own in reference.values()]):.2f}" if reference else "–",
            _kib(_mean(list(up.values()))),
            _kib(_mean(list(down.values()))),
            style="bold",
        )
        out.print(table)
    else:
        out.print("no personal model was scored (no test rows, or --scored-clients 0)")
    if reference:
        out.print(f"Δm% against local only: {_delta(scores, reference)} (lower is better, negative beats it)")
    for line in _left_out(rounds)[:_MANY]:
        out.print(line, markup=False)
    if any((path / "clients").glob("*/adapter")):
        out.print(f"personal models, as plain LoRA: {path / 'clients'}/*/adapter")


def _as_clients(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Each task as if it were a client."""
    return {task.task: Scores(tasks=(task,)) for own in scores.values() for task in own.tasks}


def _delta(scores: Mapping[str, Scores], reference: Mapping[str, Scores]) -> str:
    try:
        return f"{delta_m(_by_task(scores), _by_task(reference)):.2f}"
    except DataError as error:
        return f"none ({error})"


def _by_task(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Each task's mean over the clients that hold it."""
    found: dict[str, list[float]] = {}
    for own in scores.values():
        for task, value in own.by_task().items():
            found.setdefault(task, []).append(value)
    return {task: _mean(values) for task, values in found.items()}


def _rounds(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl.

    Raises:
        RunError: it is missing or damaged.
    """
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = parse_json(line, finite=False)
            sizes = [size for way in ("up", "down") for size in row[way].values()]
            if not all(isinstance(size, int) for size in sizes):
                raise ValueError("a size is no whole number")
            rows.append(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged ({reason(error)}); put a copy of it back.") from error
    return rows


def _left_out(rounds: list[dict[str, Any]]) -> list[str]:
    """A line for each client some of whose answers did not count, so that it is not lost in what was shown before."""
    found: dict[str, list[tuple[int, str]]] = {}
    for row in rounds:
        for name, why in row.get("refused", {}).items():
            found.setdefault(name, []).append((row.get("step", 0), str(why)))
    return [
        f"{clean_text(name)} did not count in {len(when)} of {len(rounds)} rounds (last in round {when[-1][0]}: "
        f"{clean_text(when[-1][1])})"
        for name, when in sorted(found.items())
    ]


def _bytes_per_round(rounds: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean bytes of a message by client, up and down, over the rounds it took part in."""
    sums: dict[str, dict[str, list[int]]] = {"up": {}, "down": {}}
    for row in rounds:
        for way, found in sums.items():
            for name, size in row[way].items():
                found.setdefault(name, []).append(size)
    up, down = ({name: _mean(sizes) for name, sizes in found.items()} for found in sums.values())
    return up, down


def _kib(size: float | None) -> str:
    return "–" if size is None or math.isnan(size) else f"{size / 1024:,.1f}"


def _mean(values: list[float] | list[int]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
