"""The engine for real machines: Flower carries the messages, a SuperLink between this process and the clients' nodes.

Clients are known by the name in their node's `--node-config`; node ids come and go. A message that was lost with its
node is sent again when a node of that name is back, which a client's answer allows (see `Clients`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from manylora.errors import RunError
from manylora.federated.clients import Reply
from manylora.federated.engines.flower_link import Answer, FlowerLink, Node
from manylora.federated.faults import clean_text, fault_named, shown

_ASK_NODES = 1.0
"""Seconds between two looks at who is online."""
_TRIES = 3
"""How often one message is sent to a node that is there but does not answer it."""
_QUESTION_SECONDS = 600.0
_SILENT = 60.0
"""Seconds after which a node that has not answered is asked (again) who it is. A SuperNode that is out of step with its
worker passes an answer on only with the next message; one that answers this before an older message has lost that."""
_INTRODUCTION_BYTES = 2**16
"""Bytes that a node's answer to the question who it is may have."""
_NO_DEADLINE = 30 * 86_400.0
"""Time to live of a message without a deadline: Flower wants a number."""


@dataclass(kw_only=True)
class _Order:
    """A client that has been asked and has not answered."""

    node: Node | None = None
    """To which it was sent; None while no node of the client is there."""
    sent: float = 0.0
    """When."""
    messages: tuple[str, ...] = ()
    failed: Node | None = None
    """The node that lost the message last,"""
    tries: int = 0
    """and how often."""
    missed: float = 0.0
    """Since when there is no node of the client."""


class FlowerClients:
    """Clients that are nodes of a Flower SuperLink.

    Args:
        link: to the SuperLink.
        run: stable id of the run; a client keeps its private state by it.
        expected: number of clients that the run waits for.
        keys: client name to the public key that its node must have. Default: a node is believed its name.
        patience: seconds that the run waits for the clients, and for one whose node is away, where no deadline rules.
        interval: seconds between two looks for answers.
        say: told what a person may want to know.
    """

    def __init__(
        self,
        link: FlowerLink,
        *,
        run: str,
        expected: int,
        keys: Mapping[str, bytes] | None = None,
        patience: float = 600.0,
        interval: float = 0.2,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.link, self.run, self.expected, self.keys = link, run, expected, keys
        self.patience, self.interval = patience, interval
        self.say: Callable[[str], None] = lambda line: say(clean_text(line, most=400))
        self._nodes: dict[str, Node] = {}
        self._introduced: dict[
            tuple[int, str], str
        ] = {}  # node to client name, "" while it is asked or if refused
        # Message to the node that is asked who it is, and when.
        self._questions: dict[str, tuple[Node, float]] = {}
        self._last_sent: dict[Node, float] = {}  # when a node was last sent anything
        self._looked = -1e9

    def names(self) -> Sequence[str]:
        """The clients that are there, once there are as many as expected.

        Raises:
            RunError: they do not come.
        """
        began, seen = time.monotonic(), -1
        while len(self._nodes) < self.expected:
            if time.monotonic() - began > self.patience:
                there = ", ".join(sorted(self._nodes)) or "none"
                raise RunError(
                    f"only {len(self._nodes)} of {self.expected} clients came to {self.link.address} within "
                    f"{self.patience:g} s ({there}); start the others' nodes (--recipe shows how), or lower --clients."
                )
            self._update_nodes()
            self._note_introductions(self.link.pull([*self._questions], most=_INTRODUCTION_BYTES))
            if len(self._nodes) != seen:
                seen = len(self._nodes)
                self.say(f"{seen} of {self.expected} clients are there")
            time.sleep(self.interval)
        return sorted(self._nodes)

    def examples(self, name: str) -> int | None:
        """Nobody but the client knows."""
        return None

    def ask(
        self, names: Sequence[str], message: Callable[[str], bytes], *, seconds: float | None, most: int
    ) -> Iterator[Reply]:
        """Send every message, then yield answers as they come; a client whose node is away is waited for."""
        began = time.monotonic()
        orders = {name: _Order(missed=began) for name in names}
        while orders:
            left = None if seconds is None else seconds - (time.monotonic() - began)
            if left is not None and left <= 0:
                return
            self._update_nodes()
            for name, order in orders.items():
                self._send(name, order, message, left)
                if order.node is not None and order.node == self._nodes.get(name):
                    self._question_if_silent(order.node)
            waiting = {sent: name for name, order in orders.items() for sent in order.messages}
            answers = self.link.pull([*waiting, *self._questions], most=max(most, _INTRODUCTION_BYTES))
            until = self._answered_until(answers)
            self._note_introductions(answers)
            for answer in answers:
                name = waiting.get(answer.message, "")
                if name in orders and (reply := self._reply(name, orders[name], answer)) is not None:
                    del orders[name]
                    yield reply
            for name in [name for name, order in orders.items() if order.sent < until.get(order.node, 0.0)]:
                if (lost := self._send_again(name, orders[name], "its node lost the message")) is not None:
                    del orders[name]
                    yield lost
            for name in [name for name, order in orders.items() if seconds is None and self._is_away(order)]:
                del orders[name]
                yield Reply(client=name, reason=f"its node has been away for {self.patience:g} s")
            time.sleep(self.interval)

    # ---- one client

    def _send(self, name: str, order: _Order, message: Callable[[str], bytes], left: float | None) -> None:
        """Send to the client's node, unless this one has it already."""
        node = self._nodes.get(name)
        if node is None or order.node == node:
            return
        ttl = _NO_DEADLINE if left is None else left
        labels = {"run": self.run, "client": name}
        if sent := self.link.push(node.number, labels, message(name), seconds=ttl):
            if order.messages and node != order.failed:
                self.say(f"{name} is back at another node; its message is sent again")
            order.node, order.messages = node, (*order.messages, sent)
            order.sent = self._last_sent[node] = time.monotonic()

    def _reply(self, name: str, order: _Order, answer: Answer) -> Reply | None:
        """The client's reply; None where its message has to be sent again."""
        order.messages = tuple(sent for sent in order.messages if sent != answer.message)
        if answer.error is None:
            code = answer.labels.get("code")
            reason = "no answer" if code is None else fault_named(code).words
            return Reply(client=name, data=answer.data, reason=reason)
        if not answer.gone:
            return Reply(client=name, reason=answer.error)
        if order.messages:  # an older one of several: the newest is still under way
            return None
        node = order.node
        reply = self._send_again(name, order, answer.error)
        if reply is None and node is not None and self._nodes.get(name) == node:
            # It has to say again who it is: the list of nodes that are online may be older than this answer.
            del self._nodes[name]
            self._introduced.pop((node.number, node.since), None)
        return reply

    def _send_again(self, name: str, order: _Order, reason: str) -> Reply | None:
        """Have the message sent again; a reply instead where that was tried often enough."""
        node, order.node, order.missed = order.node, None, time.monotonic()
        order.tries = order.tries + 1 if node == order.failed else 1
        order.failed = node
        if order.tries >= _TRIES:
            return Reply(client=name, reason=reason)
        self.say(f"{name} did not get its message ({reason}); it is sent again once its node is there")
        return None

    def _is_away(self, order: _Order) -> bool:
        if order.node is not None and order.node in self._nodes.values():
            order.missed = time.monotonic()
        return time.monotonic() - order.missed > self.patience

    # ---- who is there

    def _update_nodes(self) -> None:
        """Ask nodes that are new who they are, and forget those that have left."""
        if time.monotonic() - self._looked < _ASK_NODES:
            return
        self._looked = time.monotonic()
        online = self.link.nodes()
        for name, node in list(self._nodes.items()):
            if node not in online:
                self.say(f"the node of {name} has left")
                del self._nodes[name]
        for node in online:
            if (node.number, node.since) not in self._introduced:
                self._introduced[node.number, node.since] = ""
                self._question(node)
            elif self._open_questions(node) and not self._introduced[node.number, node.since]:
                self._question_if_silent(node)

    def _question(self, node: Node) -> None:
        """Ask a node who it is."""
        self._last_sent[node] = time.monotonic()
        if sent := self.link.push(node.number, {"run": self.run}, None, seconds=_QUESTION_SECONDS):
            self._questions[sent] = node, self._last_sent[node]

    def _question_if_silent(self, node: Node) -> None:
        """The same to a node that has been silent; one that works has two such questions waiting at most."""
        if time.monotonic() - self._last_sent[node] > _SILENT and self._open_questions(node) < 2:
            self._question(node)

    def _open_questions(self, node: Node) -> int:
        """How many questions a node has not answered."""
        return sum(node == asked for asked, _ in self._questions.values())

    def _answered_until(self, answers: Sequence[Answer]) -> dict[Node | None, float]:
        """Nodes that say who they are, and when they were asked: what they were sent before that is done, or lost."""
        found = [
            self._questions[answer.message]
            for answer in answers
            if answer.message in self._questions and answer.error is None
        ]
        return dict(sorted(found, key=lambda one: one[1]))

    def _note_introductions(self, answers: Sequence[Answer]) -> None:
        """Take in who new nodes say they are."""
        for answer in answers:
            node, _ = self._questions.pop(answer.message, (None, 0.0))
            if node is None:
                continue
            name = str(answer.labels.get("client", ""))
            reason, code = answer.error, answer.labels.get("code")
            if reason is None and code is not None:
                reason = fault_named(code).words
            if reason is None and (not name or clean_text(name) != name):
                reason = f"its name {shown(name)} is not 1 to 200 printable characters"
            if reason is None and self.keys is not None and self.keys.get(name) != node.key:
                reason = f"its key is not that of {name!r} in --node-keys"
            if reason is not None:
                if answer.gone:
                    self._introduced.pop((node.number, node.since), None)  # it is asked again if it is there
                else:
                    self.say(f"node {node.number} does not count: {reason}")
                continue
            self._introduced[node.number, node.since] = name
            other = self._nodes.get(name)
            if other is None or other.since <= node.since:  # a killed one seems online for up to a minute
                self._nodes[name] = node
