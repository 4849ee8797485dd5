"""Merged full weights: a plain LoRA folded into its base, for programs that know transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peft import get_peft_model, set_peft_model_state_dict

from manylora.adapters import PlainLora, import_loras
from manylora.errors import ModelError
from manylora.training.models import load_base, load_config, load_tokenizer

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


def merged(base: str, lora: PlainLora, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """The base with the LoRA added to its weights; sums run in float32 and are rounded once.

    Args:
        base: the base model.
        lora: what to merge.
        dtype: type of the result; "auto": that of the base's files.
        device: where to compute; "auto": a GPU where there is one.

    Raises:
        ModelError: the base cannot be loaded, does not fit, or the result is not finite.
    """
    if dtype == "auto":
        dtype = str(getattr(load_config(base), "dtype", None) or "float32").removeprefix("torch.")
    config, weights = import_loras({"lora": lora})
    # inference mode off: PEFT would cast the adapter's weights to the base's type before they are added
    model = get_peft_model(load_base(base, dtype=dtype, device=device), config, autocast_adapter_dtype=True)
    try:
        found = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise ModelError(f"The adapter does not fit {base} ({str(error).splitlines()[0]}).") from error
    missing = [key for key in found.missing_keys if "manylora_" in key]
    if missing or found.unexpected_keys:
        raise ModelError(
            f"The adapter does not fit {base}: {(missing or found.unexpected_keys)[0]!r} has no counterpart."
        )
    with model.base_model.route(0):
        plain: PreTrainedModel = model.base_model.merge_and_unload(safe_merge=True)
    return plain.eval()


def write_merged(
    folder: Path, base: str, lora: PlainLora, *, dtype: str = "auto", device: str = "auto"
) -> None:
    """Write merged weights and the base's tokenizer into `folder`; transformers alone loads them."""
    merged(base, lora, dtype=dtype, device=device).save_pretrained(str(folder))
    load_tokenizer(base).save_pretrained(str(folder))
