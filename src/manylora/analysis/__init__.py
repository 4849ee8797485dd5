"""The analysis room: why sharing B works, or does not, seen on any adapters.

`sources` reads adapters as matrices (ours and PEFT's LoRA), `places` says where a module stands, `subspaces` is the
mathematics of principal angles, `pairs` compares A's and B's between adapters and experts, `change` follows them
through training, `gradients` and `routers` measure on rows (`batches` feeds them), `summary` makes lines of a table,
`result` puts everything together.

Its names are imported on first use, because torch and transformers take seconds and `--help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.analysis.batches import LabelReader, Reader, TaskRows
    from manylora.analysis.change import Change, Movement, changes, movement
    from manylora.analysis.gradients import Conflict, GradientNorm, Gradients, measure_gradients
    from manylora.analysis.pairs import PairSimilarity, similarities, with_labels
    from manylora.analysis.places import Place, locate
    from manylora.analysis.result import Analysis
    from manylora.analysis.routers import Gates, measure_gates
    from manylora.analysis.sources import Layer, Source, load_source, load_sources
    from manylora.analysis.subspaces import (
        RandomBaseline,
        Similarity,
        compare,
        expected_squared,
        orthonormal_basis,
        principal_cosines,
    )
    from manylora.analysis.summary import (
        ChangeLine,
        SimilarityLine,
        Spread,
        change_lines,
        pair_label,
        similarity_lines,
        spread,
    )

_HOME = {
    "batches": ("LabelReader", "Reader", "TaskRows"),
    "change": ("Change", "Movement", "changes", "movement"),
    "gradients": ("Conflict", "GradientNorm", "Gradients", "measure_gradients"),
    "pairs": ("PairSimilarity", "similarities", "with_labels"),
    "places": ("Place", "locate"),
    "result": ("Analysis",),
    "routers": ("Gates", "measure_gates"),
    "sources": ("Layer", "Source", "load_source", "load_sources"),
    "subspaces": (
        "RandomBaseline",
        "Similarity",
        "compare",
        "expected_squared",
        "orthonormal_basis",
        "principal_cosines",
    ),
    "summary": (
        "ChangeLine",
        "SimilarityLine",
        "Spread",
        "change_lines",
        "pair_label",
        "similarity_lines",
        "spread",
    ),
}

__all__ = [
    "Analysis",
    "Change",
    "ChangeLine",
    "Conflict",
    "Gates",
    "GradientNorm",
    "Gradients",
    "LabelReader",
    "Layer",
    "Movement",
    "PairSimilarity",
    "Place",
    "RandomBaseline",
    "Reader",
    "Similarity",
    "SimilarityLine",
    "Source",
    "Spread",
    "TaskRows",
    "change_lines",
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
    "pair_label",
    "principal_cosines",
    "similarities",
    "similarity_lines",
    "spread",
    "with_labels",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"manylora.analysis.{module}"), name)
    raise AttributeError(f"module 'manylora.analysis' has no attribute {name!r}")
