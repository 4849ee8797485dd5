"""Only an answer that is what was asked for counts; every other is refused with a reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import federation, rows_of, settings
from manylora.errors import AnswerError, ManyLoraError
from manylora.federated.check import (
    Checked,
    Member,
    check_answer,
    check_joined,
    expected_shapes,
    update_limits,
)
from manylora.federated.config import FederateConfig
from manylora.federated.strategies import FED_ALORA, FLORA
from manylora.federated.wire import Message, pack, unpack

LAYER = "model.layers.0.mlp.down_proj"
Change = Callable[[Message], Message]


@pytest.fixture(scope="module")
def genuine(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Bob's answers of two rounds, and how the second is checked."""
    config = settings(tiny_base, small_data, rounds=2)
    rounds, clients = federation(config, rows_of(small_data), tmp_path_factory.mktemp("genuine"))
    rounds.run()
    member = Member(name="bob", examples=12, rank=4)
    assert rounds.state.members["bob"] == member
    how = {
        "member": member, "round": 2, "version": 1, "strategy": FED_ALORA,
        "limits": update_limits(FED_ALORA, config, member=member, round=2),
        "expected": expected_shapes(FED_ALORA, rounds.state.shapes, rank=4, intermediate=4),
    }  # fmt: skip
    return {"first": clients.answers[1]["bob"], "second": clients.answers[2]["bob"], "how": how}


def checked(genuine: dict[str, Any], data: bytes, **other: Any) -> Checked:
    return check_answer(unpack(data), **{**genuine["how"], **other})


def test_the_genuine_answer_counts(genuine: dict[str, Any]) -> None:
    answer = checked(genuine, genuine["second"])
    assert answer.update.keys() == genuine["how"]["expected"].keys()
    assert answer.norm == pytest.approx(math.sqrt(sum(float((v**2).sum()) for v in answer.update.values())))
    assert 0 < answer.loss < 20


def with_matrix(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda m: dataclasses.replace(m, tensors={**m.tensors, name: change(m.tensors[name])})


def with_field(name: str, value: Any) -> Change:
    return lambda m: dataclasses.replace(m, fields={**m.fields, name: value})


def without(name: str) -> Change:
    return lambda m: dataclasses.replace(m, tensors={k: v for k, v in m.tensors.items() if k != name})


def also(name: str) -> Change:
    return lambda m: dataclasses.replace(m, tensors={**m.tensors, name: torch.zeros(4, 4)})


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda m: dataclasses.replace(m, tensors={k: change(v) for k, v in m.tensors.items()})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_matrix(f"{LAYER}.B", lambda v: v[:, :3]), r"down_proj.B is \(32, 3\), expected \(32, 4\)"),
        (with_matrix(f"{LAYER}.B", lambda v: v[:5]), "expected"),
        (with_matrix(f"{LAYER}.B", lambda v: v.t().contiguous()), "expected"),
        (without(f"{LAYER}.B"), "lacks 1 of 4 matrices, such as model.layers.0.mlp.down_proj.B"),
        (also("lm_head.B"), "1 matrices too many, such as lm_head.B"),
        (also(f"{LAYER}.A"), "too many"),
        (with_field("examples", -12), "claims -12 examples, but joined with 12"),
        (with_field("examples", 10**12), "joined with 12"),
        (with_field("examples", 12.0), "joined with 12"),
        (with_field("examples", None), "joined with 12"),
        (with_field("loss", -1), "loss"),
        (with_field("loss", "0.5"), "loss"),
        (with_field("loss", True), "loss"),
        (with_field("moved", None), "moved"),
        (with_field("version", 0), "late answer or a replay"),
        (every(torch.zeros_like), "nothing was learnt"),
        (every(lambda v: v * 10), r"has changed by .* above the limit .*; see --max-update"),
        (with_matrix(f"{LAYER}.B", lambda v: v * 10), "above the limit"),
        (lambda m: dataclasses.replace(m, client="ada"), "'trained' of 'ada'"),
        (lambda m: dataclasses.replace(m, kind="scored"), "'scored' of 'bob'"),
        (lambda m: dataclasses.replace(m, round=3), "belongs to round 3, this is round 2"),
        (lambda m: dataclasses.replace(m, kind="failed", fields={"code": "disk"}), "its disk is full"),
    ],
)
def test_a_bad_answer_is_refused(genuine: dict[str, Any], change: Change, reason: str) -> None:
    with pytest.raises(AnswerError, match=reason):
        checked(genuine, pack(change(unpack(genuine["second"]))))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_enough(genuine: dict[str, Any], value: float) -> None:
    message = unpack(genuine["second"])
    message.tensors[f"{LAYER}.B"][7, 2] = value
    with pytest.raises(AnswerError, match="NaN or infinity"):
        check_answer(message, **genuine["how"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(genuine: dict[str, Any], value: float) -> None:
    with pytest.raises(AnswerError, match="loss"):
        check_answer(with_field("loss", value)(unpack(genuine["second"])), **genuine["how"])


def test_the_answer_of_an_old_round_is_a_replay(genuine: dict[str, Any]) -> None:
    with pytest.raises(AnswerError, match="belongs to round 1, this is round 2: a late answer or a replay"):
        checked(genuine, genuine["first"])


def test_a_truncated_answer_is_refused(genuine: dict[str, Any]) -> None:
    for size in (0, 10, len(genuine["second"]) // 2, len(genuine["second"]) - 1):
        with pytest.raises(ManyLoraError):
            checked(genuine, genuine["second"][:size])


def test_an_a_that_starts_anew_each_round_has_a_limit_too() -> None:
    """FLoRA's A comes with its beginning, and B with its change; neither may be what no training gives."""
    config = FederateConfig(strategy="flora", learning_rate=0.01, local_steps=10, r=2).resolved()
    member = Member(name="ada", examples=8, rank=2)
    fields = {"version": 0, "examples": 8, "loss": 1.0, "steps": 10, "moved": 1.0}

    def check(a: float, b: float) -> Checked:
        tensors = {"q.A": torch.full((2, 4), a), "q.B": torch.full((6, 2), b)}
        message = Message(kind="trained", client="ada", round=1, fields=fields, tensors=tensors)
        return check_answer(
            message, member=member, round=1, version=0, strategy=FLORA,
            expected=expected_shapes(FLORA, {"q": (6, 4)}, rank=2, intermediate=2),
            limits=update_limits(FLORA, config, member=member, round=1),
        )  # fmt: skip

    assert check(0.5, 0.1).norm == pytest.approx(0.1 * math.sqrt(12))
    for a, b, name in ((1.0, 0.1, "A"), (0.5, 0.5, "B")):  # 4 × 0.1, and for A 1 / √4 more
        with pytest.raises(AnswerError, match=rf"its q\.{name} has changed by .* above the limit"):
            check(a, b)


GOOD = {"examples": 5, "base": "abc", "layers": {"q": [4, 3]}}


@pytest.mark.parametrize(
    "change",
    [
        {"examples": 0},
        {"examples": -1},
        {"examples": 10**9},
        {"examples": 1.5},
        {"examples": True},
        {"base": None},
        {"layers": {}},
        {"layers": {"q": [4]}},
        {"layers": {"q": [4, -3]}},
        {"layers": [["q", 4, 3]]},
    ],
)
def test_what_cannot_join_is_refused(change: dict[str, Any]) -> None:
    def joined(fields: dict[str, Any]) -> tuple[int, str, dict[str, tuple[int, int]]]:
        return check_joined(
            Message(kind="joined", client="a", round=0, fields=fields), name="a", max_examples=1000
        )

    assert joined(GOOD) == (5, "abc", {"q": (4, 3)})
    with pytest.raises(AnswerError):
        joined({**GOOD, **change})
