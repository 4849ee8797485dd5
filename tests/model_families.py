"""Small random models of every family, and adapters on them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

from manylora.adapters import ManyLoraConfig

VOCAB = 61


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


GPT2_SMALL = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCAB,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}


FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**SMALL),
    "gpt2": GPT2Config(**GPT2_SMALL),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL, hidden_dropout=0.0, attention_dropout=0.0),
}


def base(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


def tokens(rows: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def adapted(
    family: str = "llama", *, filled: bool = True, adapter_name: str = "default", **settings
) -> PeftModel:
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(base(family), ManyLoraConfig(**settings), adapter_name=adapter_name).eval()
    if filled:
        fill(model)
    return model


def fill(model: nn.Module, seed: int = 2) -> None:
    """Random values in every adapter parameter, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
