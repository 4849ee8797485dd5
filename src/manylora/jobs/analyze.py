"""Analyze: adapters → how alike they are, how far they moved, where tasks conflict, what routers do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from manylora.errors import ConfigError
from manylora.files import whole_number
from manylora.files.settings import Count, CountOrZero, Positive
from manylora.training.config import TaskType
from manylora.training.settings import BatchSettings, DataSettings, ModelSettings

if TYPE_CHECKING:
    from manylora.analysis import Analysis, Source
    from manylora.jobs.progress import Progress


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(ModelSettings, DataSettings, BatchSettings):
    """What to look into, and what to measure on."""

    adapters: list[str] | str | None = None
    """Runs and adapter folders, ours and plain LoRAs; also without "--adapters". A federated run stands for its
    clients' personal models, a trainer's output folder for its checkpoint-STEP folders."""
    label: list[str] | str | None = None
    """Task and seed of an adapter that comes from no run here, as "PATH=TASK,SEED" (either may be empty); once each."""
    measure: Literal["auto", "none", "gradients", "gates", "all"] = "auto"
    """What to measure on rows, for which the base model is loaded. auto: what can be measured."""
    data: str | None = None
    """Default: the training rows of each adapter's run; the embedded suite for other adapters of the embedded base."""
    tasks: list[str] | str | None = None
    """Default: all. With --figures: the two to train on."""
    limit: Count = 64
    step: CountOrZero | None = None
    """Measure on the weights that the runs kept at this step (train --keep-adapters). Default: the final ones."""
    model: str | None = None
    """Default: the one each adapter was trained on; with --figures the embedded one."""
    figures: bool = False
    """Repeat the paper's figures 1 and 2: train one LoRA for each of two tasks and two or more seeds, then compare
    them. Goes on where it was stopped; finished runs are not trained again."""
    task_type: TaskType = "CAUSAL_LM"
    """With --figures: what is trained, a language model that answers or (SEQ_CLS) an encoder that chooses labels."""
    seeds: list[int] | str = "0,1"
    """With --figures: seeds of the runs, as "0,1,2" or a YAML list."""
    r: Count = 8
    """With --figures: rank of the LoRAs."""
    epochs: Positive | None = None
    """With --figures: passes over the training rows. Default: as `manylora train`."""
    learning_rate: Positive | None = None
    """With --figures: peak step size. Default: as `manylora train`."""
    seed: CountOrZero = 0
    """Of the random subspaces that similarity is compared with."""
    batch_size: Count = 16
    """Rows per forward pass."""
    out: str | None = None
    """Folder for analysis.json; must not exist. Default: the next free runs/analyze-NNN; with --figures runs/figures,
    which may exist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.figures and self.adapters:
            raise ConfigError(
                "--figures trains its own adapters; leave the folders out, or leave --figures out."
            )
        unused = [name for name in ("label", "step") if self.figures and getattr(self, name)]
        if unused:
            raise ConfigError(f"--figures does nothing with --{unused[0]}; leave it out.")


def analyze(config: AnalyzeConfig, *, progress: Progress) -> tuple[Analysis, Path]:
    """Look into adapters and write analysis.json.

    Returns:
        What was found, and the run folder.

    Raises:
        ModelError, ConfigError, DataError: the adapters cannot be compared, or what was asked for cannot be measured.
        RunError: `config.out` exists; or it holds figures with other settings.
    """
    from manylora.jobs.figures import draw_figures
    from manylora.jobs.measure import analyse, conclude
    from manylora.jobs.session import Session, reserved_folder

    if config.figures:
        return draw_figures(config, progress=progress)
    if not config.adapters:
        raise ConfigError(
            "There is nothing to analyze; give runs or adapter folders, such as manylora analyze runs/train-001, "
            "or --figures."
        )
    with reserved_folder(config.out):
        found = analyse(_sources(config), config, progress=progress)
        settings = dataclasses.asdict(config)
        with Session.begin(config.out, config=settings, kind="analyze", progress=progress) as session:
            conclude(found, session)
    return found, session.path


def _sources(config: AnalyzeConfig) -> list[Source]:
    from manylora.analysis import load_sources, with_labels
    from manylora.training.config import as_list

    sources = load_sources(as_list(config.adapters) or [])
    labels = [config.label] if isinstance(config.label, str) else config.label or []
    return with_labels(sources, dict(map(_label, labels)))


def _label(text: str) -> tuple[str, tuple[tuple[str, ...], int | None]]:
    path, equals, value = text.rpartition("=")
    task, _, seed = value.rpartition(",")
    if (
        not equals
        or not path
        or (seed.strip() and whole_number(seed.strip()) is None)
        or not value.strip(", ")
    ):
        raise ConfigError(
            f"--label {text} cannot be read; write PATH=TASK,SEED, such as loras/a=sums,0 (or PATH=TASK, or PATH=,0)."
        )
    return str(Path(path)), ((task.strip(),) if task.strip() else (), int(seed) if seed.strip() else None)
