"""The client: answers a server's messages from its own rows and its own disk. Engines carry the bytes, no more.

What leaves is decided by the strategy's `Exchange` (matrices) and by the `fields` of the answers below: the number of
training rows, the mean training loss, the steps done; on joining the base's fingerprint and the shapes of its adapted
layers; on scoring the scores of the client's tasks. Where it cannot answer, a code says which kind of fault it was
(`manylora.federated.faults`); the error's text may hold a piece of a row, so it goes into the client's own log:

    HOME/NAME/log.txt     one line for each message that could not be answered

Rows, A and everything else that is private stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manylora.data import Example, PromptRecord
from manylora.errors import AnswerError, ManyLoraError
from manylora.evaluation import generate_answers, score_all
from manylora.federated.compress import corrected, expanded, lightest, residual_of
from manylora.federated.exchange import PLAIN, State, only, split_name
from manylora.federated.faults import ClientError, Fault, clean_text, fault_of, shown
from manylora.federated.home import DamagedStateError, VersionedState, append_log, folder_name
from manylora.federated.initial import initial_state, seed_of
from manylora.federated.kept import (
    MOMENTS,
    RESIDUAL,
    TRAINED,
    broken_layer,
    check_private,
    check_stack,
    private_layout,
    with_moments,
    with_prefix,
)
from manylora.federated.messages import read_order
from manylora.federated.personal import save_personal
from manylora.federated.wire import Message, pack, unpack
from manylora.federated.workbench import Workbench, total_rows
from manylora.files import COMPLETE, NOTES, folder_sums, json_text, remove, write_json, write_text
from manylora.training.passes import PassResult, train_pass

if TYPE_CHECKING:
    from manylora.evaluation import Scores
    from manylora.training.batches import EncodedTask

_ANSWER_MARGIN = 8
"""Tokens that an answer may be longer than the longest training answer, as in `manylora train`."""


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """A client's own rows by task; every training row has an answer."""

    train: Mapping[str, list[Example]]
    test: Mapping[str, list[Example]] = field(default_factory=dict)


class Client:
    """One client. Its answers are a function of the message, its rows and its disk: asked again, it answers the same.

    Args:
        name: stable over restarts; the server and the disk know the client by it.
        data: its rows.
        home: folder for the private state of the clients of this machine.
        bench: the base model; clients of one process share it, one at a time.
        say: told, in a line, why a message could not be answered; that stays on this machine.
    """

    def __init__(
        self,
        name: str,
        data: ClientData,
        *,
        home: Path,
        bench: Workbench,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name, self.data, self.bench, self.say = name, data, bench, say
        self.folder = home / folder_name(name)
        self.private = VersionedState(self.folder)
        self._stacks = VersionedState(home / ".stacks")

    def handle(self, data: bytes) -> bytes:
        """The answer to a server's message.

        What a user or a server did wrong becomes an answer of kind "failed" with a code, and so does memory that was
        not enough; a bug raises.
        """
        message = Message(kind="unknown", client=self.name, round=0)
        try:
            message = unpack(data)
            return self._answer(message)
        except (ManyLoraError, MemoryError, RuntimeError) as error:
            fault = fault_of(error)
            text = f"{clean_text(message.kind)}, round {shown(message.round)}: {error}"
            if not isinstance(error, ManyLoraError) and fault is not Fault.MEMORY:
                raise
        append_log(self.folder / "log.txt", text)
        self.say(f"{self.name}: {clean_text(text, most=2000)}")
        number = message.round if 0 <= message.round < 2**31 else 0
        return pack(Message(kind="failed", client=self.name, round=number, fields={"code": fault.value}))

    def _answer(self, message: Message) -> bytes:
        verbs = {"join": self._join, "train": self._train, "score": self._score}
        if message.client != self.name:
            raise ClientError(
                Fault.MESSAGE,
                f"a message for client {shown(message.client)} reached {self.name!r}; check the nodes' names.",
            )
        if message.kind not in verbs:
            raise ClientError(
                Fault.MESSAGE,
                f"a message of kind {shown(message.kind)} is unknown; is the server's manylora newer?",
            )
        try:
            order = read_order(message)
        except AnswerError as error:
            raise ClientError(Fault.MESSAGE, f"the server's message: {error}") from error
        config = self.bench.config
        if message.kind != "join" and order["rank"] not in (config.ranks or [config.r]):
            raise ClientError(Fault.MESSAGE, f"the server's rank {order['rank']} is none of the run's.")
        self._check_settings(order["settings"])
        # Of a client that begins anew, or was not chosen yet, no private state says on which base it was.
        if not self.bench.is_on(base := order.get("base", self.bench.fingerprint)):
            raise ClientError(Fault.BASE_OTHER, self.bench.other_base(base))
        return verbs[message.kind](message, order)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        own = self.bench.config.for_clients()
        for name, value in settings.items():
            if own.get(name) != value:
                raise ClientError(
                    Fault.SETTINGS,
                    f"the server's {shown(name)} is {shown(value)}, this client's {own.get(name)!r}; "
                    "make them equal.",
                )

    def _join(self, message: Message, order: Mapping[str, Any]) -> bytes:
        fields = {
            "examples": sum(map(len, self.data.train.values())),
            "base": self.bench.fingerprint,
            "layers": {name: list(shape) for name, shape in self.bench.shapes.items()},
        }
        return pack(Message(kind="joined", client=self.name, round=message.round, fields=fields))

    def _train(self, message: Message, order: Mapping[str, Any]) -> bytes:
        rank, version = order["rank"], order["version"]
        kept = self._kept(version, rank=rank)
        self._put_on(message, order, kept)
        tasks = self.bench.encode(self.data.train)
        result = self._pass(tasks, message, kept)
        trained = self.bench.state()
        moved = _distance(trained, self._started)
        if not (math.isfinite(result.loss) and math.isfinite(moved)):  # also of what never leaves
            raise ClientError(
                Fault.NOT_FINITE, "the training loss or a weight is not finite; lower the learning rate."
            )
        sent, residual = self._sent(message, trained, kept, rank=rank)
        answer = pack(
            Message(
                kind="trained",
                client=self.name,
                round=message.round,
                fields={
                    "version": version,
                    "examples": total_rows(tasks),
                    "loss": result.loss,
                    "steps": result.steps,
                    "moved": moved,
                },
                tensors=sent,
            ),
            self.bench.config.wire,
        )
        private = dict(only(trained, self.bench.strategy.private))
        private |= {RESIDUAL + name: value for name, value in residual.items()}
        private |= self._moments(result)
        if self.bench.config.personal == "trained":
            private |= {TRAINED + name: value for name, value in trained.items() if name not in private}
        facts = {"rank": rank, "base": self.bench.fingerprint, "moments": with_moments(private)}
        self.private.write(message.round, private, facts)
        self.private.keep(*self._needed(version, message.round))
        return answer

    def _needed(self, version: int, number: int) -> list[int]:
        """Which versions to keep after round `number`, begun from `version`: these two, and what the rounds start from
        that the server keeps to go back to.
        """
        oldest = number - self.bench.config.keep_rounds
        earlier = [one for one in self.private.versions() if one < version]
        # After round `oldest` this client began at its last version up to there.
        first = max((one for one in (*earlier, version) if one <= oldest), default=0)
        return [version, number, *(one for one in earlier if one >= first)]

    def _kept(self, version: int, *, rank: int) -> dict[str, Tensor]:
        """What this client has on disk since the last round in which its answer counted; empty before the first."""
        if version == 0:
            return {}
        state, facts = self.private.read(version)
        on_base = self.bench.is_on(str(facts.get("base")))
        for what, now, same in (
            ("rank", rank, facts.get("rank") == rank),
            ("base", self.bench.fingerprint, on_base),
        ):
            if not same:
                raise ClientError(
                    Fault.STATE_OTHER,
                    f"the private state of client {self.name!r} was trained with {what} {facts.get(what)}, now it is "
                    f"{now}; start a new run.",
                )
        self._check_kept(version, state, facts, rank=rank)
        return state

    def check_kept(self, version: int) -> None:
        """Read the private state of a version, as an order would that goes on from it.

        Raises:
            MissingStateError, DamagedStateError: it is not there, or not what this run goes on from.
        """
        state, facts = self.private.read(version)
        rank = facts.get("rank")
        if type(rank) is not int:
            path = self.private.file(version)
            raise DamagedStateError(f"{path} is damaged (its rank is {shown(rank)}); put a copy of it back.")
        self._check_kept(version, state, facts, rank=rank)

    def _check_kept(self, version: int, state: State, facts: Mapping[str, Any], *, rank: int) -> None:
        noted = facts.get("moments")
        check_private(
            state,
            private_layout(
                self.bench.strategy,
                self.bench.config,
                self.bench.shapes,
                rank=rank,
                moments=noted if isinstance(noted, list) else None,  # of an earlier version: of every matrix
            ),
            source=self.private.file(version),
        )

    def _put_on(self, message: Message, order: Mapping[str, Any], kept: State) -> None:
        """The client's model at the beginning of its part of a round."""
        config, strategy, bench = self.bench.config, self.bench.strategy, self.bench
        rank = order["rank"]
        own_draw = strategy.restarts or (strategy.keeps_a and config.a_init == "per_client")
        state = initial_state(
            strategy.parts,
            bench.shapes,
            rank=rank,
            largest_rank=config.largest_rank,
            intermediate=config.r,
            seed=seed_of(config.seed, message.round) if strategy.restarts else config.seed,
            who=self.name if own_draw else "",
        )
        reset = (
            message.kind == "train" and config.a_state == "reset"
        )  # what is scored is what was trained last
        remembered = strategy.private - ({"A", "M"} if reset else frozenset())
        state |= only({name: value for name, value in kept.items() if "/" not in name}, remembered)
        stacks: list[tuple[int, State]] = []
        if strategy.restarts:
            stacks = self._received_stacks(message, order)
        else:
            due = {name: value.shape for name, value in only(state, strategy.exchange.down).items()}
            if {name: value.shape for name, value in message.tensors.items()} != due:
                raise ClientError(
                    Fault.MESSAGE,
                    "the server sent other matrices than this client's model has; compare the settings.",
                )
            state |= message.tensors
        if message.kind == "score" and config.personal == "trained":  # nothing for one that never took part
            state |= with_prefix(kept, TRAINED)
        bench.fold(stacks)
        self._stacks_on = stacks
        bench.load(state, rank=rank)
        self._started = bench.state()

    def _received_stacks(self, message: Message, order: Mapping[str, Any]) -> list[tuple[int, State]]:
        """Every stack up to this round, the ones that came with the message put on disk first."""
        for number, stack in self._sent_stacks(message).items():
            if not self._has_stack(number, stack):
                self._stacks.write(number, stack, {})
        known = [number for number in self._stacks.versions() if number < message.round]
        if len(known) != order.get("stacks"):
            raise ClientError(
                Fault.STATE_MISSING,
                f"client {self.name!r} has the stacks of rounds {known}, but there are {order.get('stacks')}; put its "
                "folder back.",
            )
        stacks: list[tuple[int, State]] = [(number, self._stacks.read(number)[0]) for number in known]
        for number, whole in stacks:
            check_stack(whole, self.bench.shapes, source=self._stacks.file(number))
        return stacks

    def _sent_stacks(self, message: Message) -> dict[int, dict[str, Tensor]]:
        """The stacks in a message, each whole: an A (K, D) and a B (O, K) for every layer."""
        arrived: dict[int, dict[str, Tensor]] = {}
        for name, value in message.tensors.items():
            label, _, matrix = name.partition("/")
            known = split_name(matrix)[0] in self.bench.shapes and split_name(matrix)[1] in PLAIN
            if not known or not re.fullmatch("[1-9][0-9]{0,8}", label) or int(label) >= message.round:
                raise ClientError(
                    Fault.MESSAGE, f"the server sent a matrix called {shown(name)}, which is in no stack."
                )
            arrived.setdefault(int(label), {})[matrix] = value
        for stack in arrived.values():
            if (layer := broken_layer(stack, self.bench.shapes)) is not None:
                raise ClientError(Fault.MESSAGE, f"the server sent a stack without a whole {layer!r}.")
        return arrived

    def _has_stack(self, number: int, stack: State) -> bool:
        """Whether a stack is on disk as it came: a run that went back to an earlier round makes others."""
        if number not in self._stacks.versions():
            return False
        try:
            there = self._stacks.read(number)[0]
        except DamagedStateError:
            return False
        return there.keys() == stack.keys() and all(torch.equal(there[n], stack[n]) for n in stack)

    def _pass(self, tasks: Sequence[EncodedTask], message: Message, kept: State) -> PassResult:
        config, bench = self.bench.config, self.bench
        rows = total_rows(tasks)
        epochs = (
            config.local_steps * bench.train_config.rows_per_step / rows
            if config.local_steps
            else config.local_epochs
        )
        assert epochs is not None
        assert config.rounds is not None
        return train_pass(
            bench.model,
            tasks,
            bench.train_config,
            epochs=epochs,
            number=message.round - 1,
            passes=config.rounds,
            seed=seed_of(config.seed, self.name, message.round),
            pad_token_id=bench.tokenizer.pad_token_id,
            scratch=self.folder,
            moments=self._remembered_moments(kept),
        )

    def _sent(
        self, message: Message, trained: State, kept: State, *, rank: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What goes up, and what rounding takes away from it."""
        strategy, wire = self.bench.strategy, self.bench.config.wire
        values = strategy.exchange.leaving(message.tensors, trained)
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):  # products can overflow
            raise ClientError(Fault.NOT_FINITE, "what would leave is not finite; lower the learning rate.")
        if wire == "fp32" or not strategy.feedback:
            return lightest(values, own_rank=rank, factors=trained), {}
        values = corrected(values, with_prefix(kept, RESIDUAL))
        light = lightest(values, own_rank=rank)
        arriving = unpack(pack(Message(kind="", client="", round=0, tensors=light), wire)).tensors
        return light, residual_of(values, expanded(arriving))

    def _moments(self, result: PassResult) -> dict[str, Tensor]:
        if self.bench.config.optimizer == "reset":
            return {}
        names = self.bench.parameter_names()
        return {
            f"{MOMENTS}{names[parameter]}/{key}": value.reshape(1) if value.dim() == 0 else value
            for parameter, values in result.moments.items()
            if split_name(names[parameter])[1] in self.bench.strategy.private
            for key, value in values.items()
        }

    def _remembered_moments(self, kept: State) -> dict[str, dict[str, Tensor]]:
        parameters = {part: name for name, part in self.bench.parameter_names().items()}
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in with_prefix(kept, MOMENTS).items():
            part, _, key = name.rpartition("/")
            moments.setdefault(parameters[part], {})[key] = value.reshape(()) if key == "step" else value
        return moments

    def _score(self, message: Message, order: Mapping[str, Any]) -> bytes:
        """Put the personal model together, save it as a plain LoRA, and score it on the client's own test rows."""
        self._put_on(message, order, self._kept(order["version"], rank=order["rank"]))
        limits = self._answer_tokens()
        config = self.bench.config
        prompts = PromptRecord.of(
            self.data.train, self.bench.tokenizer, date=config.date, max_length=config.max_length
        )
        remove(self.folder / COMPLETE)  # it speaks of what is about to be replaced
        save_personal(
            self.bench,
            self.folder / "adapter",
            stacks=[stack for _, stack in self._stacks_on],
            prompts=replace(prompts, base_fingerprint=self.bench.fingerprint),
        )
        write_json(
            self.folder / "tasks.json",
            {
                "max_length": self.bench.config.max_length,
                "tasks": {task: {"answer_tokens": limit} for task, limit in limits.items()},
            },
        )
        fields: dict[str, Any] = {}
        if self.data.test:
            fields["scores"] = self._scores(limits).to_rows()
        names = [path.relative_to(self.folder).as_posix() for path in self.folder.glob("adapter/*")]
        sums = folder_sums(self.folder, [*names, "tasks.json", "predictions.jsonl"])
        write_json(self.folder / COMPLETE, {"round": message.round, NOTES: sums})
        return pack(Message(kind="scored", client=self.name, round=message.round, fields=fields))

    def _answer_tokens(self) -> dict[str, int]:
        config = self.bench.config
        most = (self.bench.context or 2**20) // 2
        return {
            task.name: config.max_new_tokens or min(task.longest_answer + _ANSWER_MARGIN, most)
            for task in self.bench.encode(self.data.train)
        }

    def _scores(self, limits: Mapping[str, int]) -> Scores:
        config = self.bench.config
        longest = max(limits.values())
        answers = {
            task: generate_answers(
                self.bench.model,
                self.bench.tokenizer,
                rows,
                batch_size=config.eval_batch_size,
                max_length=config.max_length,
                max_new_tokens=limits.get(task, longest),
            )
            for task, rows in self.data.test.items()
        }
        scores = score_all(self.data.test, answers, tokenizer=self.bench.tokenizer, rouge=config.rouge)
        lines = (json_text(row) + "\n" for row in scores.prediction_rows())
        write_text(self.folder / "predictions.jsonl", "".join(lines))
        return scores


def _distance(after: State, before: State) -> float:
    """Norm of the change of a whole state."""
    return math.sqrt(
        sum(float(torch.sum((after[n].double() - before[n].double()) ** 2)) for n in sorted(after))
    )
