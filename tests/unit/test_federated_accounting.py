"""The published figures come out of the dimensions; what is sent is what is counted."""

from __future__ import annotations

from typing import Any

import pytest

from manylora.errors import ConfigError
from manylora.federated.accounting import (
    PUBLISHED,
    PUBLISHED_MODELS,
    PUBLISHED_RANKS,
    as_sent,
    mean_traffic,
    parse_dimensions,
    published_parameters,
)
from manylora.federated.strategies import FED_ALORA_UNEQUAL, STRATEGIES, strategy_for

LLAMA = PUBLISHED_MODELS["llama2-7b"]


@pytest.mark.parametrize(
    "figure", PUBLISHED, ids=lambda figure: f"{figure.model}-{figure.strategy}-{figure.millions}"
)
def test_the_published_figures_come_out(figure: Any) -> None:
    assert round(figure.counted() / 1e6, 2) == figure.millions
    assert figure.rule in strategy_for(figure.strategy, unequal=len(set(figure.ranks)) > 1).published


def test_there_are_eight_of_them() -> None:
    assert sorted(figure.millions for figure in PUBLISHED) == [
        3.21,
        4.19,
        6.42,
        8.39,
        9.23,
        12.12,
        37.73,
        49.28,
    ]


def test_the_lighter_form_sends_7_87_million_where_12_12_were_published() -> None:
    sent = mean_traffic(as_sent(FED_ALORA_UNEQUAL, LLAMA, PUBLISHED_RANKS, r=16))
    assert round(sent.parameters / 1e6, 2) == 7.87
    assert sent.bytes == 4 * sent.parameters


def test_int8_takes_at_most_a_quarter_of_the_published_bytes() -> None:
    sent = mean_traffic(as_sent(FED_ALORA_UNEQUAL, LLAMA, PUBLISHED_RANKS, r=16, wire="int8"))
    published = 4 * published_parameters(
        "B2 up, B0 down, and the r × rank terms of B1 and M", LLAMA, PUBLISHED_RANKS, r=16
    )
    assert sent.bytes < published / 4


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        # by hand, one layer of 30 × 20, clients of rank 4 and 2
        ("zero-padding", [4 * 50, 2 * 50], [4 * 50, 2 * 50]),
        ("flexlora", [4 * 50, 2 * 50], [4 * 50, 2 * 50]),
        ("flora", [4 * 50, 2 * 50], [6 * 50, 6 * 50]),
        # r = 3: the product has 90 numbers, the factors of rank 4 have 132, those of rank 2 have 66
        ("fed-alora", [90, 66], [90, 90]),
        ("local", [0, 0], [0, 0]),
    ],
)
def test_unequal_ranks_by_hand(name: str, up: list[int], down: list[int]) -> None:
    sent = as_sent(strategy_for(name, unequal=True), {(30, 20): 1}, [4, 2], r=3)
    assert [client.parameters_up for client in sent] == up
    assert [client.parameters_down for client in sent] == down


@pytest.mark.parametrize(("name", "one_way"), [("fed-alora", 30), ("fedsa", 20), ("fedit", 50), ("ffa", 30)])
def test_equal_ranks_by_hand(name: str, one_way: int) -> None:
    (sent,) = as_sent(STRATEGIES[name], {(30, 20): 2}, [4], r=4, wire="int8")
    assert (sent.parameters_up, sent.parameters_down) == (8 * one_way, 8 * one_way)
    scales = 2 * 4 * (2 if name == "fedit" else 1)  # one float32 for each component of each matrix
    assert sent.bytes_up == 8 * one_way + 4 * scales


def test_dimensions_are_read() -> None:
    assert parse_dimensions("4096x4096x64, 1024x4096x32,4096x4096x1") == {(4096, 4096): 65, (1024, 4096): 32}
    assert parse_dimensions("qwen2-7b") == {(3584, 3584): 56}
    for wrong in ("4096", "4096x4096", "0x3x4", "llama", "1x2x-3"):
        with pytest.raises(ConfigError, match="OxDxNUMBER"):
            parse_dimensions(wrong)
