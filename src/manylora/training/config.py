"""What a training run is: groups of settings as one flat, frozen record for the command line, YAML and Python."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from manylora.data import EMBEDDED
from manylora.errors import ConfigError
from manylora.files.settings import Bound, Count, CountOrZero, NotNegative, Positive, Settings
from manylora.training.settings import BEFORE, TrainedModelSettings, TrainingSettings

Method: TypeAlias = Literal["alora", "hydralora", "moelora", "lora"]
Recipe: TypeAlias = Literal[
    "auto", "embedded", "standard", "classification", "published-commonsense", "published-flan"
]
TaskType: TypeAlias = Literal["CAUSAL_LM", "SEQ_CLS"]
Quantisation: TypeAlias = Literal["4bit", "8bit"]


@dataclass(frozen=True, kw_only=True)
class TaskTypeSettings:
    """Which settings fit a task type."""

    recipes: Sequence[Recipe]
    """Those that may be named."""
    unfit: str
    """What is said of another recipe."""
    auto: Recipe
    """The recipe where none is named and the base is not the embedded one."""
    auto_embedded: Recipe
    """The same for the embedded base."""
    unused: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Settings that would do nothing, with the values with which they say nothing."""


TASK_TYPES: Mapping[TaskType, TaskTypeSettings] = {
    "CAUSAL_LM": TaskTypeSettings(
        recipes=("auto", "embedded", "standard", "published-commonsense", "published-flan"),
        unfit="is for task_type SEQ_CLS; give that too, or another recipe.",
        auto="standard",
        auto_embedded="embedded",
    ),
    "SEQ_CLS": TaskTypeSettings(
        recipes=("auto", "classification"),
        unfit="trains a model to write; leave it out with task_type SEQ_CLS, or set learning_rate and epochs yourself.",
        auto="classification",
        auto_embedded="classification",
        unused={
            "score_base": (False,),
            "loss_on": ("answer",),
            "max_new_tokens": (None,),
            "rouge": ("all",),
            "template": ("auto", "alpaca"),
        },
    ),
}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "alora": {"share": "B", "num_experts": 3},
    "hydralora": {"share": "A", "num_experts": 3},
    "moelora": {"share": "none", "num_experts": 3},
    "lora": {"share": "B", "num_experts": 1},
}
"""Methods are values: share B is ALoRA (arXiv 2509.25414), share A HydraLoRA (2404.19245), none a mixture of
LoRAs (2310.18339, 2312.09979); with one expert all three are LoRA (2106.09685). 3 experts as in 2509.25414."""

_ON_ALL_LAYERS: Mapping[str, Any] = {"warmup": 0.06, "target_modules": "all-linear"}
"""100 warm-up steps, as published, can be a whole small run, so 6 % instead."""
_PUBLISHED: Mapping[str, Any] = {
    "learning_rate": 3e-4, "batch_size": 16, "warmup": 100.0, "micro_batch_size": 4
}  # fmt: skip
"""arXiv 2509.25414, section 5."""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # See docs/log.md.
    # 8 rows a step: with 16, one LoRA on the 300 rows of review_verdict never leaves chance.
    "embedded": {"learning_rate": 5e-3, "epochs": 5.0, "batch_size": 8, **_ON_ALL_LAYERS},
    # The published step size and epochs.
    "standard": {"learning_rate": 3e-4, "epochs": 3.0, "batch_size": 16, **_ON_ALL_LAYERS},
    # For --task-type SEQ_CLS; see docs/log.md.
    "classification": {"learning_rate": 2e-3, "epochs": 3.0, "batch_size": 16, **_ON_ALL_LAYERS},
    # Llama-3-8B on commonsense and math.
    "published-commonsense": {"epochs": 3.0, "target_modules": ["q_proj", "o_proj"], **_PUBLISHED},
    # Llama-2-7B on eight FLAN tasks.
    "published-flan": {"epochs": 50.0, "target_modules": ["q_proj", "v_proj"], **_PUBLISHED},
}


_LARGEST_WEIGHT = 1000.0
"""A task that is to be drawn more often than that should be the only one."""
_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")
"""Module names with commas between; any other text is a regular expression."""


@dataclass(frozen=True, kw_only=True)
class ExpertSettings(Settings):
    """Experts and their router"""

    method: Method = "alora"
    """alora (share B), hydralora (share A), moelora (share none) or lora; sets `share` and `num_experts`."""
    share: Literal["A", "B", "none"] | None = None
    """Which matrix all experts share. Default: from `--method`."""
    num_experts: Count | None = None
    """Number of experts N. Default: from `--method`; under the task router the number of tasks."""
    router: Literal["token", "task", "uniform"] = "token"
    """token: a softmax gate per token; task: one expert per task; uniform: all experts equally (a control)."""
    router_top_k: Count | None = None
    """Token router: only the k largest weights of each token count (arXiv 2401.04088; k = 1: 2101.03961). All experts
    are computed all the same. Default: all count, as in the paper."""
    router_temperature: Positive = 1.0
    """Token router: its logits are divided by this; less is sharper. 1 as in the paper."""
    load_balance_weight: NotNegative = 0.0
    """Token router: weight of the load-balance loss (arXiv 2101.03961; 0.01 there), averaged over the layers. 0 as
    in the paper."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""


@dataclass(frozen=True, kw_only=True)
class MixingSettings(Settings):
    """How tasks are mixed, and what is held out of them"""

    mixing: Literal["proportional", "uniform", "temperature"] = "proportional"
    """How often each task is drawn: by its number of rows, equally often, or by rows ** (1 / temperature)."""
    mixing_temperature: Positive = 2.0
    """Temperature of "temperature" mixing; 1 is proportional, large is uniform."""
    weights: dict[str, float] | str | None = None
    """Task weights, as "a=2,b=0.5" or a YAML mapping: a task of weight 2 is drawn as if it had twice its rows. The
    length of the run stays. Default: all 1."""
    validation: str | None = None
    """Validation rows. Default: the data's own validation split, else a seeded cut from the training rows."""
    validation_fraction: Annotated[
        float, Bound(lambda value: 0 < value < 1, "a share between 0 and 1, such as 0.1")
    ] = 0.1
    """Share of the training rows to cut where no validation split is given (at most 50 rows a task)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", _as_weights(self.weights))
        if self.weights is not None and self.mixing == "uniform":
            raise ConfigError(
                "weights mean nothing to mixing uniform, which does not look at how many rows a task has; take "
                "proportional or temperature."
            )

    @property
    def task_weights(self) -> dict[str, float] | None:
        """Task to its weight; None where all have the same."""
        assert not isinstance(self.weights, str)
        return self.weights


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Validations and checkpoints"""

    eval_steps: Count | None = None
    """Steps between validations. Default: once an epoch."""
    save_steps: Count | None = None
    """Steps between checkpoints. Default: once an epoch."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the result: the last, or those with the lowest mean validation loss."""
    early_stopping: Count | None = None
    """Stop when the mean validation loss has not improved in this many validations, and keep the best weights, as
    `--keep best` does. Default: all steps are done."""
    keep_adapters: CountOrZero = 0
    """Keep the adapter's weights for `manylora analyze` at this many evenly spread steps, and with them those at step 0
    and at an early step (5 %)."""
    score_base: bool = False
    """Score the base without the adapter on the test rows, too, and say what the training changed."""
    report_to: list[str] | str = "none"
    """Where the trainer also reports to, besides metrics.jsonl, as "a,b" or a YAML list: wandb, mlflow, trackio,
    tensorboard, or whatever else transformers knows. Nothing leaves this machine unless one is named."""


@dataclass(frozen=True, kw_only=True)
class ResultSettings(Settings):
    """The result"""

    save_merged: bool = False
    """After training, also write the merged model to RUN/merged (task router: RUN/merged/TASK), as large as the base
    each; transformers and vLLM load it without this package. Not for token routers."""
    push_to_hub: str | None = None
    """After training, upload the adapter with its card to this repository on the Hub, such as me/my-adapter; a new one
    is private. Default: nothing leaves this machine."""


@dataclass(frozen=True, kw_only=True)
class QuantisedModelSettings(TrainedModelSettings):
    """The base model, which may be quantised"""

    quantize: Quantisation | None = None
    """Load the base's linear layers in bitsandbytes' 4 bit (NF4 with double quantisation, arXiv 2305.14314) or 8 bit,
    in training and whenever the adapter is used; it computes in --dtype. Default: as they are."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Settings):
    """The trainer"""

    optimizer: str = "adamw_torch"
    """Optimizer, by transformers' names, such as adamw_torch, adamw_8bit, paged_adamw_8bit (bitsandbytes), adafactor
    or sgd."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    QuantisedModelSettings,
    TrainingSettings,
    ExpertSettings,
    MixingSettings,
    CheckpointSettings,
    TrainerSettings,
    ResultSettings,
):
    """Settings of one run. A value left at `None` is filled in by `--method` or `--recipe`."""

    task_type: TaskType = "CAUSAL_LM"
    """What the model does, in PEFT's words. CAUSAL_LM: write the answer, as causal language models do. SEQ_CLS: choose
    it with a classification head, of which each task uses its own labels: the answers of its training rows; for any
    model that can have one, encoders such as BERT, too."""
    recipe: Recipe = "auto"
    """Learning rate, epochs, batch size, warm-up and target modules as one choice. auto: "classification" with SEQ_CLS,
    "embedded" for the embedded base, "standard" for any other; the published ones repeat arXiv 2509.25414."""
    epochs: Positive | None = None
    """Passes over the training rows. Default: from `--recipe`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = TASK_TYPES[self.task_type]
        if self.recipe not in fitting.recipes:
            raise ConfigError(f"recipe {self.recipe} {fitting.unfit}")
        for name, silent in fitting.unused.items():
            if getattr(self, name) not in silent:
                raise ConfigError(
                    f"{name} {getattr(self, name)} is about written answers, but with task_type {self.task_type} none "
                    "are written; leave it out."
                )

    @property
    def rows_per_step(self) -> int:
        """`batch_size` of a resolved configuration."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def routes_by_task(self) -> bool:
        """Whether a row's task chooses its expert, as `ManyLoraConfig.routes_by_task`; each task has one where
        `num_experts` is not given yet."""
        return self.router == "task" and self.num_experts != 1

    def resolved(self) -> TrainConfig:
        """Fill every value that method and recipe govern; idempotent.

        `num_experts` stays `None` under the task router until the tasks are known.
        """
        name, fitting = self.recipe, TASK_TYPES[self.task_type]
        if name == "auto":
            name = fitting.auto_embedded if self.model == EMBEDDED else fitting.auto
        filled: dict[str, Any] = {**RECIPES[name], **METHODS[self.method]}
        if self.router == "task" and self.method != "lora":
            filled.pop("num_experts")
        updates = {key: value for key, value in filled.items() if getattr(self, key) is None}
        updates["tasks"] = as_list(self.tasks)
        if self.early_stopping is not None:
            updates["keep"] = "best"
        targets = updates.get("target_modules", self.target_modules)
        if isinstance(targets, str) and targets != "all-linear" and _NAMES.fullmatch(targets):
            targets = as_list(targets)
        updates["target_modules"] = targets
        for key in ("model", "data", "test", "validation"):  # a run must resume from any folder
            value = getattr(self, key)
            if value is not None and value != EMBEDDED and Path(value).expanduser().exists():
                updates[key] = str(Path(value).expanduser().absolute())
        return dataclasses.replace(self, recipe=name, **updates)


def filled(known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings read back from a run folder; those that an earlier version did not have are what it did."""
    return {**TrainConfig().to_dict(), **BEFORE, **known}


def _as_weights(weights: Mapping[str, float] | str | None) -> dict[str, float] | None:
    if isinstance(weights, str):
        parts = [part.rpartition("=") for part in as_list(weights) or []]
        try:
            weights = {task.strip(): float(weight) for task, _, weight in parts}
        except ValueError:
            weights = {}
    if weights is None:
        return None
    if not weights or "" in weights:
        raise ConfigError('weights hold no list of tasks with a number each; give one such as "a=2,b=0.5".')
    for task, weight in weights.items():
        if not 0 < weight <= _LARGEST_WEIGHT:
            raise ConfigError(
                f"the weight of task {task!r} is {weight:g}; give a number above 0, at most {_LARGEST_WEIGHT:g}."
            )
    return {task: float(weight) for task, weight in weights.items()}


def as_list(value: list[str] | str | None) -> list[str] | None:
    """Split "a,b" as the command line writes lists; a list passes, `None` stays."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value
