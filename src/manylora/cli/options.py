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
    """Only these tasks, as "a,b" or a YAML list. Default: all."""
    task_column: str | None = None
    """Column that names a row's task. Default: the column "task", else the file's name."""
    limit: int | None = None
    """At most this many rows per task. Default: all."""
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
