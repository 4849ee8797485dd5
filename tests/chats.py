"""Chat templates, and tokenizers and tiny bases that have them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

THOUGHT = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' and loop.last -%}"
    "{{- '<|im_start|>assistant\n<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n\n' + m['content'] -}}"
    "{%- else -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] -}}{%- endif -%}{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""Puts an empty thought before an answer that has none."""

TOOLS = (
    "{%- if tools -%}{{- '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') -}}"
    "{%- for c in m['tool_calls'] or [] -%}{{- '<call>' + (c['function'] | tojson) + '</call>' -}}{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

DATED = "{{- 'It is ' + strftime_now('%d %B %Y') + '.\n' -}}" + CHATML


def byte_tokenizer(template: str | None = None, *, frame: str = "$A", eos: str = "<|im_end|>") -> Any:
    """A tokenizer of bytes and five special tokens, whose texts are framed as `frame` says ("<s> $A")."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    inner.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, vocabulary[token]) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token=eos, chat_template=template
    )


def chat_base(base: Path, folder: Path, template: str) -> Path:
    """A copy of a base whose tokenizer has this chat template."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
