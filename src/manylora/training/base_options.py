"""What transformers is told of a base beside its weights: what computes its attention, and how it is quantised."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from manylora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from manylora.training.config import Quantisation
    from manylora.training.heads import Head
    from manylora.training.settings import Attention

_NEEDS_GPU = ("flash_attention_2", "flex_attention")
"""Of flash attention there is no CPU version, and torch's flex attention has no backward pass there (2.13)."""
_FLASH = "attention flash_attention_2 needs another package: pip install flash-attn --no-build-isolation"


def attention_options(
    attention: Attention, head: Head, architecture: PretrainedConfig, *, model: str, device: torch.device
) -> dict[str, str]:
    """The keywords by which transformers computes attention as asked; none where it chooses itself.

    Args:
        attention: the implementation.
        head: what the base is loaded as.
        architecture: of the base.
        model: the base, for the error.
        device: where it will be trained.

    Raises:
        ConfigError: the device, this installation or the model does not have it.
    """
    if attention == "auto":
        return {}
    if attention in _NEEDS_GPU and device.type == "cpu":
        raise ConfigError(f"attention {attention} trains on a GPU alone; on this CPU take sdpa or eager.")
    options: dict[str, str] = {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            head.loader.from_config(architecture, **options)
    except ImportError as error:
        raise ConfigError(f"{_FLASH}.") from error
    except ValueError as error:
        raise ConfigError(
            f"attention {attention} is not there for {model} (transformers has none for type "
            f"{architecture.model_type!r}); leave it out, or take eager."
        ) from error
    return options


def quantisation_options(
    quantize: Quantisation | None,
    architecture: PretrainedConfig,
    *,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The keywords by which transformers loads a base in bitsandbytes' 4 or 8 bit; none where that is not asked for.

    4 bit is NF4 with double quantisation, as in QLoRA (arXiv 2305.14314).

    Args:
        quantize: how.
        architecture: of the base.
        model: the base, for the error.
        device: where it will be.
        dtype: in which it computes.

    Raises:
        ConfigError: bitsandbytes is not installed, or the base is quantised already.
    """
    if quantize is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantize {quantize} needs another package: pip install 'manylora[quantised]'.")
    if getattr(architecture, "quantization_config", None):
        raise ConfigError(f"quantize {quantize}: {model} is quantised already; leave it out.")
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantize == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    place = torch.cuda.current_device() if device.type == "cuda" else device.type
    return {"quantization_config": settings, "device_map": {"": place}}


def quantised_bytes(model: PeftModel, quantize: Quantisation) -> int:
    """Bytes of the frozen weights of a base that stands there unquantised, once its linear layers are quantised.

    4 bit: half a byte a number, and for each block of 64 a scale of one byte, for each 256 of these one of four bytes;
    8 bit: one byte a number, and four for each row. The head over the vocabulary stays as it is.
    """
    head = model.get_base_model().get_output_embeddings()
    kept = head.weight if isinstance(head, nn.Linear) else None
    linear = {
        id(layer.weight): layer.weight
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad and layer.weight is not kept
    }
    others = sum(p.nbytes for p in model.parameters() if not p.requires_grad and id(p) not in linear)
    if quantize == "8bit":
        return others + sum(weight.numel() + 4 * weight.shape[0] for weight in linear.values())
    return others + sum(
        round(weight.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256))) for weight in linear.values()
    )
