"""Similarity of A's and of B's between adapters and between the experts of one, per layer, beside chance.

Every pair says whether its two matrices were trained for the same task and began from the same initialisation, as far
as that is known: the paper's claim (2509.25414, figure 1) is that A is alike where the initialisation was the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from manylora.analysis.places import Place, locate
from manylora.analysis.records import PairSimilarity
from manylora.analysis.sources import Source
from manylora.analysis.subspaces import RandomBaseline, compare, orthonormal_basis
from manylora.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class _Member:
    source: Source
    expert: str
    basis: Tensor
    """(D, R)"""

    @property
    def label(self) -> str:
        return f"{self.source.name}/{self.expert}" if self.expert else self.source.name

    @property
    def tasks(self) -> frozenset[str]:
        own = self.source.expert_tasks.get(self.expert)
        return frozenset([own] if own else self.source.tasks)


def similarities(sources: Sequence[Source], *, baseline: RandomBaseline) -> list[PairSimilarity]:
    """Every pair of A's and every pair of B's, module by module.

    A pair of which one matrix is zero (B before training) has no angles and is left out. Modules that only one
    adapter has are compared between its own experts.

    Raises:
        ModelError: two adapters differ in a module's size, or have no module in common.
    """
    check_comparable(sources)
    where = locate({name: None for source in sources for name in source.layers})
    found = []
    for name, place in where.items():
        for matrix in ("A", "B"):
            members = [
                _Member(source=source, expert=expert, basis=orthonormal_basis(vectors_RD))
                for source in sources
                if name in source.layers
                for expert, vectors_RD in source.layers[name].vectors(matrix).items()
            ]
            found += list(_pairs(matrix, name, place, members, baseline))
    return found


def check_comparable(sources: Sequence[Source]) -> None:
    """Refuse adapters of different bases.

    Raises:
        ModelError: naming the two and the module.
    """
    sizes: dict[str, tuple[str, tuple[int, int]]] = {}
    for source in sources:
        for name, layer in source.layers.items():
            size = (next(iter(layer.A.values())).shape[1], next(iter(layer.B.values())).shape[0])
            owner, known = sizes.setdefault(name, (source.name, size))
            if known != size:
                raise ModelError(
                    f"{owner} has {name!r} with {known[0]} inputs and {known[1]} outputs, {source.name} with {size[0]} "
                    f"and {size[1]}; only adapters of one base can be compared. Analyse them one by one."
                )
    for one, other in itertools.combinations(sources, 2):
        if not one.layers.keys() & other.layers.keys():
            raise ModelError(
                f"{one.name} and {other.name} adapt no module in common ({next(iter(one.layers))!r} against "
                f"{next(iter(other.layers))!r}); only adapters of one base can be compared."
            )


def _pairs(
    matrix: str, name: str, place: Place, members: Sequence[_Member], baseline: RandomBaseline
) -> Iterator[PairSimilarity]:
    for left, right in itertools.combinations(members, 2):
        one, other = left.basis, right.basis
        if not one.shape[1] or not other.shape[1]:
            continue
        alike = compare(one, other)
        chance = baseline(one.shape[0], one.shape[1], other.shape[1])
        yield PairSimilarity(
            matrix=matrix,
            layer=place.layer,
            module=place.module,
            name=name,
            left=left.label,
            right=right.label,
            one_adapter=left.source is right.source,
            same_task=_same_task(left, right),
            same_init=_same_init(left, right),
            mean_cosine=alike.mean_cosine,
            mean_squared=alike.mean_squared,
            baseline_cosine=chance.mean_cosine,
            baseline_squared=chance.mean_squared,
        )


def _same_task(left: _Member, right: _Member) -> bool | None:
    one, other = left.tasks, right.tasks
    if left.source is right.source and not left.source.expert_tasks:
        return None  # under a token router every expert has something of every task
    if not one or not other or (one & other and one != other):
        return None
    return one == other


def _same_init(left: _Member, right: _Member) -> bool | None:
    same_A = (
        left.source.share == "A" or left.expert == right.expert
    )  # else every expert's A is drawn on its own
    if left.source is right.source:
        return same_A
    one, other = left.source.initialisation(), right.source.initialisation()
    if one is None or other is None:
        return None
    return one == other and same_A


def with_labels(
    sources: Sequence[Source], labels: Mapping[str, tuple[tuple[str, ...], int | None]]
) -> list[Source]:
    """The sources with tasks and seeds that a user gives, by path or name.

    Raises:
        ModelError: a label names no source.
    """
    used, labelled = set(), []
    for source in sources:
        key = next((k for k in (str(source.path), source.name) if k in labels), None)
        if key is None:
            labelled.append(source)
            continue
        used.add(key)
        tasks, seed = labels[key]
        labelled.append(
            replace(
                source,
                tasks=tasks or source.tasks,
                seed=source.seed if seed is None else seed,
                drawn_apart=None,
            )
        )
    if unknown := sorted(set(labels) - used):
        raise ModelError(
            f"--label {unknown[0]} names none of the adapters given, which are "
            f"{', '.join(str(source.path) for source in sources)}."
        )
    return labelled
