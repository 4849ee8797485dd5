"""The rows of every client, from what the user named: the partition, and the test rows that go with it."""

from __future__ import annotations

from manylora.data import load_splits, partition
from manylora.federated.client import ClientData
from manylora.federated.config import FederateConfig
from manylora.federated.strategies import STRATEGIES

POOLED = "all"
"""Name of the one client that has all rows under strategy centralized."""


def client_data(config: FederateConfig) -> dict[str, ClientData]:
    """Client name to its rows. A client is tested on all test rows of the tasks it trains on.

    Deterministic, so a machine that has the whole data can pick out the share of the client that it is.

    Raises:
        DataError, ConfigError: what is wrong with the data or the partition.
    """
    splits = load_splits(
        data=config.data,
        test=config.test,
        tasks=config.tasks if isinstance(config.tasks, list) else None,
        task_column=config.task_column,
        seed=config.seed,
        validation_fraction=0,
        limit=config.limit,
    )
    if STRATEGIES[config.strategy].pooled:
        return {POOLED: ClientData(train=splits.train, test=splits.test)}
    parts = partition(
        splits.train,
        by=config.partition,
        clients=config.clients,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
    )
    return {
        name: ClientData(train=rows, test={task: splits.test[task] for task in rows if task in splits.test})
        for name, rows in parts.items()
    }
