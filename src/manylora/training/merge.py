"""Merged full weights: a plain LoRA folded into its base, for programs that know transformers alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftConfig, get_peft_model
from torch import nn

from manylora.adapters import PlainLora, import_loras, put_weights
from manylora.training.models import check_base, load_base, load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDINGS = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")
_TOKEN_ROWS = "token_adapter"
"""Part of the names of trained token rows, which PEFT gives both embeddings where they are one matrix."""


def _changes_embedding(lora: PlainLora) -> bool:
    """Whether a LoRA changes an embedding as a whole: trains it in full, or has matrices for it."""
    keys = (key.split(".") for key in lora.weights if _TOKEN_ROWS not in key)
    return any(part in _EMBEDDINGS for parts in keys for part in parts)


def _untie(base: PreTrainedModel) -> None:
    """Give a base whose two embeddings are one matrix two, so that one of them can be changed alone."""
    head = base.get_output_embeddings()
    if head is None or head.weight is not base.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(found): found for found in (base.config, base.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def merged(
    base: str,
    lora: PlainLora,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trained: PeftConfig | None = None,
    mark: str | None = None,
) -> PreTrainedModel:
    """The base with the LoRA added to its weights; sums run in float32 and are rounded once.

    Args:
        base: the base model.
        lora: what to merge.
        dtype: type of the result; "auto": that of the base's files.
        device: where to compute; "auto": a GPU where there is one.
        trained: settings of the adapter that the LoRA comes from, which tell the base it was trained on.
        mark: of that base, where the settings have no place for one.

    Raises:
        ModelError: the base cannot be loaded, is another one, does not fit, or the result is not finite.
    """
    if dtype == "auto":
        dtype = str(getattr(load_config(base), "dtype", None) or "float32").removeprefix("torch.")
    config, weights = import_loras({"lora": lora})
    plain_base = load_base(base, dtype=dtype, device=device)
    if trained is not None:
        check_base(plain_base, trained, source="The adapter", mark=mark)
    if _changes_embedding(lora):
        _untie(plain_base)
    # inference mode off: PEFT would cast the adapter's weights to the base's type before they are added
    model = get_peft_model(plain_base, config, autocast_adapter_dtype=True)
    put_weights(model, weights, source="The adapter", target=base)
    with model.base_model.route(0), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Input and output embeddings are no longer tied"
        )  # as they must be
        plain: PreTrainedModel = model.base_model.merge_and_unload(safe_merge=True)
    return plain.eval()


def write_merged(
    folder: Path,
    base: str,
    lora: PlainLora,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trained: PeftConfig | None = None,
    mark: str | None = None,
) -> None:
    """Write merged weights and the base's tokenizer into `folder`; transformers alone loads them. See `merged`."""
    model = merged(base, lora, dtype=dtype, device=device, trained=trained, mark=mark)
    model.save_pretrained(str(folder))
    load_tokenizer(base).save_pretrained(str(folder))
