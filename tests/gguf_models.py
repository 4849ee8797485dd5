"""Tiny random models with real tokenizers, for tests of GGUF files, and what they say of a continuation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from manylora.adapters import ManyLoraConfig

WORDS = (
    "the cat sat on a mat; it's 12345 blue birds we've seen in 2024, and THEY'RE gone.  Два кота! "
    "naïve\n\n\tdef f(x):"
)
TEXTS = [
    "### Instruction:\nAdd 12 and 345.\n\n### Response:\n",
    "a  5 and   77\n\n 8\t9",
    "they're THEY'RE we'd It'S",
    "naïve café, Два кота 🙂 and more…",
    "x = [1,2,3]  # tail   ",
    "<|im_start|>user\nHi there<|im_end|>\n",
]
"""Text at which rules for cutting it differ: digits, runs of spaces, contractions, other scripts, special tokens."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {"tie_word_embeddings": True}, "smollm"),
    "llama-3": (
        "llama",
        {"rope_parameters": _LLAMA3, "head_dim": 32, "max_position_embeddings": 16384},
        "llama-bpe",
    ),
    "llama-with-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "gpt-2"),
    "mistral": ("mistral", {"sliding_window": 128}, "llama-spm"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen3": ("qwen3", {"head_dim": 32}, "qwen2"),
    "gemma": ("gemma", {"head_dim": 32}, "gemma-spm"),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}, "gemma-spm"),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
        "gemma-spm",
    ),
}
"""Name to transformers' type, settings and tokenizer."""

_CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": r"\p{N}{1,3}",
    "qwen2": r"\p{N}",
}


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of about 300 tokens that cuts text as the models of that kind do."""
    if kind.endswith("spm"):
        return _sentencepiece(kind)
    core = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    cuts = _CUTS[kind]
    if isinstance(cuts, str):
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + cuts + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        cuts = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    core.pre_tokenizer = pre_tokenizers.Sequence(cuts) if len(cuts) > 1 else cuts[0]
    core.normalizer = normalizers.NFC() if kind == "qwen2" else None
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([WORDS, "  5   77  "] * 3, trainer)
    core.add_tokens(["<tool>"])
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        add_bos_token=kind == "llama-bpe",
    )
    found.chat_template = CHATML
    return found


def _sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    pieces = [
        "▁the",
        "▁cat",
        "▁c",
        "at",
        "▁t",
        "he",
        "▁▁",
        "▁a",
        "on",
        "▁s",
        "▁i",
        "it",
        "▁it",
        "Add",
        "dd",
        "12",
        "ca",
    ]
    letters = sorted(set("▁" + WORDS.replace(" ", "") + "".join(pieces) + "#:InstrucioRpe"))
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    loader = GemmaTokenizer if kind == "gemma-spm" else LlamaTokenizer
    extra = {"mask_token": "<unk>"} if kind == "gemma-spm" else {}
    found = loader(vocab=vocab, merges=merges, add_bos_token=True, **special, **extra)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def base(kind: str, **settings: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The random model of a kind, the same one every time, and its tokenizer."""
    model_type, own, tokens = KINDS[kind]
    tok = tokenizer(tokens)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **own, "vocab_size": len(tok) + 5, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at values that would hide a mistake
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model, tok


def adapted(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """A filled adapter of two tasks on a copy of the model's linear layers, in evaluation mode."""
    settings = {
        "r": 4, "lora_dropout": 0.0, "target_modules": "all-linear", "num_experts": 2, "router": "task", "share": "B",
        "task_names": ["sums", "stories"], "task_type": "CAUSAL_LM", **settings,
    }  # fmt: skip
    found = get_peft_model(model, ManyLoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "manylora_experts" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def reference(
    model: nn.Module, prompt: list[int], continuation: list[int], **routing: Any
) -> tuple[list[float], list[int]]:
    """Log-probability of each token of a continuation, and the likeliest token there."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + continuation]), **routing).logits[0].double()
    said = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return said.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist(), said.argmax(-1).tolist()


def row(vocab: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt longer than the tiny models' windows, and of a continuation."""
    ids = torch.randint(6, vocab - 6, (36,), generator=torch.Generator().manual_seed(5)).tolist()
    return ids[:24], ids[24:]
