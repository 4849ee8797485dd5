"""Kinds of cells: each is one module that is a `Kind`, so that a new one is a file and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

if TYPE_CHECKING:
    from manylora.studies.results import Measured

KINDS: Mapping[str, str] = {
    "train": "manylora.studies.train_cells",
    "federate": "manylora.studies.federated_cells",
    "transfer": "manylora.studies.transfer_cells",
}
"""Kind to the module that runs its cells."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a kind gets to run one cell."""

    settings: Mapping[str, Any]
    """The method's, without seed and learning rate."""
    seed: int
    learning_rate: float | None
    """None: the kind's own."""
    split: Literal["validation", "test"]
    """The rows to score on."""
    folder: Path
    """The cell's own; run folders go into it."""
    shared: Path
    """One folder for all cells of the study; hold what is made there (`manylora.files.locked`)."""


class Kind(Protocol):
    """What the module of a kind has."""

    SETTINGS: frozenset[str]
    """The settings it knows."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse values that cannot be (ConfigError), without loading torch."""

    def tasks(self, settings: Mapping[str, Any]) -> list[str]:
        """What a cell's scores are called."""

    def work(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """Optimizer steps and answers of a cell, for an estimate of its time."""

    def run(self, job: Job) -> Measured:
        """Train and score one cell; called again after a kill, it goes on or begins anew."""


def kind_of(name: str) -> Kind:
    """The module of a kind."""
    return cast(Kind, importlib.import_module(KINDS[name]))
