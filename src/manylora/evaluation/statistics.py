"""Statistics of scores: the standard error of a mean, and the change against single-task training."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from manylora.errors import DataError


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of `values`: s / sqrt(n), with s the sample deviation (ddof = 1).

    Not a number for fewer than two values: one value says nothing about spread.
    """
    n = len(values)
    if n < 2:
        return math.nan
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def delta_m(
    scores: Mapping[str, float], single: Mapping[str, float], *, lower_is_better: Collection[str] = ()
) -> float:
    """Δm%, the mean relative loss against single-task training, in per cent (arXiv 2509.25414, section 5).

    −100 · mean over tasks of (M_task − M_single) / M_single. Lower is better; negative beats single-task
    training.

    Args:
        scores: each task's score under the method.
        single: each task's score of one LoRA of the same rank that was trained on that task alone.
        lower_is_better: tasks whose score is a cost, such as perplexity; their sign is flipped.

    Raises:
        DataError: the two name different tasks or none, or a single-task score is 0.
    """
    if set(scores) != set(single):
        raise DataError(
            f"The tasks {sorted(set(scores) ^ set(single))} stand on one side only. "
            "Give the same tasks as scores and as single-task scores."
        )
    if not scores:
        raise DataError("There is no task to compare. Give at least one task's score.")
    unknown = sorted(set(lower_is_better) - set(scores))
    if unknown:
        raise DataError(
            f"lower_is_better names {unknown}, which have no score. Known tasks: {sorted(scores)}."
        )
    zero = sorted(task for task, score in single.items() if score == 0)
    if zero:
        raise DataError(
            f"The single-task scores of {zero} are 0, so no relative change exists. Leave them out."
        )
    changes = (
        (score - single[task]) / single[task] * (-1.0 if task in lower_is_better else 1.0)
        for task, score in scores.items()
    )
    return -100.0 * math.fsum(changes) / len(scores)
