"""What study.json holds: a `Summary` of records, which one writer makes and every reader shares."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ConfigDict, Field

from manylora.evaluation.claims import Trial
from manylora.files import NanFloat, Record, Several
from manylora.studies.config import MEAN
from manylora.studies.costs import Costs
from manylora.studies.results import CellResult

_HEAVY = frozenset({"examples", "stage", "curve"})
"""Of a cell, what study.json leaves out."""


class Interval(Record):
    """A mean over seeds and its 95 % interval, NaN for one seed, which has none."""

    mean: float
    low: NanFloat = math.nan
    high: NanFloat = math.nan
    n: int | None = None

    @property
    def half(self) -> float:
        """Half of the interval's width; NaN where there is none."""
        return (self.high - self.low) / 2


class _OfMethod(Record):
    method: str


class _OfTask(_OfMethod):
    task: str


class _OfMetric(_OfTask):
    metric: str


class _OfEpoch(_OfMethod):
    epoch: float


class Score(Interval, _OfTask):
    """A method's score on a task, a group of tasks, or "mean"."""


class DeltaM(Interval, _OfMethod):
    """A method's Δm%."""


class OtherScore(Interval, _OfMetric):
    """A method's value of a metric that is not the main one."""


class CurveMean(Interval, _OfEpoch):
    """A method's mean score after some epochs."""

    delta_m: Interval | None = None
    tasks: dict[str, float] = Field(default_factory=dict)


class Screened(Record):
    """A method's mean score on validation rows at one learning rate."""

    method: str
    learning_rate: float
    validation: float
    n: int


class _Claim(Record):
    text: str = ""
    """Claim, verdict and numbers in a sentence."""
    claim: str = ""
    kind: str = "better"
    first: str = ""
    second: str = ""
    task: str = MEAN


class ClaimTrial(Trial, _Claim):
    """A claim, and what the cells say of it."""


class Summary(Record):
    """A study's numbers: study.json. Facts of its cells file, such as versions, stand beside them."""

    model_config = ConfigDict(extra="allow")

    kind: str = "compare"
    name: str = "this study"
    question: str = ""
    reference: str = ""
    tasks: Several[str] = ()
    methods: Several[str] = ()
    seeds: Several[int] = ()
    screening_seeds: Several[int] = ()
    learning_rates: dict[str, float | None] = Field(default_factory=dict)
    grid: Several[float] = ()
    at_the_edge: Several[str] = ()
    screening: Several[Screened] = ()
    cells: Several[CellResult] = ()
    missing: Several[str] = ()
    table: Several[Score] = ()
    delta_m: Several[DeltaM] = ()
    costs: Several[Costs] = ()
    curves: Several[CurveMean] = ()
    claims: Several[ClaimTrial] = ()
    notes: Several[str] = ()
    others: Several[OtherScore] = ()
    """Further metrics, means over seeds and tasks."""

    def by_method(self) -> dict[str, list[CellResult]]:
        """The cells of each method."""
        found: dict[str, list[CellResult]] = {}
        for cell in self.cells:
            found.setdefault(cell.method, []).append(cell)
        return found

    def to_dict(self) -> dict[str, Any]:
        """As study.json; what no cell has is left out."""
        found = self.model_dump()
        found["cells"] = [cell.to_dict(without=_HEAVY) for cell in self.cells]
        found["costs"] = [costs.model_dump(exclude_unset=True) for costs in self.costs]
        if not self.others:
            del found["others"]
        return found
