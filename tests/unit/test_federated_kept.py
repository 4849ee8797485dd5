"""States on disk that read well and are not what the run goes on from: rewritten, of another layout or another base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import Listening, Watched, federation, rows_of, settings
from manylora.errors import RunError
from manylora.federated import FederateConfig, Rounds
from manylora.federated.faults import ClientError, Fault
from manylora.federated.home import DamagedStateError, VersionedState
from manylora.federated.kept import check_stack

State = dict[str, torch.Tensor]
Change = Callable[[State, dict[str, Any]], object]

PERSIST = {"wire": "int8", "optimizer": "persist", "personal": "trained", "quorum": 0.3}


@pytest.fixture(scope="module")
def done(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, whose clients keep all that a client can."""
    folder = tmp_path_factory.mktemp("done")
    rounds, _ = federation(config_of(tiny_base, small_data, rounds=2), rows_of(small_data), folder)
    rounds.run()
    return folder


def config_of(base: Path, data: Path, *, rounds: int = 3) -> FederateConfig:
    return settings(base, data, rounds=rounds, local_steps=1, **PERSIST)


@pytest.fixture
def again(
    done: Path, tiny_base: Path, small_data: Path, tmp_path: Path
) -> tuple[Path, Callable[[], tuple[Rounds, Watched]]]:
    """A copy of that run, and how to take it up."""
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    return folder, lambda: federation(config_of(tiny_base, small_data), rows_of(small_data), folder)


def rewrite(folder: Path, change: Change, number: int = 2) -> None:
    """Write a state anew, with a checksum of its own."""
    store = VersionedState(folder)
    state, facts = store.read(number)
    change(state, facts)
    store.write(number, state, facts)


def drop(mark: str) -> Change:
    def change(state: State, facts: dict[str, Any]) -> None:
        for name in [name for name in state if mark in name]:
            del state[name]

    return change


def put(mark: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(state: State, facts: dict[str, Any]) -> None:
        name = min(name for name in state if mark in name and (mark != ".A" or "/" not in name))
        state[name] = value(state[name])

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("q_proj.A"), "it lacks"),
        (drop("residual/"), "it lacks"),
        (drop("moments/"), "it lacks"),
        (drop("exp_avg_sq"), "it lacks"),
        (drop("trained/"), "it lacks"),
        (drop(""), "it lacks"),
        (lambda state, facts: state.update({"layers.77.q_proj.A": torch.ones(4, 4)}), "1 matrices too many"),
        (lambda state, facts: state.update({"moments/odd.A/step": torch.ones(1)}), "1 matrices too many"),
        (put(".A", lambda value: value.to(torch.int32)), "torch.int32"),
        (put(".A", lambda value: value[:2].clone()), "not torch.float32"),
        (put("residual/", lambda value: value[:1].clone()), "not torch.float32"),
        (lambda state, facts: facts.update(rank="4"), "its rank is '4'"),
    ],
)
def test_a_private_state_of_another_layout_is_damaged(
    again: tuple[Path, Callable[[], tuple[Rounds, Watched]]], change: Change, words: str
) -> None:
    folder, resume = again
    rewrite(folder / "clients" / "ada", change)
    rounds, clients = resume()
    with pytest.raises(DamagedStateError, match=rf"ada/round-0002.safetensors is damaged \(.*{words}"):
        clients.check_states(rounds.load().counted)


def test_a_private_state_without_a_matrix_costs_its_client_the_round(
    again: tuple[Path, Callable[[], tuple[Rounds, Watched]]],
) -> None:
    folder, resume = again
    rewrite(folder / "clients" / "ada", drop("q_proj.A"))
    rewrite(folder / "clients" / "bob", put(".A", lambda value: value * float("nan")))
    rounds, _ = resume()
    rounds.progress = heard = Listening()
    rounds.run()
    assert heard.refusals["ada"] == Fault.STATE_DAMAGED.words
    assert heard.refusals["bob"] == Fault.NOT_FINITE.words
    assert rounds.state.counted == {"ada": 2, "bob": 2, "cyd": 3}
    heard.refusals.clear()
    rounds.score()
    assert Fault.NOT_FINITE.words in heard.refusals["bob"]


def test_a_private_state_that_is_not_finite_says_so(
    again: tuple[Path, Callable[[], tuple[Rounds, Watched]]],
) -> None:
    folder, resume = again
    rewrite(folder / "clients" / "ada", put("residual/", lambda value: value / 0))
    rounds, clients = resume()
    with pytest.raises(ClientError, match="holds NaN or infinity, first in residual/") as found:
        clients.check_states(rounds.load().counted)
    assert found.value.fault is Fault.NOT_FINITE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state, facts: facts.update(members={"ada": [1, "x", None]}), "members.ada.1"),
        (lambda state, facts: facts.update(members={"ada": [None, 4]}), "no rows or no rank"),
        (lambda state, facts: facts.update(members={"ada": 1}), "members.ada"),
        (lambda state, facts: facts["members"].update(ada=[20, 5]), "rank 5, which is none of the run's"),
        (lambda state, facts: facts.update(counted={"ada": "x"}), "counted.ada"),
        (lambda state, facts: facts["counted"].update(ada=7), "'ada' is said to have counted in round 7"),
        (lambda state, facts: facts["counted"].update(eve=1), "'eve' is said to have counted in round 1"),
        (lambda state, facts: facts.update(shapes={"q": [10**12, 10**12]}), "shapes.q.0"),
        (lambda state, facts: facts.update(shapes={"q": [10**6, 10**6]}), "it lacks 1 of 1 matrices"),
        (lambda state, facts: facts.update(base=5), "base: "),
        (drop("q_proj.B"), "it lacks"),
        (drop("residual/"), "it lacks"),
        (put(".B", lambda value: value.double()), "torch.float64"),
        (put(".B", lambda value: value * float("nan")), "is not finite"),
    ],
)
def test_a_round_of_the_server_that_cannot_be_is_damaged_and_nothing_is_removed(
    again: tuple[Path, Callable[[], tuple[Rounds, Watched]]], change: Change, words: str
) -> None:
    folder, resume = again
    rewrite(folder / "rounds", change, number=1)
    with pytest.raises(DamagedStateError, match=rf"is damaged \(.*{words}.* --from-round 0\."):
        resume()[0].load(from_round=1)
    assert VersionedState(folder / "rounds").versions() == [0, 1, 2]


def test_a_stack_without_a_layer_is_damaged() -> None:
    shapes = {"q": (4, 3)}
    whole = {"q.A": torch.ones(2, 3), "q.B": torch.ones(4, 2)}
    check_stack(whole, shapes, source="s")
    for more in ({"q.B": torch.ones(4, 3)}, {"q.A": torch.ones(2, 3).int()}, {"k.A": torch.ones(2, 3)},
                 {"q.A": torch.full((2, 3), float("nan"))}):  # fmt: skip
        with pytest.raises(DamagedStateError, match="s is damaged"):
            check_stack({**whole, **more}, shapes, source="s")
    with pytest.raises(DamagedStateError, match="s is damaged"):
        check_stack({"q.A": whole["q.A"]}, shapes, source="s")


@pytest.mark.parametrize("number", [0, 2])
def test_a_base_that_was_swapped_is_refused_by_every_client(
    number: int, again: tuple[Path, Callable[[], tuple[Rounds, Watched]]]
) -> None:
    """Also by one that begins anew, of which no private state says on which base it was."""
    _, resume = again
    rounds, clients = resume()
    rounds.load(from_round=number, reset=["ada"] if number else [])
    mark = clients.bench.fingerprint
    head, _, tail = mark.partition("/")
    clients.bench.fingerprint = f"{head[:-1]}{'0' if head[-1] != '0' else '1'}/{tail}"
    try:
        with pytest.raises(
            RunError, match=r"only 0 of 3 clients counted.*not the one that the run was begun"
        ):
            rounds.run()
    finally:
        clients.bench.fingerprint = mark


def test_a_file_whose_number_is_no_number_is_no_round(tmp_path: Path) -> None:
    store = VersionedState(tmp_path)
    store.write(1, {}, {})
    for name in ("²", "٣", "", "-1"):
        shutil.copy(store.file(1), tmp_path / f"round-{name}.safetensors")
    assert store.versions() == [1]
