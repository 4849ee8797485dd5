"""The engine flower over real processes on 127.0.0.1: a SuperLink, three SuperNodes with keys, workers, TLS on."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from flower_processes import BREAKABLE, FLORA, MANYLORA, NAMES, PATIENCE, SETTINGS, Federation
from manylora.cli import main

needs_flower = pytest.mark.skipif(
    shutil.which("flower-superlink", path=str(Path(sys.executable).parent)) is None,
    reason="Flower is not in this environment; `make flower` runs this file in one of its own (Python 3.11 or later)",
)


@needs_flower
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of click, which Flower asks in an old way
def test_this_release_still_has_every_undocumented_name() -> None:
    from manylora.federated.engines.flower_private import missing_names

    assert missing_names() == [], f"flwr {version('flwr')} has moved or dropped these"


@pytest.fixture(scope="module")
def federation(
    tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"), tiny_base, small_data)
    yield made
    made.close()


@needs_flower
@pytest.mark.timeout(2 * PATIENCE)
def test_three_nodes_end_with_the_weights_of_one_process_though_one_is_killed_and_the_server_too(
    federation: Federation,
) -> None:
    run = federation.folder / "broken"
    server = federation.server(*BREAKABLE, out="broken")
    federation.until(
        lambda: "waiting for clients" in federation.log("server-broken"), "server-broken", "superlink"
    )
    for name in NAMES:
        federation.node(name)
        federation.worker(name)

    # After the first round one machine dies, node and worker; it comes back when the SuperLink lets it in.
    federation.until((run / "rounds" / "round-0001.safetensors").exists, "server-broken", "superlink")
    federation.kill("node-swap")
    federation.kill("worker-swap")
    # So does the server, at some moment of the second round; a new run at the SuperLink goes on where it was.
    federation.kill("server-broken")
    assert not (run / "rounds" / "round-0003.safetensors").exists()
    server = federation.start("server-broken", *MANYLORA, "--resume", run)
    federation.worker("swap")
    federation.alone(*BREAKABLE, out="broken")
    federation.alone(*FLORA, out="flora")

    def finished() -> bool:
        if federation.running["node-swap"].poll() is not None:
            federation.node("swap")
        return server.poll() is not None

    federation.until(finished, "superlink", "worker-swap", "node-last_word")
    assert server.returncode == 0, federation.log("server-broken")
    federation.assert_like_alone("broken", "rounds/round-0003.safetensors")
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)["losses"]) == set(NAMES)
    for name in NAMES:  # A stayed with each client, as it would have in one process
        kept = federation.home("broken", name) / "round-0003.safetensors"
        theirs = federation.folder / "broken-alone" / "clients" / name / kept.name
        assert kept.read_bytes() == theirs.read_bytes()


@needs_flower
@pytest.mark.timeout(2 * PATIENCE)
def test_missed_stacks_scores_and_the_local_reference_are_those_of_one_process(
    federation: Federation,
) -> None:
    """FLoRA with unequal ranks, of whose clients two of three take part in a round."""
    server = federation.server(*FLORA, out="flora")
    federation.until(lambda: server.poll() is not None, "superlink", *(f"worker-{name}" for name in NAMES))
    assert server.returncode == 0, federation.log("server-flora")
    federation.assert_like_alone(
        "flora",
        "scores.json",
        "reference/metrics.jsonl",
        *(f"stacks/round-000{n}.safetensors" for n in (1, 2, 3)),
    )
    scores = json.loads((federation.folder / "flora" / "scores.json").read_text(encoding="utf-8"))
    assert set(scores["clients"]) == set(scores["reference"]) == set(NAMES)
    took_part = [
        set(json.loads(line)["losses"])
        for line in (federation.folder / "flora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any(name not in took_part[0] and name in took_part[2] for name in NAMES)
    for name in NAMES:
        for inside, theirs in (("", "clients"), ("-reference", "reference/clients")):
            for file in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
                ours = federation.home("flora", name, inside) / file
                alone = federation.folder / "flora-alone" / theirs / name / file
                assert ours.read_bytes() == alone.read_bytes()


@needs_flower
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.timeout(2 * PATIENCE)
def test_a_message_whose_run_ends_on_its_way_does_not_hold_up_the_next_run(federation: Federation) -> None:
    """Its SuperNode drops it without a word to the worker, which has taken it by then."""
    name = NAMES[0]  # the slow one
    with contextlib.closing(federation.link()) as link:
        key = link.register({name: (federation.folder / "keys" / f"{name}.pub").read_bytes()})[name]
        (node,) = [node for node in link.nodes() if node.key == key]
        assert link.push(node.number, {"run": "short"}, None, seconds=60)
        run = link.run_id
        asked = f"Requesting `Run` for run_id={run}"  # and then for the bundle; for the message's parts a second later
        federation.until(
            lambda: "Requesting FAB" in federation.log("superlink").partition(asked)[2], "superlink"
        )
        federation.stop(link, run)
    plain = [*SETTINGS, "--reference", "none", "--scored-clients", "0"]
    server = federation.server(*plain, "--rounds", "2", "--deadline", "90", out="next")
    federation.until(lambda: server.poll() is not None, "superlink", f"worker-{name}")
    assert server.returncode == 0, federation.log("server-next")
    rows = (federation.folder / "next" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [set(json.loads(row)["losses"]) for row in rows] == [set(NAMES)] * 2
    assert f"Run ID {run} is not in `RUNNING` status" in federation.log(f"node-{name}")
    assert "did not come whole" in federation.log(f"worker-{name}")


@needs_flower
@pytest.mark.timeout(2 * PATIENCE)
def test_a_straggler_is_left_behind_and_comes_back_and_a_client_that_is_gone_is_named(
    federation: Federation,
) -> None:
    run = federation.folder / "late"
    plain = [*SETTINGS, "--reference", "none", "--scored-clients", "0", "--wire", "bf16"]
    server = federation.server(*plain, "--rounds", "4", "--deadline", "30", out="late")
    federation.until((run / "rounds" / "round-0001.safetensors").exists, "server-late", "superlink")
    worker = federation.running["worker-swap"]
    worker.send_signal(signal.SIGSTOP)
    federation.until((run / "rounds" / "round-0002.safetensors").exists, "server-late", "superlink")
    worker.send_signal(signal.SIGCONT)  # now it answers the second round, in the third
    federation.until(lambda: server.poll() is not None, "superlink", "worker-swap")
    assert server.returncode == 0, federation.log("server-late")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1]["refused"] == {"swap": "no answer within 30 s"}
    assert set(rows[1]["losses"]) == {"first_word", "last_word"}
    assert "swap" in rows[3]["losses"]
    assert not any("replay" in reason for row in rows for reason in row["refused"].values())

    federation.kill("node-swap")
    federation.kill("worker-swap")
    server = federation.server(*plain, "--rounds", "1", "--deadline", "12", out="gone")
    assert server.wait(timeout=PATIENCE) == 2
    (line,) = [line for line in federation.log("server-gone").splitlines() if line.startswith("manylora:")]
    assert "only 2 of 3 clients came" in line
    assert "(first_word, last_word)" in line


@needs_flower
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.timeout(4 * PATIENCE)
def test_a_run_that_the_superlink_has_ended_says_so_and_goes_on_with_resume(federation: Federation) -> None:
    run = federation.folder / "ended"
    plain = [*SETTINGS, "--reference", "none", "--scored-clients", "0", "--rounds", "2", "--clients", "2"]
    server = federation.server(*plain, out="ended")
    federation.until((run / "rounds" / "round-0001.safetensors").exists, "server-ended", "superlink")
    number = int(re.findall(r"Created run (\d+)", federation.log("superlink"))[-1])
    with contextlib.closing(federation.link()) as link:
        federation.stop(link, number)
    assert server.wait(timeout=PATIENCE) == 2, federation.log("server-ended")
    (line,) = [line for line in federation.log("server-ended").splitlines() if line.startswith("manylora:")]
    assert "has ended the run" in line
    assert "--resume" in line

    server = federation.start("server-ended", *MANYLORA, "--resume", run)
    federation.until(lambda: server.poll() is not None, "superlink", "worker-first_word")
    assert server.returncode == 0, federation.log("server-ended")
    assert (run / "rounds" / "round-0002.safetensors").exists()


@needs_flower
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_word_of_an_error_leaves_a_node(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    """Marked rows that cannot be used, a folder that is not there, a disk and a bug: the envelope holds a code."""
    from manylora.federated import FederateConfig, Message, pack
    from manylora.federated.engines.flower_link import envelope, opened
    from manylora.federated.engines.flower_node import NodeClient

    mark = "CANARY"
    rows = tmp_path / f"{mark}.jsonl"
    rows.write_text(json.dumps({"instruction": mark, "output": ""}) + f"\n{{{mark}", encoding="utf-8")
    config = FederateConfig(target_modules="q_proj", rounds=1).resolved()
    fields = {"settings": config.for_clients()}
    join = pack(Message(kind="join", client="ada", round=0, fields=fields))
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    whole = {"data": str(small_data), "home": str(tmp_path / "home")}
    for own, code in (
        ({"data": str(rows)}, "data"),
        ({"data": str(tmp_path / mark)}, "data"),
        ({**whole, "home": str(tmp_path / "file" / mark)}, "disk"),
        ({**whole, "model": str(tmp_path / mark)}, "model"),
        ({**whole, mark: 1}, "settings"),
    ):
        said: list[str] = []
        node = NodeClient(say=said.append)
        answer = node.answer(
            envelope({"run": "r"}, join),
            {"client": "ada", "model": str(tiny_base), "device": "cpu", **own},
        )
        labels, data = opened(answer)
        assert labels == {"version": labels["version"], "client": "ada", "code": code}, said
        assert data is None
        assert mark in said[-1]
    labels, data = opened(NodeClient().answer(envelope({"run": "r"}, b"x"), {"client": "ada"}))
    assert labels["code"] == "message"


class OneUnreadable:
    """A grid of which one node's answer is none of Flower's objects."""

    def __init__(self, bad: str) -> None:
        self.bad, self.there, self.asked = bad, {"m1", "m2", "m3"}, 0

    def pull_messages(self, messages: list[str]) -> list[Any]:
        from types import SimpleNamespace

        from manylora.federated.engines.flower_link import envelope

        self.asked += 1
        found = []
        for message in messages:
            if message not in self.there:
                continue
            self.there.discard(message)  # it counts as received before it is read
            if message == self.bad:
                raise KeyError("b'no object'")
            content = envelope({"client": message}, message.encode())
            metadata = SimpleNamespace(reply_to_message_id=message)
            found.append(SimpleNamespace(metadata=metadata, content=content, has_error=lambda: False))
        return found


@needs_flower
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_answer_that_flower_cannot_read_costs_its_own_node_and_not_the_run() -> None:
    import threading

    from manylora.federated.engines.flower_link import FlowerLink
    from manylora.federated.engines.flower_runtime import PatientRuntime

    link = object.__new__(FlowerLink)
    link._lost, link._runtime, link._one_by_one = threading.Event(), PatientRuntime(None), False
    link._grid = OneUnreadable("m2")
    first = link.pull(["m1", "m2", "m3"], most=100)
    assert [(one.message, one.data) for one in first] == [("m3", b"m3")]  # m1 was received, and is sent again
    link._grid = OneUnreadable("m2")
    later = link.pull(["m1", "m2", "m3"], most=100)
    assert [(one.message, one.data, one.error) for one in later] == [
        ("m1", b"m1", None),
        ("m2", None, "its answer cannot be read"),
        ("m3", b"m3", None),
    ]


def test_the_recipe_names_the_superlink(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--engine", "flower", "--superlink", "hub.example.org:8000", "--clients", "3", "--recipe"]
    assert main(["federate", *words]) == 0
    out = capsys.readouterr().out
    for part in ("DNS:hub.example.org", "--superlink hub.example.org:8000", "--enable-supernode-auth", "--port 8000",
                 "--node-config", "ssh-keygen", "--clients 3", "FLWR_TELEMETRY_ENABLED=0"):  # fmt: skip
        assert part in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--engine flower --clients 3", "needs the SuperLink's HOST:PORT"),
        ("--engine flower --superlink here --clients 3", "needs the SuperLink's HOST:PORT"),
        ("--engine flower --superlink 127.0.0.1:9", "--clients"),
        ("--engine flower --superlink 127.0.0.1:9 --node-keys keys", "--certificate"),
        (
            "--engine flower --superlink 127.0.0.1:9 --clients 2 --strategy centralized",
            "all rows in one place",
        ),
        ("--superlink 127.0.0.1:9", "add --engine flower"),
        ("--node 127.0.0.1:9094 --rounds 3", "--node-config"),
        pytest.param(
            "--engine flower --superlink 127.0.0.1:9 --clients 2",
            "no SuperLink answers at 127.0.0.1:9",
            # Flower 1.41 asks click and pathspec in old ways; nothing of ours can change that.
            marks=[needs_flower, pytest.mark.filterwarnings("ignore::DeprecationWarning")],
        ),
    ],
)
def test_bad_input_is_one_line(
    words: str, reason: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["federate", *words.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("manylora:")]
    assert len(lines) == 1
    assert reason in lines[0]
