"""What a federated run shows: what would travel (--dry-run), its clients, the live rounds, the table of results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from manylora.cli.console import LiveLine, duration
from manylora.cli.tables import console
from manylora.errors import DataError
from manylora.federated.accounting import (
    PUBLISHED,
    Layers,
    as_sent,
    mean_traffic,
    parse_dimensions,
    published_parameters,
    strategies_for,
)
from manylora.federated.config import FederateConfig
from manylora.federated.faults import clean_text
from manylora.federated.progress import RoundsDisplay
from manylora.federated.results import FederatedResult, clients_table, read_result
from manylora.federated.strategies import strategy_for
from manylora.federated.wire import Format
from manylora.table import Column, Table, Value

if TYPE_CHECKING:
    from manylora.federated import ClientData

_MANY = 24
"""Clients that a table lists by name."""
_MIB = 2**20
_COUNTS = (
    *(Column(name=name, align="right") for name in ("total", "M up", "M down", "M total", "counted")),
    *(Column(name=name, digits=1) for name in ("KiB up", "KiB down")),
)


# ---- before: what would travel


def print_traffic(config: FederateConfig, *, dimensions: str | None) -> None:
    """Parameters and bytes per client and round; no weight is loaded."""
    layers, clients = _layers(config, dimensions), _number_of_clients(config, dimensions)
    config.check_number_of_clients(clients)
    ranks = [config.rank_of(index) for index in range(clients)]
    out = console()
    out.print(
        f"{sum(layers.values())} adapted layers ({', '.join(f'{n} × {o}×{d}' for (o, d), n in layers.items())}), "
        f"{clients} clients, ranks {_shown(ranks)}, r {config.r}, wire {config.wire}"
    )
    out.print(_as_published(config, layers, ranks))
    out.print(_as_sent(config, layers, ranks))
    out.print(_per_client(config, layers, ranks))
    if dimensions is not None:
        out.print(_figures())


def _layers(config: FederateConfig, dimensions: str | None) -> Layers:
    if dimensions is not None:
        return parse_dimensions(dimensions)
    from manylora.adapters import ManyLoraLinear
    from manylora.training.plan import adapter_config, shadow_model

    train = config.train_config().resolved()
    model = shadow_model(train, adapter_config(train, task_names=()))
    return dict(
        Counter(
            (module.out_features, module.in_features)
            for module in model.modules()
            if isinstance(module, ManyLoraLinear)
        )
    )


def _number_of_clients(config: FederateConfig, dimensions: str | None) -> int:
    if config.strategy == "centralized":
        return 1
    if config.clients is not None:
        return config.clients
    if dimensions is not None:
        return len(config.ranks or [0] * 8)
    from manylora.federated.dealing import client_data

    return len(client_data(config))


def _shown(ranks: Sequence[int]) -> str:
    return (
        str(ranks[0])
        if len(set(ranks)) == 1
        else ",".join(map(str, ranks[:16])) + ("…" if len(ranks) > 16 else "")
    )


def _as_published(config: FederateConfig, layers: Layers, ranks: Sequence[int]) -> Table:
    rows: list[dict[str, Value]] = [
        {
            "strategy": strategy.name,
            "rule": rule,
            "total": _millions(published_parameters(rule, layers, ranks, r=config.r)),
        }
        for strategy in strategies_for(ranks)
        for rule in strategy.published
    ]
    caption = "as published: parameters per client and round, up plus down, millions"
    return Table.of("published", caption, rows, columns=_COUNTS, marked=config.strategy)


def _as_sent(config: FederateConfig, layers: Layers, ranks: Sequence[int]) -> Table:
    rows: list[dict[str, Value]] = []
    for strategy in strategies_for(ranks):
        sent = {
            wire: mean_traffic(as_sent(strategy, layers, ranks, r=config.r, wire=wire))
            for wire in get_args(Format)
        }
        plain = sent["fp32"]
        rows.append(
            {
                "strategy": strategy.name,
                "M up": _millions(plain.parameters_up),
                "M down": _millions(plain.parameters_down),
                "M total": _millions(plain.parameters),
                **{f"MiB {wire}": own.bytes / _MIB for wire, own in sent.items()},
            }
        )
    caption = "as sent: mean per client and round"
    return Table.of("sent", caption, rows, columns=_COUNTS, marked=config.strategy)


def _per_client(config: FederateConfig, layers: Layers, ranks: Sequence[int]) -> Table:
    strategy = strategy_for(config.strategy, unequal=config.ranks is not None)
    traffic = dict(zip(ranks, as_sent(strategy, layers, ranks, r=config.r, wire=config.wire), strict=True))
    rows: list[dict[str, Value]] = [
        {
            "clients": f"{ranks.count(rank)} of {len(ranks)}",
            "rank": rank,
            "M up": _millions(own.parameters_up),
            "M down": _millions(own.parameters_down),
            "KiB up": own.bytes_up / 1024,
            "KiB down": own.bytes_down / 1024,
        }
        for rank, own in sorted(traffic.items(), reverse=True)
    ]
    return Table.of("clients", f"{strategy.name} by client, {config.wire}", rows, columns=_COUNTS)


def _figures() -> Table:
    rows: list[dict[str, Value]] = [
        {
            "model": figure.model,
            "strategy": figure.strategy,
            "ranks": _shown(figure.ranks),
            "rule": figure.rule,
            "counted": _millions(figure.counted()),
            "published": figure.millions,
        }
        for figure in PUBLISHED
    ]
    caption = "published LLaMA2-7B and Qwen2-7B, 8 clients, in millions"
    return Table.of("figures", caption, rows, columns=_COUNTS)


def _millions(value: float) -> str:
    return f"{value / 1e6:,.2f}" if value >= 1e5 else f"{value / 1e6:,.4f}"


# ---- meanwhile


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


class RoundsProgress(RoundsDisplay):
    """Live lines on standard error: one per client on a terminal (overwritten), one per round everywhere."""

    def __init__(self) -> None:
        self._line = LiveLine()
        self._began = time.monotonic()
        self._round, self._rounds, self._asked, self._done = 0, 0, 0, 0
        self._first = 0
        self._largest = ""

    def round_began(self, number: int, rounds: int, asked: int) -> None:
        """Start counting the round's clients."""
        self._round, self._rounds, self._asked, self._done = number, rounds, asked, 0
        self._first = self._first or number
        self._line.overwrite(f"round {number}/{rounds}  0/{asked} clients")

    def answered(self, client: str, loss: float, seconds: float) -> None:
        """One more client is done."""
        self._done += 1
        self._line.overwrite(
            f"round {self._round}/{self._rounds}  {self._done}/{self._asked} clients  {client}: loss {loss:.3f}"
        )

    def refused(self, client: str, reason: str) -> None:
        """Say whose answer does not count, and why."""
        self._line.print(f"  {client} does not count: {reason}")

    def noted(self, line: str) -> None:
        """Say it."""
        self._line.print(f"  {line}")

    def shared(self, number: int, shares: Mapping[str, float]) -> None:
        """Remember whose part of the round's change is the largest."""
        name = max(shares, key=lambda one: shares[one], default=None)
        self._largest = "" if name is None else f"  largest share {name} {100 * shares[name]:.0f} %"

    def round_ended(self, number: int, loss: float, update: float | None) -> None:
        """Sum the round up."""
        spent = time.monotonic() - self._began
        left = spent / max(1, number - self._first + 1) * (self._rounds - number)
        norm = "" if update is None else f"  update norm {update:.3g}"
        self._line.print(
            f"round {number}/{self._rounds}  loss {loss:.3f}{norm}  {self._done} of {self._asked} clients"
            f"{self._largest}  {duration(left)} left"
        )

    def scored(self, client: str, done: int, total: int) -> None:
        """One more personal model is scored."""
        self._line.overwrite(f"scored {done}/{total}  {client}")
        if done == total:
            self._line.print(f"scored {total} personal models")


# ---- at the end


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
