"""What a server must remember between rounds, and the files in which it does; the last few rounds are kept. And what
it learns of a round while that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from manylora.errors import RunError
from manylora.federated.check import Member
from manylora.federated.config import FederateConfig
from manylora.federated.faults import shown
from manylora.federated.home import DamagedStateError, MissingStateError, VersionedState
from manylora.federated.kept import RESIDUAL as _RESIDUAL
from manylora.federated.kept import check_layout, not_finite, shared_layout, with_prefix
from manylora.federated.parts import Shapes
from manylora.federated.strategy import Strategy
from manylora.files import Record, check_record

if TYPE_CHECKING:
    from torch import Tensor

_Count = Annotated[int, Field(ge=1)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(kw_only=True)
class ServerState:
    """All that the server must remember between rounds: with less, a resumed run would end with other weights.

    Who takes part in a round is not here, as it follows from seed and round; nor is what a client keeps, as the server
    says from which version on.
    """

    round: int = 0
    """The last finished one."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    """What rounding took from the last broadcast, which the next one makes up for."""
    counted: dict[str, int] = field(default_factory=dict)
    """Client to the last round in which its answer counted: the version of its private state that it goes on from."""
    members: dict[str, Member] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    base: str = ""


@dataclass(kw_only=True)
class RoundFacts:
    """What is known of a round while it runs, by client."""

    up: dict[str, int] = field(default_factory=dict)
    """Bytes that came,"""
    down: dict[str, int] = field(default_factory=dict)
    """and that were sent."""
    losses: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    """Of the round's change; see `Progress.shared`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why an answer does not count."""
    not_finite: set[str] = field(default_factory=set)
    """Clients whose training was not."""

    def refuse(self, name: str, reason: str) -> None:
        """This client's answer does not count."""
        self.refused[name] = reason
        for known in (self.up, self.losses, self.norms):
            known.pop(name, None)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """For metrics.jsonl: by name, whoever came first."""
        kinds = ("up", "down", "losses", "norms", "shares", "refused")
        return {kind: dict(sorted(getattr(self, kind).items())) for kind in kinds}


def save_state(saved: VersionedState, state: ServerState, *, keep: int) -> None:
    """Write the state after its round; of the rounds before, `keep` - 1 stay."""
    tensors = {**state.shared, **{_RESIDUAL + name: value for name, value in state.residual.items()}}
    facts = {
        "counted": state.counted,
        "members": {m.name: [m.examples, m.rank, m.agreed] for m in state.members.values()},
        "shapes": {name: list(shape) for name, shape in state.shapes.items()},
        "base": state.base,
    }
    saved.write(state.round, tensors, facts)
    saved.keep(*saved.versions()[-keep:])


def load_state(
    saved: VersionedState, *, number: int | None = None, check: Callable[[ServerState], None] | None = None
) -> ServerState:
    """The state after a round.

    Args:
        saved: where the rounds stand.
        number: of the round; the later ones are removed, as the run goes another way from here. Default: the last.
        check: raises where the run cannot go on from the state; called before anything is removed.

    Raises:
        RunError: it is not there, or not as it was written; says which other rounds one can go on from.
    """
    versions = saved.versions()
    wanted = versions[-1] if number is None else number
    earlier = [one for one in versions if one < wanted]
    other = f", or go on from round {earlier[-1]} with --from-round {earlier[-1]}" if earlier else ""
    try:
        state = _state_of(saved, wanted)
        if check is not None:
            check(state)
    except MissingStateError as error:
        there = ", ".join(map(str, versions))
        raise RunError(
            f"{saved.path} does not have round {wanted}, only {there} (--keep-rounds); go on from one of these."
        ) from error
    except DamagedStateError as error:
        raise DamagedStateError(f"{str(error).rstrip('.')}{other}.") from error
    if number is not None:
        saved.keep(*(one for one in versions if one <= number))
    return state


class _Facts(Record):
    """The notes beside the matrices."""

    counted: dict[str, _Count]
    members: dict[str, Annotated[list[_Count | None], Field(min_length=2, max_length=3)]]
    """Client to rows that it claims, rank and, of later versions, rows that count."""
    shapes: dict[str, Annotated[list[_Size], Field(min_length=2, max_length=2)]]
    base: str


def _state_of(saved: VersionedState, number: int) -> ServerState:
    tensors, notes = saved.read(number)
    source, remedy = saved.file(number), "put a copy of it back"
    try:
        facts = check_record(notes, _Facts, source=source, remedy=remedy)
    except RunError as error:
        raise DamagedStateError(str(error)) from error
    members: dict[str, Member] = {}
    for name, (examples, rank, *more) in facts.members.items():
        if examples is None or rank is None:
            raise DamagedStateError(
                f"{source} is damaged (of client {shown(name)} it has no rows or no rank); {remedy}."
            )
        members[name] = Member(name=name, examples=examples, rank=rank, agreed=next(iter(more), None))
    for name, version in facts.counted.items():
        if name not in members or version > number:
            raise DamagedStateError(
                f"{source} is damaged (client {shown(name)} is said to have counted in round {version}); {remedy}."
            )
    return ServerState(
        round=number,
        shared={n: v for n, v in tensors.items() if not n.startswith(_RESIDUAL)},
        residual=with_prefix(tensors, _RESIDUAL),
        counted=dict(facts.counted),
        members=members,
        shapes={name: (shape[0], shape[1]) for name, shape in facts.shapes.items()},
        base=facts.base,
    )


def check_shared(state: ServerState, strategy: Strategy, config: FederateConfig, *, source: Path) -> None:
    """Refuse a state that this run cannot go on from; else every client would be told to compare its settings.

    Raises:
        DamagedStateError: its matrices are not those of its layers, or not finite; or a client's rank is none of
            the run's.
    """
    due = shared_layout(strategy, config, state.shapes)
    check_layout(state.shared, due, source=source)
    rounds = strategy.travels and strategy.feedback and config.wire != "fp32" and state.round > 0
    check_layout(state.residual, due if rounds else {}, source=f"what rounding took, in {source},")
    wrong = ""
    if name := not_finite(state.shared) or not_finite(state.residual):
        wrong = f"its {name} is not finite"
    for member in state.members.values():
        if member.rank not in (config.ranks or [config.r]):
            wrong = f"client {shown(member.name)} has rank {member.rank}, which is none of the run's"
    if wrong:
        raise DamagedStateError(f"{source} is damaged ({wrong}); put a copy of it back.")
