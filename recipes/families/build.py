"""The four architectures: of one width, depth and size as far as each allows, with what sets each family apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recipes.base.pretrain import COPY_SCALE, EMBEDDING_STD, Settings, start_as_copier

CONTEXT = 512
"""Tokens that the models can read; the longest row of the suite has 78."""
POSITION_STD = 0.02
"""GPT-2's learned positions start as in GPT-2, well below the words."""


def _common(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "initializer_range": EMBEDDING_STD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _sizes(settings: Settings, *, shared: int, mlp: float) -> dict:
    """Sizes under the names that Llama and its relatives use.

    Args:
        settings: sizes of the Llama.
        shared: heads of queries that read one head of keys and values.
        mlp: width of the MLP as a multiple of the Llama's, so that the models are of one size.
    """
    return {
        "hidden_size": settings.hidden,
        "intermediate_size": round(settings.mlp * mlp),
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads // shared,
        "max_position_embeddings": CONTEXT,
    }


def llama(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Rotary positions, RMSNorm, gated MLP, no bias; every head has its own keys and values, as in Llama 2 7B."""
    config = LlamaConfig(**_common(tokenizer), **_sizes(settings, shared=1, mlp=1))
    return _copier(LlamaForCausalLM(config))


def qwen(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Qwen2: Llama's layers with a bias on queries, keys and values, and heads of keys and values that are shared."""
    config = Qwen2Config(**_common(tokenizer), **_sizes(settings, shared=2, mlp=1.125))
    return _copier(Qwen2ForCausalLM(config))


def mistral(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Llama's layers with shared heads of keys and values; no sliding window, as since Mistral 7B v0.2."""
    sizes = _sizes(settings, shared=2, mlp=1.125)
    config = MistralConfig(**_common(tokenizer), **sizes, sliding_window=None)
    return _copier(MistralForCausalLM(config))


def gpt2(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Learned positions, LayerNorm, biases everywhere, one fused projection, an MLP without a gate."""
    config = GPT2Config(
        **_common(tokenizer),
        n_embd=settings.hidden,
        n_inner=round(settings.mlp * 1.5),  # two matrices here, three in a gated MLP
        n_layer=settings.layers,
        n_head=settings.heads,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    _start_gpt2_as_copier(model)
    return model


FAMILIES: dict[str, Callable[[Settings, PreTrainedTokenizerFast], PreTrainedModel]] = {
    "llama": llama,
    "qwen": qwen,
    "mistral": mistral,
    "gpt2": gpt2,
}


def build(family: str, settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The untrained model of a family."""
    torch.manual_seed(settings.seed)
    return FAMILIES[family](settings, tokenizer)


def _copier(model: PreTrainedModel) -> PreTrainedModel:
    start_as_copier(model)
    return model


@torch.no_grad()
def _start_gpt2_as_copier(model: GPT2LMHeadModel) -> None:
    """`start_as_copier` for GPT-2, whose Conv1D holds weights as (in, out), queries, keys and values side by side."""
    torch.nn.init.normal_(model.transformer.wpe.weight, std=POSITION_STD)
    for block in model.transformer.h:
        width = block.attn.c_proj.weight.shape[0]
        query, key, value = block.attn.c_attn.weight.split(width, dim=1)
        for part in (value, key, query):
            part.copy_(torch.nn.init.orthogonal_(torch.empty(width, width)))
        query[:, : width // 2] = key[:, : width // 2]
        block.attn.c_proj.weight.copy_(COPY_SCALE * value.T)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.01)
