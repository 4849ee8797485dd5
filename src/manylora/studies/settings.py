"""What a cell of each kind may be told: the settings of its verb, and a few that only a study has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from manylora.data import TemplateChoice
from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.files.settings import Count, Positive, Settings
from manylora.studies.presets import PRESETS
from manylora.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class StudyPrompts(Settings):
    """How a cell's prompts are made"""

    template: TemplateChoice = "alpaca"
    """How rows of instruction and input become prompts, as of `manylora train`. Alpaca unless a study says otherwise,
    so that cells of earlier versions stand beside those of this one."""


@dataclass(frozen=True, kw_only=True)
class TrainLimit(Settings):
    """How many rows a cell trains on"""

    train_limit: Count | None = None
    """Training rows per task, a sample. Default: all."""


@dataclass(frozen=True, kw_only=True)
class RowLimits(TrainLimit):
    """How many rows a cell uses"""

    test_limit: Count | None = None
    """Rows to score per task, a sample. Default: all."""


@dataclass(frozen=True, kw_only=True)
class TrainCellSettings(StudyPrompts, TrainConfig, RowLimits):
    """A cell of kind "train"; see docs/compare.md."""

    alone: bool = False
    """One adapter per task, each trained on that task's rows alone (the baseline of Δm%)."""
    match: str | None = None
    """The method whose number of trainable parameters a LoRA's rank is raised to. Default: the rank stays r."""
    score_epochs: list[Positive] | None = None
    """Score the test rows after these epochs too. Default: after the last alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match is not None and (self.match not in PRESETS or PRESETS[self.match][0] != "train"):
            raise ConfigError(f"match is {self.match!r}; name a method of training such as 'alora'.")
        for name in ("save_merged", "push_to_hub"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name} is for one training; a study's cells leave their adapters where they are."
                )
        if self.match is not None and self.method != "lora":
            raise ConfigError("match raises the rank of a LoRA; set method to lora.")


@dataclass(frozen=True, kw_only=True)
class FederateCellSettings(StudyPrompts, FederateConfig, TrainLimit):
    """A cell of kind "federate"; see docs/compare.md."""

    def __post_init__(self) -> None:
        if self.engine != "local":
            raise ConfigError(f"engine is {self.engine!r}; a study's clients are in its own process (local).")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TransferCellSettings(StudyPrompts, TrainConfig, RowLimits):
    """A cell of kind "transfer"; see docs/compare.md."""

    frozen: Literal["A", "B", "none"]
    """The matrix that is taken from the other tasks' training, and not trained on the task that was left out."""
    shots: list[Count] = field(default_factory=lambda: [8, 32, 128])
    """Numbers of examples of the task that was left out."""
    left_out: list[str] | None = None
    """Tasks to leave out, each in turn. Default: all."""
    adapt_steps: Count = 60
    """Optimizer steps on the few examples, the same for every number of them."""
    donor_learning_rate: Positive | None = None
    """Of the training on the other tasks. Default: the recipe's; a study's rates are those on the few examples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shots", "left_out"):
            if getattr(self, name) == []:
                raise ConfigError(f"{name} is []; give one or more.")
