"""Adapter folders on disk: read ours and plain LoRAs, write both. Safetensors only: nothing unpickles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.adapters.arrival import check_finite
from manylora.adapters.config import FORMAT_VERSION, ManyLoraConfig, ManyLoraType
from manylora.adapters.export import PREFIX, PlainLora
from manylora.adapters.patterns import check_pattern, check_time, expressions_of
from manylora.errors import ManyLoraError, ModelError
from manylora.files import check_noted, read_json, reason

_LARGEST_SCALE = 1e15
"""Of a LoRA's alpha, as of ours: beyond, float32 overflows."""
_LARGEST_SIDE, _SIDES = 4096, 64
"""Ranks up to the first, or so many times a side of a weight, cost no memory to speak of."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """An adapter's weights from a safetensors file, as copies; the one place where such a file is opened.

    Raises:
        ModelError: the file is damaged, or holds values that are not finite.
        RunError: it is not what its run wrote.
    """
    check_noted(path)
    try:
        # copies: the loaded tensors are the file itself, which another program may replace
        weights = {key: tensor.clone() for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"The weights in {path} are broken ({error}).") from error
    check_finite(weights, path)
    return weights


def read_adapter(folder: Path) -> tuple[ManyLoraConfig, dict[str, Tensor]]:
    """Settings and weights of a saved ManyLoRA adapter.

    Raises:
        ModelError: no such adapter, one of another method, or damaged files.
    """
    values = _settings(folder)
    kind = values.get("peft_type")
    if kind != ManyLoraType.MANYLORA.value:
        remedy = (
            "a plain LoRA needs no export (--merge writes it into its base)"
            if kind == "LORA"
            else "only those can be exported"
        )
        raise ModelError(f"{folder} holds a {kind} adapter, not one of ManyLoRA; {remedy}.")
    return _built(ManyLoraConfig, values, folder), _weights(folder, values)


def read_lora(folder: Path) -> PlainLora:
    """A LoRA as PEFT saves it.

    Raises:
        ModelError: no such LoRA, an adapter of another method, settings this PEFT does not know, or damaged files.
    """
    values = _settings(folder)
    if values.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder} holds a {values.get('peft_type')} adapter, not a plain LoRA; give LoRA folders."
        )
    return PlainLora(config=_built(LoraConfig, values, folder), weights=_weights(folder, values))


def read_any(
    folder: Path, *, weights: Path | None = None
) -> tuple[ManyLoraConfig | dict[str, Any], dict[str, Tensor]]:
    """Settings and weights for readers of matrices alone: another method's settings stay as the file has them.

    Args:
        folder: adapter of any PEFT method.
        weights: a safetensors file to read in place of the folder's own.

    Raises:
        ModelError: no adapter there, pickled weights, or damaged files.
    """
    values = _settings(folder, built=False)
    ours = values.get("peft_type") == ManyLoraType.MANYLORA.value
    config = _built(ManyLoraConfig, values, folder) if ours else values
    return config, _weights(folder, values) if weights is None else read_weights(weights)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter of any PEFT method, as its file has them.

    Raises:
        ModelError: there are none, or they are damaged.
        RunError: they are not what the folder's run wrote.
    """
    return _settings(folder, built=False)


def check_folder(folder: Path) -> None:
    """Refuse an adapter folder, before PEFT builds what its settings say, that is damaged or asks for absurd sizes.

    Raises:
        ModelError: no weights, pickled ones, damaged files, or ranks that have nothing to do with the weights.
        ConfigError: an expression that takes too long on the names of the weights.
        RunError: a file is not what the folder's run wrote.
    """
    values, path = _settings(folder), _weights_file(folder)
    check_noted(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            sides = [side for key in names for side in file.get_slice(key).get_shape()]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"The weights in {path} are broken ({error}).") from error
    _check_expressions(values, names)
    if values.get("peft_type") == ManyLoraType.MANYLORA.value:
        return  # whose size is looked at when it is put onto a model
    pattern = values.get("rank_pattern")
    largest = max([_LARGEST_SIDE, *(_SIDES * side for side in sides)])
    for rank in (values.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())):
        if isinstance(rank, int) and rank > largest:
            raise ModelError(
                f"{folder / CONFIG_NAME} asks for rank {rank:,}, which its weights do not have; save the adapter again."
            )
    if values.get("layer_replication"):
        raise ModelError(
            f"{folder / CONFIG_NAME} repeats layers of the base (layer_replication); merge it with PEFT."
        )


def find_loras(folder: Path) -> list[Path]:
    """The LoRA folder meant: itself, or the adapter folders in it, by name.

    Raises:
        ModelError: there is none.
    """
    if (folder / CONFIG_NAME).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise ModelError(
            f"{folder} is no adapter folder and holds none (no {CONFIG_NAME}); give folders that PEFT wrote."
        )
    return found


def write_folder(folder: Path, config: PeftConfig, weights: Mapping[str, Tensor], *, card: str) -> None:
    """Write settings, weights and README.md into a new folder; the same input gives the same bytes.

    Raises:
        ModelError: a weight is not finite.
    """
    check_finite(weights, "What would be written")
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    path = folder / CONFIG_NAME
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):  # sets, which PEFT writes in any order
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _settings(folder: Path, *, built: bool = True) -> dict[str, Any]:
    """The settings; `built`: whether PEFT will build an adapter of them, so that each of them counts."""
    path = folder / CONFIG_NAME
    check_noted(path)
    try:
        values = read_json(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); give an adapter folder.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({reason(error)}); save the adapter again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no settings; save the adapter again.")
    _check_settings(values, path, built=built)
    return values


_KINDS: Mapping[Any, type[PeftConfig]] = {"LORA": LoraConfig, ManyLoraType.MANYLORA.value: ManyLoraConfig}


def _check_settings(values: dict[str, Any], path: Path, *, built: bool) -> None:
    """Refuse, by name, settings that would be passed over in silence, and a plain LoRA's that compute nothing or too
    much; ours are checked where they are built. Settings that are not known and are off are taken out.
    """
    name = values.get("peft_type")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        return
    version = values.get("format_version")
    if kind is ManyLoraConfig and isinstance(version, int) and version > FORMAT_VERSION:
        return  # which has settings of its own; whoever builds it asks for a newer manylora
    known = {field.name for field in dataclasses.fields(kind)} | {"peft_type", "peft_version"}
    if kind is LoraConfig and not built:  # which readers of matrices do not need to know
        known |= values.keys()
    if unknown := sorted(name for name, value in values.items() if name not in known and value):
        raise ModelError(
            f"{path} has settings that the installed "
            + (
                f"PEFT does not know ({', '.join(unknown)}); install the PEFT it was made with."
                if kind is LoraConfig
                else f"manylora does not know ({', '.join(unknown)}); remove them, or install the manylora it was made "
                "with."
            )
        )
    for name in values.keys() - known:
        del values[name]
    if kind is not LoraConfig:
        return
    for setting in ("rank_pattern", "alpha_pattern"):
        if not isinstance(values.get(setting) or {}, dict):
            raise ModelError(f"{path} has a {setting} that is no object; save the adapter again.")
    alphas = {"lora_alpha": values["lora_alpha"]} if "lora_alpha" in values else {}
    alphas |= {
        f"alpha_pattern[{key!r:.80}]": alpha for key, alpha in (values.get("alpha_pattern") or {}).items()
    }
    for name, alpha in alphas.items():
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not 1 / _LARGEST_SCALE <= abs(alpha) <= _LARGEST_SCALE:
            raise ModelError(
                f"{path} has {name}={alpha!r:.40}, which is no scale: the adapter would do nothing, or overflow. "
                f"Give a number such as 16, at most {_LARGEST_SCALE:g}."
            )


def _check_expressions(values: Mapping[str, Any], keys: Collection[str]) -> None:
    """Refuse expressions that are none or that backtrack, on the names of the weights: readers of files match these."""
    expressions = expressions_of(values)
    for setting, found in expressions.items():
        for one in found:
            check_pattern(f"{setting}=", one)
    # the module's name, whatever this kind of adapter puts behind it
    names = {
        ".".join(parts[:end])
        for key in keys
        for parts in [key.removeprefix(PREFIX).split(".")]
        for end in (-1, -2)
    }
    check_time(expressions, sorted(names - {""}))


def _built(kind: type[Any], values: dict[str, Any], folder: Path) -> Any:
    try:
        return kind.from_peft_type(**values)
    except ManyLoraError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(f"{folder / CONFIG_NAME} cannot be used ({reason(error)}).") from error


def _weights_file(folder: Path) -> Path:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ModelError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}; pickled weights are not read.")
    return path


def _weights(folder: Path, values: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = read_weights(_weights_file(folder))
    _check_expressions(values, weights)
    return weights
