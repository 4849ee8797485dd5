"""A strategy of one's own is one class: it runs whole rounds without a line anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from federation import WEIGHTS, Watched, rows_of, settings
from manylora.federated import FederateConfig, Rounds, Strategy, Workbench, aggregate
from manylora.federated.home import VersionedState
from manylora.federated.parts import PARTS
from manylora.federated.strategies import FED_ALORA_UNEQUAL, STRATEGIES


@final
@dataclass(frozen=True, kw_only=True)
class HalfWay(Strategy):
    """Only B travels, rounded to powers of two when it leaves; the server goes half the way to the mean."""

    def leave(self, received: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: powers_of_two(value) for name, value in super().leave(received, trained).items()}

    def aggregate(self, received: dict[str, Tensor], answers: object, scaling: float) -> dict[str, Tensor]:
        mean = aggregate.mean(received, answers, scaling)
        return {name: (value + mean[name]) / 2 for name, value in received.items()}


def powers_of_two(value: Tensor) -> Tensor:
    return torch.where(value == 0, value, value.sign() * 2 ** value.abs().log2().round())


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_a_strategy_defined_here_runs_rounds_and_scores(
    wire: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    half_way = HalfWay(name="half-way", up=frozenset({"B"}), down=frozenset({"B"}))
    config = settings(tiny_base, small_data, rounds=2, wire=wire)
    bench = Workbench(config, strategy=half_way)
    clients = Watched(rows_of(small_data), home=tmp_path / "clients", bench=bench)
    rounds = Rounds(config, clients, tmp_path, strategy=half_way)
    rounds.run()
    saved = VersionedState(tmp_path / "rounds")
    for number in (1, 2):
        before, after = saved.read(number - 1)[0], saved.read(number)[0]
        for name, value in rounds.state.shared.items():
            start = before[name]
            changes = {who: powers_of_two(clients.history[number][who][name] - start) for who in WEIGHTS}
            expected = start + sum(p * changes[who] for who, p in WEIGHTS.items()) / 2
            assert value.abs().max() > 1e-3  # something was learnt
            if wire == "fp32":
                torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)
    assert sorted(rounds.score()) == sorted(WEIGHTS)


def test_the_table_of_parts_has_every_part_of_every_strategy() -> None:
    for strategy in (*STRATEGIES.values(), FED_ALORA_UNEQUAL):
        assert strategy.up | strategy.parts | strategy.trains <= PARTS.keys()
        assert strategy.down - {"stack"} <= PARTS.keys()
        assert strategy.trains <= strategy.parts
        assert strategy.published


def test_the_command_line_knows_every_strategy() -> None:
    assert set(get_args(get_type_hints(FederateConfig)["strategy"])) == STRATEGIES.keys()


def test_the_shapes_of_all_parts_multiply() -> None:
    sizes = {"layer": (11, 7), "rank": 2, "intermediate": 3}
    shape = {name: part.shape(**sizes) for name, part in PARTS.items()}
    assert shape["A"] == (2, 7)
    assert shape["B"] == (11, 2)
    for product, left, right in (("dB", "B2", "B1"), ("B0", "B2", "B1")):
        assert (shape[left][0], shape[right][1]) == shape[product]
        assert shape[left][1] == shape[right][0]
    assert (shape["M"][0], shape["A"][1]) == (3, 7)
    for name, part in PARTS.items():
        assert "K" in part.axes or "R" in part.axes, name
        assert part.axes[part.components] in "KR"
