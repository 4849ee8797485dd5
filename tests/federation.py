"""A small federation for tests: a tiny base, three clients of unequal size, and an engine that watches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from manylora.data import load_examples
from manylora.federated import (
    ClientData,
    FederateConfig,
    LocalClients,
    Reply,
    Rounds,
    RoundsDisplay,
    Workbench,
)

Dense = dict[str, torch.Tensor]
"""Layer to a matrix (O, D) in float64."""

SIZES = {"ada": ("last_word", 20), "bob": ("first_word", 12), "cyd": ("swap", 8)}
WEIGHTS = {name: size / 40 for name, (_, size) in SIZES.items()}


class Listening(RoundsDisplay):
    """Remembers what the operator is told."""

    def __init__(self) -> None:
        self.refusals: dict[str, str] = {}

    def refused(self, client: str, reason: str) -> None:
        self.refusals[client] = reason


def settings(base: Path, data: Path, **more: Any) -> FederateConfig:
    values: dict[str, Any] = {
        "model": str(base), "data": str(data), "device": "cpu", "batch_size": 8, "learning_rate": 0.02,
        "target_modules": ["q_proj", "down_proj"], "rounds": 1, "lora_dropout": 0.0, "warmup": 0.0, "r": 4,
        "scheduler": "constant_with_warmup", "lora_alpha": 8.0, "scored_clients": 3, "wire": "fp32", **more,
    }  # fmt: skip
    return FederateConfig(**values).resolved()


def rows_of(data: Path, *, test_rows: int = 2) -> dict[str, ClientData]:
    train, test = (load_examples(data, split=split) for split in ("train", "test"))
    return {
        name: ClientData(
            train={task: train[task][:size]}, test={task: test[task][:test_rows]} if test_rows else {}
        )
        for name, (task, size) in SIZES.items()
    }


class Watched(LocalClients):
    """The real engine, which also notes what each client had after training, and may change what comes back.

    Args:
        more: what `LocalClients` takes.
        tamper: (client, round, answer) to the reply that arrives instead; None loses it.
        order: in which order the clients are asked.
    """

    def __init__(
        self,
        *more: Any,
        tamper: Callable[[str, int, bytes], bytes | None] | None = None,
        order: Callable[[Sequence[str]], Sequence[str]] = list,
        **named: Any,
    ) -> None:
        super().__init__(*more, **named)
        self.tamper, self.order = tamper, order
        self.history: list[dict[str, dict[str, torch.Tensor]]] = []
        """For every asking (0: to join, then the rounds, then to score) the adapter of each client after it."""
        self.answers: list[dict[str, bytes]] = []
        self.orders: list[dict[str, bytes]] = []

    def ask(
        self, names: Sequence[str], message: Callable[[str], bytes], *, seconds: float | None, most: int
    ) -> Iterator[Reply]:
        adapters: dict[str, dict[str, torch.Tensor]] = {}
        answers: dict[str, bytes] = {}
        self.history.append(adapters)
        self.answers.append(answers)
        self.orders.append({})
        number = len(self.answers) - 1
        for name in self.order(names):
            self.orders[number][name] = message(name)
            for reply in super().ask([name], self.orders[number].__getitem__, seconds=seconds, most=most):
                assert reply.data is not None
                adapters[name], answers[name] = self.bench.state(), reply.data
                data = reply.data if self.tamper is None else self.tamper(name, number, reply.data)
                if data is not None:
                    yield dataclasses.replace(reply, data=data)


_BENCHES: dict[str, Workbench] = {}


def bench_for(config: FederateConfig) -> Workbench:
    """One base model for all tests of the same settings, as it was when it was loaded."""
    key = repr(config)
    if key not in _BENCHES:
        _BENCHES[key] = Workbench(config)
    _BENCHES[key].fold([])
    return _BENCHES[key]


def federation(
    config: FederateConfig, data: dict[str, ClientData], folder: Path, **watched: Any
) -> tuple[Rounds, Watched]:
    clients = Watched(data, home=folder / "clients", bench=bench_for(config), **watched)
    return Rounds(config, clients, folder), clients


def final_state(folder: Path) -> bytes:
    """The shared weights after the last round."""
    return max((folder / "rounds").glob("round-*.safetensors")).read_bytes()
