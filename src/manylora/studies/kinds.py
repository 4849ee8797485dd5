"""Kinds of cells: each is one module with `check` and `run`, so that a new one is a file and a line here.

A kind's module has

    SETTINGS: frozenset[str]                      the settings it knows
    check(settings) -> None                       refuse values that cannot be (ConfigError), without loading torch
    tasks(settings) -> list[str]                  what its scores are called
    work(settings) -> tuple[int, int]             optimizer steps and answers of a cell, for an estimate of its time
    run(job: Job) -> Measured                     train and score; called again after a kill, it goes on or begins anew
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from pydantic import Field

from manylora.files import Record, open_own

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
    """One folder for all cells of the study; hold what is made there (`held`)."""


class Measured(Record):
    """What a cell found, also as the measured.json of a run folder of it."""

    scores: dict[str, float]
    """Task to score, 0 to 100."""
    examples: dict[str, list[float]]
    """Task to every test row's score, in the order of the rows."""
    parameters: int
    """Trained ones, of all adapters together."""
    seconds: float
    """Of training alone."""
    cpu_seconds: float = 0.0
    """Processor time of training, which other programs on the machine disturb less."""
    evaluation_seconds: float = 0.0
    metrics: dict[str, str] = Field(default_factory=dict)
    """Task to what its score measures (`TaskScore.metric`)."""
    others: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Further metrics: name to task to mean."""
    resumed: bool = False
    """Whether the cell went on after a kill, so that `seconds` are not all of it."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Anything else worth keeping, such as the scores after each epoch under "curve"."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, made if need be; waits for another that holds it, which its end, however it
    comes, releases. A runner that was killed leaves its cells running: the next one waits for them here."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    with open_own(folder / ".held", os.O_WRONLY) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Kind(Protocol):
    """What the module of a kind has."""

    SETTINGS: frozenset[str]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse values that cannot be."""

    def tasks(self, settings: Mapping[str, Any]) -> list[str]:
        """Names of a cell's scores."""

    def work(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """Optimizer steps and answers of a cell."""

    def run(self, job: Job) -> Measured:
        """Train and score one cell."""


def kind_of(name: str) -> Kind:
    """The module of a kind."""
    return cast(Kind, importlib.import_module(KINDS[name]))
