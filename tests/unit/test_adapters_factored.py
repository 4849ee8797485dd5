"""The factored bank is one LoRA whose two matrices are products."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from manylora.adapters import FactoredBank, ManyLoraConfig, ManyLoraLinear
from manylora.errors import ConfigError


def layer_with(rank: int, own_rank: int, *, dropout: float = 0.0) -> tuple[ManyLoraLinear, FactoredBank]:
    config = ManyLoraConfig(num_experts=1, r=rank, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(7, 5)).double(), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    bank = FactoredBank(layer.bank("default").double(), own_rank=own_rank)
    bank.reset_parameters(identity=False)
    layer.manylora_experts["default"] = bank
    return layer, bank


@pytest.mark.parametrize(("rank", "own_rank"), [(3, 2), (2, 4), (4, 4)])
def test_it_computes_the_formula_and_its_gradients(rank: int, own_rank: int) -> None:
    torch.manual_seed(0)
    layer, bank = layer_with(rank, own_rank)
    bank.B0.normal_()
    assert [tuple(m.shape) for m in (bank.A, bank.M, bank.B1, bank.B2, bank.B0)] == [
        (own_rank, 7),
        (rank, own_rank),
        (own_rank, rank),
        (5, own_rank),
        (5, rank),
    ]
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    W0, b = layer.get_base_layer().weight, layer.get_base_layer().bias
    factors = [m.detach().clone().requires_grad_() for m in (bank.A, bank.M, bank.B1, bank.B2)]
    A, M, B1, B2 = factors
    dense = W0 + (6 / rank) * (bank.B0 + B2 @ B1) @ M @ A
    expected = x @ dense.t() + b
    got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    target = torch.randn_like(expected)
    (expected * target).sum().backward()
    (got * target).sum().backward()
    for mine, theirs in zip((bank.A, bank.M, bank.B1, bank.B2), factors, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_only_the_clients_own_factors_can_be_trained() -> None:
    _, bank = layer_with(3, 2)
    bank.requires_grad_(True)
    assert {name for name, _ in bank.named_parameters()} == {"A", "M", "B1", "B2"}
    assert not bank.B0.requires_grad


def test_it_starts_as_the_identity_and_can_be_copied() -> None:
    layer, bank = layer_with(3, 2)
    bank.reset_parameters()
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    twin = copy.deepcopy(bank)
    assert torch.equal(twin.lora_A, bank.lora_A)
    for matrix in (bank.A, bank.M, bank.B1):
        assert matrix.abs().max() <= 1 / matrix.shape[1] ** 0.5


def test_merging_adds_what_the_forward_adds() -> None:
    layer, bank = layer_with(3, 2)
    bank.B0.normal_()
    x = torch.randn(4, 7, dtype=torch.float64)
    before = layer(x)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), before, rtol=1e-10, atol=1e-10)
    layer.unmerge()
    torch.testing.assert_close(layer(x), before, rtol=1e-10, atol=1e-10)


def test_several_experts_or_no_rank_are_refused() -> None:
    config = ManyLoraConfig(num_experts=2, r=3, target_modules=["0"])
    bank = get_peft_model(nn.Sequential(nn.Linear(7, 5)), config).base_model.model[0].bank("default")
    with pytest.raises(ConfigError, match="has one expert, not 2"):
        FactoredBank(bank, own_rank=2)
    with pytest.raises(ConfigError, match="rank 0"):
        layer_with(3, 0)
