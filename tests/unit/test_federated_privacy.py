"""What leaves a client when something goes wrong: a code. Rows are marked; the marks are looked for in every byte."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import federation, rows_of, settings
from manylora.data import Example
from manylora.errors import ConfigError, DataError
from manylora.federated import Client, ClientData, FederateConfig, Message, Workbench, pack, unpack
from manylora.federated.allowed import Allowed
from manylora.federated.engines.flower_node import NodeClient
from manylora.federated.faults import ClientError, Fault

MARK = "CANARY"
PATH = f"/srv/{MARK}/secret-rows.jsonl:7"


def row(output: str = MARK, **more: Any) -> Example:
    return Example(task="boolq", instruction=f"{MARK} says", output=output, origin=PATH, **more)


def chat_row() -> Example:
    return dataclasses.replace(row(), form="chat")


CHAT = {"boolq": [chat_row()]}
LONG = {"boolq": [row(output=f"{MARK} " * 600)]}
NO_ANSWER = {"boolq": [row(output="")]}
FINE = {"boolq": [row(output="true", answer="true")] * 8}
OTHER_LABEL = {"boolq": [row(answer="true"), row(answer=f"{MARK} is the gold answer")]}
UNSCORABLE = {"boolq": [row(output="")]}
HALF_LABELLED = {"boolq": [row(answer="true"), row()]}


def sent_plain(data: bytes) -> bytes:
    """Every byte of a message, and what its compressed header says."""
    return data + zlib.decompress(data[8 : 8 + int.from_bytes(data[4:8], "little")])


def order(
    kind: str, config: FederateConfig, *, number: int, version: int = 0, client: str = "ada"
) -> Message:
    fields: dict[str, Any] = {"settings": config.for_clients()}
    if kind != "join":
        fields |= {"rank": 4, "version": version}
    return Message(kind=kind, client=client, round=number, fields=fields)


def shared(bench: Workbench) -> dict[str, torch.Tensor]:
    return {f"{name}.B": torch.zeros(out, 4) for name, (out, _) in bench.shapes.items()}


class Site:
    """One client with marked rows, and all that left it."""

    def __init__(self, config: FederateConfig, home: Path, data: ClientData) -> None:
        self.config, self.home, self.bench = config, home, Workbench(config)
        self.said: list[str] = []
        self.client = Client("ada", data, home=home, bench=self.bench, say=self.said.append)

    def ask(self, verb: str, number: int, *, version: int = 0, **more: Any) -> Message:
        message = order(verb, self.config, number=number, version=version)
        if verb != "join":
            message = dataclasses.replace(message, tensors=shared(self.bench))
        answer = self.client.handle(pack(dataclasses.replace(message, **more)))
        assert MARK.encode() not in sent_plain(answer)
        assert str(self.home).encode() not in sent_plain(answer)
        assert b".jsonl" not in sent_plain(answer)
        return unpack(answer)


@pytest.fixture
def site(tiny_base: Path, small_data: Path, tmp_path: Path) -> Callable[..., Site]:
    def make(
        train: dict[str, list[Example]], test: dict[str, list[Example]] | None = None, **more: Any
    ) -> Site:
        config = settings(tiny_base, small_data, local_steps=1, max_new_tokens=2, **more)
        return Site(config, tmp_path / MARK, ClientData(train=train, test=test or {}))

    return make


def assert_code(site: Site, answer: Message, fault: Fault, *, text: str = MARK) -> None:
    """Nothing but the code left, and whoever runs the client reads the rest there."""
    assert (answer.kind, answer.fields, answer.tensors) == ("failed", {"code": fault.value}, {})
    log = (site.home / "ada" / "log.txt").read_text(encoding="utf-8")
    assert text in log
    assert text in site.said[-1]


@pytest.mark.parametrize("rows", [CHAT, LONG, NO_ANSWER], ids=["encoding", "too-long", "no-answer"])
def test_rows_that_cannot_be_trained_on_leave_a_code(site: Callable[..., Site], rows: Any) -> None:
    made = site(rows)
    assert_code(made, made.ask("train", 1), Fault.DATA, text="secret-rows.jsonl:7")


@pytest.mark.parametrize("rows", [OTHER_LABEL, UNSCORABLE, HALF_LABELLED], ids=["gold", "no-answer", "half"])
def test_rows_that_cannot_be_scored_leave_a_code(site: Callable[..., Site], rows: Any) -> None:
    made = site(FINE, rows)
    assert made.ask("train", 1).kind == "trained"
    assert_code(made, made.ask("score", 2, version=1), Fault.DATA)


def test_training_that_is_not_finite_leaves_a_code(site: Callable[..., Site]) -> None:
    made = site(FINE)
    with torch.no_grad():
        made.bench.model.get_input_embeddings().weight.fill_(float("nan"))
    assert_code(made, made.ask("train", 1), Fault.NOT_FINITE, text="not finite")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(MARK),
        torch.OutOfMemoryError(f"CUDA out of memory. {MARK}"),
        RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {MARK}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_not_enough_leaves_a_code(
    error: Exception, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = site(FINE)

    def fail(rows: object) -> None:
        raise error

    monkeypatch.setattr(made.bench, "encode", fail)
    assert_code(made, made.ask("train", 1), Fault.MEMORY)


def test_a_private_state_that_is_lost_or_damaged_leaves_a_code(site: Callable[..., Site]) -> None:
    made = site(FINE)
    made.ask("train", 1)
    file = made.home / "ada" / "round-0001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_code(made, made.ask("train", 2, version=1), Fault.STATE_DAMAGED, text=str(made.home))
    file.unlink()
    assert_code(made, made.ask("train", 2, version=1), Fault.STATE_MISSING, text=str(made.home))
    file.write_bytes(whole)
    assert made.ask("train", 2, version=1).kind == "trained"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "open"},
        {"client": "bob"},
        {"round": -1},
        {"fields": {}},
        {"fields": {"settings": {"data": "/etc"}, "rank": 4, "version": 0}},
        {"tensors": {}},
    ],
    ids=str,
)
def test_a_message_that_cannot_be_leaves_a_code(site: Callable[..., Site], change: dict[str, Any]) -> None:
    answer = (made := site(FINE)).ask("train", 1, **change)
    assert answer.fields in ({"code": "message"}, {"code": "settings"})
    assert len(made.said) == 1


def test_a_log_stays_small(site: Callable[..., Site]) -> None:
    made = site(FINE)
    path = made.home / "ada" / "log.txt"
    made.ask("open", 1)
    with path.open("a", encoding="utf-8") as file:
        file.write("x" * 2**21)
    made.ask("open", 1)
    assert path.stat().st_size < 1000
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_no_mark_reaches_the_server_whatever_happens_to_a_client(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """A whole run over the local engine: bob's rows cannot be trained on, cyd's cannot be scored."""
    config = settings(tiny_base, small_data, local_steps=1, max_new_tokens=2, quorum=0.3)
    rows = {
        **rows_of(small_data),
        "bob": ClientData(train=CHAT),
        "cyd": ClientData(train=FINE, test=OTHER_LABEL),
    }
    rounds, clients = federation(config, rows, tmp_path)
    rounds.run()
    assert list(rounds.score()) == ["ada"]
    for answers in clients.answers:
        for name, answer in answers.items():
            assert MARK.encode() not in sent_plain(answer), name
    shutil.rmtree(tmp_path / "clients")  # their own disk
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or MARK.encode() not in path.read_bytes(), path
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["refused"] == {"bob": Fault.DATA.words}


def test_the_one_who_runs_all_clients_reads_why(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = settings(tiny_base, small_data, local_steps=1)
    rows = {**rows_of(small_data), "bob": ClientData(train=CHAT)}
    rounds, _ = federation(config, rows, tmp_path, say=said.append)
    rounds.run()
    (line,) = said
    assert line.startswith("bob: train, round 1: ")
    assert "secret-rows.jsonl:7 is a chat row" in line


# ---- what a site allows


@pytest.mark.parametrize(
    ("allowed", "more", "fits"),
    [
        ({}, {}, True),
        ({"strategies": ["fed-alora", "ffa"]}, {}, True),
        ({"strategies": ["fedsa"]}, {}, False),
        ({"strategies": []}, {}, False),
        ({"parts": ["B"]}, {}, True),
        ({"parts": ["B"]}, {"ranks": "4,2,2"}, False),
        ({"parts": ["dB"]}, {"ranks": "4,2,2"}, True),
        ({"parts": ["B"]}, {"strategy": "fedit"}, False),
        ({"parts": ["A", "B"]}, {"strategy": "flora"}, True),
        ({"strategies": ["fed-alora"], "parts": []}, {}, False),
        ({"parts": []}, {"strategy": "local"}, True),
    ],
)
def test_a_site_pins_what_may_leave_it(allowed: dict[str, Any], more: dict[str, Any], fits: bool) -> None:
    config = FederateConfig(**more).resolved()
    if fits:
        Allowed(**allowed).check(config)
    else:
        with pytest.raises(ClientError, match="nothing left") as found:
            Allowed(**allowed).check(config)
        assert found.value.fault is Fault.NOT_ALLOWED


def test_a_pin_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"there is no strategy 'fedavg'; choose from .*fed-alora"):
        Allowed(strategies=["fedavg"])
    with pytest.raises(ConfigError, match="there is no part 'C'; choose from A, B, dB"):
        Allowed(parts=["C"])


def test_a_pinned_node_trains_nothing_for_another_strategy(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """Asked before the rows are read, which are not even there."""
    node = NodeClient(allowed=Allowed(strategies=["fed-alora"]))
    own = {"client": "ada", "model": str(tiny_base), "data": str(tmp_path / "nowhere"), "home": str(tmp_path)}

    def asked(strategy: str) -> None:
        config = settings(tiny_base, small_data, strategy=strategy)
        node._handle(pack(order("join", config, number=0)), "ada", "run", own)

    with pytest.raises(ClientError, match="the server runs strategy fedit, this site allows fed-alora"):
        asked("fedit")
    with pytest.raises(DataError, match="nowhere"):
        asked("fed-alora")


@pytest.mark.parametrize("run", ["", "a\nb", "x" * 300])
def test_a_run_without_a_name_does_not_write_beside_the_others(run: str, tmp_path: Path) -> None:
    node = NodeClient()
    with pytest.raises(ClientError, match="give it a name") as found:
        node._handle(b"", "ada", run, {"client": "ada", "home": str(tmp_path)})
    assert found.value.fault is Fault.MESSAGE
    assert list(tmp_path.iterdir()) == []


def test_what_a_server_may_not_set_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    own = FederateConfig(data=str(tmp_path))
    for name, value in (
        ("rounds", "3"), ("rounds", 10**400), ("rounds", True), ("rounds", 2.5), ("learning_rate", float("nan")),
        ("ranks", [4, "2"]), ("ranks", {"a": 1}), ("strategy", "fedavg"), ("strategy", ["ffa"]),
        ("wire", 8), ("seed", 1e400), ("robust", None), ("data", "/etc"), ("device", "cpu"), ("nonsense", 1),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"the server sets '?{name}'?"):
            own.accept_settings({name: value})
    assert own.accept_settings(
        FederateConfig(ranks="4,2", target_modules=["q_proj"]).for_clients()
    ).ranks == [4, 2]
