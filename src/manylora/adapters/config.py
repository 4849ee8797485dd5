"""`ManyLoraConfig`: every setting of one adapter, checked once, saved as PEFT's `adapter_config.json`."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from manylora.adapters.card import add_loading_section
from manylora.adapters.layout import Share
from manylora.adapters.patterns import check_pattern
from manylora.errors import ConfigError, TargetModulesError

RouterKind = Literal["token", "task", "uniform"]
"""What decides how much each expert counts."""

FORMAT_VERSION = 2
"""The newest version of the saved adapter's keys and fields that this code reads. It writes the oldest that can
say what the adapter computes: 1, or 2 where `router_top_k` or `router_temperature` is set, which a reader of
version 1 would drop with a warning."""

MOST_EXPERTS = 10_000
_LARGEST_RANK = 10**9
"""Of no use, and yet few enough that sizes stay below 2**63: the plan can say how much memory that would take."""
_LARGEST_SCALE = 1e15
_TEMPERATURES = (1e-6, 1e9)
_MOST_NAMES = 10_000
"""Of modules or patterns in one setting: each is tried on every module."""

_BIASES = ("none", "all", "manylora_only", "lora_only")


class ManyLoraType(str, enum.Enum):
    """The PEFT type of this method.

    PEFT's own `PeftType` is closed, and adding to it breaks unpickling. A str-enum whose member's name equals
    its value hashes and compares like the plain string in `adapter_config.json`, so PEFT's tables find it.
    """

    MANYLORA = "MANYLORA"


@dataclass(kw_only=True)
class ManyLoraConfig(PeftConfig):
    """Settings of one multi-LoRA adapter; field names that PEFT's `LoraConfig` has keep its meaning.

    The dataclass is not frozen because PEFT writes into it (resolved target modules, base model name).

    Raises:
        ConfigError: a value cannot work, or two contradict each other.
        TargetModulesError: `target_modules` is empty.
    """

    r: int = 8
    """Rank R of every expert. 8 in all the paper's runs (2509.25414, section 5)."""

    lora_alpha: float = 16
    """The scaling is lora_alpha / r. 16 at rank 8 in the paper's multi-task runs."""

    lora_dropout: float = 0.05
    """Dropout on the adapter's input, not on the router's; one mask per layer call serves all experts (with one
    expert it is the mask that PEFT's LoRA would draw). 0.05 as in the paper's multi-task runs."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (2312.03732). Off, as in the paper."""

    num_experts: int = 3
    """Number of experts N; 1 is plain LoRA, without a router. 3 in the paper's multi-task runs."""

    share: Share = "B"
    """The matrix all experts have in common: "B" (ALoRA, the paper's finding), "A" (HydraLoRA) or "none"."""

    router: RouterKind | None = "token"
    """"token": softmax over a linear map of each token (the paper's). "task": `expert_ids` choose one expert
    per example. "uniform": all count 1/N (a control). None only with one expert. Only "task" looks at
    `expert_ids`; the others accept them, so that one data pipeline serves every router."""

    default_expert: int | None = None
    """Task router: the expert used when no ids are given, and the one that merging takes. None: give ids."""

    target_modules: list[str] | set[str] | str | None = None
    """Names (endings), a regular expression, or "all-linear"; None: PEFT's LoRA default for the model."""

    exclude_modules: list[str] | set[str] | str | None = None
    """Names (endings) or a regular expression of modules to leave alone."""

    layers_to_transform: list[int] | int | None = None
    """Only these layer indices; None: all."""

    layers_pattern: list[str] | str | None = None
    """Name of the layer list `layers_to_transform` counts in, where the first numbered list is not it."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or regular expression -> its rank, where it differs from `r`."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Module name or regular expression -> its alpha, where it differs from `lora_alpha`."""

    modules_to_save: list[str] | None = None
    """Modules to train in full and save beside the adapter."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the input embedding (a list), or of the named embeddings, to train and save beside the adapter."""

    bias: str = "none"
    """Base biases to train: "none", "all", or "manylora_only" (also "lora_only"): of adapted layers."""

    init_weights: bool = True
    """True: A kaiming-uniform, each expert drawn on its own, B zero, so the adapter starts as the identity.
    False: B is drawn as well (for tests)."""

    fan_in_fan_out: bool = False
    """Whether base weights are stored as (D, O). Found from the layers' type (Conv1D: yes), recorded here."""

    router_top_k: int | None = None
    """Token router: only the k largest weights of each token count, and sum to 1 as in Mixtral (2401.04088);
    with k = 1 the one keeps its share of the full softmax, as in Switch (2101.03961). All experts are computed
    all the same: this changes the result, not the cost. None: all count, as in the paper."""

    router_temperature: float = 1.0
    """Token router: softmax(W_g x / temperature). 1 as in the paper; less is sharper."""

    load_balance_weight: float = 0.0
    """Token router: weight of the load-balance loss (2101.03961, equations 4 to 6; 0.01 there), averaged over
    the layers. In training it is added to the model's own loss; `model.load_balance()` hands it to code that
    computes its loss itself. 0: none, as in the paper."""

    format_version: int = 1
    """Version of the saved format; 2 where a router option asks for it (see `FORMAT_VERSION`)."""

    task_names: list[str] | None = None
    """Names of the experts' tasks, in the order of the experts; under the task router one per expert."""

    base_fingerprint: str | None = None
    """Opaque mark of the base weights the adapter was trained on; training code writes and compares it."""

    base_quantization: str | None = None
    """How training code loaded the base: "4bit" or "8bit" of bitsandbytes; None: as it is. Whoever loads the base for
    this adapter does the same to get what was trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ManyLoraType.MANYLORA
        _check_version(self.format_version)
        if self.base_quantization not in (None, "4bit", "8bit"):
            raise ConfigError(
                f"base_quantization is {self.base_quantization!r}; it is 4bit, 8bit or left out (null)."
            )
        _check_numbers(self)
        _check_experts(self)
        _check_router(self)
        if self.router_top_k is not None or self.router_temperature != 1:
            self.format_version = max(self.format_version, 2)
        _check_patterns(self)
        _check_targets(self)
        # PEFT's matching wants sets (a set membership test per module), JSON brings lists.
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)

    @property
    def routes_by_task(self) -> bool:
        """Whether `expert_ids` choose between experts: a task router over more than one."""
        return self.router == "task" and self.num_experts > 1

    def expert_of(self, task: str) -> int:
        """The expert that the task router uses for a task.

        Raises:
            ConfigError: the router is another one, or the adapter knows no such task.
        """
        if self.router != "task":
            raise ConfigError(f"Task {task!r}: with router={self.router!r} no expert belongs to a task.")
        names = self.task_names or []
        if task not in names:
            raise ConfigError(
                f"Task {task!r} is unknown to this adapter; it knows {', '.join(names) or 'none'}."
            )
        return names.index(task)

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values; sets become sorted lists, so that the same settings give the same bytes."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; where PEFT has just written a model card, tell in it how to load."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(Path(save_directory), task_type=self.task_type)


def _check_version(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"format_version {version!r} is no positive integer; leave it out for version 1.")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"This adapter has format_version {version}, this manylora reads up to {FORMAT_VERSION}; "
            "install a newer manylora (pip install -U manylora)."
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


def _is_scale(value: object) -> bool:
    """A positive number that float32 can hold, and whose quotient by a rank, too."""
    return _is_number(value) and 1 / _LARGEST_SCALE <= value <= _LARGEST_SCALE  # type: ignore[operator]


def _check_numbers(config: ManyLoraConfig) -> None:
    if not _is_rank(config.r):
        raise ConfigError(f"r={config.r!r:.40} is no rank; give a positive integer such as 8.")
    if not _is_scale(config.lora_alpha):
        raise ConfigError(
            f"lora_alpha={config.lora_alpha!r:.40} is no scale; give a positive number such as 16, at most "
            f"{_LARGEST_SCALE:g}."
        )
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout={config.lora_dropout!r} is outside [0, 1); give one such as 0.05.")
    if config.bias not in _BIASES:
        raise ConfigError(f"bias={config.bias!r} is unknown; choose one of {', '.join(map(repr, _BIASES))}.")
    if not isinstance(config.init_weights, bool):
        raise ConfigError(f"init_weights={config.init_weights!r} is unknown; give True or False.")
    if not isinstance(config.use_rslora, bool):
        raise ConfigError(f"use_rslora={config.use_rslora!r} is unknown; give True or False.")


def _check_experts(config: ManyLoraConfig) -> None:
    n = config.num_experts
    if not _is_int(n) or not 1 <= n <= MOST_EXPERTS:
        raise ConfigError(
            f"num_experts={n!r:.40} is no number of experts; give 1 (plain LoRA) to {MOST_EXPERTS:,}."
        )
    if config.share not in get_args(Share):
        raise ConfigError(f"share={config.share!r} is unknown; choose one of 'A', 'B', 'none'.")
    if config.router is not None and config.router not in get_args(RouterKind):
        raise ConfigError(
            f"router={config.router!r} is unknown; choose 'token', 'task' or 'uniform' (None: one expert)."
        )
    if config.router is None and n > 1:
        raise ConfigError(
            f"num_experts={n} with router=None: nothing would choose between the experts; "
            "set router to 'token', 'task' or 'uniform', or num_experts to 1."
        )
    default = config.default_expert
    if default is not None:
        if config.router != "task":
            raise ConfigError(
                f"default_expert={default!r} with router={config.router!r}: only the task router has one; "
                "set router='task' or leave default_expert out."
            )
        if not _is_int(default) or not 0 <= default < n:
            raise ConfigError(f"default_expert={default!r} is no expert; the experts are 0 to {n - 1}.")
    names = config.task_names
    if names is not None:
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"task_names={names!r} is no list of names; give one string per task.")
        if len(set(names)) != len(names):
            raise ConfigError(f"task_names={names!r} names a task twice; give each name once.")
        config.task_names = list(names)
        if config.router == "task" and len(names) != n:
            raise ConfigError(
                f"task_names has {len(names)} names for {n} experts; "
                "under router='task' give one per expert, in the experts' order."
            )


def _check_router(config: ManyLoraConfig) -> None:
    k, temperature, balance = config.router_top_k, config.router_temperature, config.load_balance_weight
    n = config.num_experts
    if k is not None and (not _is_int(k) or not 1 <= k <= n):
        raise ConfigError(f"router_top_k={k!r} is no number of experts; give 1 to {n}, or None for all.")
    low, high = _TEMPERATURES
    if not _is_number(temperature) or not low <= temperature <= high:
        raise ConfigError(
            f"router_temperature={temperature!r:.40} cannot be used; give a positive number such as 1, from {low:g} to "
            f"{high:g}."
        )
    if not _is_number(balance) or not 0 <= balance <= _LARGEST_SCALE:
        raise ConfigError(f"load_balance_weight={balance!r} cannot be used; give 0 or more, such as 0.01.")
    if config.router == "token" and n > 1:
        return
    for setting, value, off in (
        ("router_top_k", k, None),
        ("router_temperature", temperature, 1),
        ("load_balance_weight", balance, 0),
    ):
        if value != off:
            raise ConfigError(
                f"{setting}={value!r} with router={config.router!r} and num_experts={n}: only a token router "
                f"over several experts has it; leave {setting} out."
            )


def _check_patterns(config: ManyLoraConfig) -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, setting)
        if pattern is None:
            setattr(config, setting, {})
            continue
        if not isinstance(pattern, dict):
            raise ConfigError(f"{setting}={pattern!r} is no mapping; give {{module name or regex: value}}.")
        _check_count(setting, pattern)
        for key, value in pattern.items():
            check_pattern(f"{setting} key ", key)
            if not (_is_rank(value) if setting == "rank_pattern" else _is_scale(value)):
                kind = "a positive integer" if setting == "rank_pattern" else "a positive number"
                raise ConfigError(f"{setting}[{key!r}]={value!r} cannot be used; give {kind}.")


def _check_targets(config: ManyLoraConfig) -> None:
    targets = config.target_modules
    for setting in ("target_modules", "exclude_modules"):
        value = getattr(config, setting)
        if value is None:
            continue
        if isinstance(value, str):
            check_pattern(f"{setting}=", value)
        elif not isinstance(value, Iterable) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{setting}={value!r} cannot be used; give a list of names or one string.")
        else:
            _check_count(setting, list(value))
    if targets is not None and len(targets) == 0:
        raise TargetModulesError("target_modules is empty; name linear layers or use 'all-linear'.")
    saved: Any = config.modules_to_save
    # PEFT would take a string for its letters, and save every module whose name ends in one of them
    if saved is not None and (
        isinstance(saved, str)
        or not isinstance(saved, Iterable)
        or not all(isinstance(name, str) and name for name in saved)
    ):
        raise ConfigError(f"modules_to_save={saved!r} cannot be used; give a list of names.")
    _check_tokens(config)
    _check_layers(config)


def _check_count(setting: str, found: Sized) -> None:
    if len(found) > _MOST_NAMES:
        raise ConfigError(
            f"{setting} has {len(found):,} entries; give at most {_MOST_NAMES:,}, or one regular expression."
        )


def _check_tokens(config: ManyLoraConfig) -> None:
    """Of the form alone; the model's vocabulary is looked at when the adapter is put on."""
    tokens: Any = config.trainable_token_indices
    if tokens is None:
        return
    lists = tokens if isinstance(tokens, dict) else {"": tokens}
    for name, indices in lists.items():
        good = isinstance(name, str) and isinstance(indices, (list, tuple))
        if not good or not all(_is_int(index) and index >= 0 for index in indices):
            raise ConfigError(
                f"trainable_token_indices={tokens!r:.80} cannot be used; give a list of token ids, or one for each "
                "named embedding."
            )


def _check_layers(config: ManyLoraConfig) -> None:
    targets = config.target_modules
    layers: Any = config.layers_to_transform
    listed = layers if isinstance(layers, (list, tuple, range)) else [layers]
    # PEFT would take an empty list for all layers
    if layers is not None and (not listed or not all(_is_int(index) and index >= 0 for index in listed)):
        raise ConfigError(
            f"layers_to_transform={layers!r} cannot be used; give a layer's index or a list of them, from 0 on."
        )
    patterns = config.layers_pattern or ()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        check_pattern("layers_pattern=", pattern)
    if config.layers_pattern and layers is None:
        raise ConfigError(
            f"layers_pattern={config.layers_pattern!r} without layers_to_transform does nothing; give both."
        )
    if isinstance(targets, str) and layers is not None:
        raise ConfigError(
            f"layers_to_transform={config.layers_to_transform!r} needs target_modules as a list, "
            f"but it is the string {targets!r}; list the names or put the layers into the regular expression."
        )


def _as_set(names: Iterable[str] | str | None) -> set[str] | str | None:
    return names if names is None or isinstance(names, str) else set(names)


def rank_of(config: Any, module: str) -> int:
    """A module's rank, in a LoRA's settings or ours: by `rank_pattern` as PEFT reads it, else `r`."""
    ranks = config.rank_pattern or {}
    return int(ranks.get(get_pattern_key(list(ranks), module), config.r))


def alpha_of(config: Any, module: str) -> float:
    """A module's alpha, likewise."""
    alphas = config.alpha_pattern or {}
    return alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)


def scaling_of(config: Any, alpha: float, rank: int) -> float:
    """What the product B A x is multiplied by."""
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
