"""Answers are checked before they count: a server believes nothing that it can verify.

What a client claims of itself, its number of rows first of all, it may claim of any size. So what follows from a claim
(its weight in an average, how far its update may go) is measured against the other clients.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.errors import AnswerError, RunError
from manylora.federated.compress import multiply_factors
from manylora.federated.config import FederateConfig
from manylora.federated.faults import clean_text, shown
from manylora.federated.messages import read_joined, read_trained
from manylora.federated.parts import PARTS, Shapes, State, norm, sent_as, split_name
from manylora.federated.strategy import Strategy
from manylora.federated.wire import Message

MOST_CLAIMED = 10
"""How many times the median of the other clients' rows a client's own count for, where nobody vouches for them."""
_MOST_EXAMPLES = 10_000_000
"""Rows that a client may claim to have where `max_examples` says nothing."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What the server knows of a client from its joining."""

    name: str
    examples: int
    """Training rows, as it claims."""
    rank: int
    agreed: int | None = None
    """Training rows that count, where those are fewer; fixed at joining (see `agreed_counts`)."""

    @property
    def weight(self) -> int:
        """Training rows that count: its answer's weight in an average, and the length of its training."""
        return self.examples if self.agreed is None else self.agreed


@dataclass(frozen=True, kw_only=True)
class Checked:
    """An answer that may count."""

    update: dict[str, Tensor]
    """What came up, products instead of factors."""
    loss: float
    norm: float
    """Of the update; where nothing travels, of the change that the client reports."""


def expected_shapes(
    strategy: Strategy, shapes: Shapes, *, rank: int, intermediate: int
) -> dict[str, tuple[int, int]]:
    """Name and shape of every matrix that a client of this rank sends."""
    return {
        f"{layer}.{sent}": PARTS[sent].shape(layer=size, rank=rank, intermediate=intermediate)
        for layer, size in shapes.items()
        for part in strategy.up
        for sent in sent_as(part, layer=size, rank=rank, intermediate=intermediate)
    }


def update_limits(
    strategy: Strategy, config: FederateConfig, *, member: Member, round: int
) -> dict[str, float]:
    """Part to the largest root mean square that a matrix of an update may have.

    AdamW moves a number by about its learning rate in a step, so an honest change has a root mean square of at most
    about learning_rate × steps; `max_update` is how often that. Of the product B2 B1 the one factor begins at zero
    each round, the other one at 1/√(3 r) in the first and has moved in every round since.

    Args:
        strategy: of the run.
        config: resolved.
        member: whose update it is.
        round: in which it was made.
    """
    assert config.local_epochs is not None
    assert config.learning_rate is not None
    assert config.batch_size is not None
    steps = config.local_steps or math.ceil(config.local_epochs * member.weight / config.batch_size)
    moved = config.learning_rate * steps * (1 + config.weight_decay)
    product = moved * math.sqrt(member.rank) * (1 / math.sqrt(3 * config.r) + moved * round)
    return {part: config.max_update * (product if PARTS[part].factors else moved) for part in strategy.up}


def check_answer(
    message: Message,
    *,
    member: Member,
    round: int,
    version: int,
    expected: Mapping[str, tuple[int, int]],
    strategy: Strategy,
    limits: Mapping[str, float],
) -> Checked:
    """The answer of one client, if it is what it was asked for.

    Args:
        message: what came.
        member: who was asked.
        round: for which round.
        version: the round it was told to start from.
        expected: name and shape of every matrix, from `expected_shapes`.
        strategy: of the run.
        limits: by part, from `update_limits`.

    Raises:
        AnswerError: it is not; says what is wrong, not whose answer it is.
    """
    said = read_trained(message, name=member.name, examples=member.examples)
    if message.round != round or said.version != version:
        raise AnswerError(
            f"it belongs to round {shown(message.round)}, this is round {round}: a late answer or a replay"
        )
    _check_matrices(message.tensors, expected)
    update = multiply_factors(message.tensors)
    _check_size(update, strategy, limits)
    size = _norm_of_change(update, strategy) if strategy.travels else said.moved
    if size == 0 and not (strategy.may_stand_still and said.moved > 0):
        raise AnswerError(
            "its update is zero: nothing was learnt; is its learning rate 0, or are its rows empty?"
        )
    return Checked(update=update, loss=said.loss, norm=size)


def check_joined(
    message: Message, *, name: str, max_examples: int | None, known: int | None = None
) -> tuple[int, str, Shapes]:
    """Example count, fingerprint of the base and shapes of the layers of a client that joins.

    Args:
        message: what came.
        name: who was asked.
        max_examples: most rows that it may claim. Default: 10 million.
        known: its number of rows, where the engine knows it.

    Raises:
        AnswerError: they cannot be.
    """
    most = _MOST_EXAMPLES if max_examples is None else max_examples
    said = read_joined(message, name=name, max_examples=most)
    if known is not None and said.examples != known:
        raise AnswerError(f"it claims {said.examples} examples, but has {known}")
    return said.examples, said.base, said.layers


def agreed_counts(claims: Mapping[str, int], *, vouched: Iterable[str] = ()) -> dict[str, int]:
    """How many rows of each client count: at most `MOST_CLAIMED` times the median of the others' claims.

    So whoever claims any number weighs at most as ten usual clients do. With two clients nobody can say whose number is
    the odd one, so both count as they are.

    Args:
        claims: client to the rows that it claims.
        vouched: clients whose numbers are known to be right.
    """
    counts, known = dict(claims), frozenset(vouched)
    for name, claim in claims.items():
        others = [other for who, other in claims.items() if who != name]
        if len(others) > 1 and name not in known:
            counts[name] = min(claim, max(1, math.floor(MOST_CLAIMED * statistics.median(others))))
    return counts


def out_of_proportion(norms: Mapping[str, float], *, most: float) -> dict[str, str]:
    """Clients whose change is above `most` times the median of the others', and why they do not count.

    With fewer than three answers, or where most have not changed at all, there is nothing to compare with.
    """
    found = {}
    for name, size in norms.items():
        others = [other for who, other in norms.items() if who != name]
        median = statistics.median(others) if len(others) > 1 else 0.0
        if median > 0 and size > most * median:
            found[name] = (
                f"its change is {size / median:.3g} times the median of the others', above the limit {most:g}; "
                "see --max-ratio"
            )
    return found


def check_result(new: State, *, change: float, norms: Iterable[float], most: float | None) -> None:
    """The new shared state, before it replaces the old one.

    Args:
        new: what came out of the answers that count.
        change: norm of its change.
        norms: of the answers that count.
        most: times the median of these that the change may be; None where the two cannot be compared.

    Raises:
        RunError: it is not finite, or out of proportion.
    """
    for name, value in new.items():
        if not torch.isfinite(value).all():
            raise RunError(f"its {name} is not finite")
    if most is not None and change > most * (usual := statistics.median(norms)):
        raise RunError(
            f"its change, {change:.3g}, is above {most:g} times what the clients sent ({usual:.3g})"
        )


def _check_matrices(sent: State, expected: Mapping[str, tuple[int, int]]) -> None:
    if missing := sorted(set(expected) - set(sent)):
        raise AnswerError(f"it lacks {len(missing)} of {len(expected)} matrices, such as {missing[0]}")
    if extra := sorted(set(sent) - set(expected)):
        raise AnswerError(f"it has {len(extra)} matrices too many, such as {clean_text(extra[0])}")
    for name, value in sent.items():
        if tuple(value.shape) != expected[name]:
            raise AnswerError(f"its {name} is {tuple(value.shape)}, expected {expected[name]}")
        if not torch.isfinite(value).all():
            raise AnswerError(f"its {name} holds NaN or infinity")


def _check_size(update: State, strategy: Strategy, limits: Mapping[str, float]) -> None:
    for name, value in update.items():
        part = split_name(name)[1]
        limit = limits[part]
        if strategy.brings_its_beginning(part):  # ±1/√(columns)
            limit += 1 / math.sqrt(value.shape[1])
        size = float(value.double().square().mean().sqrt())
        if size > limit:
            raise AnswerError(
                f"its {name} has changed by {size:.3g} (root mean square), above the limit {limit:.3g}; "
                "see --max-update"
            )


def _norm_of_change(update: State, strategy: Strategy) -> float:
    # An A that starts anew each round is no change; the B beside it began at zero, so it is one.
    return norm(
        {n: value for n, value in update.items() if not strategy.brings_its_beginning(split_name(n)[1])}
    )
