"""A base model from a GGUF file: dequantised once into a plain folder of safetensors, which every later start loads.

The folders lie under `cache_folder()`/gguf, one for each content of a file and version of this reader. A folder appears
only when it is whole; one that is damaged is made anew, and of two processes that want it one makes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from manylora.errors import ModelError
from manylora.training.gguf_format import ROPE_FREQS, Names, from_file, gguf_library, settings_of
from manylora.training.gguf_vocabulary import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
"""Before the name of an installed package that carries a model."""

VERSION = 1
"""Of this reader: a change of what it makes of a file makes all folders anew."""

MANIFEST = "manylora-gguf.json"
_CHECKED = "checked.json"
_SEEN = "seen"
_EXACT_UP_TO = 1_000_000_000
"""Parameters up to which a quantised file is kept in float32, which holds its values exactly; bfloat16 above, as a
7B model would take 28 GB."""


def cache_folder() -> Path:
    """`MANYLORA_CACHE`, else manylora in the user's cache folder (`XDG_CACHE_HOME`, else ~/.cache)."""
    if own := os.environ.get("MANYLORA_CACHE"):
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path("~/.cache")).expanduser() / "manylora"


def find_gguf(model: str) -> Path | None:
    """The GGUF file meant by `model`: FILE.gguf, or the only one in a folder or in "package:NAME"; None for others.

    A folder or package with a config.json is a model in safetensors, whatever lies beside it.

    Raises:
        ModelError: no such file, several in one place, or one part of a split file.
    """
    path = Path(model).expanduser()
    if model.startswith(PACKAGE):
        name = model.removeprefix(PACKAGE)
        spec = find_spec(name) if name.isidentifier() else None  # of a name without dots, nothing is imported
        roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
        folders = [folder for root in roots for folder in (root, *sorted(root.glob("*/")))]
    elif path.is_dir():
        folders = [path]
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{model} does not exist; give a GGUF file, a model folder or a Hub id.")
        return _whole(path)
    else:
        return None
    if any((folder / "config.json").is_file() for folder in folders):
        return None
    found = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if len(found) > 1:
        raise ModelError(
            f"{model} holds {len(found)} GGUF files ({found[0].name}, {found[1].name}, …); give one of them, "
            f"such as {found[0]}."
        )
    return _whole(found[0]) if found else None


def _whole(path: Path) -> Path:
    stem, mark, count = path.stem.rpartition("-of-")
    if mark and count.isdigit() and stem[-5:].isdigit():
        raise ModelError(
            f"{path} is one part of {int(count)}; join them first: llama-gguf-split --merge {path} WHOLE.gguf."
        )
    return path


def cached_base(path: Path) -> Path:
    """The folder that holds the model of a GGUF file as transformers loads it, made where it is not there yet.

    Raises:
        ConfigError: the gguf package is missing.
        ModelError: the file is damaged, or of a kind that is not read, or the cache cannot be written.
    """
    if not os.access(path, os.R_OK):
        raise ModelError(f"{path} cannot be read; give a file that this user may read.")
    try:
        root = cache_folder() / "gguf"
        root.mkdir(parents=True, exist_ok=True)
        digest = _content_of(path, root / _SEEN)
        folder = root / f"{digest[:32]}-{VERSION}"
        if not _is_whole(folder, digest):
            with _lock(root / f".{folder.name}.lock"):
                if not _is_whole(folder, digest):  # another process may have made it meanwhile
                    _make(folder, path, digest)
    except OSError as error:
        raise ModelError(
            f"The model of {path} cannot be kept in {cache_folder()} ({error.strerror or error}); "
            "set MANYLORA_CACHE to a folder with room."
        ) from error
    return folder


def _content_of(path: Path, seen: Path) -> str:
    """SHA-256 of the file; remembered for as long as the file is not touched, as gigabytes take seconds."""
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    stamp = _stamp(path)
    remembered = _read_json(seen / f"{key}.json")
    if remembered.get("stamp") == stamp:
        return str(remembered["sha256"])
    digest = _sha256(path)
    if _stamp(path) != stamp:
        raise ModelError(f"{path} is being written; start again when it is whole.")
    seen.mkdir(exist_ok=True)
    _write_json(seen / f"{key}.json", {"stamp": stamp, "sha256": digest, "path": str(path.resolve())})
    return digest


def _stamp(path: Path) -> list[int]:
    """What changes whenever a file does: the time of change (ctime) cannot be set back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _is_whole(folder: Path, digest: str) -> bool:
    """Whether the folder holds what was written into it: by checksums, at every change of its files."""
    try:
        manifest = _read_json(folder / MANIFEST)
        if manifest.get("source") != digest or manifest.get("version") != VERSION:
            return False
        stamps = {name: _stamp(folder / name) for name in (MANIFEST, *manifest["files"])}
        if _read_json(folder / _CHECKED) == stamps:
            return True
        if any(_sha256(folder / name) != sha for name, sha in manifest["files"].items()):
            return False
        _write_json(folder / _CHECKED, stamps)
    except (OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def _make(folder: Path, path: Path, digest: str) -> None:
    """Fill a folder beside the final one and rename it; the lock is held."""
    for left in folder.parent.glob(f".{folder.name}.partial*"):  # a killed process's
        shutil.rmtree(left, ignore_errors=True)
    partial_folder = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    print(f"reading {path.name} once, for {folder}", file=sys.stderr)
    try:
        partial_folder.mkdir()
        convert(path, partial_folder)
        files = {each.name: _sha256(each) for each in sorted(partial_folder.iterdir())}
        manifest = {"source": digest, "name": path.name, "version": VERSION, "files": files}
        _write_json(partial_folder / MANIFEST, manifest)
        _write_json(
            partial_folder / _CHECKED, {name: _stamp(partial_folder / name) for name in (MANIFEST, *files)}
        )
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for, and hold, the right to make a folder; the system frees it when a process dies."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # Windows: two makers, the later one's rename fails or replaces like by like
            pass
        yield


def convert(path: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as transformers saves them.

    Weights are in float32, or in the file's own 16 bits where those hold all of its values; quantised files of more
    than a billion parameters are rounded to bfloat16.

    Raises:
        ConfigError: the gguf package is missing.
        ModelError: the file is damaged or of a kind that is not read.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bar over files would stand among our lines
    try:
        model, tokenizer = _read(path)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    except ModelError as error:
        raise ModelError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error


def _read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, to be saved and not to be used (it has weights only), and its tokenizer."""
    metadata, tensors = _open(path)
    family, values = settings_of(
        {key: value for key, value in metadata.items() if not key.startswith("tokenizer.")},
        {name: partial(_dequantised, tensor) for name, tensor in tensors.items()},
    )
    tokenizer = tokenizer_of({key: value for key, value in metadata.items() if key.startswith("tokenizer.")})
    values.setdefault("vocab_size", len(metadata["tokenizer.ggml.tokens"]))
    model = _skeleton(family.model_types[0], values, tokenizer, metadata.get("tokenizer.ggml.eot_token_id"))
    names = Names(family, model.config.num_hidden_layers).of_weights(model)
    if extra := sorted(tensors.keys() - set(names.values()) - {ROPE_FREQS}):
        raise ModelError(
            f"it holds the tensor {extra[0]!r}, which a {model.config.model_type} model has no place for"
        )
    if lacking := sorted(set(names.values()) - tensors.keys()):
        raise ModelError(f"it lacks the tensor {lacking[0]!r}")
    dtype = _kept_type(tensors)
    weights: dict[str, Tensor] = {}
    for key, name in names.items():
        weight = from_file(name, _dequantised(tensors[name]), family, model.config)
        if weight.shape != model.get_parameter(key).shape:
            raise ModelError(
                f"its tensor {name!r} has the shape {tuple(weight.shape)}, which does not fit its settings"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"its tensor {name!r} has values that are not finite")
        weights[key] = weight.to(dtype).contiguous()
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval(), tokenizer


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's metadata, and its tensors by name."""
    gguf = gguf_library()
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("it is not a GGUF file (its first bytes are others)")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if key.count(".")}
        tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"it is damaged or cut off ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    if missing := [key for key in ("general.architecture", "tokenizer.ggml.tokens") if key not in metadata]:
        raise ModelError(f"it is not a language model's (it lacks {missing[0]})")
    return metadata, tensors


def _dequantised(tensor: Any) -> Tensor:
    """A file's tensor in float32, its last dimension the input's."""
    try:
        values = gguf_library().dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelError(f"its tensor {tensor.name!r} is of the type {tensor.tensor_type.name}, which the gguf package "
                         "cannot unpack") from error  # fmt: skip
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _kept_type(tensors: dict[str, Any]) -> torch.dtype:
    """The smallest type that holds every value, or bfloat16 for a large quantised model."""
    large = sum(int(tensor.n_elements) for tensor in tensors.values()) > _EXACT_UP_TO
    matrices = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if matrices == {name}:
            vectors = [_dequantised(tensor) for tensor in tensors.values() if len(tensor.shape) == 1]
            exact = all(torch.equal(vector.to(dtype).float(), vector) for vector in vectors)
            return dtype if exact or large else torch.float32
    return torch.bfloat16 if large and matrices != {"F32"} else torch.float32


def _skeleton(
    model_type: str, values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, end_of_turn: int | None
) -> PreTrainedModel:
    """A model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids: dict[str, Any] = {
        f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")
    }
    if end_of_turn is not None and end_of_turn != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_turn]
    config = AutoConfig.for_model(model_type, **values, **ids)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _read_json(path: Path) -> Any:
    """A small file's content, or {} where there is none to be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, content: Callable[[], Any] | Any) -> None:
    """Written beside and renamed: another process reads all of it or nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    beside.replace(path)
