"""How an encoder makes one vector of a row: as its folder says, where sentence-transformers wrote it.

A BERT classifier reads the first token. An encoder that was trained for the mean of its tokens keeps little there: on
300 questions of TREC's six kinds a linear probe of all-MiniLM-L6-v2 is right on 33 % of 200 test rows by the first
token's vector, and on 62 % by the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from manylora.errors import ModelError
from manylora.files import read_json, reason

POOLING = Path("1_Pooling") / "config.json"
"""Where sentence-transformers says how tokens become one vector."""


class MeanPooler(nn.Module):
    """The mean over a row's real tokens, in place of a BERT's pooler; B rows, T tokens, D wide."""

    def __init__(self) -> None:
        super().__init__()
        self._mask: Tensor | None = None

    def read_mask(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the encoder: note the running call's attention mask."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states to (B, D)."""
        mask, self._mask = self._mask, None
        if mask is None:
            return hidden_BTD.mean(1)
        real_BT1 = mask.to(hidden_BTD.dtype)[..., None]
        return (hidden_BTD * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)


def pool_as_told(model: PreTrainedModel, location: str) -> None:
    """Let a classifier read the mean of the tokens where its folder says that this is the encoder's vector.

    Changes models whose encoder has a pooler of its own (BERT, MPNet, …); others stay as they are.

    Raises:
        ModelError: what the folder says is damaged.
    """
    told = Path(location) / POOLING
    if not told.is_file() or not isinstance(getattr(model.base_model, "pooler", None), nn.Module):
        return
    try:
        settings = read_json(told)
    except (OSError, ValueError) as error:
        raise ModelError(f"{told} cannot be read ({reason(error)}); put a copy of it back.") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{told} holds no settings; put a copy of it back.")
    if settings.get("pooling_mode_mean_tokens") or settings.get("pooling_mode") == "mean":
        pooler = MeanPooler()
        model.base_model.pooler = pooler
        model.base_model.register_forward_pre_hook(pooler.read_mask, with_kwargs=True)
