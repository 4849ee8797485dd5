"""GGUF files for llama.cpp and Ollama: a model, and one LoRA per task beside it.

Exact in "f32"; the other types round the weights of a model (`gguf_types`). A LoRA is written in float32 and applies to
the model in any type. What a file cannot say exactly is refused, or told as a note where only unusual text differs.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.utils.other import get_pattern_key
from torch import Tensor

from manylora.adapters import PlainLora
from manylora.adapters.export import PREFIX
from manylora.adapters.from_lora import check_plain
from manylora.errors import ModelError
from manylora.serving.gguf_types import (
    FILE_TYPES,
    Quantisation,
    check_quantisation,
    packed,
    tensor_type,
)
from manylora.training.gguf_format import (
    ROPE_FREQS,
    Names,
    family_of,
    gguf_library,
    metadata_of,
    rope_divisors,
    to_file,
)
from manylora.training.gguf_vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FINGERPRINT = "manylora.base_fingerprint"
"""Metadata key under which model and LoRA files name their base, so that a LoRA of another base is found out."""

_PLACES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""The layers of a block that llama.cpp applies a LoRA to."""


def write_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantisation: Quantisation = "f16",
    name: str | None = None,
    fingerprint: str | None = None,
    chat: bool | None = None,
) -> tuple[str, ...]:
    """Write a base or merged model, with its tokenizer and chat template, as one file that appears when it is whole.

    Args:
        path: the file to write.
        model: a causal language model of a family in `gguf_format.FAMILIES`, in any float type.
        tokenizer: its tokenizer.
        quantisation: "f32", "bf16", "f16", "q8_0" or "q4_k_m".
        name: for people, "general.name".
        fingerprint: of the base (`base_fingerprint`), kept in the file.
        chat: see `vocabulary_of`.

    Returns:
        Where llama.cpp's tokens differ from the tokenizer's, one sentence each.

    Raises:
        ModelError: an architecture, tokenizer or weight that a file cannot hold exactly.
        ConfigError: the gguf package is missing, or what the quantisation needs.
    """
    check_quantisation(quantisation)
    config = model.config
    family = family_of(config)
    names = Names(family, config.num_hidden_layers).of_weights(model)
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = vocabulary_of(tokenizer, rows=rows, ends=_ends(model), chat=chat)
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": name or path.stem,
        "general.file_type": FILE_TYPES[quantisation],
        "general.quantization_version": 2,
        FINGERPRINT: fingerprint,
        **{f"{family.architecture}.{key}": value for key, value in metadata_of(config, family).items()},
        f"{family.architecture}.vocab_size": rows,
        **vocabulary.metadata(),
    }
    weights = model.state_dict()
    large = config.num_hidden_layers == 80 and config.num_attention_heads != config.num_key_value_heads
    entries = (
        [_Entry(name=ROPE_FREQS, tensor=divisors)] if (divisors := rope_divisors(config)) is not None else []
    )
    for key, file_name in names.items():
        kind = tensor_type(
            file_name,
            tuple(weights[key].shape),
            quantisation,
            layers=config.num_hidden_layers,
            tied=bool(config.tie_word_embeddings),
            large=large,
        )
        ours = partial(to_file, file_name, family=family, config=config)
        entries.append(_Entry(name=file_name, tensor=weights[key].detach(), kind=kind, laid_out=ours))
    _write(path, family.architecture, metadata, entries)
    return vocabulary.notes


def _ends(model: PreTrainedModel) -> list[int]:
    """The tokens at which the model's own answers end, besides the tokenizer's end token."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None) or []
    return [ends] if isinstance(ends, int) else list(ends)


def write_lora(
    path: Path,
    lora: PlainLora,
    config: PretrainedConfig,
    *,
    name: str | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write a plain LoRA as one file, which llama.cpp and Ollama apply to its base in any quantisation.

    Args:
        path: the file to write.
        lora: what PEFT saves as one LoRA, ours or anybody's.
        config: of its base.
        name: for people, "general.name".
        fingerprint: of the base, kept in the file.

    Raises:
        ModelError: the base's family is not known, or the LoRA holds more than llama.cpp applies.
        ConfigError: the gguf package is missing.
    """
    label = name or path.stem
    check_plain(label, lora.config)
    if lora.config.modules_to_save or lora.config.bias != "none":
        what = f"modules_to_save={sorted(lora.config.modules_to_save or ())}"
        what = f"bias={lora.config.bias!r}" if lora.config.bias != "none" else what
        raise ModelError(
            f"{label} was trained with {what}, which a LoRA for llama.cpp cannot hold; merge it into the base."
        )
    family = family_of(config)
    names = Names(family, config.num_hidden_layers)
    entries = []
    for module, (A, B) in sorted(_pairs(label, lora).items()):
        place = names.of_module(module)
        if place is None or place.rpartition(".")[2] not in _PLACES:
            raise ModelError(
                f"{label} changes {module!r}, where llama.cpp applies no LoRA; merge it into the base."
            )
        # llama.cpp scales by lora_alpha / the layer's own rank, whatever the patterns say
        ratio = _scaling(lora, module) / (lora.config.lora_alpha / A.shape[0])
        B = B.double() * ratio if ratio != 1.0 else B.double()
        B = to_file(f"{place}.weight", B, family, config)
        entries += [
            _Entry(name=f"{place}.weight.lora_a", tensor=A),
            _Entry(name=f"{place}.weight.lora_b", tensor=B),
        ]
    metadata = {
        "general.type": "adapter",
        "general.name": label,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(lora.config.lora_alpha),
        FINGERPRINT: fingerprint,
    }
    _write(path, family.architecture, metadata, entries)


def _pairs(label: str, lora: PlainLora) -> dict[str, tuple[Tensor, Tensor]]:
    """Module to A (R, D) and B (O, R)."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in lora.weights.items():
        module, mark, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
        if not mark or leaf not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ModelError(
                f"{label} holds {key!r}, which is no LoRA of a linear layer; merge it into the base."
            )
        found.setdefault(module, {})[leaf[0]] = tensor
    for module, parts in found.items():
        if parts.keys() != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise ModelError(f"{label} is incomplete at {module!r}; save the LoRA again.")
    if not found:
        raise ModelError(f"{label} holds no weights; save the LoRA again.")
    return {module: (parts["A"], parts["B"]) for module, parts in found.items()}


def _scaling(lora: PlainLora, module: str) -> float:
    """What PEFT multiplies B A with in this layer."""
    config = lora.config
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
    return float(alpha) / (math.sqrt(rank) if config.use_rslora else rank)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of a file."""

    name: str
    tensor: Tensor
    kind: str = "F32"
    laid_out: Callable[[Tensor], Tensor] | None = None
    """Puts a weight into the file's layout; done when it is written, so that one copy at a time is in memory."""

    def values(self) -> NDArray[np.float32]:
        wide = self.tensor.double() if self.tensor.dtype == torch.float64 else self.tensor.float()
        ours = wide if self.laid_out is None else self.laid_out(wide)
        return ours.to("cpu", torch.float32).contiguous().numpy()


def _write(path: Path, architecture: str, metadata: Mapping[str, Any], entries: Sequence[_Entry]) -> None:
    gguf = gguf_library()
    with _appearing(path) as beside, contextlib.closing(gguf.GGUFWriter(beside, architecture)) as writer:
        for key, value in metadata.items():
            if value is not None:
                _add(writer, key, value)
        for entry in entries:
            stored = gguf.GGMLQuantizationType[entry.kind]
            block, size = gguf.GGML_QUANT_SIZES[stored]
            length = entry.tensor.numel() // block * size
            writer.add_tensor_info(
                entry.name, tuple(entry.tensor.shape), np.dtype(np.float32), length, raw_dtype=stored
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(packed(entry.name, entry.values(), entry.kind))


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file to fill, which gets its name when it is whole; after an error nothing is left.

    Raises:
        ModelError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be written ({error.strerror or error}); choose another place."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
