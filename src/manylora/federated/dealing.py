"""The rows of every client, from what the user named: the partition, and the test rows that go with it."""

from __future__ import annotations

from manylora.data import Splits, load_splits, partition
from manylora.federated.config import FederateConfig
from manylora.federated.personal import ClientData
from manylora.federated.strategies import STRATEGIES

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
