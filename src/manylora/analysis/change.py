"""How far A and B move during training, from snapshots of a run (2509.25414, figure 2).

Of a matrix' R vectors (A's rows, B's columns) before and after:

    magnitude    mean of | ‖after‖ − ‖before‖ | / ‖before‖
    direction    mean of 1 − cos(before, after)
    similarity   mean σ of the two spans (`subspaces`)

B is zero at step 0, so it is compared with the first snapshot in which it is not, and A with both, so that the two can
be compared over the same steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.analysis.places import Place, locate
from manylora.analysis.records import Change, Movement
from manylora.analysis.sources import Layer, Layers, Source
from manylora.analysis.subspaces import compare, orthonormal_basis


def movement(before_RD: Tensor, after_RD: Tensor) -> Movement:
    """How vectors, given as rows, have changed; a vector that was zero before does not count.

    Args:
        before_RD: A, or B transposed.
        after_RD: likewise, later.
    """
    before, after = (vectors.to("cpu", torch.float64) for vectors in (before_RD, after_RD))
    norms_R, later_R = before.norm(dim=1), after.norm(dim=1)
    was_R = norms_R > 0
    both_R = was_R & (later_R > 0)
    magnitude = ((later_R - norms_R).abs() / norms_R)[was_R]
    cosine = ((before * after).sum(1) / (norms_R * later_R))[both_R].clamp(-1, 1)
    one, other = orthonormal_basis(before), orthonormal_basis(after)
    spans = compare(one, other) if one.shape[1] and other.shape[1] else None
    return Movement(
        similarity=spans.mean_cosine if spans else None,
        magnitude=float(magnitude.mean()) if was_R.any() else None,
        direction=float((1 - cosine).mean()) if both_R.any() else None,
    )


def changes(source: Source) -> list[Change]:
    """From every reference to every later snapshot and to the result; empty where the run kept none.

    A's references are step 0 (where kept) and the first snapshot with a B that is not zero anywhere; B's is the latter.
    """
    moments: dict[int, Layers] = {step: source.snapshot(step) for step in source.snapshots}
    if source.last_step is not None and moments:
        moments.setdefault(source.last_step, source.layers)
    steps = sorted(moments)
    early = next((step for step in steps if _moved(moments[step])), None)
    later = [] if early is None else [early]
    references = {"A": sorted({step for step in (0, *later) if step in moments}), "B": later}
    where = locate(source.layers)
    found = []
    for matrix in ("A", "B"):
        for start in references[matrix]:
            for end in (step for step in steps if step > start):
                for name, place in where.items():
                    if name in moments[start] and name in moments[end]:
                        before, after = moments[start][name], moments[end][name]
                        found += _of(source, matrix, name, place, (start, end), before, after)
    return found


def _moved(layers: Layers) -> bool:
    return all(bool(B.any()) for layer in layers.values() for B in layer.B.values())


def _of(
    source: Source, matrix: str, name: str, place: Place, steps: tuple[int, int], before: Layer, after: Layer
) -> list[Change]:
    later = after.vectors(matrix)
    return [
        Change(
            source=source.name,
            expert=expert,
            matrix=matrix,
            layer=place.layer,
            module=place.module,
            name=name,
            from_step=steps[0],
            to_step=steps[1],
            **movement(vectors_RD, later[expert]).model_dump(),
        )
        for expert, vectors_RD in before.vectors(matrix).items()
    ]
