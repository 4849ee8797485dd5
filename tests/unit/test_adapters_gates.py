"""Gate statistics: the right numbers in training and evaluation, and no cost outside the block."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor, nn

from manylora.adapters import ExpertBank, ManyLoraConfig, gate_statistics
from manylora.errors import RoutingError
from tiny_models import GREEDY, adapted, assert_same, checkpoint, gradients, tokens

LAYER = "model.layers.1.self_attn.v_proj"


def watched_weights(model: nn.Module, **inputs: Tensor) -> Tensor:
    """The routing weights of `LAYER`, from its input and the router's matrix alone."""
    layer = model.get_submodule(f"base_model.model.{LAYER}")
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return torch.softmax(seen[0] @ layer.bank("default").lora_router.T, -1).double().flatten(0, -2)


def test_numbers_of_a_token_router() -> None:
    model = adapted()
    with torch.no_grad(), model.gate_statistics() as stats:
        model(input_ids=tokens())
    w = watched_weights(model, input_ids=tokens()).detach()
    layer = stats.layers[LAYER]
    assert len(stats.layers) == 14
    assert layer.tokens == 24
    assert layer.share == pytest.approx(w.mean(0).tolist(), rel=1e-6)
    assert layer.first == pytest.approx([(w.argmax(-1) == i).double().mean().item() for i in range(3)])
    assert layer.entropy == pytest.approx(-(w * w.log()).sum(-1).mean().item(), rel=1e-6)
    assert 0 < layer.entropy < math.log(3)
    assert sum(layer.share) == pytest.approx(1)
    assert not layer.share_by_task


def test_collapse_is_flagged() -> None:
    model = adapted()
    bank = model.get_submodule(f"base_model.model.{LAYER}").bank("default")
    assert isinstance(bank, ExpertBank)
    x = torch.zeros(1, 32)
    with model.gate_statistics() as stats:
        model(input_ids=tokens())
    assert stats.collapsed == [n for n, layer in stats.layers.items() if max(layer.share) > 0.9]
    with torch.no_grad():
        seen: list[Tensor] = []
        handle = bank.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(input_ids=tokens())
        handle.remove()
        x = seen[0].flatten(0, 1)
        bank.lora_router.zero_()
        bank.lora_router[1] = torch.linalg.lstsq(x, torch.full((24, 1), 20.0)).solution[:, 0]
    with model.gate_statistics() as stats:
        model(input_ids=tokens())
    assert LAYER in stats.collapsed
    assert stats.layers[LAYER].share[1] > 0.99
    assert stats.layers[LAYER].entropy < 0.1


def test_sums_go_over_calls_and_leave_padding_out() -> None:
    model = adapted()
    padded = torch.cat((torch.zeros(3, 4, dtype=torch.long), tokens()), 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        with model.gate_statistics() as both:
            model(input_ids=padded, attention_mask=mask)
            model(input_ids=tokens(2, seed=5))
        with model.gate_statistics() as first:
            model(input_ids=padded, attention_mask=mask)
        with model.gate_statistics() as plain:
            model(input_ids=tokens())
    assert both.layers[LAYER].tokens == 24 + 16
    assert first.layers[LAYER].tokens == 24
    for name, layer in first.layers.items():
        assert layer.share == pytest.approx(plain.layers[name].share, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "ids", "share", "entropy"),
    [
        ({"router": "task"}, [2, 2, 0], [1 / 3, 0, 2 / 3], 0.0),
        ({"router": "task", "default_expert": 1}, None, [0, 1, 0], 0.0),
        ({"router": "uniform"}, None, [1 / 3] * 3, math.log(3)),
        ({"num_experts": 1}, None, [1], 0.0),
    ],
)
def test_other_routers(settings: dict, ids: list[int] | None, share: list[float], entropy: float) -> None:
    model = adapted(**settings)
    given = None if ids is None else torch.tensor(ids)
    with model.gate_statistics() as stats:
        model(input_ids=tokens(), expert_ids=given)
    for layer in stats.layers.values():
        assert layer.share == pytest.approx(share)
        assert layer.entropy == pytest.approx(entropy)
        assert not layer.collapsed  # only a token router can


def test_top_k_shows_in_the_share() -> None:
    model = adapted(router_top_k=1)
    with model.gate_statistics() as stats:
        model(input_ids=tokens())
    assert sum(stats.layers[LAYER].share) < 1  # the one keeps its own probability


def test_per_task() -> None:
    model = adapted()
    ids = torch.tensor([7, 0, 7])
    with model.gate_statistics(per_task=True) as stats:
        model(input_ids=tokens(), expert_ids=ids)
        with model.route(4):
            model(input_ids=tokens(1))
    w = watched_weights(model, input_ids=tokens()).view(3, 8, 3)
    by_task = stats.layers[LAYER].share_by_task
    assert list(by_task) == [0, 4, 7]
    assert by_task[0] == pytest.approx(w[1].mean(0).tolist(), rel=1e-5)
    assert by_task[7] == pytest.approx(w[[0, 2]].flatten(0, 1).mean(0).tolist(), rel=1e-5)
    with pytest.raises(RoutingError, match="needs expert_ids"), model.gate_statistics(per_task=True):
        model(input_ids=tokens())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_inside_the_block_is_the_same_and_counts_once(reentrant: bool | None) -> None:
    model = adapted(lora_dropout=0.3).train()
    if reentrant is not None:
        checkpoint(model, reentrant=reentrant)
    results = []
    for watch in (False, True):
        torch.manual_seed(3)
        if watch:
            with gate_statistics(model) as stats:
                model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        else:
            model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        results.append(gradients(model))
    assert_same(results[1], results[0], rtol=0, atol=0)
    assert {layer.tokens for layer in stats.layers.values()} == {24}


def test_nothing_runs_outside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    calls = {"n": 0}
    original = ExpertBank.observed_weights

    def counted(self: ExpertBank, *args: object) -> Tensor:
        calls["n"] += 1
        return original(self, *args)

    monkeypatch.setattr(ExpertBank, "observed_weights", counted)
    banks = [module for module in model.modules() if isinstance(module, ExpertBank)]
    model(input_ids=tokens())
    with model.gate_statistics():
        assert all(bank._forward_pre_hooks for bank in banks)
        model(input_ids=tokens())
    assert calls["n"] == 14
    with pytest.raises(RoutingError, match="shape"), model.gate_statistics():
        model(input_ids=tokens(), expert_ids=torch.tensor(1))  # the block ends as cleanly by an error
    assert calls["n"] == 14
    model(input_ids=tokens())
    assert calls["n"] == 14
    assert not any(bank._forward_pre_hooks or bank._forward_hooks for bank in banks)


def test_generation_and_two_adapters() -> None:
    model = adapted()
    model.add_adapter("second", ManyLoraConfig(r=2, num_experts=2, target_modules=["q_proj"]))
    with model.gate_statistics() as stats, model.gate_statistics(adapter_name="second") as none:
        model.generate(input_ids=tokens(), **GREEDY)
    assert stats.layers[LAYER].tokens == 3 * (8 + 4)  # the last token is not read
    with pytest.raises(RoutingError, match="has seen no forward"):
        _ = none.layers
    model.set_adapter("second")
    with model.gate_statistics() as stats:
        model(input_ids=tokens())
    assert len(stats.layers) == 2
    assert len(stats.layers["model.layers.0.self_attn.q_proj"].share) == 2
    with (
        pytest.raises(RoutingError, match=r"'third'.*default, second"),
        model.gate_statistics(adapter_name="third"),
    ):
        pass


def test_another_threads_calls_do_not_count() -> None:
    model = adapted()
    with model.gate_statistics() as stats:
        thread = threading.Thread(target=lambda: model(input_ids=tokens()))
        thread.start()
        thread.join()
        model(input_ids=tokens(1))
    assert stats.layers[LAYER].tokens == 8
