"""One real round of every strategy against dense matrices in float64.

Three clients of unequal size train on a tiny base; the engine notes the factors that each ended with. What a client
has after the round is then worked out by summing dense matrices (O, D) — never the strategy's own way of averaging
factors — and compared with the plain LoRA that the client saves.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from federation import WEIGHTS, Dense, Watched, federation, rows_of, settings
from manylora.federated import Rounds

NAMES = sorted(WEIGHTS)
RANKS = {"ada": 6, "bob": 3, "cyd": 2}
S = 2.0


def one_round(
    base: Path, data: Path, folder: Path, **more: Any
) -> tuple[Rounds, Watched, dict[str, dict[str, torch.Tensor]], dict[str, Dense]]:
    """Run it; the factors each client had trained (float64) and the dense delta of what it has in the end."""
    rounds, clients = federation(settings(base, data, **more), rows_of(data, test_rows=0), folder)
    rounds.run()
    trained = in_double(clients.history[1])
    rounds.score()
    personal = {name: dense_lora(folder / "clients" / name / "adapter") for name in trained}
    return rounds, clients, trained, personal


def in_double(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {key: value.double() for key, value in state.items()} for name, state in states.items()}


def dense_lora(folder: Path) -> Dense:
    weights = load_file(folder / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in weights}
    return {
        layer: S
        * weights[f"base_model.model.{layer}.lora_B.weight"].double()
        @ weights[f"base_model.model.{layer}.lora_A.weight"].double()
        for layer in layers
    }


def assert_dense(got: Dense, layer: str, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1e-4  # something was learnt
    torch.testing.assert_close(got[layer], expected, rtol=1e-5, atol=1e-7)


def layers_of(personal: dict[str, Dense]) -> list[str]:
    layers = sorted(personal["ada"])
    assert len(layers) == 4
    return layers


@pytest.mark.parametrize("a_init", ["common", "per_client"])
def test_fed_alora_is_the_mean_of_every_b_with_ones_own_a(
    a_init: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    _, _, trained, personal = one_round(tiny_base, small_data, tmp_path, a_init=a_init)
    for layer, me in itertools.product(layers_of(personal), NAMES):
        mine = trained[me][f"{layer}.A"]
        expected = sum(p * S * trained[k][f"{layer}.B"] @ mine for k, p in WEIGHTS.items())
        assert_dense(personal[me], layer, expected)


def test_fedsa_is_ones_own_b_with_the_mean_of_every_a(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    _, _, trained, personal = one_round(tiny_base, small_data, tmp_path, strategy="fedsa")
    for layer, me in itertools.product(layers_of(personal), NAMES):
        mine = trained[me][f"{layer}.B"]
        expected = sum(p * S * mine @ trained[k][f"{layer}.A"] for k, p in WEIGHTS.items())
        assert_dense(personal[me], layer, expected)


def test_fedit_pairs_every_b_with_every_a(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    _, _, trained, personal = one_round(tiny_base, small_data, tmp_path, strategy="fedit")
    for layer, me in itertools.product(layers_of(personal), NAMES):
        expected = sum(
            p * q * S * trained[k][f"{layer}.B"] @ trained[j][f"{layer}.A"]
            for (k, p), (j, q) in itertools.product(WEIGHTS.items(), repeat=2)
        )
        assert_dense(personal[me], layer, expected)


def test_ffa_leaves_a_where_it_began_and_averages_the_products(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    _, _, trained, personal = one_round(tiny_base, small_data, tmp_path, strategy="ffa")
    for layer, me in itertools.product(layers_of(personal), NAMES):
        assert torch.equal(trained[me][f"{layer}.A"], trained["ada"][f"{layer}.A"])
        expected = sum(
            p * S * trained[k][f"{layer}.B"] @ trained[k][f"{layer}.A"] for k, p in WEIGHTS.items()
        )
        assert_dense(personal[me], layer, expected)


@pytest.mark.parametrize("ranks", [None, list(RANKS.values())])
def test_a_personal_model_can_be_what_was_trained_last(
    ranks: list[int] | None, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    _, _, trained, personal = one_round(tiny_base, small_data, tmp_path, personal="trained", ranks=ranks)
    for layer, me in itertools.product(layers_of(personal), NAMES):
        own = {part: trained[me].get(f"{layer}.{part}") for part in ("A", "B", "M", "B1", "B2")}
        expected = (
            S * own["B"] @ own["A"] if ranks is None else S * own["B2"] @ own["B1"] @ own["M"] @ own["A"]
        )
        assert_dense(personal[me], layer, expected)


@pytest.mark.parametrize("strategy", ["local", "centralized"])
def test_without_exchange_everyone_keeps_what_it_learnt(
    strategy: str, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    _, _, trained, personal = one_round(tiny_base, small_data, tmp_path, strategy=strategy)
    for layer, me in itertools.product(layers_of(personal), NAMES):
        assert_dense(personal[me], layer, S * trained[me][f"{layer}.B"] @ trained[me][f"{layer}.A"])


def test_unequal_fed_alora_adds_every_product_under_ones_own_m_and_a(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    rounds, _, trained, personal = one_round(tiny_base, small_data, tmp_path, ranks=list(RANKS.values()))
    for layer, me in itertools.product(layers_of(personal), NAMES):
        own = trained[me]
        assert own[f"{layer}.A"].shape[0] == RANKS[me]
        expected = sum(
            p
            * S
            * trained[k][f"{layer}.B2"]
            @ trained[k][f"{layer}.B1"]
            @ own[f"{layer}.M"]
            @ own[f"{layer}.A"]
            for k, p in WEIGHTS.items()
        )
        assert_dense(personal[me], layer, expected)
    assert rounds.state.shared.keys() == {f"{layer}.B0" for layer in layers_of(personal)}


def test_zero_padding_pairs_the_components_that_two_clients_have_in_common(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    _, _, trained, personal = one_round(
        tiny_base, small_data, tmp_path, strategy="zero-padding", ranks=list(RANKS.values())
    )
    for layer, me in itertools.product(layers_of(personal), NAMES):
        expected = torch.zeros_like(personal[me][layer])
        for (k, p), (j, q) in itertools.product(WEIGHTS.items(), repeat=2):
            for i in range(min(RANKS[k], RANKS[j], RANKS[me])):
                column, row = trained[k][f"{layer}.B"][:, i], trained[j][f"{layer}.A"][i]
                expected += p * q * S * torch.outer(column, row)
        assert_dense(personal[me], layer, expected)


def test_flora_adds_every_product_to_the_base(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    _, clients, trained, personal = one_round(
        tiny_base, small_data, tmp_path, strategy="flora", ranks=list(RANKS.values())
    )
    for layer, me in itertools.product(layers_of(personal), NAMES):
        expected = sum(
            p * S * trained[k][f"{layer}.B"] @ trained[k][f"{layer}.A"] for k, p in WEIGHTS.items()
        )
        assert_dense(personal[me], layer, expected)
        adapted = clients.bench.layers[layer]
        torch.testing.assert_close(
            adapted.get_base_weight().double() - clients.bench._original[layer].double(),
            expected,
            rtol=1e-4,
            atol=1e-6,
        )


def test_flexlora_is_the_projection_onto_the_largest_directions(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    _, _, trained, personal = one_round(
        tiny_base, small_data, tmp_path, strategy="flexlora", ranks=list(RANKS.values())
    )
    for layer, me in itertools.product(layers_of(personal), NAMES):
        total = sum(p * S * trained[k][f"{layer}.B"] @ trained[k][f"{layer}.A"] for k, p in WEIGHTS.items())
        _, directions = torch.linalg.eigh(total @ total.T)  # ascending: the last are the largest
        kept = directions[:, -RANKS[me] :]
        torch.testing.assert_close(personal[me][layer], kept @ kept.T @ total, rtol=1e-3, atol=1e-6)


def test_weights_are_shares_among_the_answers_that_count(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """Without bob's 12 of 40 rows, ada's 20 and cyd's 8 make up the whole; bob's A stays with his start."""

    def lose_bob(name: str, number: int, answer: bytes) -> bytes | None:
        return None if name == "bob" and number == 1 else answer

    config = settings(tiny_base, small_data, ranks=list(RANKS.values()), optimizer="persist", local_steps=2)
    rounds, clients = federation(config, rows_of(small_data, test_rows=0), tmp_path, tamper=lose_bob)
    rounds.run()
    trained = in_double(clients.history[1])
    for layer in {name.rpartition(".")[0] for name in trained["ada"]}:
        ada, cyd = (trained[name][f"{layer}.B2"] @ trained[name][f"{layer}.B1"] for name in ("ada", "cyd"))
        expected = (20 * ada + 8 * cyd) / 28
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(
            rounds.state.shared[f"{layer}.B0"].double(), expected, rtol=1e-5, atol=1e-7
        )
    assert rounds.state.counted == {"ada": 1, "cyd": 1}
    kept = load_file(tmp_path / "clients" / "ada" / "round-0001.safetensors")
    parts = {name.partition("/")[::2] if "/" in name else ("", name) for name in kept}
    assert {name.split("/")[0].rpartition(".")[2] for _, name in parts} == {
        "A",
        "M",
        "B1",
    }  # nor moments of B2


def test_unequal_ranks_begin_and_go_on_as_the_formula_says(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """After round 1 B2 is zero again and A, M, B1 are kept: in round 2 B0 grows by the new products alone."""
    config = settings(tiny_base, small_data, ranks=list(RANKS.values()), rounds=2)
    rounds, clients = federation(config, rows_of(small_data, test_rows=0), tmp_path)
    rounds.run()
    first, second = in_double(clients.history[1]), in_double(clients.history[2])
    for layer in {name.rpartition(".")[0] for name in first["ada"]}:
        assert not torch.equal(first["ada"][f"{layer}.A"], second["ada"][f"{layer}.A"])
        expected = sum(
            p * state[k][f"{layer}.B2"] @ state[k][f"{layer}.B1"]
            for state in (first, second)
            for k, p in WEIGHTS.items()
        )
        torch.testing.assert_close(
            rounds.state.shared[f"{layer}.B0"].double(), expected, rtol=1e-5, atol=1e-7
        )
