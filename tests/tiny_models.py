"""Tiny random models with filled adapters, for tests that look at routing."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from manylora.adapters import ManyLoraConfig

VOCAB = 61
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def llama(layers: int = 2) -> LlamaForCausalLM:
    """A random Llama, 32 wide; the same one every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def t5() -> T5ForConditionalGeneration:
    """A random T5, 32 wide; the same one every time."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config).eval()


def bert(vocab: int = VOCAB, length: int = 64) -> BertForSequenceClassification:
    """A random BERT classifier, 32 wide, without dropout; the same one every time."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=vocab,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


def fill(model: nn.Module, seed: int = 2) -> None:
    """Random values in every adapter parameter, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((0.3 * values).to(parameter.dtype))


def adapted(base: nn.Module | None = None, **settings: object) -> PeftModel:
    """A tiny Llama (or `base`) with a filled adapter on all linear layers, in evaluation mode."""
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": "all-linear", **settings}
    model = get_peft_model(llama() if base is None else base, ManyLoraConfig(**settings)).eval()
    fill(model)
    return model


def tokens(rows: int = 3, length: int = 8, seed: int = 1) -> Tensor:
    """Random token ids (rows, length) without the padding token."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, taken out of the model."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(
    got: dict[str, Tensor], want: dict[str, Tensor], *, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """Same names, and values within the tolerance."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=name)


def checkpoint(model: PeftModel, *, reentrant: bool) -> None:
    """Turn gradient checkpointing on."""
    base = model.get_base_model()
    model.enable_input_require_grads()
    # the second is its name before transformers 5.23
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
