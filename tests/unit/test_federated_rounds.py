"""The rounds over the real in-process engine: who takes part, what counts, what a resumed run becomes."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from federation import Listening, Watched, bench_for, federation, final_state, rows_of, settings
from manylora.errors import ConfigError, RunError
from manylora.federated import Client, FederateConfig, LocalClients, Message, Rounds, Workbench, pack, unpack
from manylora.federated.home import VersionedState
from manylora.training import load_base


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run(config: FederateConfig, data: Path, folder: Path, **watched: Any) -> tuple[Rounds, Watched]:
    rounds, clients = federation(config, rows_of(data), folder, **watched)
    rounds.run()
    return rounds, clients


def lose_bob(name: str, number: int, answer: bytes) -> bytes | None:
    return None if name == "bob" and number > 0 else answer


def spoil_bob(name: str, number: int, answer: bytes) -> bytes | None:
    if name != "bob" or number == 0:
        return answer
    message = unpack(answer)
    message.tensors[sorted(message.tensors)[0]][0, 0] = 1e30
    return pack(message)


def test_a_bad_answer_counts_as_little_as_none(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, small_data, rounds=2)
    run(config, small_data, tmp_path / "lost", tamper=lose_bob)
    run(config, small_data, tmp_path / "bad", tamper=spoil_bob)
    run(config, small_data, tmp_path / "whole")
    assert final_state(tmp_path / "lost") == final_state(tmp_path / "bad") != final_state(tmp_path / "whole")
    for row in metrics(tmp_path / "bad"):
        assert sorted(row["losses"]) == ["ada", "cyd"]
        assert "above the limit" in row["refused"]["bob"]
    assert metrics(tmp_path / "lost")[0]["refused"] == {"bob": "no answer"}


def test_the_order_of_answers_does_not_matter(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, small_data, rounds=2, wire="int8")
    run(config, small_data, tmp_path / "sorted", order=sorted)
    run(config, small_data, tmp_path / "reversed", order=lambda names: sorted(names, reverse=True))
    assert final_state(tmp_path / "sorted") == final_state(tmp_path / "reversed")


@pytest.mark.parametrize(
    "more",
    [
        {"wire": "int8", "ranks": "6,3,2", "optimizer": "persist"},
        {"strategy": "flora", "ranks": "4,3,2", "participation": 0.6},
        {"strategy": "fedsa", "participation": 0.6, "wire": "bf16"},
        {"a_state": "reset", "a_init": "per_client"},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_run_that_is_broken_off_anywhere_ends_as_an_unbroken_one(
    more: dict[str, Any], tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, rounds=3, local_steps=1, **more)
    whole, _ = run(config, small_data, tmp_path / "whole")
    whole.score()

    class PullThePlug(BaseException):
        pass

    for answers in (1, 2):  # in a round, after so many answers of it
        folder, seen = tmp_path / str(answers), []

        def broken(
            name: str, number: int, answer: bytes, seen: list[str] = seen, stop: int = answers
        ) -> bytes:
            seen.extend([name] if number == 2 else [])
            if len(seen) >= stop:
                raise PullThePlug
            return answer

        with pytest.raises(PullThePlug):
            run(config, small_data, folder, tamper=broken)
        resumed, _ = run(config, small_data, folder)
        resumed.score()
        assert final_state(folder) == final_state(tmp_path / "whole")
        for name in ("ada", "bob", "cyd"):
            adapter = f"clients/{name}/adapter/adapter_model.safetensors"
            assert (folder / adapter).read_bytes() == (tmp_path / "whole" / adapter).read_bytes()
        assert metrics(folder) == metrics(tmp_path / "whole")


def test_an_order_given_twice_gives_the_same_answer(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, rounds=2, wire="int8", optimizer="persist", lora_dropout=0.1)
    _, clients = run(config, small_data, tmp_path)
    again = Client("bob", clients.data["bob"], home=clients.home, bench=Workbench(config))
    assert again.handle(clients.orders[2]["bob"]) == clients.answers[2]["bob"]


@pytest.mark.parametrize(("a_state", "matters"), [("persist", True), ("reset", False)])
def test_whether_a_is_remembered_is_a_setting(
    a_state: str, matters: bool, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, rounds=2, a_state=a_state)
    _, clients = run(config, small_data, tmp_path)
    private = VersionedState(clients.home / "bob")
    kept, notes = private.read(1)
    private.write(1, {name: value * 0.5 for name, value in kept.items()}, notes)
    again = Client("bob", clients.data["bob"], home=clients.home, bench=clients.bench)
    answer = again.handle(clients.orders[2]["bob"])
    assert (answer != clients.answers[2]["bob"]) == matters


def test_a_client_that_lost_its_disk_says_so_and_the_round_goes_on(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    def wipe(name: str, number: int, answer: bytes) -> bytes:
        if number == 1:
            shutil.rmtree(tmp_path / "clients" / "bob", ignore_errors=True)
        return answer

    rounds, _ = run(settings(tiny_base, small_data, rounds=2), small_data, tmp_path, tamper=wipe)
    reason = metrics(tmp_path)[1]["refused"]["bob"]
    assert "its private state is missing" in reason
    assert "put its folder back" in reason
    assert "--reset-client" in reason
    assert rounds.state.counted == {"ada": 2, "bob": 1, "cyd": 2}


def test_what_no_one_is_told_stays(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    """Every byte that goes up, taken apart: B's change, an example count, losses, and nothing else."""
    _, clients = run(settings(tiny_base, small_data, rounds=2), small_data, tmp_path)
    for answers in clients.answers[1:]:
        for answer in answers.values():
            message = unpack(answer)
            assert message.fields.keys() == {"version", "examples", "loss", "steps", "moved"}
            assert {name.rpartition(".")[2] for name in message.tensors} == {"B"}
    joined = unpack(clients.answers[0]["ada"])
    assert joined.fields.keys() == {"examples", "base", "layers"}


@pytest.mark.parametrize("odd", ["ada", "cyd"])  # the first to come, the last
def test_a_client_of_another_base_than_most_is_left_out(
    odd: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    def other_base(name: str, number: int, answer: bytes) -> bytes:
        message = unpack(answer)
        changed = {**message.fields, "base": "another"} if (name, number) == (odd, 0) else message.fields
        return pack(dataclasses.replace(message, fields=changed))

    told = Listening()
    config = settings(tiny_base, small_data, local_steps=1)
    rounds, _ = federation(config, rows_of(small_data), tmp_path, tamper=other_base)
    rounds.progress = told
    rounds.run()
    assert sorted(rounds.state.members) == sorted({"ada", "bob", "cyd"} - {odd})
    assert "it has another base model, or other layers of it, than 2 others" in told.refusals[odd]


def test_where_no_base_has_most_clients_nobody_trains(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    def each_its_own(name: str, number: int, answer: bytes) -> bytes:
        message = unpack(answer)
        return pack(dataclasses.replace(message, fields={**message.fields, "base": f"base of {name}"}))

    rounds, _ = federation(
        settings(tiny_base, small_data), rows_of(small_data), tmp_path, tamper=each_its_own
    )
    with pytest.raises(RunError, match="none has most: ada base of ada and bob base of bob"):
        rounds.run()


def test_a_client_that_has_the_odd_base_counts_for_the_quorum(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    def other_base(name: str, number: int, answer: bytes) -> bytes:
        message = unpack(answer)
        changed = {**message.fields, "base": "another"} if name == "ada" else message.fields
        return pack(dataclasses.replace(message, fields=changed))

    config = settings(tiny_base, small_data, quorum=0.9)
    rounds, _ = federation(config, rows_of(small_data), tmp_path, tamper=other_base)
    with pytest.raises(
        RunError, match=r"only 2 of 3 clients joined, 3 are needed .*ada: it has another base"
    ):
        rounds.run()


def test_participation_is_drawn_by_seed(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    def draws(seed: int) -> list[list[str]]:
        config = settings(tiny_base, small_data, rounds=6, participation=0.3, seed=seed)
        rounds, _ = federation(config, rows_of(small_data), tmp_path / str(seed))
        members = rounds.state.members
        members |= dict.fromkeys(random.Random(seed).sample([f"c{i}" for i in range(20)], 20))  # type: ignore[arg-type]
        return [rounds.chosen(number) for number in range(1, 7)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert all(len(names) == 6 and names == sorted(names) for names in draws(1))
    assert len(set(map(tuple, draws(1)))) == 6


def test_too_few_answers_end_the_run_with_their_reasons(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, quorum=0.9)
    rounds, _ = federation(config, rows_of(small_data), tmp_path, tamper=lose_bob)
    with pytest.raises(
        RunError, match=r"only 2 of 3 clients counted in round 1, 3 are needed .*bob: no answer"
    ):
        rounds.run()
    resumed, _ = run(config, small_data, tmp_path)
    assert resumed.state.round == 1


def test_a_quorum_is_a_share_to_the_last_digit(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, small_data, quorum=0.07)  # times 100 it is 7.000000000000001
    rounds, _ = federation(config, rows_of(small_data), tmp_path)
    names = [f"c{number}" for number in range(100)]
    rounds._check_quorum(7, names, "joined")
    with pytest.raises(RunError, match="only 6 of 100 clients joined, 7 are needed"):
        rounds._check_quorum(6, names, "joined")


@pytest.mark.parametrize(
    "change",
    [{"counted": 3}, {"members": {"ada": 3}}, {"members": []}, {"shapes": {"q": [4]}}, {"base": None}],
)
def test_a_damaged_state_is_named(
    change: dict[str, Any], tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    good = {"counted": {"ada": 1}, "members": {"ada": [20, 4]}, "shapes": {"q": [4, 3]}, "base": "abc"}
    facts = {name: value for name, value in {**good, **change}.items() if value is not None}
    VersionedState(tmp_path / "rounds").write(1, {}, facts)
    rounds, _ = federation(settings(tiny_base, small_data), rows_of(small_data), tmp_path)
    with pytest.raises(RunError, match=r"round-0001.safetensors is damaged \(.*; put a copy of it back"):
        rounds.run()


def test_a_model_that_is_not_scored_in_time_is_named(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    def lose_bobs_score(name: str, number: int, answer: bytes) -> bytes | None:
        return None if name == "bob" and number == 2 else answer

    config = settings(tiny_base, small_data, local_steps=1)
    rounds, _ = federation(config, rows_of(small_data), tmp_path, tamper=lose_bobs_score)
    rounds.progress = told = Listening()
    rounds.run()
    assert list(rounds.score()) == ["ada", "cyd"]
    assert told.refusals == {"bob": "its model is not scored: no answer"}


def test_answers_after_the_deadline_are_dropped(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    run(settings(tiny_base, small_data, local_steps=1), small_data, tmp_path / "in time")
    deadline = 5 * (
        time.monotonic() - began
    )  # a machine under load needs more than a fixed number of seconds

    def slow(name: str, number: int, answer: bytes) -> bytes:
        if name == "cyd" and number > 0:
            time.sleep(deadline)
        return answer

    config = settings(tiny_base, small_data, local_steps=1, deadline=deadline)
    run(config, small_data, tmp_path / "late", tamper=slow)
    (row,) = metrics(tmp_path / "late")
    assert row["refused"] == {"cyd": f"no answer within {deadline:g} s"}
    assert sorted(row["up"]) == ["ada", "bob"]


def test_a_late_answer_is_not_mixed_into_the_next_round(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    kept: list[bytes] = []

    def late(name: str, number: int, answer: bytes) -> bytes | None:
        if name != "bob" or number not in (1, 2):
            return answer
        kept.append(answer)
        return None if number == 1 else kept[0]

    run(settings(tiny_base, small_data, rounds=2), small_data, tmp_path, tamper=late)
    assert "belongs to round 1, this is round 2" in metrics(tmp_path)[1]["refused"]["bob"]


def test_a_round_without_learning_is_an_error(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    rounds, _ = federation(
        settings(tiny_base, small_data, learning_rate=1e-60), rows_of(small_data), tmp_path
    )
    with pytest.raises(RunError, match="nothing was learnt"):
        rounds.run()


def test_a_round_of_one_step_learns_also_while_warming_up(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, scheduler="linear", warmup=0.06, rounds=3, local_steps=1)
    run(config, small_data, tmp_path)
    assert all(row["update_norm"] > 0 and not row["refused"] for row in metrics(tmp_path))


def test_an_a_that_cannot_move_in_its_first_step_still_counts(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """While B is zero A has no gradient; the client's own B moves, so something was learnt."""
    config = settings(tiny_base, small_data, strategy="fedsa", rounds=2, local_steps=1)
    run(config, small_data, tmp_path)
    first, second = metrics(tmp_path)
    assert first["update_norm"] == 0 < second["update_norm"]
    assert first["refused"] == second["refused"] == {}


@pytest.mark.parametrize("more", [{}, {"ranks": "6,3,2"}, {"strategy": "flora", "ranks": "4,3,2"}])
def test_the_personal_model_is_a_plain_lora(
    more: dict[str, Any], tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    rounds, clients = run(settings(tiny_base, small_data, **more), small_data, tmp_path)
    rounds.score()  # leaves cyd's personal model on the bench
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        ours = clients.bench.model.eval()(input_ids=ids).logits
        plain = PeftModel.from_pretrained(
            load_base(str(tiny_base), device="cpu"), str(tmp_path / "clients" / "cyd" / "adapter")
        )
        assert plain.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
        with plain.disable_adapter():
            assert (plain(input_ids=ids).logits - ours).abs().max() > 1e-2


def test_the_clients_of_one_base_do_not_see_each_other(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """Where nothing travels, a client's adapter is what it would be without the others."""
    config = settings(tiny_base, small_data, strategy="local", rounds=2)
    run(config, small_data, tmp_path / "together")
    rounds, _ = federation(config, {"bob": rows_of(small_data)["bob"]}, tmp_path / "alone")
    rounds.run()
    own = "clients/bob/round-0002.safetensors"
    assert (tmp_path / "together" / own).read_bytes() == (tmp_path / "alone" / own).read_bytes()


def test_a_client_with_other_settings_is_told(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, small_data)
    said: list[str] = []
    client = Client(
        "bob",
        rows_of(small_data)["bob"],
        home=tmp_path,
        bench=Workbench(settings(tiny_base, small_data, r=2)),
        say=said.append,
    )
    order = Message(kind="join", client="bob", round=0, fields={"settings": config.for_clients()})
    answer = unpack(client.handle(pack(order)))
    assert answer.kind == "failed"
    assert answer.fields == {"code": "settings"}
    (line,) = said
    assert "the server's 'r' is 4, this client's 2" in line
    for wrong in (b"", b"x" * 100, pack(Message(kind="join", client="ada", round=0))):
        assert unpack(client.handle(wrong)).kind == "failed"


def test_settings_of_the_server_reach_a_client_but_not_its_paths(tiny_base: Path, small_data: Path) -> None:
    server = settings(tiny_base, small_data, r=16, strategy="fedit", rounds=7)
    own = FederateConfig(model="/mine", data="/my-rows", device="cpu")
    accepted = own.accept_settings(server.for_clients())
    assert (accepted.r, accepted.strategy, accepted.rounds) == (16, "fedit", 7)
    assert (accepted.model, accepted.data) == ("/mine", "/my-rows")
    with pytest.raises(ConfigError, match="the server sets 'data'"):
        own.accept_settings({"data": "/etc"})
    with pytest.raises(ConfigError, match="rounds is -1"):
        own.accept_settings({"rounds": -1})


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"strategy": "fedit", "ranks": "4,2"}, "needs one rank for all"),
        ({"strategy": "fedsa", "a_state": "reset"}, "keep no A of their own"),
        ({"strategy": "ffa", "a_init": "per_client"}, "keep no A of their own"),
        ({"strategy": "local", "personal": "trained"}, "sends nothing back"),
        ({"strategy": "flora", "personal": "trained"}, "start each round anew"),
        ({"ranks": "4,x"}, "no list of whole numbers"),
        ({"ranks": "4,0"}, "1 or more"),
        ({"participation": 1.5}, "at most 1"),
        ({"strategy": "centralized", "clients": 3}, "all rows in one place"),
        ({"rounds": 0}, "above 0"),
        ({"learning_rate": 1e37}, "at most 1"),
    ],
)
def test_what_contradicts_itself_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FederateConfig(**more)


def test_six_frames_lead_from_the_rounds_to_the_optimizer_step(
    tiny_base: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a newcomer reads a round from top to bottom."""
    found: list[list[str]] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *more: Any, **named: Any) -> Any:
        frames = [frame for frame in traceback.extract_stack() if "/manylora/" in frame.filename]
        found.append([frame.name for frame in frames])
        return step(self, *more, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = settings(tiny_base, small_data, local_steps=1)
    bench = bench_for(config)
    clients = LocalClients(rows_of(small_data), home=tmp_path / "clients", bench=bench)
    Rounds(config, clients, tmp_path).run()
    assert found[0] == ["run", "_round", "ask", "handle", "_train", "train_pass"]
