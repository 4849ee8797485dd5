"""Answers are checked before they count: a server believes nothing that it can verify."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.errors import AnswerError
from manylora.federated.compress import expanded, product_is_lighter
from manylora.federated.config import FederateConfig
from manylora.federated.exchange import UPDATE, State, split_name
from manylora.federated.initial import Shapes, part_shape
from manylora.federated.strategies import Strategy
from manylora.federated.wire import Message


@dataclass(frozen=True, kw_only=True)
class Member:
    """What the server knows of a client from its joining."""

    name: str
    examples: int
    """Training rows; the answer's weight in an average."""
    rank: int


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
    expected = {}
    for layer, size in shapes.items():
        for part in strategy.exchange.up:
            light = part != UPDATE or product_is_lighter(
                out_features=size[0], rank=intermediate, own_rank=rank
            )
            for sent in (part,) if light else ("B2", "B1"):
                expected[f"{layer}.{sent}"] = part_shape(
                    sent, layer=size, rank=rank, intermediate=intermediate
                )
    return expected


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
    steps = config.local_steps or math.ceil(config.local_epochs * member.examples / config.batch_size)
    moved = config.learning_rate * steps * (1 + config.weight_decay)
    product = moved * math.sqrt(member.rank) * (1 / math.sqrt(3 * config.r) + moved * round)
    return {part: config.max_update * (product if part == UPDATE else moved) for part in strategy.exchange.up}


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
    if message.kind == "failed":
        raise AnswerError(str(message.fields.get("reason", "it failed without a reason"))[:500])
    if message.kind != "trained" or message.client != member.name:
        raise AnswerError(
            f"it is a {message.kind!r} of {message.client!r}, not the answer that was asked for"
        )
    if message.round != round or message.fields.get("version") != version:
        raise AnswerError(
            f"it belongs to round {message.round}, this is round {round}: a late answer or a replay"
        )
    examples = message.fields.get("examples")
    if type(examples) is not int or examples != member.examples:
        raise AnswerError(f"it claims {examples!r} examples, but joined with {member.examples}")
    loss = _number(message.fields, "loss")
    _check_matrices(message.tensors, expected)
    update = expanded(message.tensors)
    moved = _number(message.fields, "moved")
    _check_size(update, strategy, limits)
    norm = _norm_of_change(update, strategy) if strategy.travels else moved
    if norm == 0 and not (strategy.may_stand_still and moved > 0):
        raise AnswerError(
            "its update is zero: nothing was learnt; is its learning rate 0, or are its rows empty?"
        )
    return Checked(update=update, loss=loss, norm=norm)


def check_joined(
    message: Message, *, name: str, max_examples: int
) -> tuple[int, str, dict[str, tuple[int, int]]]:
    """Example count, fingerprint of the base and shapes of the layers of a client that joins.

    Raises:
        AnswerError: they cannot be.
    """
    if message.kind == "failed":
        raise AnswerError(str(message.fields.get("reason", "it failed without a reason"))[:500])
    if message.kind != "joined" or message.client != name:
        raise AnswerError(
            f"it is a {message.kind!r} of {message.client!r}, not the answer that was asked for"
        )
    examples, base = message.fields.get("examples"), message.fields.get("base")
    if type(examples) is not int or not 1 <= examples <= max_examples:
        raise AnswerError(
            f"it claims {examples!r} examples; allowed are 1 to {max_examples} (--max-examples)"
        )
    layers = message.fields.get("layers")
    if not isinstance(base, str) or not isinstance(layers, dict) or not layers:
        raise AnswerError("it does not describe its base model")
    shapes = {}
    for layer, shape in layers.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            raise AnswerError(f"its layer {layer!r} has the shape {shape!r}")
        shapes[layer] = (shape[0], shape[1])
    return examples, base, shapes


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AnswerError(f"its {name} is {value!r}, no number")
    if not (math.isfinite(value) and value >= 0):
        raise AnswerError(f"its {name} is {value!r}; it must be finite and not negative")
    return float(value)


def _check_matrices(sent: State, expected: Mapping[str, tuple[int, int]]) -> None:
    if missing := sorted(set(expected) - set(sent)):
        raise AnswerError(f"it lacks {len(missing)} of {len(expected)} matrices, such as {missing[0]}")
    if extra := sorted(set(sent) - set(expected)):
        raise AnswerError(f"it has {len(extra)} matrices too many, such as {extra[0]}")
    for name, value in sent.items():
        if tuple(value.shape) != expected[name]:
            raise AnswerError(f"its {name} is {tuple(value.shape)}, expected {expected[name]}")
        if not torch.isfinite(value).all():
            raise AnswerError(f"its {name} holds NaN or infinity")


def _check_size(update: State, strategy: Strategy, limits: Mapping[str, float]) -> None:
    for name, value in update.items():
        part = split_name(name)[1]
        limit = limits[part]
        if part == "A" and part not in strategy.exchange.down:  # it comes with its beginning: ±1/√(columns)
            limit += 1 / math.sqrt(value.shape[1])
        size = float(value.double().square().mean().sqrt())
        if size > limit:
            raise AnswerError(
                f"its {name} has changed by {size:.3g} (root mean square), above the limit {limit:.3g}; "
                "see --max-update"
            )


def _norm_of_change(update: State, strategy: Strategy) -> float:
    both = strategy.exchange.up & strategy.exchange.down
    # An A that starts anew each round is no change; the B beside it began at zero, so it is one.
    changes = [value for name, value in update.items() if split_name(name)[1] in {*both, UPDATE, "B"}]
    return math.sqrt(sum(float(value.double().square().sum()) for value in changes))
