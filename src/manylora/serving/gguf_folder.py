"""The folder that `ollama create` and llama.cpp's server take: the base once, a LoRA and a Modelfile per task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.adapters import PlainLora
from manylora.errors import ConfigError
from manylora.serving.gguf import write_lora, write_model
from manylora.serving.gguf_types import Quantisation, check_quantisation
from manylora.serving.ollama import PromptForm, chat_parts, modelfile
from manylora.training.fingerprint import base_fingerprint
from manylora.training.gguf_base import find_gguf
from manylora.training.gguf_format import family_of
from manylora.training.merge import merged
from manylora.training.models import load_base, load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_gguf_folder(
    folder: Path,
    base: str,
    loras: Mapping[str, PlainLora],
    *,
    quantisation: Quantisation | None = "f16",
    merge: bool = False,
    prompt: PromptForm = "alpaca",
    device: str = "auto",
) -> tuple[str, ...]:
    """Write every task's files.

    `base-Q.gguf`, and per LoRA `NAME.gguf` and `NAME.Modelfile`; with `merge`, `NAME-Q.gguf` in their place. Everything
    that would be refused is refused before weights are loaded, but for values that a type cannot hold.

    Args:
        folder: where; made if need be.
        base: the base model, by the name that it was trained under.
        loras: file name, without an end, to LoRA.
        quantisation: of the base; None: no base is written, as `base` is a GGUF file itself.
        merge: write whole models with the LoRA merged in, and no base.
        prompt: how the training rows were written; see `modelfile`.
        device: where merging computes.

    Returns:
        Where llama.cpp's tokens differ from the tokenizer's, one sentence each.

    Raises:
        ConfigError: settings that contradict each other, or a missing package.
        ModelError: what a file cannot hold; see `write_model` and `write_lora`.
    """
    config, tokenizer = load_config(base), load_tokenizer(base)
    source = None if quantisation is not None else find_gguf(base)
    if quantisation is None and (merge or source is None):
        raise ConfigError(
            "Merged models are written in a quantisation; choose one."
            if merge
            else f"{base} is not a GGUF file, so its own is needed; choose a quantisation."
        )
    if quantisation is not None:
        check_quantisation(quantisation)
    family_of(config)
    if prompt == "chat":
        chat_parts(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if merge and quantisation is not None:
        return _write_merged(folder, base, loras, tokenizer, quantisation, prompt=prompt, device=device)
    model = load_base(base, dtype="float32", device="cpu")
    fingerprint = base_fingerprint(model)
    for name, lora in loras.items():
        write_lora(folder / f"{name}.gguf", lora, config, name=name, fingerprint=fingerprint)
        place = str(source.absolute()) if source is not None else f"./base-{quantisation}.gguf"
        _write_modelfile(folder, name, place, f"./{name}.gguf", prompt, tokenizer)
    if quantisation is None:
        return ()
    return write_model(
        folder / f"base-{quantisation}.gguf",
        model,
        tokenizer,
        quantisation=quantisation,
        name=base,
        fingerprint=fingerprint,
        chat=prompt == "chat",
    )


def _write_merged(
    folder: Path,
    base: str,
    loras: Mapping[str, PlainLora],
    tokenizer: PreTrainedTokenizerBase,
    quantisation: Quantisation,
    *,
    prompt: PromptForm,
    device: str,
) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    for name, lora in loras.items():
        # in float32, whatever the base's files have: the file's own type rounds once
        model: PreTrainedModel = merged(base, lora, dtype="float32", device=device)
        file = f"{name}-{quantisation}.gguf"
        notes = write_model(
            folder / file, model, tokenizer, quantisation=quantisation, name=name, chat=prompt == "chat"
        )
        _write_modelfile(folder, name, f"./{file}", None, prompt, tokenizer)
    return notes


def _write_modelfile(
    folder: Path,
    name: str,
    model: str,
    adapter: str | None,
    prompt: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = modelfile(model, adapter=adapter, prompt=prompt, tokenizer=tokenizer)
    (folder / f"{name}.Modelfile").write_text(text, encoding="utf-8")
