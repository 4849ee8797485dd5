"""Tiny adapted models to be exported, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from manylora.adapters import (
    ManyLoraConfig,
    read_adapter,
)

VOCAB = 61


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


FAMILIES = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),  # has biases on q, k and v
    "gpt2": GPT2Config(  # keeps its weights as (D, O)
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


TOKENS = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(1))


def base(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


def adapted(family: str = "llama", **settings: Any) -> PeftModel:
    settings = {
        "r": 2, "lora_dropout": 0.0, "share": "B", "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        **settings,
    }  # fmt: skip
    model = get_peft_model(base(family), ManyLoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name or parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(model: PeftModel, folder: Path) -> tuple[ManyLoraConfig, dict[str, Tensor]]:
    model.save_pretrained(folder, save_embedding_layers=False)
    return read_adapter(folder)


def logits(model: nn.Module, **routing: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, **routing).logits


def settings_of(config: ManyLoraConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "lora_dropout", "share", "num_experts", "target_modules", "task_type")
    return {name: getattr(config, name) for name in names}
