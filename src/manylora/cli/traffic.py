"""What a federated run shows: its clients, the live rounds, the table of results, and the bytes that travel."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.console import duration
from manylora.cli.tables import console
from manylora.errors import DataError
from manylora.federated.config import FederateConfig
from manylora.federated.faults import clean_text
from manylora.federated.progress import RoundsDisplay
from manylora.federated.results import FederatedResult, clients_table, read_result
from manylora.table import Table, Value

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
    named = all(
        list(own.train) == [name] for name, own in data.items()
    )  # each client holds the task it is called by
    rows: list[dict[str, Value]] = [
        {
            "client": name,
            **({} if named else {"tasks": ", ".join(data[name].train)}),
            "rows": sum(map(len, data[name].train.values())),
            "test rows": sum(map(len, data[name].test.values())),
            "rank": config.rank_of(index),
        }
        for index, name in enumerate(sorted(data))
    ]
    out = console()
    out.print(Table.of("clients", "clients", rows).first_rows(_MANY))
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
    found, out = read_result(path), console()
    if found.clients:
        out.print(clients_table(found).first_rows(_MANY))
    else:
        out.print("no personal model was scored (no test rows, or --scored-clients 0)")
    if found.alone:
        out.print(f"Δm% against local only: {_delta(found)} (lower is better, negative beats it)")
    # Said again at the end, so that it is not lost in what was shown before.
    for name, when in list(found.left_out().items())[:_MANY]:
        last, why = when[-1]
        out.print(
            f"{clean_text(name)} did not count in {len(when)} of {len(found.rounds)} rounds (last in round {last}: "
            f"{clean_text(why)})",
            markup=False,
        )
    if any((path / "clients").glob("*/adapter")):
        out.print(f"personal models, as plain LoRA: {path / 'clients'}/*/adapter")


def _delta(found: FederatedResult) -> str:
    try:
        return f"{found.delta_m():.2f}"
    except DataError as error:
        return f"none ({error})"
