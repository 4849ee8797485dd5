"""The engine flower's bookkeeping, against a link that behaves as Flower was seen to; no SuperLink, no time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from manylora.errors import ConfigError, RunError
from manylora.federated import FederateConfig, Message, pack, unpack
from manylora.federated.engines import flower_private
from manylora.federated.engines.flower import FlowerClients
from manylora.federated.engines.flower_link import Answer, Node, PatientRuntime
from manylora.federated.engines.flower_node import NodeClient, forget_old_runs, settings_of

MOST = 1000
"""Bytes that an answer may have."""


class Hub:
    """Nodes that answer at once, unless they are `deaf`; a message to one that is `gone` comes back as an error."""

    address = "hub:1"

    def __init__(self, **names: str) -> None:
        self.online = {int(number.strip("_")): name for number, name in names.items()}
        self.keys = {number: name.encode() for number, name in self.online.items()}
        self.since = dict.fromkeys(self.online, "1")
        self.deaf: set[int] = set()
        self.gone: set[int] = set()
        self.sent: list[tuple[int, bytes | None, float]] = []
        self.waiting: dict[str, int] = {}
        self.labels: dict[str, str] = {}

    def nodes(self) -> list[Node]:
        return [Node(number=n, since=self.since[n], key=self.keys[n]) for n in self.online]

    def push(self, node: int, labels: Mapping[str, str], data: bytes | None, *, seconds: float) -> str:
        assert labels["run"] == "r"
        self.sent.append((node, data, seconds))
        self.waiting[f"m{len(self.sent)}"] = node
        return f"m{len(self.sent)}"

    def pull(self, messages: Sequence[str], *, most: int) -> list[Answer]:
        assert most > 0
        answers = []
        for message in messages:
            node = self.waiting.get(message)
            data = self.sent[int(message[1:]) - 1][1]
            if node in self.gone and data is not None:
                answers.append(Answer(message=message, labels={}, error="Node Unavailable", gone=True))
                self.lost(node)
            elif node is not None and node in self.online and not (node in self.deaf and data is not None):
                labels = {"client": self.online[node], **(self.labels if data is not None else {})}
                answers.append(Answer(message=message, labels=labels, data=None if self.labels else data))
            else:
                continue
            del self.waiting[message]
        return answers

    def lost(self, node: int) -> None:
        """A node was lost: another of the same client comes."""
        self.online[node + 1] = self.online.pop(node)
        self.keys[node + 1], self.since[node + 1] = self.keys[node], "2"


def clients(hub: Hub, expected: int, **more: object) -> FlowerClients:
    return FlowerClients(hub, run="r", expected=expected, patience=0.3, interval=0.001, **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.federated.engines.flower._ASK_NODES", 0.0)


def test_names_come_from_the_nodes_and_not_from_their_ids() -> None:
    assert clients(Hub(_70="bob", _10="cyd", _40="ada"), 3).names() == ["ada", "bob", "cyd"]


def test_too_few_clients_end_with_who_is_there() -> None:
    with pytest.raises(RunError, match=r"only 1 of 2 clients came to hub:1 within 0\.3 s \(ada\)"):
        clients(Hub(_1="ada"), 2).names()


def test_a_node_with_another_key_is_not_believed_its_name() -> None:
    hub = Hub(_1="ada", _2="bob")
    hub.keys[2] = b"mallory"
    said: list[str] = []
    with pytest.raises(RunError, match=r"only 1 of 2 clients .* \(ada\)"):
        clients(hub, 2, keys={"ada": b"ada", "bob": b"bob"}, say=said.append).names()
    assert any("its key is not that of 'bob'" in line for line in said)


def test_a_node_cannot_write_on_the_operators_terminal() -> None:
    """Neither by its name, nor by what Flower passes on as the reason of its error."""
    hub = Hub(_1="ada", _2="bob")
    hub.online[2] = "bob\x1b[2J\r\nround 9/9"
    said: list[str] = []
    with pytest.raises(RunError, match=r"only 1 of 2 clients .* \(ada\)"):
        clients(hub, 2, say=said.append).names()
    assert any("does not count: its name 'bob" in line for line in said)
    assert all(line.isprintable() for line in said)


@pytest.mark.parametrize(
    ("code", "words"), [("data", "its rows cannot be used"), ("\x1b[2J", "could not answer")]
)
def test_of_what_went_wrong_at_a_node_only_a_code_is_believed(code: str, words: str) -> None:
    hub = Hub(_1="ada")
    engine = clients(hub, 1)
    engine.names()
    hub.labels = {"code": code, "reason": "\x1b[2J a row"}
    (reply,) = engine.ask(["ada"], str.encode, seconds=60, most=MOST)
    assert reply.data is None
    assert words in reply.reason
    assert "row\x1b" not in reply.reason
    assert reply.reason.isprintable()


def test_a_message_lost_with_its_node_is_sent_again_to_the_next_of_that_name() -> None:
    hub = Hub(_1="ada", _5="bob")
    hub.gone = {1}
    engine = clients(hub, 2)
    engine.names()
    replies = {
        reply.client: reply.data for reply in engine.ask(["ada", "bob"], str.encode, seconds=60, most=MOST)
    }
    assert replies == {"ada": b"ada", "bob": b"bob"}
    assert [(node, data) for node, data, _ in hub.sent if data == b"ada"] == [(1, b"ada"), (2, b"ada")]


def test_a_straggler_is_not_waited_for_after_the_deadline_and_its_message_expires_with_it() -> None:
    hub = Hub(_1="ada", _5="bob")
    hub.deaf = {5}
    engine = clients(hub, 2)
    engine.names()
    assert [reply.client for reply in engine.ask(["ada", "bob"], str.encode, seconds=0.2, most=MOST)] == [
        "ada"
    ]
    assert all(seconds <= 0.2 for _, data, seconds in hub.sent if data is not None)
    hub.deaf = set()  # its late answer belongs to no later question
    later = [reply.data for reply in engine.ask(["bob"], lambda name: b"next", seconds=60, most=MOST)]
    assert later == [b"next"]


def test_a_client_that_stays_away_is_given_up_where_no_deadline_rules() -> None:
    hub = Hub(_1="ada", _5="bob")
    engine = clients(hub, 2)
    engine.names()
    del hub.online[5]
    replies = {
        reply.client: reply for reply in engine.ask(["ada", "bob"], str.encode, seconds=None, most=MOST)
    }
    assert replies["ada"].data == b"ada"
    assert replies["bob"].data is None
    assert "away for 0.3 s" in replies["bob"].reason


class OutOfStep(Hub):
    """A node of it passes an answer on only when the next message comes."""

    def pull(self, messages: Sequence[str], *, most: int) -> list[Answer]:
        last = {node: message for message, node in self.waiting.items()}
        return super().pull(
            [message for message in messages if last.get(self.waiting.get(message)) != message], most=most
        )


class Forgetful(Hub):
    """Loses each node's first messages, without a word."""

    def __init__(self, lost: int, **names: str) -> None:
        super().__init__(**names)
        self.left = dict.fromkeys(self.online, lost)

    def push(self, node: int, labels: Mapping[str, str], data: bytes | None, *, seconds: float) -> str:
        message = super().push(node, labels, data, seconds=seconds)
        if data is not None and self.left[node]:
            self.left[node] -= 1
            del self.waiting[message]
        return message


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_node_that_is_out_of_step_is_nudged(seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.federated.engines.flower._SILENT", 0.02)
    hub = OutOfStep(_1="ada", _5="bob")
    engine = clients(hub, 2)
    assert engine.names() == ["ada", "bob"]
    for _ in range(3):
        replies = [reply.data for reply in engine.ask(["ada", "bob"], str.encode, seconds=seconds, most=MOST)]
        assert sorted(replies) == [b"ada", b"bob"]
    assert sum(data is not None for _, data, _ in hub.sent) == 6  # nothing is sent again


def test_a_node_that_works_is_nudged_but_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.federated.engines.flower._SILENT", 0.01)
    hub = Hub(_1="ada")
    engine = clients(hub, 1)
    engine.names()
    hub.pull = lambda messages, most: []  # type: ignore[method-assign]
    assert list(engine.ask(["ada"], str.encode, seconds=0.3, most=MOST)) == []
    assert [data for _, data, _ in hub.sent] == [None, b"ada", None, None]


def test_a_message_that_a_node_has_lost_is_sent_again_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.federated.engines.flower._SILENT", 0.02)
    for lost, data in ((1, b"ada"), (3, None)):
        hub = Forgetful(lost, _1="ada")
        engine = clients(hub, 1)
        engine.names()
        (reply,) = engine.ask(["ada"], str.encode, seconds=None, most=MOST)
        assert reply.data == data
        assert sum(data is not None for _, data, _ in hub.sent) == min(lost + 1, 3)
    assert reply.reason == "its node lost the message"


def test_a_node_may_set_what_is_its_own_and_nothing_else() -> None:
    own = settings_of({"client": "ada", "home": "/x", "data": "rows.jsonl", "micro-batch-size": 2})
    assert (own.data, own.micro_batch_size) == ("rows.jsonl", 2)
    with pytest.raises(ConfigError, match="'learning_rate'; it may set client, home, model"):
        settings_of({"client": "ada", "learning-rate": 1.0})
    with pytest.raises(ConfigError, match="--node-config sets limit to 'five', which it cannot be"):
        settings_of({"client": "ada", "limit": "five"})


def test_runs_that_ended_long_ago_do_not_pile_up_at_a_client(tmp_path: Path) -> None:
    for run, days in (("old", 31), ("new", 29)):
        (tmp_path / run / "ada" / "adapter").mkdir(parents=True)
        (tmp_path / run / ".stacks").mkdir()
        for file in (
            "ada/round-0003.safetensors",
            ".stacks/round-0001.safetensors",
            "ada/adapter/adapter_model.safetensors",
        ):
            (tmp_path / run / file).write_bytes(b"x")
        (tmp_path / run / "ada.lock").touch()
        then = time.time() - days * 86_400
        os.utime(tmp_path / run / "ada.lock", (then, then))
    forget_old_runs(tmp_path)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.safetensors")}
    assert left == {
        "old/ada/adapter/adapter_model.safetensors",
        "new/ada/adapter/adapter_model.safetensors",
        "new/ada/round-0003.safetensors",
        "new/.stacks/round-0001.safetensors",
    }


def test_a_message_whose_run_ended_on_the_way_is_given_up() -> None:
    class Runtime:
        there = True

        def PullObject(self, request: SimpleNamespace) -> SimpleNamespace:  # noqa: N802 - Flower's name
            return SimpleNamespace(object_found=True, object_available=self.there)

    runtime, whole, part = Runtime(), SimpleNamespace(object_id="a"), SimpleNamespace(object_id="b")
    patient = PatientRuntime(runtime, patience=0.05)
    time.sleep(0.1)
    assert patient.PullObject(whole).object_available
    runtime.there = False
    assert patient.PullObject(part).object_found  # something came just now
    time.sleep(0.1)
    runtime.there = True
    assert patient.PullObject(whole).object_available
    runtime.there = False
    assert patient.PullObject(part).object_found  # something else came meanwhile
    late = SimpleNamespace(object_id="c")
    assert patient.PullObject(late).object_found
    time.sleep(0.1)
    assert not patient.PullObject(part).object_found
    assert patient.PullObject(late).object_found  # of a message that is sent again


class Store:
    """A SuperLink that has one answer to each of two messages, in parts of 100 bytes."""

    def __init__(self, **parts: int) -> None:
        self.parts, self.fetched = parts, 0

    def PullMessages(self, request: object) -> SimpleNamespace:  # noqa: N802 - Flower's name
        def tree(name: str, *children: SimpleNamespace) -> SimpleNamespace:
            return SimpleNamespace(object_id=name, children=children)

        return SimpleNamespace(
            messages_list=[
                SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=name)) for name in self.parts
            ],
            message_object_trees=[
                tree(name, tree(f"{name} record", *(tree(f"{name} {n}") for n in range(count))))
                for name, count in self.parts.items()
            ],
        )

    def PullObject(self, request: SimpleNamespace) -> SimpleNamespace:  # noqa: N802 - Flower's name
        self.fetched += 1
        return SimpleNamespace(object_found=True, object_available=True, object_content=bytes(100))


def test_an_answer_larger_than_what_was_asked_for_is_not_fetched_to_its_end() -> None:
    store = Store(small=3, large=1000)
    patient = PatientRuntime(store)
    patient.most = 1000
    patient.PullMessages(None)

    def fetched(name: str, count: int) -> list[bool]:
        return [
            patient.PullObject(SimpleNamespace(object_id=f"{name} {n}")).object_found for n in range(count)
        ]

    assert all(fetched("small", 3))
    found = fetched("large", 1000)
    assert sum(found) == 10
    assert store.fetched == 3 + 11
    assert patient.too_large == {"large"}


def test_a_clock_that_jumps_does_not_drop_a_federation_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the files' times both runs ended long ago; of one this worker has just had a message."""
    for run in ("going-on", "over"):
        (tmp_path / run / "ada").mkdir(parents=True)
        (tmp_path / run / "ada" / "round-0001.safetensors").write_bytes(b"x")
        (tmp_path / run / "ada.lock").touch()
        os.utime(tmp_path / run / "ada.lock", (0, 0))
    node = NodeClient()
    node._look_for_old_runs(tmp_path / "going-on")
    node._look_for_old_runs(
        tmp_path / "another"
    )  # a worker that has just begun knows of no run whether it goes on
    assert len([*tmp_path.rglob("*.safetensors")]) == 2
    monkeypatch.setattr("manylora.federated.engines.flower_node._LOOK_SECONDS", 0.0)
    node._look_for_old_runs(tmp_path / "another")
    assert [path.parts[-3] for path in tmp_path.rglob("*.safetensors")] == ["going-on"]


def test_a_message_renews_the_time_of_its_runs_lock(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = FederateConfig(target_modules="q_proj", rounds=1).resolved()
    join = pack(Message(kind="join", client="ada", round=0, fields={"settings": config.for_clients()}))
    own = {"model": str(tiny_base), "device": "cpu", "data": str(small_data), "home": str(tmp_path)}
    node, lock = NodeClient(), tmp_path / "run" / "ada.lock"
    for _ in range(2):
        assert unpack(node._handle(join, "ada", "run", {"client": "ada", **own})).kind == "joined"
        assert time.time() - lock.stat().st_mtime < 60
        os.utime(lock, (0, 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of click, which Flower asks in an old way
def test_flower_still_has_every_undocumented_name() -> None:
    pytest.importorskip("flwr", reason="Flower is not in this environment; `make flower` has one of its own")
    assert flower_private.missing_names() == [], f"flwr {version('flwr')} has moved or dropped these"


def test_undocumented_names_of_flower_stand_in_one_file() -> None:
    engines = Path(flower_private.__file__).parent
    documented = r"flwr\.(app|clientapp|serverapp)"
    for file in engines.glob("*.py"):
        imported = re.findall(
            r"^ *(?:from|import) (flwr[\w.]*)", file.read_text(encoding="utf-8"), re.MULTILINE
        )
        others = [name for name in imported if name != "flwr" and not re.fullmatch(documented, name)]
        assert others == [], file
