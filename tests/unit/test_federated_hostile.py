"""One client of three sends what it likes: it costs its own part of a round, never the run, nor the others' weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import Watched, bench_for, federation, final_state, rows_of, settings
from manylora.errors import RunError
from manylora.federated import FederateConfig, Message, Rounds, RoundsDisplay, pack, unpack
from manylora.federated.check import Member, agreed_counts, check_result, out_of_proportion, update_limits
from manylora.federated.strategies import FED_ALORA, Averaged

Tamper = Callable[[str, int, bytes], "bytes | None"]


class Console(RoundsDisplay):
    """What an operator would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shares: list[Mapping[str, float]] = []

    def refused(self, client: str, reason: str) -> None:
        self.lines.append(f"{client}: {reason}")

    def noted(self, line: str) -> None:
        self.lines.append(line)

    def shared(self, number: int, shares: Mapping[str, float]) -> None:
        self.shares.append(shares)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def bob(change: Callable[[Message], Message], *numbers: int) -> Tamper:
    """Bob's answers (0: to join, then the rounds, then the scores) changed."""

    def tamper(name: str, number: int, answer: bytes) -> bytes:
        return pack(change(unpack(answer))) if name == "bob" and number in numbers else answer

    return tamper


def with_fields(**values: Any) -> Callable[[Message], Message]:
    return lambda message: dataclasses.replace(message, fields={**message.fields, **values})


def run(config: FederateConfig, data: Path, folder: Path, tamper: Tamper | None) -> tuple[Rounds, Console]:
    rounds, _ = federation(config, rows_of(data), folder, tamper=tamper)
    rounds.progress = console = Console()
    rounds.run()
    return rounds, console


# ---- fields


ESCAPE = "\x1b[2J\x1b]0;owned\x07\r\nround 9/9  loss 0.000\u202e"


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": 10**400},
        {"moved": 10**400},
        {"loss": 1e308},
        {"steps": "many"},
        {"steps": -1},
        {"version": True},
        {"loss": ESCAPE},
        {"note": ESCAPE * 10},
        {"loss": [[0.0] * 10] * 10},
    ],
    ids=lambda fields: f"{next(iter(fields))}-{str(next(iter(fields.values())))[:8]!r}",
)
def test_a_field_that_cannot_be_costs_the_answer_and_nothing_else(
    fields: dict[str, Any], tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, local_steps=1)
    _, console = run(config, small_data, tmp_path, bob(with_fields(**fields), 1))
    (row,) = metrics(tmp_path)
    assert sorted(row["losses"]) == ["ada", "cyd"]
    assert next(iter(fields)) in row["refused"]["bob"]
    assert all(line.isprintable() and len(line) < 300 for line in (*console.lines, row["refused"]["bob"]))
    again, _ = federation(config, rows_of(small_data), tmp_path)  # and the run can be taken up again
    assert again.run().round == 1


BAD_SCORE = {
    "task": "swap", "metric": "rouge1", "score": 1e308, "standard_error": None, "n": 2,
    "metrics": {"rouge1": {"mean": 1e308, "standard_error": 1.0, "n": 2}},
}  # fmt: skip


def test_malformed_scores_leave_a_client_unscored_and_the_others_scored(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, local_steps=1)
    rounds, console = run(config, small_data, tmp_path, bob(with_fields(scores=[BAD_SCORE]), 2))
    assert sorted(rounds.score()) == ["ada", "cyd"]
    assert any("bob: it could not score its model: its mean is 1e+308" in line for line in console.lines)


# ---- example counts and sizes of changes


def test_a_number_of_rows_that_the_engine_knows_cannot_be_lied_about(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, local_steps=1)
    rounds, console = run(config, small_data, tmp_path, bob(with_fields(examples=10**6), 0))
    assert sorted(rounds.state.members) == ["ada", "cyd"]
    assert console.lines == ["bob: it claims 1000000 examples, but has 12"]


class Remote(Watched):
    """Clients whose rows nobody else can count, as on machines of their own."""

    def examples(self, name: str) -> int | None:
        return None


def test_a_lie_about_the_number_of_rows_buys_little(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """Bob claims a million rows of his twelve, to weigh 99.99 % and to move as far as a million rows could."""

    def lie(name: str, number: int, answer: bytes) -> bytes:
        message = unpack(answer)
        if name != "bob" or number > 1:
            return answer
        tensors = {n: value * 40 for n, value in message.tensors.items()}
        return pack(
            dataclasses.replace(message, fields={**message.fields, "examples": 10**6}, tensors=tensors)
        )

    config = settings(tiny_base, small_data, local_epochs=1.0, rounds=2)
    clients = Remote(rows_of(small_data), home=tmp_path / "clients", bench=bench_for(config), tamper=lie)
    rounds = Rounds(config, clients, tmp_path, progress=(console := Console()))
    rounds.run()
    # of ada's 20 and cyd's 8, the median is 14
    assert rounds.state.members["bob"] == Member(name="bob", examples=10**6, rank=4, agreed=140)
    assert any("bob claims 1,000,000 examples; they count as 140" in line for line in console.lines)
    first, second = metrics(tmp_path)
    assert "bob" in first["refused"]
    assert sorted(first["losses"]) == ["ada", "cyd"]
    assert all(math.isfinite(loss) for loss in second["losses"].values())
    honest = update_limits(FED_ALORA, config, member=Member(name="x", examples=140, rank=4), round=1)
    assert update_limits(FED_ALORA, config, member=rounds.state.members["bob"], round=1) == honest


def test_a_claim_is_measured_against_the_others() -> None:
    claims = {"a": 100, "b": 300, "c": 200, "liar": 10**7}
    assert agreed_counts(claims) == {"a": 100, "b": 300, "c": 200, "liar": 2000}
    assert agreed_counts(claims, vouched=["liar"]) == claims
    assert agreed_counts({"a": 1, "b": 10**6}) == {"a": 1, "b": 10**6}  # nobody can say which is the odd one
    assert agreed_counts({"a": 5, "b": 50, "c": 1}) == {"a": 5, "b": 30, "c": 1}


def test_the_operator_can_vouch_for_a_number_of_rows(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = settings(tiny_base, small_data, local_steps=1, max_examples=10**6)
    tamper = bob(with_fields(examples=10**6), 0, 1)
    clients = Remote(rows_of(small_data), home=tmp_path / "clients", bench=bench_for(config), tamper=tamper)
    rounds = Rounds(config, clients, tmp_path)
    rounds.run()
    assert rounds.state.members["bob"].weight == 10**6
    assert metrics(tmp_path)[0]["shares"]["bob"] > 0.99


def test_a_change_is_measured_against_the_others() -> None:
    norms = {"a": 1.0, "b": 1.2, "c": 0.8, "hostile": 11.0}
    (found,) = out_of_proportion(norms, most=10).items()
    assert found[0] == "hostile"
    assert "11 times the median of the others'" in found[1]
    assert out_of_proportion({**norms, "hostile": 9.9}, most=10) == {}
    assert out_of_proportion({"a": 1.0, "b": 1e6}, most=10) == {}
    assert out_of_proportion({"a": 0.0, "b": 0.0, "c": 1.0}, most=10) == {}


def test_a_change_out_of_proportion_does_not_count(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    def grown(message: Message) -> Message:
        return dataclasses.replace(message, tensors={n: 20 * value for n, value in message.tensors.items()})

    # as far as one client's own limit is concerned, it may
    config = settings(tiny_base, small_data, max_update=1e6)
    run(config, small_data, tmp_path / "grown", bob(grown, 1))
    run(
        config,
        small_data,
        tmp_path / "lost",
        lambda name, number, answer: None if (name, number) == ("bob", 1) else answer,
    )
    (row,) = metrics(tmp_path / "grown")
    assert "times the median of the others'" in row["refused"]["bob"]
    assert row["up"].keys() == row["losses"].keys() == row["norms"].keys() == {"ada", "cyd"}
    assert final_state(tmp_path / "grown") == final_state(tmp_path / "lost")


def test_a_result_that_cannot_be_is_refused() -> None:
    new = {"q.B": torch.ones(2, 2)}
    check_result(new, change=2.0, norms=[1.0, 2.0], most=10)
    for value in (math.inf, math.nan):
        with pytest.raises(RunError, match=r"its q\.B is not finite"):
            check_result({"q.B": torch.tensor([[value]])}, change=1.0, norms=[1.0], most=None)
    with pytest.raises(RunError, match="above 10 times what the clients sent"):
        check_result(new, change=100.0, norms=[1.0, 2.0, 3.0], most=10)
    check_result(new, change=100.0, norms=[1.0], most=None)


def test_a_round_whose_result_cannot_be_is_not_saved_and_says_whose_it_is(
    tiny_base: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_base, small_data, rounds=2, local_steps=1)
    rounds, _ = federation(config, rows_of(small_data), tmp_path)
    from manylora.federated import aggregate

    def overflowing(received: Any, answers: Any, scaling: float) -> dict[str, torch.Tensor]:
        new = aggregate.mean(received, answers, scaling)
        return {name: value / 0 if rounds.state.round else value for name, value in new.items()}

    monkeypatch.setattr(Averaged, "aggregate", lambda _, *given: overflowing(*given))
    with pytest.raises(RunError, match=r"round 2 is not saved: .* largest shares of its change are .* %"):
        rounds.run()
    assert [path.name for path in sorted((tmp_path / "rounds").iterdir())] == [
        "round-0000.safetensors",
        "round-0001.safetensors",
    ]
    monkeypatch.undo()
    again, _ = federation(config, rows_of(small_data), tmp_path)
    assert again.run().round == 2


def test_each_clients_share_of_a_round_is_told(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    _, console = run(settings(tiny_base, small_data, local_steps=1), small_data, tmp_path, None)
    (row,) = metrics(tmp_path)
    (shares,) = console.shares
    assert row["shares"] == shares
    assert sum(shares.values()) == pytest.approx(1)
    parts = {name: row["norms"][name] * count for name, count in {"ada": 20, "bob": 12, "cyd": 8}.items()}
    assert shares == pytest.approx({name: part / sum(parts.values()) for name, part in parts.items()})


def test_an_answer_that_is_too_large_costs_its_client_the_round(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    def fat(message: Message) -> Message:
        return dataclasses.replace(message, tensors={**message.tensors, "x.B": torch.ones(1024, 1024)})

    run(settings(tiny_base, small_data, local_steps=1), small_data, tmp_path, bob(fat, 1))
    (row,) = metrics(tmp_path)
    assert "were asked for" in row["refused"]["bob"]
    assert sorted(row["losses"]) == ["ada", "cyd"]
