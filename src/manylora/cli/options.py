"""The options of a verb that are about the command line alone, beside those of its job; nothing heavy is imported, as
`--help` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.files.settings import Count, Settings
from manylora.jobs.predict import PredictConfig
from manylora.studies.compare import CompareConfig
from manylora.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunOptions(Settings):
    """The run"""

    out: str | None = None
    """Folder of the run; must not exist. Default: the next free runs/train-NNN."""
    resume: str | None = None
    """Continue this run folder where it broke off; takes all settings from there."""
    dry_run: bool = False
    """Print the plan and stop: rows, adapters, parameters, steps and memory."""


@dataclass(frozen=True, kw_only=True)
class ShownRows(Settings):
    """Rows to look at"""

    show_rows: Count | None = None
    """Print this many training rows of each task as the model gets them, what carries loss marked, and stop."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig, ShownRows, RunOptions):
    """Settings of the run, and what to do with them."""


@dataclass(frozen=True, kw_only=True)
class FederateOptions(FederateConfig, RunOptions):
    """What to do with a federated run, and with one client of it."""

    out: str | None = None
    """Default: the next free runs/federate-NNN."""
    resume: str | None = None
    """Continue this run folder after its last finished round; takes all settings from there."""
    dry_run: bool = False
    """Print the parameters and bytes that would travel, as published and as sent, and stop."""
    from_round: int | None = None
    """With --resume: go back to this finished round, one of the last --keep-rounds; what came after it is forgotten."""
    reset_client: list[str] | str | None = None
    """With --resume: let these clients, as "a,b" or a YAML list, begin anew, whose private state is lost."""
    node: str | None = None
    """Be a client instead: work for the Flower SuperNode on this machine whose Runtime API is at this HOST:PORT."""
    allow_strategy: list[str] | str | None = None
    """With --node: take part in runs of these strategies alone, as "a,b" or a YAML list. Default: any."""
    allow_parts: list[str] | str | None = None
    """With --node: let these parts leave and no others, of A, B and dB (the product B2 B1). Default: those of the
    strategy."""
    recipe: bool = False
    """With --engine flower: print how to make certificates and keys and start the SuperLink and the nodes, and stop."""
    dimensions: str | None = None
    """With --dry-run: count for these layers instead of a model's, as OxDxNUMBER ("4096x4096x64,1024x4096x32"), or
    for one of the published models, "llama2-7b" (q_proj, v_proj) and "qwen2-7b" (q_proj, o_proj)."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(PredictConfig):
    """What is asked."""

    prompt: str = ""
    """What to ask; also without "--prompt". Default: standard input."""
    file: str | None = None
    """JSONL file of rows to answer, or .jsonl.gz; "-" reads rows from standard input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is not None and self.prompt:
            raise ConfigError("--file and a prompt were both given; give one of them.")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(CompareConfig):
    """Which study, and what to do with it."""

    dry_run: bool = False
    """Print the cells and about how long they take, and stop."""
    print_cells: bool = False
    """Print one command for every cell that can run now, and stop."""
    cell: str | None = None
    """Run this cell alone, in this process."""

    def __post_init__(self) -> None:
        names = ("dry_run", "print_cells", "cell", "tables", "from_cells")
        chosen = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one.")
        super().__post_init__()


def refuse_beside_resume(given: Collection[str], allowed: Collection[str]) -> None:
    """Refuse settings beside --resume, which takes all of them from the run folder.

    Raises:
        ConfigError: naming them.
    """
    if extra := ", ".join(f"--{name.replace('_', '-')}" for name in sorted({*given} - {*allowed})):
        raise ConfigError(f"--resume takes all settings from the run folder; leave out {extra}.")
