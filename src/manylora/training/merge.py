"""Merged full weights: a plain LoRA folded into its base, for programs that know transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft import get_peft_model

from manylora.adapters import ManyLoraConfig, PlainLora, import_loras, put_weights
from manylora.errors import ModelError
from manylora.training.models import check_base, load_base, load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIED = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")


def check_mergeable(base: str, lora: PlainLora) -> None:
    """Refuse, before weights are loaded, what merged weights cannot hold.

    Raises:
        ModelError: the base uses one matrix for its input and output tokens, and the LoRA changes one of the two.
    """
    if not getattr(load_config(base), "tie_word_embeddings", False):
        return
    touched = {part for key in lora.weights for part in key.split(".") if part in _TIED}
    if touched:
        raise ModelError(
            f"{base} uses one matrix for input and output embeddings, and the adapter changes {sorted(touched)[0]}; "
            "merged weights cannot hold both. Export without --merge."
        )


def merged(
    base: str,
    lora: PlainLora,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trained: ManyLoraConfig | None = None,
) -> PreTrainedModel:
    """The base with the LoRA added to its weights; sums run in float32 and are rounded once.

    Args:
        base: the base model.
        lora: what to merge.
        dtype: type of the result; "auto": that of the base's files.
        device: where to compute; "auto": a GPU where there is one.
        trained: settings of the adapter that the LoRA comes from, which tell the base it was trained on.

    Raises:
        ModelError: the base cannot be loaded, is another one, does not fit, or the result is not finite.
    """
    if dtype == "auto":
        dtype = str(getattr(load_config(base), "dtype", None) or "float32").removeprefix("torch.")
    config, weights = import_loras({"lora": lora})
    # inference mode off: PEFT would cast the adapter's weights to the base's type before they are added
    model = load_base(base, dtype=dtype, device=device)
    if trained is not None:
        check_base(model, trained, source="The adapter")
    model = get_peft_model(model, config, autocast_adapter_dtype=True)
    put_weights(model, weights, source="The adapter", target=base)
    with model.base_model.route(0):
        plain: PreTrainedModel = model.base_model.merge_and_unload(safe_merge=True)
    return plain.eval()


def write_merged(
    folder: Path,
    base: str,
    lora: PlainLora,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trained: ManyLoraConfig | None = None,
) -> None:
    """Write merged weights and the base's tokenizer into `folder`; transformers alone loads them. See `merged`."""
    merged(base, lora, dtype=dtype, device=device, trained=trained).save_pretrained(str(folder))
    load_tokenizer(base).save_pretrained(str(folder))
