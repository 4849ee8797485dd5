"""The rounds, written once for every engine: choose, send, train, collect, check, aggregate, save.

    FOLDER/rounds/round-0003.safetensors     shared state after round 3, who has counted when, who takes part
    FOLDER/stacks/round-0003.safetensors     FLoRA's stacks
    FOLDER/answers/                          answers of the running round that passed their checks
    FOLDER/metrics.jsonl                     one line per round

Of the rounds the last few stay (`keep_rounds`), so that a run can go back.

A round that is saved is never repeated, one that is not is repeated from the same messages; so a run that is killed
at any moment and resumed ends with the weights of an unbroken one. What one client sends can cost its own part of a
round and no more; a result that cannot be is not saved.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from manylora.errors import AnswerError, RunError, WireError
from manylora.evaluation import Scores
from manylora.federated.check import (
    Member,
    check_answer,
    check_result,
    expected_shapes,
    out_of_proportion,
    update_limits,
)
from manylora.federated.clients import Clients, Reply
from manylora.federated.compress import corrected, multiply_factors, residual_of
from manylora.federated.config import FederateConfig
from manylora.federated.faults import FailedError, Fault, clean_text
from manylora.federated.home import VersionedState, folder_name
from manylora.federated.joining import Joining, Participants
from manylora.federated.messages import read_scored
from manylora.federated.parts import PARTS, State, initial_state, norm
from manylora.federated.progress import RoundsDisplay
from manylora.federated.robust import changes_of, robust_change, shares_of
from manylora.federated.server_state import RoundFacts, ServerState, check_shared, load_state, save_state
from manylora.federated.strategies import strategy_for
from manylora.federated.strategy import Strategy, Turn
from manylora.federated.wire import JOINING, SCORING, Bounds, Message, pack, unpack
from manylora.training import RunFolder


class Rounds:
    """A federated run at its server.

    Args:
        config: resolved.
        clients: an engine.
        folder: of the run, or of its reference within it.
        progress: told what happens.
        strategy: of the run. Default: the one that `config` names.
    """

    def __init__(
        self,
        config: FederateConfig,
        clients: Clients,
        folder: Path,
        *,
        progress: RoundsDisplay | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self.config, self.clients, self.folder = config, clients, folder
        self.strategy = strategy or strategy_for(config.strategy, unequal=config.ranks is not None)
        self.progress = progress or RoundsDisplay()
        self._saved = VersionedState(folder / "rounds")
        self._stacks = VersionedState(folder / "stacks")
        self._answers = folder / "answers"
        self.state = ServerState()

    def load(
        self,
        *,
        from_round: int | None = None,
        reset: Sequence[str] = (),
        check: Callable[[ServerState], None] = lambda state: None,
    ) -> ServerState:
        """Take up what is on disk, if anything is; `run` does it by itself.

        Args:
            from_round: go back to this round; what came after it is forgotten. Default: the last.
            reset: clients that begin anew, as if they had never taken part, because their private state is lost.
            check: raises where the run cannot go on from its state; called before any round is removed.

        Raises:
            RunError: it is not there or damaged, or there is no such client.
        """
        if self._saved.versions():

            def whole(state: ServerState) -> None:
                source = self._saved.file(state.round)
                check_shared(state, self.strategy, self.config, source=source)
                check(state)

            self.state = load_state(self._saved, number=from_round, check=whole)
        elif from_round is not None or reset or (self.folder / "metrics.jsonl").is_file():
            raise RunError(
                f"{self._saved.path} has no round, though the run was begun; put the folder back, or start anew with "
                "another --out."
            )
        if unknown := sorted(set(reset) - set(self.state.members)):
            raise RunError(
                f"there is no client {unknown[0]!r} to reset; the run has {', '.join(sorted(self.state.members))}."
            )
        for name in reset:
            self.state.counted.pop(name, None)
        if reset:
            self._save()
        return self.state

    def run(self) -> ServerState:
        """Run every round that is not yet saved.

        Raises:
            RunError: too few clients answered, or a round changed nothing.
        """
        assert self.config.rounds is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.state.members:
            self.load()
        if not self.state.members:
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
            names,
            lambda name: self._order("score", name, last, values),
            seconds=self.config.deadline,
            most=SCORING.message or 0,
        )
        waiting = set(names)
        for reply in replies:
            waiting.discard(reply.client)
            try:
                found = read_scored(unpack(_bytes(reply), SCORING), name=reply.client)
                if found:
                    scores[reply.client] = Scores(tasks=found)
            except (AnswerError, WireError) as error:
                self.progress.refused(reply.client, f"it could not score its model: {clean_text(error)}")
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
        joined = self._join(names)
        self.config.check_number_of_clients(len(names))
        members = {
            name: Member(
                name=name,
                examples=claim,
                rank=self.config.rank_of(names.index(name)),
                agreed=count if (count := joined.agreed[name]) < claim else None,
            )
            for name, claim in sorted(joined.examples.items())
        }
        shared = initial_state(
            self.strategy.down & PARTS.keys(),
            joined.shapes,
            rank=self.config.largest_rank,
            largest_rank=self.config.largest_rank,
            intermediate=self.config.r,
            seed=self.config.seed,
        )
        self.state = ServerState(shared=shared, members=members, shapes=joined.shapes, base=joined.base)
        self._save()

    def _join(self, names: Sequence[str]) -> Participants:
        """Who takes part, of those that are there."""
        fields = {"settings": self.config.for_clients()}
        joining = Joining(self.config, self.clients, self.progress)
        replies = self.clients.ask(
            names,
            lambda name: pack(Message(kind="join", client=name, round=0, fields=fields)),
            seconds=self.config.deadline,
            most=JOINING.message or 0,
        )
        for reply in replies:
            if reply.client in names:
                joining.take(reply)
        joined = joining.result(names, no_answer=self._no_answer())
        self._check_quorum(len(joined.examples), names, "joined", joined.refused)
        return joined

    # ---- one round

    def chosen(self, number: int) -> list[str]:
        """Who takes part in a round: a seeded draw that depends on the names, the seed and the round alone."""
        names = sorted(self.state.members)
        count = max(1, round(self.config.participation * len(names)))
        return sorted(random.Random(f"{self.config.seed}:participation:{number}").sample(names, count))

    def _round(self, number: int) -> None:
        """One round, from whom it asks to what it leaves on disk."""
        config, strategy, deadline = self.config, self.strategy, self.config.deadline
        names = self.chosen(number)
        self.progress.round_began(number, config.rounds or 0, len(names))
        # With what the last broadcast lost by rounding (error feedback), so that over the rounds nothing is lost.
        sending = corrected(self.state.shared, self.state.residual)
        shutil.rmtree(self._answers, ignore_errors=True)  # those of a round that was killed
        self._answers.mkdir()
        facts, waiting, began = RoundFacts(), set(names), time.monotonic()

        def order(name: str) -> bytes:
            data = self._order("train", name, number, sending)
            facts.down[name] = len(data)
            return data

        most = max(self._bounds(name).message or 0 for name in names)
        for reply in self.clients.ask(names, order, seconds=deadline, most=most):
            seconds = time.monotonic() - began
            if reply.client in waiting and not (deadline is not None and seconds > deadline):
                waiting.remove(reply.client)
                self._take_answer(reply, number, facts, seconds=seconds)
        for name in sorted(waiting):
            self._refuse(facts, name, self._no_answer())
        if strategy.travels:
            for name, reason in out_of_proportion(facts.norms, most=config.max_ratio).items():
                self._refuse(facts, name, reason)
        counted = sorted(facts.losses)
        self._check_quorum(
            len(counted), names, f"counted in round {number}", facts.refused, not_finite=facts.not_finite
        )
        change = self._aggregate(number, counted, sending, facts) if strategy.travels else None

        examples = {name: self.state.members[name].weight for name in counted}
        loss = sum(facts.losses[name] * n for name, n in examples.items()) / sum(examples.values())
        # Before the state: whoever resumes takes lines of rounds that are not saved away again (`rewind_metrics`).
        RunFolder(self.folder).append_metrics(
            {"step": number, "loss": loss, "update_norm": change, "asked": len(names), **facts.to_dict()}
        )
        self.state.counted |= dict.fromkeys(counted, number)
        self.state.round = number
        self._save()
        shutil.rmtree(self._answers, ignore_errors=True)
        self.progress.shared(number, facts.shares)
        self.progress.round_ended(number, loss, change)

    def _order(self, kind: str, name: str, number: int, shared: State) -> bytes:
        """The message that gives one client what it needs for its part of a round, or to score its model."""
        turn = self._turn(name, number)
        parcel = self.strategy.prepare(shared, turn)
        fields = {
            "settings": self.config.for_clients(), "rank": turn.rank, "version": turn.version,
            "base": self.state.base,
        }  # fmt: skip
        message = Message(
            kind=kind, client=name, round=number, fields={**fields, **parcel.fields}, tensors=parcel.tensors
        )
        return pack(message, self.config.wire)

    def _turn(self, name: str, number: int) -> Turn:
        return Turn(
            config=self.config, client=name, round=number, rank=self.state.members[name].rank,
            version=self.state.counted.get(name, 0), shapes=self.state.shapes, stacks=self._stacks,
        )  # fmt: skip

    def _take_answer(self, reply: Reply, number: int, facts: RoundFacts, *, seconds: float) -> None:
        """Put an answer that passes its checks on disk, so that memory holds one at a time; refuse another."""
        name = reply.client
        member = self.state.members[name]
        try:
            data = _bytes(reply)
            checked = check_answer(
                unpack(data, self._bounds(name)),
                member=member,
                round=number,
                version=self.state.counted.get(name, 0),
                expected=self._expected(name),
                strategy=self.strategy,
                limits=update_limits(self.strategy, self.config, member=member, round=number),
            )
        except (AnswerError, WireError) as error:
            if isinstance(error, FailedError) and error.fault is Fault.NOT_FINITE:
                facts.not_finite.add(name)
            self._refuse(facts, name, clean_text(error))
            return
        (self._answers / folder_name(name)).write_bytes(data)
        facts.up[name] = len(data)
        facts.losses[name], facts.norms[name] = checked.loss, checked.norm
        self.progress.answered(name, checked.loss, seconds)

    def _refuse(self, facts: RoundFacts, name: str, reason: str) -> None:
        facts.refuse(name, reason)
        self.progress.refused(name, reason)

    def _no_answer(self) -> str:
        deadline = self.config.deadline
        return "no answer" + (f" within {deadline:g} s" if deadline else "")

    def _expected(self, name: str) -> dict[str, tuple[int, int]]:
        rank = self.state.members[name].rank
        return expected_shapes(self.strategy, self.state.shapes, rank=rank, intermediate=self.config.r)

    def _bounds(self, name: str) -> Bounds:
        return Bounds.of(self._expected(name), self.config.wire)

    def _aggregate(self, number: int, counted: Sequence[str], sent: State, facts: RoundFacts) -> float:
        """The new shared state from the answers on disk; returns the norm of its change."""
        strategy, config = self.strategy, self.config
        # What the clients have read: rounded as the wire rounds.
        received = unpack(pack(Message(kind="", client="", round=0, tensors=sent), config.wire)).tensors
        total = sum(self.state.members[name].weight for name in counted)
        weights = [self.state.members[name].weight / total for name in counted]

        def answers() -> Iterator[tuple[float, State]]:
            for name, weight in zip(counted, weights, strict=True):
                message = unpack((self._answers / folder_name(name)).read_bytes(), self._bounds(name))
                came = multiply_factors(message.tensors)
                yield weight, strategy.accept(received, came, self._turn(name, number))

        if config.robust == "none":
            new = strategy.aggregate(received, answers(), config.scaling)
            parts = [weight * facts.norms[name] for name, weight in zip(counted, weights, strict=True)]
        else:
            changes = changes_of(received, [state for _, state in answers()])
            change, parts = robust_change(changes, weights, config)
            new = {name: (value.double() + change[name]).float() for name, value in received.items()}
        facts.shares = dict(zip(counted, shares_of(parts), strict=True))
        size = norm(
            {name: value - received[name] if name in received else value for name, value in new.items()}
        )
        self._check_result(number, new, size, facts)
        if size == 0 and not strategy.may_stand_still:
            raise RunError(f"round {number} changed nothing (update norm 0); is the learning rate 0?")
        if strategy.restarts:
            self._stacks.write(number, new, {})
        else:
            self.state.shared = new
        if strategy.feedback and config.wire != "fp32":
            self.state.residual = residual_of(sent, received)
        return size

    def _check_result(self, number: int, new: State, change: float, facts: RoundFacts) -> None:
        """Refuse a round's result that cannot be; the rounds before stay as they are."""
        most = self.config.max_ratio if self.strategy.linear else None
        try:
            check_result(new, change=change, norms=facts.norms.values(), most=most)
        except RunError as error:
            first = sorted(facts.shares.items(), key=lambda item: -item[1])[:3]
            largest = ", ".join(f"{name} {100 * share:.0f} %" for name, share in first)
            raise RunError(
                f"round {number} is not saved: {error}. The largest shares of its change are {largest}; leave that "
                "client out, then continue with --resume from the last round that is saved."
            ) from error

    def _check_quorum(
        self,
        counted: int,
        names: Sequence[str],
        what: str,
        refused: dict[str, str] | None = None,
        *,
        not_finite: set[str] | None = None,
    ) -> None:
        needed = max(1, math.ceil(self.config.quorum * len(names) - 1e-9))  # 0.07 × 100 is 7.000000000000001
        if counted >= needed:
            return
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted((refused or {}).items())[:5])
        remedy = "Mend the clients, then continue with --resume."
        earlier = [one for one in self._saved.versions() if 0 < one < self.state.round]
        if earlier and len(not_finite or ()) > 1:
            # Several at once: rather what they were sent than their own rows.
            remedy = (
                f"What round {self.state.round} left may be the cause rather than these clients: see the shares in "
                f"metrics.jsonl, and go back with --resume RUN --from-round {earlier[-1]}."
            )
        raise RunError(
            f"only {counted} of {len(names)} clients {what}, {needed} are needed (--quorum {self.config.quorum:g})"
            f"{f' ({reasons})' if reasons else ''}. {remedy}"
        )

    def _save(self) -> None:
        save_state(self._saved, self.state, keep=self.config.keep_rounds)


def _bytes(reply: Reply) -> bytes:
    if reply.data is None:
        raise AnswerError(reply.reason or "no answer")
    return reply.data
