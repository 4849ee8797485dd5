"""What a strategy is: a round's five verbs, and the few facts of it that settings and accounting ask for.

    server   prepare     what is sent to one client
    client   receive     what the client begins its part of the round with
    client   leave       what may leave the client; nothing else does
    server   accept      the client's own values, from what came
    server   aggregate   the new shared state, from all answers that count

A class overrides the verbs in which it differs; `manylora.federated.strategies` has those that there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manylora.errors import AnswerError
from manylora.federated.aggregate import Answers
from manylora.federated.faults import ClientError, Fault
from manylora.federated.parts import (
    FACTORED,
    PARTS,
    PLAIN,
    STACK,
    Shapes,
    State,
    initial_state,
    select_parts,
    split_name,
    truncated,
)

if TYPE_CHECKING:
    from torch import Tensor

    from manylora.federated.config import FederateConfig
    from manylora.federated.home import VersionedState


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One client's part in one round, as both ends know it."""

    config: FederateConfig
    client: str
    round: int
    rank: int
    """K."""
    version: int
    """The last round in which this client's answer counted; 0 before the first."""
    shapes: Shapes
    stacks: VersionedState
    """Where this machine keeps what earlier rounds have added to the base (FLoRA)."""

    def draw(self, parts: frozenset[str], *, seed: int, who: str = "") -> dict[str, Tensor]:
        """Initial matrices at this client's rank; see `initial_state`."""
        return initial_state(
            parts, self.shapes, rank=self.rank, largest_rank=self.config.largest_rank,
            intermediate=self.config.r, seed=seed, who=who,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What comes down to a client."""

    tensors: State
    fields: Mapping[str, int] = field(default_factory=dict)
    """Further fields of the message; `manylora.federated.messages` knows their names."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a client begins its part of a round with."""

    state: dict[str, Tensor]
    """Every matrix of its model."""
    added: Sequence[tuple[int, State]] = ()
    """Number and matrices of what is added to the base (`Workbench.fold`)."""


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """One way to learn from many clients. A subclass is final: a frozen dataclass, whose instances are the presets."""

    name: str
    up: frozenset[str] = frozenset()
    """Parts that go to the server after local training."""
    down: frozenset[str] = frozenset()
    """Parts that come from it before. A part that goes both ways goes up as its change against what came down: the
    receiver knows the rest, and a small difference survives rounding better than a large value."""
    parts: frozenset[str] = PLAIN
    """Parts of a client's model."""
    trains: frozenset[str] = PLAIN
    """Parts that local training changes."""
    unequal: bool = False
    """Whether clients may differ in rank."""
    linear: bool = False
    """Whether the new shared state is the old one and a sum over the clients of what each changed, so that the sum may
    be another one (`manylora.federated.robust`)."""
    feedback: bool = True
    """Whether rounding errors of a lossy wire are added to the next message; not where one message does not go on from
    the last."""
    pooled: bool = False
    """Whether all rows are in one place: no clients at all."""
    published: tuple[str, ...] = ("nothing",)
    """Rules by which its traffic is published; see `manylora.federated.accounting`."""

    # ---- the verbs

    def prepare(self, shared: State, turn: Turn) -> Parcel:
        """At the server: what is sent to this client, by default what is shared, at the client's rank."""
        return Parcel(tensors=truncated(shared, turn.rank))

    def receive(self, parcel: Parcel, turn: Turn, *, kept: State, reset: bool) -> Beginning:
        """At the client: what it begins with. By default its private parts as it kept them, the others as they came.

        Args:
            parcel: what came.
            turn: whose part in which round it is.
            kept: what this client has on disk; empty before the first round that counted.
            reset: set what belongs to its A back to the beginning (`a_state`).

        Raises:
            ClientError: other matrices came than the model has.
        """
        own = self.keeps_a and turn.config.a_init == "per_client"
        state = turn.draw(self.parts, seed=turn.config.seed, who=turn.client if own else "")
        remembered = {part for part in self.private if not (reset and PARTS[part].side == "A")}
        state |= select_parts({name: value for name, value in kept.items() if "/" not in name}, remembered)
        due = {name: value.shape for name, value in select_parts(state, self.down).items()}
        if {name: value.shape for name, value in parcel.tensors.items()} != due:
            raise ClientError(
                Fault.MESSAGE,
                "the server sent other matrices than this client's model has; compare the settings.",
            )
        return Beginning(state=state | dict(parcel.tensors))

    def leave(self, received: State, trained: State) -> dict[str, Tensor]:
        """At the client: what may leave it, and nothing else does.

        Args:
            received: the parts that came down, as they came.
            trained: the client's whole state after local training.

        Returns:
            The parts in `up`; those that go both ways as their changes (float32).
        """
        return {
            name: (value.double() - received[name].double()).float() if self._goes_both_ways(name) else value
            for name, value in select_parts(trained, self.up).items()
        }

    def accept(self, received: State, sent: State, turn: Turn) -> dict[str, Tensor]:
        """At the server: undo `leave`, to the client's own values in float64.

        Args:
            received: what is shared, as the wire rounds it.
            sent: what came up from this client, products instead of factors.
            turn: whose part in which round it is.

        Raises:
            AnswerError: `sent` changes a matrix that was not sent down.
        """
        values, received = {}, truncated(received, turn.rank)
        for name, value in sent.items():
            if not self._goes_both_ways(name):
                values[name] = value.double()
            elif name in received:
                values[name] = received[name].double() + value.double()
            else:
                raise AnswerError(f"it changes {name!r}, which was not sent to it")
        return values

    @abstractmethod
    def aggregate(self, received: State, answers: Answers, scaling: float) -> dict[str, Tensor]:
        """At the server: the new shared state in float32.

        Args:
            received: what was sent to all, as the wire rounds it.
            answers: (p_k, what `accept` gave) of the clients that count, Σ p_k = 1, sorted by client; read once.
            scaling: s.
        """

    # ---- what follows from the fields

    @property
    def factored(self) -> bool:
        """Whether a client's model is W0 + s (B0 + B2 B1) M A instead of W0 + s B A."""
        return self.parts == FACTORED

    @property
    def travels(self) -> bool:
        """Whether a client sends any matrix."""
        return bool(self.up)

    @property
    def restarts(self) -> bool:
        """Whether what comes down goes into the base, so that each round starts with fresh factors (FLoRA)."""
        return STACK in self.down

    @property
    def private(self) -> frozenset[str]:
        """Parts that a client keeps from round to round."""
        if self.restarts:
            return frozenset()
        return frozenset(part for part in self.parts - self.down if not PARTS[part].absorbed)

    @property
    def keeps_a(self) -> bool:
        """Whether each client has an A of its own, so that `a_init` and `a_state` mean something."""
        return "A" in self.private and "A" in self.trains

    @property
    def may_stand_still(self) -> bool:
        """Whether what travels may be unchanged although something was learnt: while B is zero A has no gradient, so
        a client's first step moves B alone."""
        return self.up == {"A"}

    def brings_its_beginning(self, part: str) -> bool:
        """Whether a part goes up together with what was drawn for it, of which the server knows nothing."""
        return part not in self.down and PARTS[part].drawn

    def _goes_both_ways(self, name: str) -> bool:
        part = split_name(name)[1]
        return part in self.up and part in self.down
