"""From single matrices to the lines of a table: means with spread and n, over all modules and per kind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from manylora.analysis.records import Change, PairSimilarity
from manylora.files import NanFloat, Record

_WORDS: dict[bool | None, str] = {True: "same", False: "other", None: "unknown"}

ALL = "all"
"""Kind of module of the lines over all kinds."""


class Spread(Record):
    """Mean and standard deviation (n − 1) of some values."""

    mean: float
    deviation: NanFloat
    """Not a number for one value."""
    n: int


class SimilarityLine(Record):
    """The pairs of one label."""

    matrix: str
    module: str
    label: str
    pairs: int
    cosine: Spread
    squared: Spread
    baseline_cosine: float
    baseline_squared: float


class ChangeLine(Record):
    """One matrix of one source between two steps."""

    source: str
    matrix: str
    module: str
    from_step: int
    to_step: int
    similarity: Spread | None
    magnitude: Spread | None
    direction: Spread | None


def spread(values: Iterable[float]) -> Spread:
    """Mean, deviation and n.

    Raises:
        ValueError: no value.
    """
    known = list(values)
    deviation = statistics.stdev(known) if len(known) > 1 else math.nan
    return Spread(mean=statistics.fmean(known), deviation=deviation, n=len(known))


def pair_label(pair: PairSimilarity) -> str:
    """What is known of a pair, in words."""
    if pair.one_adapter:
        return "experts of one adapter"
    return f"{_WORDS[pair.same_task]} task, {_WORDS[pair.same_init]} init"


def similarity_lines(pairs: Sequence[PairSimilarity], *, per_module: bool = True) -> list[SimilarityLine]:
    """Lines by matrix, then kind of module (all of them first), then label.

    The values of a line are its pairs' in every layer; those of one pair are not independent of each other.
    """
    lines = []
    for matrix in ("A", "B"):
        of_matrix = [pair for pair in pairs if pair.matrix == matrix]
        kinds = dict.fromkeys(pair.module for pair in of_matrix)
        for module in [ALL, *kinds] if per_module else [ALL]:
            some = [pair for pair in of_matrix if module in (ALL, pair.module)]
            for label in sorted({pair_label(pair) for pair in some}, key=_order):
                group = [pair for pair in some if pair_label(pair) == label]
                lines.append(
                    SimilarityLine(
                        matrix=matrix,
                        module=module,
                        label=label,
                        pairs=len({(pair.left, pair.right) for pair in group}),
                        cosine=spread(pair.mean_cosine for pair in group),
                        squared=spread(pair.mean_squared for pair in group),
                        baseline_cosine=statistics.fmean(pair.baseline_cosine for pair in group),
                        baseline_squared=statistics.fmean(pair.baseline_squared for pair in group),
                    )
                )
    return lines


def _order(label: str) -> tuple[int, str]:
    """What is alike in most first."""
    return -label.count("same"), label


def change_lines(
    changes: Sequence[Change], *, last_only: bool = True, per_module: bool = True
) -> list[ChangeLine]:
    """Lines by source, matrix, steps and kind of module; `last_only`: only up to the last step."""
    lines = []
    for source in dict.fromkeys(change.source for change in changes):
        of_source = [change for change in changes if change.source == source]
        last = max(change.to_step for change in of_source)
        spans = dict.fromkeys(
            (change.matrix, change.from_step, change.to_step)
            for change in of_source
            if change.to_step == last or not last_only
        )
        for matrix, start, end in spans:
            some = [c for c in of_source if (c.matrix, c.from_step, c.to_step) == (matrix, start, end)]
            kinds = dict.fromkeys(change.module for change in some)
            for module in [ALL, *kinds] if per_module else [ALL]:
                group = [change for change in some if module in (ALL, change.module)]
                lines.append(
                    ChangeLine(
                        source=source,
                        matrix=matrix,
                        module=module,
                        from_step=start,
                        to_step=end,
                        similarity=_known(group, lambda change: change.similarity),
                        magnitude=_known(group, lambda change: change.magnitude),
                        direction=_known(group, lambda change: change.direction),
                    )
                )
    return lines


def _known(changes: Sequence[Change], value: Callable[[Change], float | None]) -> Spread | None:
    values = [found for change in changes if (found := value(change)) is not None]
    return spread(values) if values else None
