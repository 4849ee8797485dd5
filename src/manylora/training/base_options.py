"""What transformers is told of a base beside its weights: what computes its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from manylora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
