"""The configuration of a run: what recipes and methods fill in, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from manylora.errors import ConfigError
from manylora.training import METHODS, RECIPES, TrainConfig
from manylora.training.config import as_list


@pytest.mark.parametrize(
    ("method", "share", "experts"),
    [("alora", "B", 3), ("hydralora", "A", 3), ("moelora", "none", 3), ("lora", "B", 1)],
)
def test_a_method_is_a_share_and_a_number_of_experts(method: Any, share: str, experts: int) -> None:
    config = TrainConfig(method=method).resolved()
    assert (config.share, config.num_experts) == (share, experts)
    assert set(METHODS) == {"alora", "hydralora", "moelora", "lora"}


def test_what_is_given_wins_over_method_and_recipe() -> None:
    config = TrainConfig(
        method="alora", share="A", num_experts=5, learning_rate=0.5, target_modules="q_proj,v_proj"
    )
    filled = config.resolved()
    assert (filled.share, filled.num_experts, filled.learning_rate) == ("A", 5, 0.5)
    assert filled.target_modules == ["q_proj", "v_proj"]
    assert filled.epochs == RECIPES["embedded"]["epochs"]


def test_the_recipe_follows_the_model_unless_named() -> None:
    assert TrainConfig().resolved().recipe == "embedded"
    assert TrainConfig(model="some/model").resolved().recipe == "standard"
    published = TrainConfig(model="some/model", recipe="published-flan").resolved()
    # arXiv 2509.25414, section 5
    assert (published.learning_rate, published.epochs, published.warmup) == (3e-4, 50, 100)
    assert (published.batch_size, published.micro_batch_size, published.max_length) == (16, 4, 256)
    assert (published.r, published.lora_alpha, published.lora_dropout) == (8, 16, 0.05)
    assert published.target_modules == ["q_proj", "v_proj"]


def test_resolving_twice_changes_nothing_and_survives_yaml_values() -> None:
    once = TrainConfig(target_modules="all-linear", tasks="a, b").resolved()
    assert once.resolved() == once
    assert TrainConfig(**once.to_dict()).resolved() == once
    assert once.target_modules == "all-linear"
    assert once.tasks == ["a", "b"]


def test_under_the_task_router_the_tasks_decide_how_many_experts() -> None:
    assert TrainConfig(router="task").resolved().num_experts is None
    assert TrainConfig(router="task", num_experts=8).resolved().num_experts == 8


@pytest.mark.parametrize(
    "bad",
    [
        {"r": 0},
        {"lora_alpha": -1.0},
        {"learning_rate": 0.0},
        {"epochs": -1.0},
        {"lora_dropout": 1.0},
        {"validation_fraction": 0.0},
        {"warmup": -1.0},
        {"batch_size": 16, "micro_batch_size": 3},
        {"max_length": 0},
        {"num_experts": 0},
    ],
)
def test_impossible_values_are_refused_with_their_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TrainConfig(**bad)


def test_lists_are_comma_separated_words() -> None:
    assert as_list(None) is None
    assert as_list("a, b,,c ") == ["a", "b", "c"]
    assert as_list(["a,b"]) == ["a,b"]
