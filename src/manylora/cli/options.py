"""The options of each verb, in a module that imports nothing heavy.

jsonargparse resolves their types by running this module's imports, those under TYPE_CHECKING too, so that these
classes beside the verbs' own imports would cost every `--help` the seconds that torch takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """Settings of the run, and what to do with them."""

    out: str | None = None
    """Folder of the run; must not exist. Default: the next free runs/train-NNN."""
    resume: str | None = None
    """Continue this run folder where it broke off; takes all settings from there."""
    dry_run: bool = False
    """Print the plan (rows, adapters, parameters, steps, memory) and stop."""


@dataclass(frozen=True, kw_only=True)
class FederateOptions(FederateConfig):
    """Settings of a federated run, and what to do with them."""

    out: str | None = None
    """Folder of the run; must not exist. Default: the next free runs/federate-NNN."""
    resume: str | None = None
    """Continue this run folder after its last finished round; takes all settings from there."""
    dry_run: bool = False
    """Print what would travel, in parameters and bytes, as published and as sent, and stop."""
    node: str | None = None
    """Be a client instead: work for the Flower SuperNode on this machine whose Runtime API is at this HOST:PORT."""
    recipe: bool = False
    """With --engine flower: print how to make certificates and keys and start the SuperLink and the nodes, and stop."""
    dimensions: str | None = None
    """With --dry-run: count for these layers instead of a model's, as OxDxNUMBER ("4096x4096x64,1024x4096x32"), or
    for one of the published models, "llama2-7b" (q_proj, v_proj) and "qwen2-7b" (q_proj, o_proj)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to score, on what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder. Default: none, the bare model is scored."""
    data: str | None = None
    """Test rows: "embedded", a file or folder of JSON, JSONL, CSV or Parquet, or a Hub data set id. Default: those of
    the adapter's run, else the embedded suite."""
    model: str | None = None
    """Base model. Default: the one the adapter was trained on, else the embedded one."""
    tasks: list[str] | str | None = None
    """Only these tasks, as "a,b" or a YAML list. Default: all; those of the run where its test rows are scored."""
    task_column: str | None = None
    """Column that names a row's task. Default: the column "task", else the file's name; the run's own where its test
    rows are scored."""
    limit: int | None = None
    """At most this many rows per task. Default: all; that of the run where its test rows are scored."""
    batch_size: int = 64
    """Rows per batch. It does not change the answers."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: per task what the run noted from its training rows, else 64."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: float32 on CPU, bfloat16 on a GPU that has it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    out: str | None = None
    """Folder for predictions.jsonl and scores.json; must not exist. Default: nothing is written."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a value above 0.")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to answer, and with what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder."""
    prompt: str = ""
    """The instruction; also without "--prompt". Default: standard input."""
    input: str = ""
    """Text that the instruction is about, where there is one."""
    file: str | None = None
    """JSONL file of rows to answer; "-" reads rows from standard input."""
    task: str | None = None
    """Task whose expert answers; needed by adapters with a task router, unless the rows name their task."""
    model: str | None = None
    """Base model. Default: the one the adapter was trained on."""
    raw: bool = False
    """Give the prompt to the model as it stands, without the template."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: what the run noted from its training rows, else 64."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: float32 on CPU, bfloat16 on a GPU that has it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.adapter is None:
            raise ConfigError("--adapter is missing; give a run folder, such as runs/train-001.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; give a value above 0.")
        if self.file is not None and self.prompt:
            raise ConfigError("--file and a prompt were both given; give one of them.")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, where to, and what it may cost."""

    adapter: str | None = None
    """Run folder or adapter folder to export; also without "--adapter"."""
    to: str | None = None
    """Folder to write; must not exist. One LoRA goes into it, one per task into folders named after the tasks."""
    tasks: list[str] | str | None = None
    """Only these tasks, as "a,b" or a YAML list. Default: all the adapter (or, with a token router, its data) has."""
    merge: bool = False
    """Write whole models with the adapter merged into the weights, not LoRAs; as large as the base, each."""
    from_loras: list[str] | str | None = None
    """The other way: put these plain LoRA folders into one adapter, as "DIR,DIR" or "NAME=DIR,NAME=DIR"; a folder
    of LoRA folders stands for all of them. Tasks are called by NAME, else by the folder's name."""
    model: str | None = None
    """Base model to name in what is written. Default: the one the adapter was trained on."""
    data: str | None = None
    """Token router: rows of its tasks, to fit the LoRAs and to score them on. Default: the run's training rows for the
    fit and its validation rows for the scores."""
    task_column: str | None = None
    """Column of --data that names a row's task. Default: the column "task", else the file's name."""
    collapse: Literal["fit", "mean"] = "fit"
    """Token router: what stands for it. fit: the LoRA of the same rank that is nearest to the adapter on the task's
    tokens; mean: the experts averaged with the task's mean routing weights."""
    limit: int | None = None
    """Token router: at most this many rows per task. Default: all."""
    max_loss: float = 1.0
    """Token router: refuse when the LoRAs score more than this many points below the adapter, mean over tasks."""
    force: bool = False
    """Token router: write the LoRAs whatever they lose."""
    batch_size: int = 64
    """Rows per batch when answers are generated. It does not change the answers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: for merged weights that of the base's files; for scores float32 on CPU, bfloat16 on a
    GPU that has it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.to is None:
            raise ConfigError("--to is missing; give a folder to write, such as --to exported.")
        if (self.adapter is None) == (self.from_loras is None):
            raise ConfigError(
                "Give either an adapter to export (manylora export runs/train-001 --to exported) or LoRA folders to "
                "put into one adapter (--from-loras)."
            )
        unused = [name for name in ("tasks", "data", "merge", "force") if getattr(self, name)]
        if self.from_loras is not None and unused:
            raise ConfigError(f"--from-loras does nothing with --{unused[0]}; leave it out.")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a value above 0.")
        if not self.max_loss >= 0:
            raise ConfigError(f"max_loss is {self.max_loss}; give points, 0 or more.")
