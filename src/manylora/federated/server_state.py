"""What a server must remember between rounds, and the files in which it does; the last few rounds are kept. And what
it learns of a round while that runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from manylora.errors import RunError
from manylora.federated.check import Member
from manylora.federated.home import DamagedStateError, MissingStateError, VersionedState
from manylora.federated.parts import Shapes

if TYPE_CHECKING:
    from torch import Tensor

_RESIDUAL = "residual/"


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


def load_state(saved: VersionedState, *, number: int | None = None) -> ServerState:
    """The state after a round.

    Args:
        saved: where the rounds stand.
        number: of the round; the later ones are removed, as the run goes another way from here. Default: the last.

    Raises:
        RunError: it is not there, or not as it was written; says which other rounds one can go on from.
    """
    versions = saved.versions()
    wanted = versions[-1] if number is None else number
    earlier = [one for one in versions if one < wanted]
    other = f", or go on from round {earlier[-1]} with --from-round {earlier[-1]}" if earlier else ""
    try:
        state = _state_of(saved, wanted)
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


def _state_of(saved: VersionedState, number: int) -> ServerState:
    tensors, facts = saved.read(number)
    try:
        return ServerState(
            round=number,
            shared={n: v for n, v in tensors.items() if not n.startswith(_RESIDUAL)},
            residual={n.removeprefix(_RESIDUAL): v for n, v in tensors.items() if n.startswith(_RESIDUAL)},
            counted=dict(facts["counted"]),
            members={n: Member(name=n, examples=e, rank=r, agreed=next(iter(more), None))
                     for n, (e, r, *more) in facts["members"].items()},
            shapes={name: (shape[0], shape[1]) for name, shape in facts["shapes"].items()},
            base=facts["base"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedStateError(
            f"the state of round {number} in {saved.path} is damaged ({error!r}); put a copy of it back."
        ) from error
