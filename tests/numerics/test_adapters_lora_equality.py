"""One expert is PEFT's LoRA: equal weights in, equal outputs, gradients and training trajectory out."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.adapters import ManyLoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).double()


def pair(*, dropout: float, rslora: bool, share: str, router: str | None):
    """A ManyLoRA model with one expert and a PEFT LoRA model, with equal weights."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    }
    many = get_peft_model(base(), ManyLoraConfig(num_experts=1, share=share, router=router, **settings))
    lora = get_peft_model(base(), LoraConfig(**settings))
    with torch.no_grad():
        for name, module in many.named_modules():
            if name.endswith("manylora_experts.default"):
                layer = lora.get_submodule(name.removesuffix(".manylora_experts.default"))
                torch.nn.init.normal_(module.lora_B, std=0.1)
                layer.lora_A["default"].weight.copy_(module.lora_A)
                layer.lora_B["default"].weight.copy_(module.lora_B)
    return many, lora


def matched(many, lora):
    """(ours, LoRA's) parameters in the same order."""
    for name, ours in many.named_parameters():
        if ours.requires_grad:
            theirs = name.replace("manylora_experts.default.lora_A", "lora_A.default.weight")
            theirs = theirs.replace("manylora_experts.default.lora_B", "lora_B.default.weight")
            yield ours, lora.get_parameter(theirs)


@pytest.mark.parametrize(
    ("share", "router"), [("B", None), ("A", "uniform"), ("none", "token"), ("B", "task")]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients(share: str, router: str | None, rslora: bool) -> None:
    many, lora = pair(dropout=0.0, rslora=rslora, share=share, router=router)
    ids = torch.randint(0, 61, (3, 9))
    got, want = many(input_ids=ids, labels=ids), lora(input_ids=ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-10, atol=1e-10)
    got.loss.backward()
    want.loss.backward()
    pairs = list(matched(many, lora))
    assert len(pairs) == 12
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ten_adamw_steps(dropout: float) -> None:
    many, lora = pair(dropout=dropout, rslora=False, share="B", router=None)
    losses = []
    for model in (many, lora):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(1)
        trajectory = []
        for _ in range(10):
            ids = torch.randint(0, 61, (3, 9))
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trajectory.append(loss.item())
        losses.append(trajectory)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for ours, theirs in matched(many, lora):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_same_number_of_parameters_as_lora() -> None:
    many, lora = pair(dropout=0.0, rslora=False, share="B", router="token")
    assert many.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()
    assert not any("lora_router" in name for name, _ in many.named_parameters())


def test_deepcopy_of_an_adapted_model_is_independent() -> None:
    many, _ = pair(dropout=0.0, rslora=False, share="B", router="task")
    other = copy.deepcopy(many)
    ids = torch.randint(0, 61, (2, 5))
    assert torch.equal(many(input_ids=ids).logits, other(input_ids=ids).logits)
    with torch.no_grad():
        next(p for p in other.parameters() if p.requires_grad).add_(1.0)
    assert not torch.equal(many(input_ids=ids).logits, other(input_ids=ids).logits)
