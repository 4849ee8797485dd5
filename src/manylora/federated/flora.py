"""FLoRA (arXiv 2409.05976): the A's and B's of a whole round, stacked, come down and go into every client's base.

The server keeps each round's stack, and a client those that it has received: it is sent only what it missed, and folds
all of them into its base in order. Both check that none is missing, for a base without one would be another base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from manylora.federated import aggregate
from manylora.federated.aggregate import Answers
from manylora.federated.faults import ClientError, Fault, shown
from manylora.federated.parts import PLAIN, Shapes, State, seed_of, split_name
from manylora.federated.strategy import Beginning, Parcel, Strategy, Turn

if TYPE_CHECKING:
    from torch import Tensor

    from manylora.federated.home import VersionedState


@final
@dataclass(frozen=True, kw_only=True)
class Stacked(Strategy):
    """Fresh factors each round; what was learnt stands in the base."""

    def prepare(self, shared: State, turn: Turn) -> Parcel:
        """The stacks that this client has missed, and how many there are."""
        made = [number for number in turn.stacks.versions() if number < turn.round]
        # Whoever counted in round v had the stacks before v by then; it missed the others.
        missed = {
            f"{number}/{name}": value
            for number in made
            if number >= turn.version
            for name, value in _whole_stack(turn, number).items()
        }
        return Parcel(tensors=missed, fields={"stacks": len(made)})

    def receive(self, parcel: Parcel, turn: Turn, *, kept: State, reset: bool) -> Beginning:
        """Factors of this round's own draw, on a base with every stack up to it."""
        for number, stack in _stacks_in(parcel.tensors, turn.shapes, before=turn.round).items():
            if not _has_stack(turn.stacks, number, stack):
                turn.stacks.write(number, stack, {})
        known = [number for number in turn.stacks.versions() if number < turn.round]
        if len(known) != parcel.fields.get("stacks"):
            raise ClientError(
                Fault.STATE_MISSING,
                f"client {turn.client!r} has the stacks of rounds {known}, but there are "
                f"{parcel.fields.get('stacks')}; put its folder back.",
            )
        return Beginning(
            state=turn.draw(self.parts, seed=seed_of(turn.config.seed, turn.round), who=turn.client),
            added=[(number, _whole_stack(turn, number)) for number in known],
        )

    def aggregate(self, received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
        """The round's stack."""
        return aggregate.stacked(received, answers, scaling)


FLORA = Stacked(
    name="flora", up=PLAIN, down=frozenset({"stack"}), unequal=True, feedback=False,
    published=("A and B up, the stack of all down",),
)  # fmt: skip


def _whole_stack(turn: Turn, number: int) -> State:
    """The stack of a round, as it is on disk.

    Raises:
        DamagedStateError: it is not as it was written, or not one of the run's layers.
    """
    from manylora.federated.kept import check_stack

    stack, _ = turn.stacks.read(number)
    check_stack(stack, turn.shapes, source=turn.stacks.file(number))
    return stack


def _stacks_in(sent: State, shapes: Shapes, *, before: int) -> dict[int, dict[str, Tensor]]:
    """The stacks in a message, each whole: an A (K, D) and a B (O, K) for every layer.

    Raises:
        ClientError: a matrix belongs to none, or a stack lacks one.
    """
    from manylora.federated.kept import broken_layer

    arrived: dict[int, dict[str, Tensor]] = {}
    for name, value in sent.items():
        label, _, matrix = name.partition("/")
        layer, part = split_name(matrix)
        known = layer in shapes and part in PLAIN
        if not known or not re.fullmatch("[1-9][0-9]{0,8}", label) or int(label) >= before:
            raise ClientError(
                Fault.MESSAGE, f"the server sent a matrix called {shown(name)}, which is in no stack."
            )
        arrived.setdefault(int(label), {})[matrix] = value
    for stack in arrived.values():
        if (broken := broken_layer(stack, shapes)) is not None:
            raise ClientError(Fault.MESSAGE, f"the server sent a stack without a whole {broken!r}.")
    return arrived


def _has_stack(saved: VersionedState, number: int, stack: State) -> bool:
    """Whether a stack is on disk as it came: a run that went back to an earlier round makes others."""
    from manylora.federated.home import DamagedStateError

    if number not in saved.versions():
        return False
    try:
        there = saved.read(number)[0]
    except DamagedStateError:
        return False
    return there.keys() == stack.keys() and all(there[name].equal(stack[name]) for name in stack)
