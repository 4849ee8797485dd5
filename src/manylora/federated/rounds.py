"""The rounds, written once for every engine: choose, send, train, collect, check, aggregate, save.

    FOLDER/rounds/round-0003.safetensors     shared state after round 3, who has counted when, who takes part
    FOLDER/stacks/round-0003.safetensors     FLoRA's stacks
    FOLDER/answers/                          answers of the running round that passed their checks
    FOLDER/metrics.jsonl                     one line per round

A round that is saved is never repeated, one that is not is repeated from the same messages; so a run that is killed
at any moment and resumed ends with the weights of an unbroken one.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.errors import AnswerError, RunError, WireError
from manylora.evaluation import Scores
from manylora.evaluation.score import TaskScore
from manylora.federated.aggregate import truncated
from manylora.federated.check import (
    Checked,
    Member,
    check_answer,
    check_joined,
    expected_shapes,
    update_limits,
)
from manylora.federated.clients import Clients, Reply
from manylora.federated.compress import corrected, expanded, residual_of
from manylora.federated.config import FederateConfig
from manylora.federated.exchange import State
from manylora.federated.home import VersionedState, folder_name
from manylora.federated.initial import Shapes, initial_state
from manylora.federated.progress import Progress, Quiet
from manylora.federated.strategies import strategy_for
from manylora.federated.wire import Message, pack, unpack
from manylora.training import RunFolder, same_base

if TYPE_CHECKING:
    from torch import Tensor

_RESIDUAL = "residual/"


@dataclass(kw_only=True)
class ServerState:
    """All that the server must remember between rounds."""

    round: int = 0
    """The last finished one."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    """What rounding took from the last broadcast."""
    counted: dict[str, int] = field(default_factory=dict)
    """Client to the last round in which its answer counted."""
    members: dict[str, Member] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    base: str = ""


class Rounds:
    """A federated run at its server.

    Args:
        config: resolved.
        clients: an engine.
        folder: of the run, or of its reference within it.
        progress: told what happens.
    """

    def __init__(
        self, config: FederateConfig, clients: Clients, folder: Path, *, progress: Progress | None = None
    ) -> None:
        self.config, self.clients, self.folder = config, clients, folder
        self.strategy = strategy_for(config.strategy, unequal=config.ranks is not None)
        self.progress: Progress = progress or Quiet()
        self._saved = VersionedState(folder / "rounds")
        self._stacks = VersionedState(folder / "stacks")
        self._answers = folder / "answers"
        self.state = ServerState()

    def run(self) -> ServerState:
        """Run every round that is not yet saved.

        Raises:
            RunError: too few clients answered, or a round changed nothing.
        """
        assert self.config.rounds is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._saved.versions():
            self._load()
        else:
            self._begin()
        RunFolder(self.folder).rewind_metrics(self.state.round)
        while self.state.round < self.config.rounds:
            self._round(self.state.round + 1)
        return self.state

    def score(self) -> dict[str, Scores]:
        """Send every client what is shared in the end, and have it score its personal model on its own test rows.

        A client that has no test rows is left out, and so is one that does not answer, which is said.
        """
        names = sorted(self.state.members)[: self.config.scored_clients]
        scores: dict[str, Scores] = {}
        last = self.state.round + 1
        values = corrected(self.state.shared, self.state.residual)
        replies = self.clients.ask(
            names, lambda name: self._order("score", name, last, values), seconds=self.config.deadline
        )
        waiting = set(names)
        for reply in replies:
            waiting.discard(reply.client)
            try:
                if rows := _scored(reply):
                    scores[reply.client] = Scores(tasks=tuple(map(TaskScore.from_dict, rows)))
            except (AnswerError, WireError, KeyError, TypeError, AttributeError) as error:
                self.progress.refused(reply.client, f"it could not score its model: {error}")
            self.progress.scored(reply.client, len(names) - len(waiting), len(names))
        for name in sorted(waiting):
            self.progress.refused(name, f"its model is not scored: {self._no_answer()}")
        return {name: scores[name] for name in names if name in scores}

    # ---- before the first round

    def _begin(self) -> None:
        """Let the clients join, give each its rank, and save what all begin with as round 0."""
        names = sorted(self.clients.names())
        if len(set(names)) != len(names):
            raise RunError(f"two clients have one name among {names}; give each its own.")
        joined, base, shapes = self._join(names)
        self.config.check_number_of_clients(len(names))
        members = {
            name: Member(name=name, examples=joined[name], rank=self.config.rank_of(index))
            for index, name in enumerate(names)
            if name in joined
        }
        shared = initial_state(
            () if self.strategy.restarts else self.strategy.exchange.down,
            shapes,
            rank=self.config.largest_rank,
            largest_rank=self.config.largest_rank,
            intermediate=self.config.r,
            seed=self.config.seed,
        )
        self.state = ServerState(shared=shared, members=members, shapes=shapes, base=base)
        self._save()

    def _join(self, names: Sequence[str]) -> tuple[dict[str, int], str, Shapes]:
        """Example counts of the clients that join, and the base model that all of them have."""
        joined: dict[str, int] = {}
        refused: dict[str, str] = {}
        common: tuple[str, Shapes] | None = None
        fields = {"settings": self.config.for_clients()}
        replies = self.clients.ask(
            names,
            lambda name: pack(Message(kind="join", client=name, round=0, fields=fields)),
            seconds=self.config.deadline,
        )
        for reply in replies:
            if reply.client not in names or reply.client in joined:
                continue
            try:
                examples, base, shapes = check_joined(
                    unpack(_bytes(reply)), name=reply.client, max_examples=self.config.max_examples
                )
            except (AnswerError, WireError) as error:
                refused[reply.client] = str(error)
                self.progress.refused(reply.client, str(error))
                continue
            if common is not None and not (same_base(base, common[0]) and shapes == common[1]):
                raise RunError(
                    f"client {reply.client!r} has another base model, or other layers of it, than {min(joined)!r} "
                    f"(fingerprints {base} and {common[0]}); give all the same."
                )
            joined[reply.client], common = examples, (base, shapes)
        refused |= {name: self._no_answer() for name in names if name not in joined and name not in refused}
        self._check_quorum(len(joined), names, "joined", refused)
        assert common is not None
        return joined, *common

    # ---- one round

    def chosen(self, number: int) -> list[str]:
        """Who takes part in a round: a seeded draw that depends on the names, the seed and the round alone."""
        names = sorted(self.state.members)
        count = max(1, round(self.config.participation * len(names)))
        return sorted(random.Random(f"{self.config.seed}:participation:{number}").sample(names, count))

    def _round(self, number: int) -> None:
        names = self.chosen(number)
        self.progress.round_began(number, self.config.rounds or 0, len(names))
        values = corrected(self.state.shared, self.state.residual)
        # What the clients will read: rounded as the wire rounds, truncated or not.
        received = unpack(
            pack(Message(kind="", client="", round=0, tensors=values), self.config.wire)
        ).tensors
        shutil.rmtree(self._answers, ignore_errors=True)
        self._answers.mkdir()
        facts: dict[str, Any] = {"up": {}, "down": {}, "losses": {}, "norms": {}, "refused": {}}
        self._collect(names, number, values, facts)
        counted = sorted(facts["losses"])
        self._check_quorum(len(counted), names, f"counted in round {number}", facts["refused"])
        update = self._aggregate(number, counted, values, received)
        self.state.counted |= dict.fromkeys(counted, number)
        self.state.round = number
        examples = {name: self.state.members[name].examples for name in counted}
        loss = sum(facts["losses"][name] * n for name, n in examples.items()) / sum(examples.values())
        by_client = {what: dict(sorted(of.items())) for what, of in facts.items()}  # whoever came first
        RunFolder(self.folder).append_metrics(
            {"step": number, "loss": loss, "update_norm": update, "asked": len(names), **by_client}
        )
        self._save()
        shutil.rmtree(self._answers, ignore_errors=True)
        self.progress.round_ended(number, loss, update)

    def _collect(self, names: Sequence[str], number: int, values: State, facts: dict[str, Any]) -> None:
        """Ask, and put every answer that passes its checks on disk; memory holds one at a time."""

        def order(name: str) -> bytes:
            data = self._order("train", name, number, values)
            facts["down"][name] = len(data)
            return data

        began, waiting = time.monotonic(), set(names)
        deadline = self.config.deadline
        for reply in self.clients.ask(names, order, seconds=deadline):
            late = deadline is not None and time.monotonic() - began > deadline
            if reply.client not in waiting or late:
                continue
            waiting.remove(reply.client)
            try:
                checked = self._check(reply, number)
            except (AnswerError, WireError) as error:
                facts["refused"][reply.client] = str(error)
                self.progress.refused(reply.client, str(error))
                continue
            assert reply.data is not None
            (self._answers / folder_name(reply.client)).write_bytes(reply.data)
            facts["up"][reply.client] = len(reply.data)
            facts["losses"][reply.client], facts["norms"][reply.client] = checked.loss, checked.norm
            self.progress.answered(reply.client, checked.loss, time.monotonic() - began)
        for name in sorted(waiting):
            facts["refused"][name] = self._no_answer()
            self.progress.refused(name, facts["refused"][name])

    def _no_answer(self) -> str:
        deadline = self.config.deadline
        return "no answer" + (f" within {deadline:g} s" if deadline else "")

    def _check(self, reply: Reply, number: int) -> Checked:
        client = reply.client
        member = self.state.members[client]
        return check_answer(
            unpack(_bytes(reply)),
            member=member,
            round=number,
            version=self.state.counted.get(client, 0),
            expected=expected_shapes(
                self.strategy, self.state.shapes, rank=member.rank, intermediate=self.config.r
            ),
            strategy=self.strategy,
            limits=update_limits(self.strategy, self.config, member=member, round=number),
        )

    def _order(self, kind: str, name: str, number: int, values: State) -> bytes:
        """The message that gives one client what is shared, at its rank."""
        member, version = self.state.members[name], self.state.counted.get(name, 0)
        fields = {"settings": self.config.for_clients(), "rank": member.rank, "version": version}
        tensors: State = truncated(values, member.rank) if self.strategy.truncates else values
        if self.strategy.restarts:
            made = [stack for stack in self._stacks.versions() if stack < number]
            fields["stacks"] = len(made)
            # Whoever counted in round v had the stacks before v by then; it missed the others.
            tensors = {
                f"{stack}/{matrix}": value
                for stack in made
                if stack >= version
                for matrix, value in self._stacks.read(stack)[0].items()
            }
        message = Message(kind=kind, client=name, round=number, fields=fields, tensors=tensors)
        return pack(message, self.config.wire)

    def _aggregate(self, number: int, counted: Sequence[str], values: State, received: State) -> float | None:
        """The new shared state from the answers on disk; returns the norm of its change, None where nothing travels."""
        if not self.strategy.travels:
            return None
        total = sum(self.state.members[name].examples for name in counted)

        def answers() -> Iterator[tuple[float, State]]:
            for name in counted:
                member = self.state.members[name]
                message = unpack((self._answers / folder_name(name)).read_bytes())
                down = truncated(received, member.rank) if self.strategy.truncates else received
                yield (
                    member.examples / total,
                    self.strategy.exchange.arrived(down, expanded(message.tensors)),
                )

        new = self.strategy.aggregate(received, answers(), self.config.scaling)
        if self.strategy.restarts:
            self._stacks.write(number, new, {})
            return _norm(new)
        norm = _norm({name: value - received[name] for name, value in new.items()})
        if norm == 0 and not self.strategy.may_stand_still:
            raise RunError(f"round {number} changed nothing (update norm 0); is the learning rate 0?")
        self.state.shared = new
        if self.strategy.feedback and self.config.wire != "fp32":
            self.state.residual = residual_of(values, received)
        return norm

    def _check_quorum(
        self, counted: int, names: Sequence[str], what: str, refused: dict[str, str] | None = None
    ) -> None:
        needed = max(1, math.ceil(self.config.quorum * len(names) - 1e-9))  # 0.07 × 100 is 7.000000000000001
        if counted >= needed:
            return
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted((refused or {}).items())[:5])
        raise RunError(
            f"only {counted} of {len(names)} clients {what}, {needed} are needed (--quorum {self.config.quorum:g})"
            f"{f' ({reasons})' if reasons else ''}. Mend the clients, then continue with --resume."
        )

    # ---- on disk

    def _save(self) -> None:
        state = self.state
        tensors = {**state.shared, **{_RESIDUAL + name: value for name, value in state.residual.items()}}
        facts = {
            "counted": state.counted,
            "members": {m.name: [m.examples, m.rank] for m in state.members.values()},
            "shapes": {name: list(shape) for name, shape in state.shapes.items()},
            "base": state.base,
        }
        self._saved.write(state.round, tensors, facts)
        self._saved.keep(state.round)

    def _load(self) -> None:
        number = self._saved.versions()[-1]
        tensors, facts = self._saved.read(number)
        try:
            self.state = ServerState(
                round=number,
                shared={n: v for n, v in tensors.items() if not n.startswith(_RESIDUAL)},
                residual={
                    n.removeprefix(_RESIDUAL): v for n, v in tensors.items() if n.startswith(_RESIDUAL)
                },
                counted=dict(facts["counted"]),
                members={n: Member(name=n, examples=e, rank=r) for n, (e, r) in facts["members"].items()},
                shapes={name: (shape[0], shape[1]) for name, shape in facts["shapes"].items()},
                base=facts["base"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RunError(
                f"the state of round {number} in {self._saved.path} is damaged ({error!r}); put a copy of it back."
            ) from error


def _bytes(reply: Reply) -> bytes:
    if reply.data is None:
        raise AnswerError(reply.reason or "no answer")
    return reply.data


def _scored(reply: Reply) -> Any:
    answer = unpack(_bytes(reply))
    if answer.kind != "scored" or answer.client != reply.client:
        raise AnswerError(str(answer.fields.get("reason", f"it sent a {answer.kind!r}")))
    return answer.fields.get("scores")


def _norm(state: State) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in state.values()))
