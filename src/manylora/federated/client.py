"""The client: answers a server's messages from its own rows and its own disk. Engines carry the bytes, no more.

What leaves is decided by the strategy's `leave` (matrices) and by the `fields` of the answers below: the number of
training rows, the mean training loss, the steps done; on joining the base's fingerprint and the shapes of its adapted
layers; on scoring the scores of the client's tasks. Where it cannot answer, a code says which kind of fault it was
(`manylora.federated.faults`); the error's text may hold a piece of a row, so it goes into the client's own log:

    HOME/NAME/log.txt     one line for each message that could not be answered

Rows, A and everything else that is private stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.errors import AnswerError, ManyLoraError
from manylora.federated.compress import corrected, factor_products, multiply_factors, residual_of
from manylora.federated.faults import ClientError, Fault, clean_text, fault_of, shown
from manylora.federated.home import VersionedState, append_log, folder_name
from manylora.federated.kept import RESIDUAL, TRAINED, with_prefix
from manylora.federated.messages import read_order
from manylora.federated.parts import State, norm, seed_of
from manylora.federated.personal import ClientData, score_personal
from manylora.federated.private import recall, recalled_moments, remember
from manylora.federated.strategy import Beginning, Parcel, Turn
from manylora.federated.wire import Message, pack, unpack
from manylora.federated.workbench import Workbench, total_rows
from manylora.training.passes import train_pass


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
        self.name, self.bench, self.say = name, bench, say
        self.data = data.with_template(bench.template)
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
            order = self._read_order(message)
            return {"join": self._join, "train": self._train, "score": self._score}[message.kind](
                message, order
            )
        except (ManyLoraError, MemoryError, RuntimeError) as error:
            fault = fault_of(error)
            if not isinstance(error, ManyLoraError) and fault is not Fault.MEMORY:
                raise
            text = f"{clean_text(message.kind)}, round {shown(message.round)}: {error}"
        append_log(self.folder / "log.txt", text)
        self.say(f"{self.name}: {clean_text(text, most=2000)}")
        number = message.round if 0 <= message.round < 2**31 else 0
        return pack(Message(kind="failed", client=self.name, round=number, fields={"code": fault.value}))

    def _read_order(self, message: Message) -> dict[str, Any]:
        """What the server wants, if it is of this run and for this client."""
        if message.client != self.name:
            raise ClientError(
                Fault.MESSAGE,
                f"a message for client {shown(message.client)} reached {self.name!r}; check the nodes' names.",
            )
        if message.kind not in ("join", "train", "score"):
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
        own = config.for_clients()
        for name, value in order["settings"].items():
            if own.get(name) != value:
                raise ClientError(
                    Fault.SETTINGS,
                    f"the server's {shown(name)} is {shown(value)}, this client's {own.get(name)!r}; "
                    "make them equal.",
                )
        # Of a client that begins anew, or was not chosen yet, no private state says on which base it was.
        if not self.bench.is_on(base := order.get("base", self.bench.fingerprint)):
            raise ClientError(Fault.BASE_OTHER, self.bench.other_base(base))
        return order

    def _join(self, message: Message, order: Mapping[str, Any]) -> bytes:
        fields = {
            "examples": sum(map(len, self.data.train.values())),
            "base": self.bench.fingerprint,
            "layers": {name: list(shape) for name, shape in self.bench.shapes.items()},
        }
        return pack(Message(kind="joined", client=self.name, round=message.round, fields=fields))

    def _train(self, message: Message, order: Mapping[str, Any]) -> bytes:
        """One round of this client: its model as the strategy begins it, its own rows, and what may leave."""
        bench, config, rank = self.bench, self.bench.config, order["rank"]
        kept = recall(self.private, order["version"], rank=rank, bench=bench, who=self.name)
        self._put_on(message, order, kept)
        begun = bench.state()
        tasks = bench.encode(self.data.train)
        rows = total_rows(tasks)
        assert config.local_epochs is not None
        assert config.rounds is not None
        result = train_pass(
            bench.model,
            tasks,
            bench.train_config,
            epochs=config.local_steps * bench.train_config.rows_per_step / rows
            if config.local_steps
            else config.local_epochs,
            number=message.round - 1,
            passes=config.rounds,
            seed=seed_of(config.seed, self.name, message.round),
            pad_token_id=bench.tokenizer.pad_token_id,
            scratch=self.folder,
            moments=recalled_moments(kept, bench),
        )
        trained = bench.state()
        moved = norm({name: trained[name].double() - begun[name].double() for name in sorted(trained)})
        if not (math.isfinite(result.loss) and math.isfinite(moved)):  # also of what never leaves
            raise ClientError(
                Fault.NOT_FINITE, "the training loss or a weight is not finite; lower the learning rate."
            )
        sent, residual = self._update(message.tensors, trained, kept, rank=rank)
        fields = {
            "version": order["version"],
            "examples": rows,
            "loss": result.loss,
            "steps": result.steps,
            "moved": moved,
        }
        answer = pack(
            Message(kind="trained", client=self.name, round=message.round, fields=fields, tensors=sent),
            config.wire,
        )
        # Before the answer leaves: the server may count it, and then asks this client to go on from here.
        remember(
            self.private, message.round, version=order["version"], rank=rank, bench=bench, trained=trained,
            residual=residual, result=result,
        )  # fmt: skip
        return answer

    def _put_on(self, message: Message, order: Mapping[str, Any], kept: State) -> Beginning:
        """Make the bench's model this client's, as it is at the beginning of its part of a round."""
        bench, scored = self.bench, message.kind == "score"
        turn = Turn(
            config=bench.config, client=self.name, round=message.round, rank=order["rank"],
            version=order["version"], shapes=bench.shapes, stacks=self._stacks,
        )  # fmt: skip
        fields = {"stacks": order["stacks"]} if "stacks" in order else {}
        beginning = bench.strategy.receive(
            Parcel(tensors=message.tensors, fields=fields),
            turn,
            kept=kept,
            reset=bench.config.a_state == "reset" and not scored,  # what is scored is what was trained last
        )
        state = beginning.state
        if scored and bench.config.personal == "trained":  # nothing for one that never took part
            state = state | with_prefix(kept, TRAINED)
        bench.fold(beginning.added)
        bench.load(state, rank=turn.rank)
        return beginning

    def _update(
        self, received: State, trained: State, kept: State, *, rank: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What goes up, and what rounding takes away from it."""
        strategy, wire = self.bench.strategy, self.bench.config.wire
        values = strategy.leave(received, trained)
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):  # products can overflow
            raise ClientError(Fault.NOT_FINITE, "what would leave is not finite; lower the learning rate.")
        if wire == "fp32" or not strategy.feedback:
            return factor_products(values, own_rank=rank, factors=trained), {}
        # Error feedback: what the last message lost goes with this one, and what the server will not know of this one,
        # as it will read it, goes with the next.
        values = corrected(values, with_prefix(kept, RESIDUAL))
        light = factor_products(values, own_rank=rank)
        arriving = unpack(pack(Message(kind="", client="", round=0, tensors=light), wire)).tensors
        return light, residual_of(values, multiply_factors(arriving))

    def _score(self, message: Message, order: Mapping[str, Any]) -> bytes:
        """Put the personal model together, save it as a plain LoRA, and score it on the client's own test rows."""
        kept = recall(self.private, order["version"], rank=order["rank"], bench=self.bench, who=self.name)
        added = self._put_on(message, order, kept).added
        stacks = [stack for _, stack in added]
        scores = score_personal(self.bench, self.data, self.folder, number=message.round, stacks=stacks)
        fields = {} if scores is None else {"scores": scores.to_rows()}
        return pack(Message(kind="scored", client=self.name, round=message.round, fields=fields))
