"""The analysis room: why sharing B works, or does not, seen on any adapters.

`sources` reads adapters as matrices (ours and PEFT's LoRA), `places` says where a module stands, `subspaces` is the
mathematics of principal angles, `pairs` compares A's and B's between adapters and experts, `change` follows them
through training, `gradients` and `routers` measure on rows (`batches` feeds them), `records` is what they find,
`summary` makes lines of it, `tables` shows these, `result` puts everything together.

Its names are imported on first use, because torch and transformers take seconds and `--help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.analysis.batches import LabelReader, Reader
    from manylora.analysis.change import changes, movement
    from manylora.analysis.gradients import measure_gradients
    from manylora.analysis.pairs import similarities, with_labels
    from manylora.analysis.places import Place, locate
    from manylora.analysis.records import Gates, Gradients
    from manylora.analysis.result import Analysis
    from manylora.analysis.routers import measure_gates
    from manylora.analysis.sources import Layer, Source, load_source, load_sources
    from manylora.analysis.subspaces import (
        RandomBaseline,
        compare,
        expected_squared,
        orthonormal_basis,
        principal_cosines,
    )

_HOME = {
    "batches": ("LabelReader", "Reader"),
    "change": ("changes", "movement"),
    "gradients": ("measure_gradients",),
    "pairs": ("similarities", "with_labels"),
    "places": ("Place", "locate"),
    "records": ("Gates", "Gradients"),
    "result": ("Analysis",),
    "routers": ("measure_gates",),
    "sources": ("Layer", "Source", "load_source", "load_sources"),
    "subspaces": ("RandomBaseline", "compare", "expected_squared", "orthonormal_basis", "principal_cosines"),
}

__all__ = [
    "Analysis",
    "Gates",
    "Gradients",
    "LabelReader",
    "Layer",
    "Place",
    "RandomBaseline",
    "Reader",
    "Source",
    "changes",
    "compare",
    "expected_squared",
    "load_source",
    "load_sources",
    "locate",
    "measure_gates",
    "measure_gradients",
    "movement",
    "orthonormal_basis",
    "principal_cosines",
    "similarities",
    "with_labels",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"manylora.analysis.{module}"), name)
    raise AttributeError(f"module 'manylora.analysis' has no attribute {name!r}")
