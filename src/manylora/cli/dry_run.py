"""`manylora federate --dry-run`: what would travel, counted as the papers do and as it is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from manylora.cli.tables import console
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
from manylora.federated.strategies import strategy_for
from manylora.federated.wire import Format
from manylora.table import Column, Table, Value

_MIB = 2**20
_COUNTS = (
    *(Column(name=name, align="right") for name in ("total", "M up", "M down", "M total", "counted")),
    *(Column(name=name, digits=1) for name in ("KiB up", "KiB down")),
)


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
