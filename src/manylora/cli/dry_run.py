"""`manylora federate --dry-run`: what would travel, counted as the papers do and as it is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

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

_MIB = 2**20
_SETTING = "published LLaMA2-7B and Qwen2-7B, 8 clients, in millions"


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


def _table(title: str, *columns: str, words: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", overflow="fold")
    return table


def _millions(value: float) -> str:
    return f"{value / 1e6:,.2f}" if value >= 1e5 else f"{value / 1e6:,.4f}"


def _as_published(config: FederateConfig, layers: Layers, ranks: Sequence[int]) -> Table:
    table = _table(
        "as published: parameters per client and round, up plus down, millions",
        "strategy",
        "rule",
        "total",
        words=2,
    )
    for strategy in strategies_for(ranks):
        for rule in strategy.published:
            total = published_parameters(rule, layers, ranks, r=config.r)
            table.add_row(
                strategy.name,
                rule,
                _millions(total),
                style="bold" if strategy.name == config.strategy else "",
            )
    return table


def _as_sent(config: FederateConfig, layers: Layers, ranks: Sequence[int]) -> Table:
    table = _table(
        "as sent: mean per client and round", "strategy", "M up", "M down", "M total",
        *(f"MiB {wire}" for wire in ("fp32", "bf16", "int8")),
    )  # fmt: skip
    for strategy in strategies_for(ranks):
        fp32, bf16, int8 = (
            mean_traffic(as_sent(strategy, layers, ranks, r=config.r, wire=wire))
            for wire in ("fp32", "bf16", "int8")
        )
        table.add_row(
            strategy.name,
            *map(_millions, (fp32.parameters_up, fp32.parameters_down, fp32.parameters)),
            *(f"{traffic.bytes / _MIB:,.2f}" for traffic in (fp32, bf16, int8)),
            style="bold" if strategy.name == config.strategy else "",
        )
    return table


def _per_client(config: FederateConfig, layers: Layers, ranks: Sequence[int]) -> Table:
    strategy = strategy_for(config.strategy, unequal=config.ranks is not None)
    table = _table(
        f"{strategy.name} by client, {config.wire}", "clients", "rank", "M up", "M down", "KiB up", "KiB down"
    )
    traffic = dict(zip(ranks, as_sent(strategy, layers, ranks, r=config.r, wire=config.wire), strict=True))
    for rank, own in sorted(traffic.items(), reverse=True):
        table.add_row(
            f"{ranks.count(rank)} of {len(ranks)}",
            str(rank),
            *map(_millions, (own.parameters_up, own.parameters_down)),
            *(f"{size / 1024:,.1f}" for size in (own.bytes_up, own.bytes_down)),
        )
    return table


def _figures() -> Table:
    table = _table(_SETTING, "model", "strategy", "ranks", "rule", "counted", "published", words=4)
    for figure in PUBLISHED:
        table.add_row(
            figure.model,
            figure.strategy,
            _shown(figure.ranks),
            figure.rule,
            _millions(figure.counted()),
            f"{figure.millions:.2f}",
        )
    return table
