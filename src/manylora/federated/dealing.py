"""The rows of every client, from what the user named: the partition, and the test rows that go with it."""

from __future__ import annotations

from pathlib import Path

from manylora.data import Splits, encode_prompt, load_splits, partition
from manylora.errors import ConfigError
from manylora.federated.client import Client, ClientData
from manylora.federated.config import FederateConfig
from manylora.federated.strategies import STRATEGIES
from manylora.federated.wire import unpack
from manylora.federated.workbench import Workbench

POOLED = "all"
"""Name of the one client that has all rows under strategy centralized."""


def all_rows(config: FederateConfig) -> Splits:
    """The rows that the settings name, undivided; no validation rows are cut off.

    Raises:
        DataError: what is wrong with the data.
    """
    return load_splits(
        data=config.data,
        test=config.test,
        tasks=config.tasks if isinstance(config.tasks, list) else None,
        task_column=config.task_column,
        seed=config.seed,
        validation_fraction=0,
        limit=config.limit,
    )


def client_data(config: FederateConfig, *, notes: list[str] | None = None) -> dict[str, ClientData]:
    """Client name to its rows. A client is tested on all test rows of the tasks it trains on.

    Deterministic, so a machine that has the whole data can pick out the share of the client that it is. `notes` takes
    sentences on what is left out (`Splits.notes`).

    Raises:
        DataError, ConfigError: what is wrong with the data or the partition.
    """
    splits = all_rows(config)
    if notes is not None:
        notes += splits.notes
    if STRATEGIES[config.strategy].pooled:
        return {POOLED: ClientData(train=splits.train, test=splits.test)}
    parts = partition(
        splits.train,
        by=config.partition,
        clients=config.clients,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
    )
    config.check_number_of_clients(len(parts))
    return {
        name: ClientData(train=rows, test={task: splits.test[task] for task in rows if task in splits.test})
        for name, rows in parts.items()
    }


def client_for(
    message: bytes, *, name: str, own: FederateConfig, home: Path, rows: ClientData | None = None
) -> Client:
    """The client that answers this message, for an engine whose clients are processes of their own.

    Args:
        message: from the server; it carries the settings that server and clients share.
        name: of the client.
        own: this machine's own settings: model, data, device.
        home: folder of its private state.
        rows: its rows. Default: its share of `own.data`, by the partition that the server names.

    Raises:
        WireError, ConfigError, DataError, ModelError: what is wrong with the message or this machine's settings.
    """
    config = own.accept_settings(unpack(message).fields.get("settings", {})).resolved()
    if rows is None:
        shares = client_data(config)
        if name not in shares:
            raise ConfigError(
                f"the data has no share for client {name!r}; the clients are {', '.join(shares)}."
            )
        rows = shares[name]
    return Client(name, rows, home=home, bench=Workbench(config))


def cut_prompts(bench: Workbench, rows: ClientData) -> str:
    """A sentence on a client's prompts that are too long and lose their beginnings; "" where all are whole.

    Raises:
        DataError: a row cannot be encoded.
    """
    length = bench.config.max_length
    train = {task.name: sum(row.truncated for row in task.rows) for task in bench.encode(rows.train)}
    test = {
        task: sum(
            encode_prompt(row, bench.tokenizer, max_length=length, vocabulary=bench.vocabulary)[1]
            for row in found
        )
        for task, found in rows.test.items()
    }
    shares = [
        f"{100 * cut / len(found[task]):.1f} % of {task}'s {what} prompts"
        for what, cuts, found in (("training", train, rows.train), ("test", test, rows.test))
        for task, cut in cuts.items()
        if cut
    ]
    return f"longer than {length} tokens and cut to their ends: {', '.join(shares)}" if shares else ""
