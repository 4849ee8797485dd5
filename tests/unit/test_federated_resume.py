"""What lies on disk between rounds: checked when it is read, kept for some rounds, and never missing unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from federation import federation, final_state, rows_of, settings
from manylora.errors import RunError
from manylora.federated import Rounds
from manylora.federated.home import DamagedStateError, MissingStateError, VersionedState
from manylora.federated.server_state import load_state


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def flip(path: Path) -> None:
    """One bit of the last number."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def lose_bob_in(*numbers: int) -> Callable[[str, int, bytes], bytes | None]:
    return lambda name, number, answer: None if name == "bob" and number in numbers else answer


def end(folder: Path) -> list[bytes]:
    """What is shared after the last round, FLoRA's stacks too."""
    return [final_state(folder), *(path.read_bytes() for path in sorted((folder / "stacks").glob("*")))]


def numbers(folder: Path) -> list[int]:
    return VersionedState(folder).versions()


@pytest.mark.parametrize(
    "more",
    [
        {"participation": 0.6, "wire": "int8"},
        {"ranks": "6,3,2", "optimizer": "persist", "keep_rounds": 2},
        {"strategy": "flora", "ranks": "4,3,2", "participation": 0.6},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_run_can_go_back_to_each_round_that_is_kept_and_ends_as_it_did(
    more: dict[str, Any], tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, rounds=5, local_steps=1, **more)
    rounds, _ = federation(config, rows_of(small_data), tmp_path)
    rounds.run()
    kept = range(6 - config.keep_rounds, 6)
    assert numbers(tmp_path / "rounds") == list(kept)
    assert all(
        len(numbers(tmp_path / "clients" / name)) <= config.keep_rounds + 1 for name in ("ada", "bob", "cyd")
    )
    ended, told = final_state(tmp_path), metrics(tmp_path)
    rounds.score()
    adapters = {path: path.read_bytes() for path in tmp_path.glob("clients/*/adapter/*.safetensors")}
    for number in kept:
        folder = tmp_path.with_name(f"{tmp_path.name}-{number}")
        shutil.copytree(tmp_path, folder)
        again, _ = federation(config, rows_of(small_data), folder)
        assert again.load(from_round=number).round == number
        assert numbers(folder / "rounds")[-1] == number  # what came after it is gone
        again.run()
        assert final_state(folder) == ended
        assert metrics(folder) == told
        again.score()
        for path, data in adapters.items():
            assert (folder / path.relative_to(tmp_path)).read_bytes() == data


@pytest.mark.parametrize("strategy", ["fed-alora", "flora"])
def test_what_came_after_the_round_gone_back_to_leaves_no_trace(
    strategy: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """Bob counts in the second round at first, and not once the run has gone back; FLoRA's stacks are others then."""
    config = settings(tiny_base, small_data, rounds=4, local_steps=1, strategy=strategy, keep_rounds=4)
    lost, _ = federation(config, rows_of(small_data), tmp_path / "lost", tamper=lose_bob_in(2))
    lost.run()
    first, _ = federation(config, rows_of(small_data), tmp_path / "back")
    first.run()
    assert end(tmp_path / "back") != end(tmp_path / "lost")
    back, _ = federation(
        config,
        rows_of(small_data),
        tmp_path / "back",
        tamper=lose_bob_in(0),  # the first asking
    )
    back.load(from_round=1)
    back.run()
    assert end(tmp_path / "back") == end(tmp_path / "lost")
    back.score()
    lost.score()
    for name in ("ada", "bob", "cyd"):
        adapter = f"clients/{name}/adapter/adapter_model.safetensors"
        assert (tmp_path / "back" / adapter).read_bytes() == (tmp_path / "lost" / adapter).read_bytes()


def begun(base: Path, data: Path, folder: Path, **more: Any) -> Callable[[], Rounds]:
    """A run of which three rounds are done, and how to take it up for a fourth."""
    config = settings(base, data, rounds=3, local_steps=1, **more)
    rounds, _ = federation(config, rows_of(data), folder)
    rounds.run()
    longer = settings(base, data, rounds=4, local_steps=1, **more)
    return lambda: federation(longer, rows_of(data), folder)[0]


def test_a_flipped_bit_in_a_round_is_named_with_the_round_to_go_back_to(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path)
    flip(tmp_path / "rounds" / "round-0003.safetensors")
    with pytest.raises(DamagedStateError, match=r"round-0003.safetensors is damaged .* --from-round 2"):
        resume().run()
    again = resume()
    again.load(from_round=2)
    assert again.run().round == 4


def test_a_flipped_bit_in_a_private_state_costs_its_client_the_round_and_is_named(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path)
    flip(tmp_path / "clients" / "bob" / "round-0003.safetensors")
    again = resume()
    with pytest.raises(DamagedStateError, match=r"bob/round-0003.safetensors is damaged"):
        again.clients.check_states(again.load().counted)  # type: ignore[attr-defined]
    again.run()
    row = metrics(tmp_path)[3]
    assert "its private state is damaged" in row["refused"]["bob"]
    assert "--reset-client" in row["refused"]["bob"]
    assert sorted(row["losses"]) == ["ada", "cyd"]


@pytest.mark.parametrize("strategy", ["fed-alora", "flora"])
def test_a_client_whose_private_state_is_lost_can_begin_anew(
    strategy: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path, strategy=strategy)
    shutil.rmtree(tmp_path / "clients" / "bob")
    again = resume()
    if strategy == "fed-alora":
        with pytest.raises(MissingStateError, match="bob has no state of round 3"):
            again.clients.check_states(again.load().counted)  # type: ignore[attr-defined]
    again = resume()
    again.load(reset=["bob"])
    again.run()
    assert sorted(metrics(tmp_path)[3]["losses"]) == ["ada", "bob", "cyd"]
    assert again.state.counted["bob"] == 4
    with pytest.raises(RunError, match="there is no client 'eve' to reset; the run has ada, bob, cyd"):
        resume().load(reset=["eve"])


def test_a_damaged_stack_at_a_client_is_named_and_comes_again(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path, strategy="flora")
    flip(tmp_path / "clients" / ".stacks" / "round-0001.safetensors")
    with pytest.raises(
        RunError, match=r"only 0 of 3 clients counted in round 4.*its private state is damaged"
    ):
        resume().run()
    again = resume()
    again.load(reset=["ada"])  # who gets all stacks again; here all have one disk
    assert again.run().round == 4
    assert sorted(metrics(tmp_path)[3]["losses"]) == ["ada", "bob", "cyd"]


def test_a_round_that_is_not_kept_any_more_is_named(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path, keep_rounds=2)
    for number in (0, 1, 4):
        with pytest.raises(RunError, match=rf"does not have round {number}, only 2, 3 \(--keep-rounds\)"):
            resume().load(from_round=number)
    assert numbers(tmp_path / "rounds") == [2, 3]


def test_rounds_that_are_gone_are_not_begun_anew_in_silence(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path)
    shutil.rmtree(tmp_path / "rounds")
    with pytest.raises(RunError, match="rounds has no round, though the run was begun"):
        resume().run()


def test_a_newest_round_that_is_gone_is_repeated_to_the_same_bytes(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path)
    newest = tmp_path / "rounds" / "round-0003.safetensors"
    whole = newest.read_bytes()
    newest.unlink()
    resume().run()
    assert newest.read_bytes() == whole


def test_clients_that_are_not_finite_together_point_to_the_round_before(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    resume = begun(tiny_base, small_data, tmp_path)
    again = resume()
    with torch.no_grad():
        weight = again.clients.bench.model.get_input_embeddings().weight  # type: ignore[attr-defined]
        first = weight.clone()
        weight.fill_(float("nan"))
    try:
        with pytest.raises(RunError, match=r"training is not finite.* What round 3 left .* --from-round 2\."):
            again.run()
    finally:
        with torch.no_grad():
            weight.copy_(first)
    assert numbers(tmp_path / "rounds")[-1] == 3


def test_a_round_of_an_earlier_version_still_opens(tmp_path: Path) -> None:
    """Its notes have no checksum, and its members no rows that count for less."""
    facts = {"counted": {"ada": 1}, "members": {"ada": [20, 4]}, "shapes": {"q": [4, 3]}, "base": "abc"}
    save_file(
        {"q.B": torch.ones(4, 4)}, tmp_path / "round-0001.safetensors", metadata={"facts": json.dumps(facts)}
    )
    state = load_state(VersionedState(tmp_path))
    assert (state.members["ada"].weight, state.counted, state.round) == (20, {"ada": 1}, 1)
    assert torch.equal(state.shared["q.B"], torch.ones(4, 4))


def test_a_state_that_stands_under_another_round_is_damaged(tmp_path: Path) -> None:
    store = VersionedState(tmp_path)
    store.write(1, {"q.A": torch.ones(2, 3)}, {})
    store.file(1).rename(store.file(2))
    with pytest.raises(DamagedStateError, match=r"round-0002.safetensors is damaged"):
        store.read(2)
