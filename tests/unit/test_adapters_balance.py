"""Router options beyond the paper: top-k, temperature, and the load-balance loss and how it reaches the loss."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from manylora.adapters import ManyLoraConfig, has_load_balance, load_balance, load_balance_loss, ops
from manylora.errors import RoutingError
from tiny_models import VOCAB, adapted, assert_same, checkpoint, gradients, llama, tokens

WEIGHT = 0.5


def logits(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (5, 7, 4)), generator=generator, dtype=torch.float64)


def test_top_k_weights_are_the_softmax_of_the_k_largest() -> None:
    values = logits().requires_grad_()
    w = ops.routing_weights(values, top_k=2)
    assert ((w > 0).sum(-1) == 2).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(5, 7, dtype=torch.float64))
    for row, got in zip(values.detach().flatten(0, 1), w.detach().flatten(0, 1), strict=True):
        best = row.sort(descending=True).indices[:2]
        e = [math.exp(row[i]) for i in best]
        assert [got[i].item() for i in best] == pytest.approx([v / sum(e) for v in e], rel=1e-12)
    (gradient,) = torch.autograd.grad(w, values, logits(1))
    assert torch.isfinite(gradient).all()
    assert ((gradient != 0) == (w > 0)).all()  # what was not chosen has no say
    assert torch.equal(ops.routing_weights(values, top_k=4), ops.routing_weights(values))


def test_top_1_keeps_its_probability_so_that_the_router_learns() -> None:
    values = logits().requires_grad_()
    w = ops.routing_weights(values, top_k=1)
    torch.testing.assert_close(w.sum(-1), torch.softmax(values, -1).amax(-1))
    (gradient,) = torch.autograd.grad(w.sum(), values)
    assert (gradient.abs().sum(-1) > 0).all()


def test_ties_still_choose_k() -> None:
    assert (ops.routing_weights(torch.zeros(6, 4), top_k=2).gt(0).sum(-1) == 2).all()


def test_temperature_divides_the_logits() -> None:
    values = logits()
    torch.testing.assert_close(
        ops.routing_weights(values, temperature=0.25), torch.softmax(4 * values, dim=-1)
    )
    half = values.bfloat16()
    assert torch.equal(
        ops.routing_weights(half, temperature=3.0), torch.softmax(half.float() / 3, dim=-1).bfloat16()
    )


@pytest.mark.parametrize("share", ["A", "B", "none"])
@pytest.mark.parametrize("options", [{"router_top_k": 2}, {"router_top_k": 1}, {"router_temperature": 0.3}])
def test_options_change_the_model_and_are_saved(share: str, options: dict, tmp_path) -> None:
    plain = adapted(share=share)
    model = adapted(share=share, **options)
    got = model(input_ids=tokens()).logits
    assert not torch.allclose(got, plain(input_ids=tokens()).logits, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=tokens()).logits, got)
    model.double()
    want = model(input_ids=tokens()).logits
    with ops.computed_by("reference"):
        torch.testing.assert_close(model(input_ids=tokens()).logits, want, rtol=1e-9, atol=1e-9)


def naive_loss(values: Tensor, mask: Tensor | None, k: int | None, temperature: float) -> Tensor:
    """Equations 4 to 6, token by token."""
    n = values.shape[-1]
    rows = values.reshape(-1, n)
    kept = [row for i, row in enumerate(rows) if mask is None or mask.reshape(-1)[i]]
    f = [0.0] * n
    for row in kept:
        for expert in row.sort(descending=True).indices[: k or 1].tolist():
            f[expert] += 1 / ((k or 1) * len(kept))
    p = sum(torch.softmax(row / temperature, -1) for row in kept) / len(kept)
    return n * sum(f[i] * p[i] for i in range(n))


@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_that_of_the_switch_transformer(k: int | None, masked: bool) -> None:
    values = logits().requires_grad_()
    mask = (torch.arange(35).view(5, 7) % 3 > 0).long() if masked else None
    got = load_balance_loss(values, mask_T=mask, top_k=k, temperature=0.7)
    want = naive_loss(values, mask, k, 0.7)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, values)[0], torch.autograd.grad(want, values)[0], rtol=1e-12, atol=1e-14
    )


def test_loss_is_one_when_balanced_and_n_when_collapsed() -> None:
    balanced = 50 * torch.eye(4).repeat(3, 1)
    assert load_balance_loss(balanced).item() == pytest.approx(1)
    collapsed = 50 * torch.eye(4)[[2] * 12]
    assert load_balance_loss(collapsed).item() == pytest.approx(4)
    assert load_balance_loss(collapsed[:0]).item() == 0  # no token, no loss
    assert load_balance_loss(collapsed, mask_T=torch.zeros(12)).item() == 0


def extra(model: nn.Module, **inputs: Tensor) -> Tensor:
    """The model's loss less the plain cross-entropy of its logits."""
    output = model(**inputs)
    labels = inputs["labels"][:, 1:]
    plain = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels.flatten())
    return output.loss - plain


def test_the_models_own_loss_has_the_term_in_training_only() -> None:
    model = adapted(load_balance_weight=WEIGHT)
    inputs = {"input_ids": tokens(), "labels": tokens()}
    assert extra(model, **inputs).abs() < 1e-6
    model.train()
    with torch.no_grad():
        assert extra(model, **inputs).abs() < 1e-6
    with load_balance(model) as balance:
        assert extra(model, **inputs).abs() < 1e-6  # handed over instead
    assert len(balance.calls) == 14  # 7 layers in each of 2 blocks
    terms = [load_balance_loss(call.logits) for call in balance.calls]
    torch.testing.assert_close(balance.loss(), WEIGHT * torch.stack(terms).mean())
    torch.testing.assert_close(extra(model, **inputs), balance.loss(), rtol=1e-4, atol=1e-5)
    as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], model(**inputs).loss)


def test_the_gradient_of_the_term_reaches_the_routers_and_what_lies_before_them() -> None:
    model = adapted(load_balance_weight=WEIGHT).train()
    with model.load_balance() as balance:
        model(input_ids=tokens())
    balance.loss().backward()
    found = gradients(model)
    routers = {name for name in found if name.endswith("lora_router")}
    assert len(routers) == 14
    assert all(found[name].abs().sum() > 0 for name in routers)
    assert any("lora_B" in name and found[name].abs().sum() > 0 for name in found)  # of layers before


def test_each_of_several_active_adapters_has_its_whole_weight() -> None:
    """By hand: N Σ f P of each layer, its mean per adapter, times that adapter's weight, added up."""
    model = adapted(load_balance_weight=WEIGHT)
    few = ManyLoraConfig(
        r=2, num_experts=2, load_balance_weight=0.25, target_modules=["q_proj"], lora_dropout=0.0
    )
    model.add_adapter("few", few)
    model.base_model.set_adapter(["default", "few"])
    model.train()
    with model.load_balance() as balance:
        model(input_ids=tokens())
    assert len(balance.calls) == 16  # 14 layers of one, 2 of the other
    want = 0.0
    for adapter, layers, weight in (("default", 14, WEIGHT), ("few", 2, 0.25)):
        calls = [call for call in balance.calls if call.adapter == adapter]
        assert len(calls) == layers
        for call in calls:
            p_TN = call.logits.detach().flatten(0, 1).softmax(-1)
            chosen = p_TN.argmax(-1).tolist()
            f_N = [chosen.count(n) / len(chosen) for n in range(p_TN.shape[1])]
            by_hand = sum(f * p for f, p in zip(f_N, p_TN.mean(0).tolist(), strict=True)) * p_TN.shape[1]
            want += weight * by_hand / layers
    assert balance.loss().item() == pytest.approx(want, rel=1e-6)
    output = model(input_ids=tokens(), labels=tokens())
    plain = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert (output.loss - plain).item() == pytest.approx(want, rel=1e-4)


def test_padding_does_not_count() -> None:
    model = adapted(load_balance_weight=WEIGHT).train()
    padded = torch.cat((tokens(), torch.zeros(3, 4, dtype=torch.long)), 1)
    mask = (padded != 0).long()
    losses = []
    for inputs in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": tokens()}):
        with model.load_balance() as balance:
            model(**inputs)
        losses.append(balance.loss().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_no_loss_to_go_into_is_an_error() -> None:
    model = adapted(load_balance_weight=WEIGHT).train()
    with pytest.raises(RoutingError, match=r"load_balance_weight=0.5.*model.load_balance\(\)"):
        model(input_ids=tokens())
    with torch.no_grad():
        model(input_ids=tokens())
    model.eval()
    model(input_ids=tokens())


def test_off_means_nothing_is_collected() -> None:
    model = adapted().train()
    assert not has_load_balance(model)
    with model.load_balance() as balance:
        model(input_ids=tokens())
    assert balance.calls == []
    assert balance.loss().item() == 0
    assert has_load_balance(adapted(load_balance_weight=0.01))


def test_checkpointing_gives_the_same_gradients() -> None:
    model = adapted(load_balance_weight=WEIGHT).train()
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    model(**inputs).loss.backward()
    want = gradients(model)
    checkpoint(model, reentrant=False)
    first, second = model(**inputs).loss, model(**inputs).loss  # and two forwards before one backward
    ((first + second) / 2).backward()
    assert_same(gradients(model), want)
    with model.load_balance() as balance:
        loss = model(**inputs).loss
        (loss + balance.loss()).backward()  # the rerun happens inside the block and must not count
    assert len(balance.calls) == 14
    assert_same(gradients(model), want)


def test_reentrant_checkpointing_is_refused() -> None:
    model = adapted(load_balance_weight=WEIGHT).train()
    checkpoint(model, reentrant=True)
    with pytest.raises(RoutingError, match="use_reentrant to False"):
        model(input_ids=tokens(), labels=tokens(), use_cache=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer_adds_it_once_a_step(accumulation: int, tmp_path) -> None:
    """Over the micro-batches of a step the weights add up to 1, as those of the loss itself do."""
    rows = [{"input_ids": t, "labels": t} for t in tokens(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1.0,
        train_sampling_strategy="sequential",
    )
    updates = []
    for weight in (0.0, WEIGHT):
        model = adapted(load_balance_weight=weight, task_type="CAUSAL_LM")
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        updates.append({n: before[n] - model.get_parameter(n).detach() for n in before})
    want: dict[str, Tensor] = {}
    model = adapted(load_balance_weight=WEIGHT).train()
    for part in tokens(4).split(4 // accumulation):
        with model.load_balance() as balance:
            model(input_ids=part)
        (balance.loss() / accumulation).backward()
    want = gradients(model)
    got = {n: updates[1][n] - updates[0][n] for n in want}
    assert_same(got, want, rtol=1e-3, atol=1e-5)


def test_config_of_a_frozen_adapter_still_runs_in_training_mode() -> None:
    model = adapted(load_balance_weight=WEIGHT).train()
    model.requires_grad_(False)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert not loss.requires_grad
    assert isinstance(model.peft_config["default"], ManyLoraConfig)
    assert model.config.vocab_size == VOCAB
