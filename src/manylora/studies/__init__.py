"""The studies room: a study is methods × seeds × tasks, run cell by cell, and tried with statistics.

`config` reads a study from YAML, `presets` names methods, `kinds` lists what can be a cell (`train_cells`,
`federated_cells`, `transfer_cells`), `cells` says who cells are, `results` keeps what they found, `costs` lists what
they cost, `runner` runs them as processes, `summary` turns results into numbers and verdicts, `tables` shows these.

Its names are imported on first use, because torch and transformers take seconds and `--help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.studies.cells import Cell, results_of, run_cell
    from manylora.studies.config import Contrast, Method, Study, load_study, parse_study
    from manylora.studies.costs import CELL_METRICS, CellMetric
    from manylora.studies.kinds import KINDS, Job
    from manylora.studies.presets import PRESETS
    from manylora.studies.records import Summary
    from manylora.studies.results import CellResult, Measured, read_cells, write_cells
    from manylora.studies.runner import Progress, run_study
    from manylora.studies.summary import summarise

_HOME = {
    "cells": ("Cell", "results_of", "run_cell"),
    "costs": ("CELL_METRICS", "CellMetric"),
    "config": ("Contrast", "Method", "Study", "load_study", "parse_study"),
    "kinds": ("KINDS", "Job"),
    "presets": ("PRESETS",),
    "runner": ("Progress", "run_study"),
    "results": ("CellResult", "Measured", "read_cells", "write_cells"),
    "records": ("Summary",),
    "summary": ("summarise",),
}

__all__ = [
    "CELL_METRICS",
    "KINDS",
    "PRESETS",
    "Cell",
    "CellMetric",
    "CellResult",
    "Contrast",
    "Job",
    "Measured",
    "Method",
    "Progress",
    "Study",
    "Summary",
    "load_study",
    "parse_study",
    "read_cells",
    "results_of",
    "run_cell",
    "run_study",
    "summarise",
    "write_cells",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"manylora.studies.{module}"), name)
    raise AttributeError(f"module 'manylora.studies' has no attribute {name!r}")
