"""The rank-matched LoRA against the closed form of method.md."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from manylora.studies.train_cells import matched, trainable
from manylora.training import TrainConfig

# the tiny base: per layer q, k, v, o are 32 → 32, gate and up 32 → 64, down 64 → 32; two layers
SHAPES = [(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]
LAYERS = 2


def of_lora(rank: int) -> int:
    return LAYERS * sum(rank * (D + out) for out, D in SHAPES)


def of_shared_b(rank: int, experts: int, *, routed: bool) -> int:
    per_layer = (experts * rank * D + rank * out + (experts * D if routed else 0) for out, D in SHAPES)
    return LAYERS * sum(per_layer)


def of_shared_a(rank: int, experts: int) -> int:
    return LAYERS * sum(rank * D + experts * rank * out + experts * D for out, D in SHAPES)


def settings(base: Path, **more: object) -> dict[str, object]:
    return {"model": str(base), "target_modules": "all-linear", "device": "cpu", **more}


def test_parameters_are_those_of_the_formulas(tiny_base: Path) -> None:
    assert trainable(TrainConfig(**settings(tiny_base, method="lora")), tasks=3) == of_lora(8)
    alora = TrainConfig(**settings(tiny_base, method="alora", r=4))
    assert trainable(alora, tasks=3) == of_shared_b(4, 3, routed=True)
    by_task = TrainConfig(**settings(tiny_base, method="alora", router="task"))
    assert trainable(by_task, tasks=5) == of_shared_b(8, 5, routed=False)
    hydra = TrainConfig(**settings(tiny_base, method="hydralora"))
    assert trainable(hydra, tasks=3) == of_shared_a(8, 3)


@pytest.mark.parametrize(
    "target", [{"method": "alora"}, {"method": "alora", "router": "task"}, {"method": "hydralora"}]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_rank_is_the_nearest_not_smaller_at_the_same_scaling(
    tiny_base: Path, target: dict[str, object], rslora: bool
) -> None:
    config = TrainConfig(**settings(tiny_base, method="lora", use_rslora=rslora))
    found = matched(config, settings(tiny_base, **target), tasks=4)
    wanted = trainable(TrainConfig(**settings(tiny_base, **target)), tasks=4)
    assert found.r == math.ceil(wanted / of_lora(1))
    assert of_lora(found.r - 1) < wanted <= of_lora(found.r)
    power = 0.5 if rslora else 1.0
    assert found.lora_alpha / found.r**power == pytest.approx(16 / 8**power)
