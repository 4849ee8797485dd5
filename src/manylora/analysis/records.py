"""What is measured on adapters, row by row: the records of analysis.json.

`layer` is `None` where a module stands in no numbered layer, `module` is its kind, and `name` its full name.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from manylora.files import NanFloat, Record, Several


class _Row(Record):
    model_config = ConfigDict(allow_inf_nan=True)


class SourceFacts(Record):
    """What is known of an adapter beside its weights."""

    name: str
    path: str = ""
    format: str = ""
    tasks: Several[str] = ()
    seed: int | None = None
    score: float | None = None
    share: str = "B"
    num_experts: int = 1
    router: str | None = None
    modules: int = 0
    """How many it adapts."""
    steps: Several[int] = ()
    """Of which weights were kept."""


class _AtModule(_Row):
    layer: int | None = None
    module: str
    name: str = ""
    """Of the module; "" for all modules together."""


class _AtMatrix(_AtModule):
    matrix: str = ""
    """"A" or "B"."""


class PairSimilarity(_AtMatrix):
    """Two matrices of one module."""

    left: str
    """Source, or source/expert."""
    right: str
    one_adapter: bool = False
    """Whether both are experts of one adapter."""
    same_task: bool | None = None
    """None where a task is unknown, or the two have some tasks in common and others not."""
    same_init: bool | None = None
    """None where a seed is unknown."""
    mean_cosine: float
    mean_squared: float
    baseline_cosine: float
    """Of random subspaces of the same sizes."""
    baseline_squared: float


class Movement(_Row):
    """Of one matrix between two steps; None where every vector was zero before."""

    similarity: float | None = None
    magnitude: float | None = None
    direction: float | None = None


class Change(Movement, _AtMatrix):
    """Of one matrix of one module between two steps."""

    source: str = ""
    expert: str = ""
    """"" for a shared matrix and for a single LoRA."""
    from_step: int
    to_step: int


class GradientNorm(_AtMatrix):
    """‖gradient‖ of one task on the shared matrix of one module."""

    source: str = ""
    task: str
    norm: NanFloat


class Conflict(_AtMatrix):
    """Cosine of two tasks' gradients; with left = right that of the two halves of the task's rows."""

    source: str = ""
    left: str
    right: str
    cosine: float


class Gradients(_Row):
    """Of one adapter. Values over all modules together stand in `overall_…`."""

    source: str = ""
    shared: str = "?"
    """"A" or "B"; "A and B" of a single LoRA, whose matrices are both shared by all tasks."""
    rows: dict[str, int] = Field(default_factory=dict)
    """Task to the rows that were read."""
    norms: list[GradientNorm] = Field(default_factory=list)
    conflict: list[Conflict] = Field(default_factory=list)
    within: list[Conflict] = Field(default_factory=list)
    overall_norms: list[GradientNorm] = Field(default_factory=list)
    overall_conflict: list[Conflict] = Field(default_factory=list)
    overall_within: list[Conflict] = Field(default_factory=list)


MEASURED = ("norms", "conflict", "within", "overall_norms", "overall_conflict", "overall_within")
"""The lists of `Gradients`; analysis.json has one of each over all adapters."""


class Gates(_AtModule):
    """Of one task in one module, over all tokens of its rows (padding left out)."""

    source: str = ""
    task: str
    weights: list[float] = Field(min_length=1)
    """Mean routing weight of each expert."""
    entropy: NanFloat = math.nan
    """Mean entropy of a token's weights in nats: 0 where one expert has all, log N where all count alike."""
    collapsed: bool = False
    """Whether one expert has more than `manylora.adapters.COLLAPSED_ABOVE` of the weight."""


class Findings(Record):
    """Every row of analysis.json."""

    sources: list[SourceFacts] = Field(default_factory=list)
    similarity: list[PairSimilarity] = Field(default_factory=list)
    change: list[Change] = Field(default_factory=list)
    gradients: list[Gradients] = Field(default_factory=list)
    gates: list[Gates] = Field(default_factory=list)
    """Those over all tasks (`manylora.analysis.routers.ALL`) included."""
    notes: list[str] = Field(default_factory=list)
    """What could not be looked at, and why."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, saved: Any) -> Any:
        """In the file the gates over all tasks stand apart, and gradients of all adapters in one list per measure."""
        if not isinstance(saved, dict):
            return saved
        gates = [*_entries(saved.get("gates")), *_entries(saved.get("gates_over_tasks"))]
        gradients = saved.get("gradients")
        if isinstance(gradients, dict):
            return {**saved, "gates": gates, "gradients": _by_source(gradients)}
        return {**saved, "gates": gates}


def _by_source(saved: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {key: [row for row in _entries(saved.get(key)) if isinstance(row, dict)] for key in MEASURED}
    known = [row for row in _entries(saved.get("sources")) if isinstance(row, dict)]
    about = {str(row.get("source", "")): row for row in known}
    names = dict.fromkeys([*about, *(str(row.get("source", "")) for own in rows.values() for row in own)])
    return [
        {
            "source": name,
            "shared": saved.get("shared", "?"),
            **about.get(name, {}),
            **{key: [row for row in own if str(row.get("source", "")) == name] for key, own in rows.items()},
        }
        for name in names
    ]


def _entries(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []
