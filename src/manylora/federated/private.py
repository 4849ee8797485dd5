"""What a client keeps on its disk from round to round, and what it goes on from.

A, M, …       its private parts
residual/…    what rounding took from its last message, which goes with the next one (error feedback)
moments/…     Adam's, of its private parts (`optimizer` persist)
trained/…     its whole model as it had trained it (`personal` trained)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from manylora.federated.faults import ClientError, Fault, shown
from manylora.federated.home import DamagedStateError, VersionedState
from manylora.federated.kept import (
    MOMENTS,
    RESIDUAL,
    TRAINED,
    check_layout,
    not_finite,
    private_layout,
    with_moments,
    with_prefix,
)
from manylora.federated.parts import State, select_parts, split_name
from manylora.federated.workbench import Workbench

if TYPE_CHECKING:
    from manylora.training.passes import PassResult


def recall(
    saved: VersionedState, version: int, *, rank: int, bench: Workbench, who: str
) -> dict[str, Tensor]:
    """What the client had on disk after round `version`, the last in which its answer counted; empty for 0.

    Later versions may be there, of answers that were lost or refused: for the rounds to come they have never happened.

    Raises:
        MissingStateError, DamagedStateError: it is not there, not as it was written, or not what this run goes on from.
        ClientError: it is of another rank or base, or not finite.
    """
    if version == 0:
        return {}
    state, facts = saved.read(version)
    for what, now, same in (
        ("rank", rank, facts.get("rank") == rank),
        ("base", bench.fingerprint, bench.is_on(str(facts.get("base")))),
    ):
        if not same:
            raise ClientError(
                Fault.STATE_OTHER,
                f"the private state of client {who!r} was trained with {what} {facts.get(what)}, now it is "
                f"{now}; start a new run.",
            )
    _check(saved, version, state, facts, rank=rank, bench=bench)
    return state


def check_version(saved: VersionedState, version: int, *, bench: Workbench) -> None:
    """Read the private state of a version, as an order would that goes on from it.

    Raises:
        MissingStateError, DamagedStateError: it is not there, or not what this run goes on from.
        ClientError: it is not finite.
    """
    state, facts = saved.read(version)
    rank = facts.get("rank")
    if type(rank) is not int:
        raise DamagedStateError(
            f"{saved.file(version)} is damaged (its rank is {shown(rank)}); put a copy of it back."
        )
    _check(saved, version, state, facts, rank=rank, bench=bench)


def remember(
    saved: VersionedState,
    number: int,
    *,
    version: int,
    rank: int,
    bench: Workbench,
    trained: State,
    residual: State,
    result: PassResult,
) -> None:
    """Write the version of round `number`, begun from `version`, and remove those that no round can start from."""
    private = dict(select_parts(trained, bench.strategy.private))
    private |= {RESIDUAL + name: value for name, value in residual.items()}
    private |= _moments(bench, result)
    if bench.config.personal == "trained":
        private |= {TRAINED + name: value for name, value in trained.items() if name not in private}
    facts = {"rank": rank, "base": bench.fingerprint, "moments": with_moments(private)}
    saved.write(number, private, facts)
    # Those two, and what the rounds start from that the server keeps to go back to: after round `oldest` this client
    # began at its last version up to there.
    oldest = number - bench.config.keep_rounds
    earlier = [one for one in saved.versions() if one < version]
    first = max((one for one in (*earlier, version) if one <= oldest), default=0)
    saved.keep(version, number, *(one for one in earlier if one >= first))


def recalled_moments(kept: State, bench: Workbench) -> dict[str, dict[str, Tensor]]:
    """Adam's moments on disk by the names that the model has for the parameters."""
    parameters = {part: name for name, part in bench.parameter_names().items()}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in with_prefix(kept, MOMENTS).items():
        part, _, key = name.rpartition("/")
        moments.setdefault(parameters[part], {})[key] = value.reshape(()) if key == "step" else value
    return moments


def _check(
    saved: VersionedState,
    version: int,
    state: State,
    facts: Mapping[str, Any],
    *,
    rank: int,
    bench: Workbench,
) -> None:
    """Refuse a state that this run cannot go on from."""
    noted = facts.get("moments")
    due = private_layout(
        bench.strategy,
        bench.config,
        bench.shapes,
        rank=rank,
        moments=noted if isinstance(noted, list) else None,  # of an earlier version: of every matrix
    )
    source = saved.file(version)
    check_layout(state, due, source=source)
    if name := not_finite(state):
        raise ClientError(
            Fault.NOT_FINITE,
            f"{source} holds NaN or infinity, first in {name}; put a copy of it back, or go back to a round before.",
        )


def _moments(bench: Workbench, result: PassResult) -> Mapping[str, Tensor]:
    if bench.config.optimizer == "reset":
        return {}
    names = bench.parameter_names()
    return {
        f"{MOMENTS}{names[parameter]}/{key}": value.reshape(1) if value.dim() == 0 else value
        for parameter, values in result.moments.items()
        if split_name(names[parameter])[1] in bench.strategy.private
        for key, value in values.items()
    }
