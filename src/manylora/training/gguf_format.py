"""What a GGUF file and a transformers model call the same thing: settings, weights and their layout, both ways.

GGUF is llama.cpp's file format. A family is one of its architectures and the transformers models that are it. Each
states what the other side can say; whatever it cannot say exactly is refused here, so that no file is written or read
that would answer differently. Source: the conversion scripts and model code of llama.cpp (b11434).

Shape letters: H heads, D input width.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manylora.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which a file of a Llama 3.1 or later carries besides the model's weights."""

_SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_CAPPED_AT = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""Where llama.cpp caps Gemma 2's logits if the file does not say it."""
_HEAD_LENGTHS = (
    "attention.value_length", "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count",
    "rope.dimension_count_swa",
)  # fmt: skip
"""Further keys of a file that must all say head_dim, as transformers has one length for all."""
_LLAMA3_ROPE = [
    {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]
"""The settings of Llama 3.1 and 3.3 (8) and of Llama 3.2 (32): a file holds only the divisors that follow from them."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of llama.cpp."""

    architecture: str
    model_types: tuple[str, ...]
    """transformers' names of the models that are it; a file is read as the first."""
    settings: Mapping[str, str] = field(default_factory=lambda: _SETTINGS)
    """Metadata key, without the architecture before it, to the attribute of transformers' config."""
    activation: str = "silu"
    permuted: bool = False
    """Whether the rows of q and k stand in pairs (i, i + half a head) in the file; transformers has the halves."""
    norm_offset: float = 0.0
    """What the file's norm weights have more than transformers'."""
    always_tied: bool = False
    windows_every: int | None = None
    """Every layer but each n-th reads through a sliding window; None: no layer does."""
    largest: int | None = None
    """Layers of the one size whose attention is divided by another number; llama.cpp knows it by them."""
    full_width_heads: bool = False
    """Whether llama.cpp takes heads × head_dim to be the hidden size."""


_GEMMA = Family(
    architecture="gemma",
    model_types=("gemma",),
    activation="gelu_pytorch_tanh",
    norm_offset=1.0,
    always_tied=True,
)
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {name: name for name in _CAPPED_AT}

FAMILIES = (
    Family(architecture="llama", model_types=("llama", "mistral"), permuted=True),
    Family(architecture="qwen2", model_types=("qwen2",), full_width_heads=True),
    Family(architecture="qwen3", model_types=("qwen3",)),
    _GEMMA,
    replace(
        _GEMMA, architecture="gemma2", model_types=("gemma2",), windows_every=2, largest=46,
        settings={**_SETTINGS, **_WINDOW, **_CAPS},
    ),
    replace(
        _GEMMA, architecture="gemma3", model_types=("gemma3_text",), windows_every=6, largest=62, always_tied=False,
        settings={**_SETTINGS, **_WINDOW},
    ),
)  # fmt: skip


def gguf_library() -> Any:
    """The `gguf` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "GGUF files are read and written by the gguf package; install it: pip install gguf."
        ) from error


def family_of(config: PretrainedConfig) -> Family:
    """The family of a transformers model, where its settings can be said in a GGUF file.

    Raises:
        ModelError: no such family, or a setting that llama.cpp would read otherwise.
    """
    kind = str(config.model_type)
    family = next((family for family in FAMILIES if kind in family.model_types), None)
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.model_types)
        raise ModelError(f"A model of type {kind!r} cannot be written as GGUF; those can: {known}.")
    for name, found, needed in _demands(family, config):
        if found != needed:
            raise ModelError(
                f"This {kind} model has {name}={found!r}, which a GGUF file of llama.cpp's {family.architecture!r} "
                f"cannot say (it means {needed!r}); serve it from its own folder."
            )
    return family


def _demands(family: Family, config: PretrainedConfig) -> Iterable[tuple[str, Any, Any]]:
    """Setting, what the config has, and what llama.cpp takes for granted."""
    heads, width = config.num_attention_heads, config.hidden_size
    head = _head_dim(config)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    yield "hidden_act", activation, family.activation
    if family.always_tied:
        yield "tie_word_embeddings", bool(config.tie_word_embeddings), True
    if family.full_width_heads:
        yield "head_dim", head, width // heads
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        largest = family.largest == config.num_hidden_layers
        yield "query_pre_attn_scalar", scalar, width // heads if largest else head
    for name, default in _CAPPED_AT.items():
        value = getattr(config, name, None)
        yield name, value, (value or default) if name in family.settings else None
    if family.architecture == "gemma3":
        yield (
            "use_bidirectional_attention",
            bool(getattr(config, "use_bidirectional_attention", False)),
            False,
        )
    if family.windows_every is not None:
        yield "layer_types", list(config.layer_types), layer_types(family, config.num_hidden_layers)


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_types(family: Family, layers: int) -> list[str]:
    """transformers' names of what each layer reads, as llama.cpp lays them out."""
    every = family.windows_every
    return [
        "sliding_attention" if every is not None and (layer + 1) % every else "full_attention"
        for layer in range(layers)
    ]


def metadata_of(config: PretrainedConfig, family: Family) -> dict[str, int | float | str]:
    """The metadata under the architecture's name that says what the config says.

    Raises:
        ModelError: rotary embeddings that cannot be said.
    """
    head = _head_dim(config)
    values: dict[str, int | float | str] = {"attention.value_length": head, "rope.dimension_count": head}
    for key, name in family.settings.items():
        value = head if name == "head_dim" else getattr(config, name, None)
        if value is not None:
            values[key] = float(value) if key.endswith(("softcapping", "epsilon")) else int(value)
    # llama.cpp gives this family no window, so its context ends where the window would begin to matter
    window = getattr(config, "sliding_window", None)
    if family.windows_every is None and window is not None and getattr(config, "use_sliding_window", True):
        values["context_length"] = min(int(values["context_length"]), int(window))
    values.update(_rope_metadata(config, family))
    return values


def _rope_of(config: PretrainedConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Rotary settings of the layers that read everything, and of those with a window where they differ."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in parameters:
        return dict(parameters["full_attention"]), dict(parameters["sliding_attention"])
    return parameters, None


def _rope_metadata(config: PretrainedConfig, family: Family) -> dict[str, int | float | str]:
    rope, windowed = _rope_of(config)
    kind = rope.get("rope_type", "default")
    values: dict[str, int | float | str] = {"rope.freq_base": float(rope.get("rope_theta", 10000.0))}
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "llama3" and family.architecture != "llama":  # there by a tensor: see `rope_divisors`
        kind = f"llama3 in a {family.architecture}"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        kind = f"partial ({rope['partial_rotary_factor']})"
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(
            f"This model has rotary embeddings of type {kind!r}, which are not written as GGUF; default, linear and "
            "llama3 are. Serve it from its own folder."
        )
    if windowed is not None:
        if windowed.get("rope_type", "default") != "default":
            raise ModelError(
                f"This model's windowed layers have rotary embeddings of type {windowed['rope_type']!r}, which a GGUF "
                "file cannot say; serve it from its own folder."
            )
        values["rope.freq_base_swa"] = float(windowed.get("rope_theta", 10000.0))
    return values


def rope_divisors(config: PretrainedConfig) -> Tensor | None:
    """What `ROPE_FREQS` holds for this config (head_dim / 2,), or None where it has none."""
    rope, _ = _rope_of(config)
    return _divisors(rope, _head_dim(config)) if rope.get("rope_type") == "llama3" else None


def _divisors(rope: Mapping[str, Any], head: int) -> Tensor:
    """Llama 3.1's stretching of long wavelengths (transformers' `_compute_llama3_parameters`)."""
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    length, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    divisors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


def settings_of(
    metadata: Mapping[str, Any], tensors: Mapping[str, Callable[[], Tensor]]
) -> tuple[Family, dict[str, Any]]:
    """The family of a GGUF file, and what transformers' config of it is made from.

    Args:
        metadata: all of the file's metadata but the vocabulary.
        tensors: the name of each tensor in the file, and how to read it.

    Raises:
        ModelError: another architecture, or a setting that this reader does not understand.
    """
    name = metadata.get("general.architecture")
    family = next((family for family in FAMILIES if family.architecture == name), None)
    if family is None:
        known = ", ".join(family.architecture for family in FAMILIES)
        raise ModelError(
            f"its architecture is {name!r}, and those of {known} are read; give the model's folder in safetensors"
        )
    stated = {key.partition(".")[2]: value for key, value in metadata.items() if key.startswith(f"{name}.")}
    values: dict[str, Any] = {}
    for key, attribute in family.settings.items():
        if key in stated:
            values[attribute] = stated.pop(key)
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values["rope_parameters"] = _rope_settings(stated, family, values, tensors)
    if family.windows_every is not None:
        values["layer_types"] = layer_types(family, values["num_hidden_layers"])
        width = values["hidden_size"] // values["num_attention_heads"]
        largest = family.largest == values["num_hidden_layers"]
        values["query_pre_attn_scalar"] = width if largest else values["head_dim"]
    expected = dict.fromkeys(_HEAD_LENGTHS, values["head_dim"])
    expected |= {"attention.sliding_window_pattern": family.windows_every, "attention.causal": True}
    expected |= {"expert_count": 0, "expert_used_count": 0}
    if strange := [key for key, value in stated.items() if expected.get(key) != value]:
        key, value = strange[0], stated[strange[0]]
        raise ModelError(
            f"it says {name}.{key} = {value!r}, which this reader does not understand; give the model's folder in "
            "safetensors"
        )
    values["tie_word_embeddings"] = "output.weight" not in tensors
    if name in ("llama", "qwen3"):
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if name == "llama":
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    return family, values


def _rope_settings(
    stated: dict[str, Any],
    family: Family,
    values: Mapping[str, Any],
    tensors: Mapping[str, Callable[[], Tensor]],
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": stated.pop("rope.freq_base", 10000.0)}
    kind, factor = stated.pop("rope.scaling.type", "none"), stated.pop("rope.scaling.factor", 1.0)
    stated.pop("rope.scaling.finetuned", None)  # how the model came to its scaling, which changes nothing
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        stated["rope.scaling.type"] = kind
    else:
        stated.pop("rope.scaling.original_context_length", None)
    if ROPE_FREQS in tensors:
        found = tensors[ROPE_FREQS]()
        known = [{**rope, "rope_type": "llama3", **settings} for settings in _LLAMA3_ROPE]
        match = [each for each in known if _is_close(_divisors(each, values["head_dim"]), found)]
        if not match:
            raise ModelError(
                "its rotary embeddings are stretched in a way that is none of Llama 3.1's to 3.3's; give the model's "
                "folder in safetensors"
            )
        rope = match[0]
    windowed = stated.pop("rope.freq_base_swa", 10000.0)
    if family.architecture != "gemma3":
        return rope
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": windowed},
    }


def _is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4)


class Names:
    """The GGUF names of a model's weights."""

    def __init__(self, family: Family, layers: int) -> None:
        gguf = gguf_library()
        architecture = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
        self._known = gguf.get_tensor_name_map(architecture, layers)

    def of_module(self, module: str) -> str | None:
        """The file's name of a module ("model.layers.0.mlp.up_proj" is "blk.0.ffn_up"); None where it has none."""
        name = self._known.get_name(module)
        return str(name) if name else None

    def of_weights(self, model: nn.Module) -> dict[str, str]:
        """The name in transformers to the name in the file, of every weight that a file holds.

        Raises:
            ModelError: a weight that a file has no name for.
        """
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        names: dict[str, str] = {}
        for key in model.state_dict():
            module, _, leaf = key.rpartition(".")
            if tied and module == "lm_head":
                continue
            name = self.of_module(module)
            if name is None or leaf not in ("weight", "bias"):
                raise ModelError(
                    f"The model's weight {key!r} has no name in GGUF; serve it from its own folder."
                )
            names[key] = f"{name}.{leaf}"
        return names


def to_file(name: str, weight: Tensor, family: Family, config: PretrainedConfig) -> Tensor:
    """A weight, a bias, or a LoRA's B, with its rows as the file has them.

    Args:
        name: its name in the file.
        weight: (O, …) as transformers has it.
        family: the model's.
        config: the model's.
    """
    if family.norm_offset and name.endswith("norm.weight"):
        return weight.float() + family.norm_offset
    if heads := _permuted_heads(name, family, config):
        # (H, 2, half, …) to (H, half, 2, …)
        return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    return weight


def from_file(name: str, weight: Tensor, family: Family, config: PretrainedConfig) -> Tensor:
    """The inverse of `to_file`."""
    if family.norm_offset and name.endswith("norm.weight"):
        return weight.float() - family.norm_offset
    if heads := _permuted_heads(name, family, config):
        return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    return weight


def _permuted_heads(name: str, family: Family, config: PretrainedConfig) -> int:
    """How many heads the rows of this tensor make where they are permuted, else 0."""
    if not family.permuted:
        return 0
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else 0
