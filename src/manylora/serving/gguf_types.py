"""How the numbers of a GGUF file are stored: which type each tensor gets, and packing it.

The gguf package packs all types but those with 256 numbers a block ("K"); those are packed by llama.cpp's own
`ggml_quantize_chunk`, out of the library that the xllamacpp package carries. Which tensor gets which type under
"q4_k_m" is the rule of llama.cpp's `llama-quantize` (src/llama-quant.cpp, b11434) without an importance matrix.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from manylora.errors import ConfigError, ModelError
from manylora.training.gguf_format import gguf_library

Quantisation: TypeAlias = Literal["f32", "bf16", "f16", "q8_0", "q4_k_m"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)

FILE_TYPES: dict[Quantisation, int] = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15, "bf16": 32}
"""llama.cpp's numbers for a whole file (`general.file_type`)."""

_BLOCK = {"Q4_K": 256, "Q6_K": 256, "Q5_0": 32, "Q8_0": 32}
"""Numbers of one row that are packed together."""
_SMALLER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What a tensor gets whose rows are no multiple of 256."""
_F16_LARGEST = 65504.0


def check_quantisation(quantisation: str) -> None:
    """Refuse, before a weight is loaded, what cannot be written here.

    Raises:
        ConfigError: unknown, or it needs a package that is missing.
    """
    if quantisation not in QUANTISATIONS:
        raise ConfigError(
            f"Quantisation {quantisation!r} is unknown. Choose one of {', '.join(QUANTISATIONS)}."
        )
    gguf_library()
    if quantisation == "q4_k_m":
        _ggml()


def tensor_type(
    name: str,
    shape: tuple[int, ...],
    quantisation: Quantisation,
    *,
    layers: int,
    tied: bool,
    large: bool = False,
) -> str:
    """The type of one tensor, by ggml's name ("F32", "Q4_K").

    Args:
        name: its name in the file.
        shape: as in torch, the last one the row that is packed.
        quantisation: of the file.
        layers: of the model.
        tied: whether the token embedding is the output layer too.
        large: a Llama of 80 layers with grouped heads, which llama.cpp gives more bits for v.
    """
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return "F32"
    if quantisation in ("f32", "bf16", "f16"):
        return quantisation.upper()
    if quantisation == "q8_0":
        return "Q8_0" if shape[-1] % _BLOCK["Q8_0"] == 0 else "F16"
    kind = "Q4_K"
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = "Q6_K" if shape[-1] % _BLOCK["Q4_K"] == 0 else "Q8_0"
    elif "attn_v.weight" in name:
        kind = "Q6_K" if _gets_more_bits(name, layers) else "Q5_K" if large else "Q4_K"
    elif "ffn_down" in name:
        kind = "Q6_K" if _gets_more_bits(name, layers) else "Q4_K"
    if shape[-1] % _BLOCK.get(kind, 256):
        kind = _SMALLER.get(kind, kind)
    return kind if shape[-1] % _BLOCK.get(kind, 256) == 0 else "F16"


def _gets_more_bits(name: str, layers: int) -> bool:
    layer, eighth = int(name.split(".")[1]), layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def packed(name: str, values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """A tensor as the file stores it; rounding is to the nearest.

    Raises:
        ModelError: a value that is not finite, or too large for 16 bits.
        ConfigError: the type needs a package that is missing.
    """
    gguf = gguf_library()
    largest = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(largest):
        raise ModelError(f"The tensor {name!r} has values that are not finite; the model is broken.")
    if kind != "F32" and kind != "BF16" and largest > _F16_LARGEST:
        raise ModelError(
            f"The tensor {name!r} has a value of {largest:.3g}, more than float16 holds; write bf16 or f32."
        )
    stored = gguf.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        return _by_ggml(values, int(stored), int(gguf.GGML_QUANT_SIZES[stored][1]))
    return np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(values), stored))


def _by_ggml(values: NDArray[np.float32], kind: int, block_bytes: int) -> NDArray[np.uint8]:
    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
    out = np.zeros((rows.shape[0], rows.shape[1] // 256 * block_bytes), dtype=np.uint8)
    written = _ggml().ggml_quantize_chunk(
        kind, rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1], None
    )
    if written != out.nbytes:
        raise ModelError(
            f"llama.cpp packed {written} bytes where {out.nbytes} belong; use another xllamacpp."
        )
    return out.reshape(*values.shape[:-1], -1)


@functools.cache
def _ggml() -> ctypes.CDLL:
    """llama.cpp's library, after a check that it packs as it should."""
    missing = (
        "q4_k_m is packed by llama.cpp's own code, which {}; install xllamacpp on Linux, or write f16 and convert it "
        "with llama-quantize."
    )
    try:
        library = ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
    except ImportError as error:
        raise ConfigError(missing.format("is not installed")) from error
    except (OSError, AttributeError) as error:
        raise ConfigError(missing.format("this xllamacpp does not offer")) from error
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library
