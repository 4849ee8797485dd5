"""Analyze: adapters → how alike they are, how far they moved, where tasks conflict, what routers do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.errors import ConfigError
from manylora.files import whole_number
from manylora.jobs.settings import AnalyzeConfig

if TYPE_CHECKING:
    from manylora.analysis import Analysis, Source
    from manylora.jobs.progress import Progress


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
