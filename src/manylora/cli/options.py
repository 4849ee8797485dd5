"""The options of each verb, in a module that imports nothing heavy: `--help` must not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.files import check_values
from manylora.training.config import TaskType, TrainConfig


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
    from_round: int | None = None
    """With --resume: go back to this finished round, one of the last --keep-rounds; what came after it is forgotten."""
    reset_client: list[str] | str | None = None
    """With --resume: let these clients, as "a,b" or a YAML list, begin anew, whose private state is lost."""
    dry_run: bool = False
    """Print what would travel, in parameters and bytes, as published and as sent, and stop."""
    node: str | None = None
    """Be a client instead: work for the Flower SuperNode on this machine whose Runtime API is at this HOST:PORT."""
    allow_strategy: list[str] | str | None = None
    """With --node: take part in runs of these strategies alone, as "a,b" or a YAML list. Default: any."""
    allow_parts: list[str] | str | None = None
    """With --node: let these parts leave and no others, of A, B and dB (the product B2 B1). Default: those of the
    strategy."""
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
    """Test rows: "embedded", a file or folder of JSON, JSONL, CSV, TSV or Parquet, or a Hub data set id. Default: those
    of the adapter's run, else the embedded suite."""
    model: str | None = None
    """Base model. Default: the one the adapter was trained on, else the embedded one."""
    tasks: list[str] | str | None = None
    """Only these tasks, as "a,b" or a YAML list. Default: all; those of the run where its test rows are scored."""
    task_column: str | None = None
    """Column that names a row's task. Default: the column "task", else the file's name; the run's own where its test
    rows are scored."""
    limit: int | None = None
    """At most this many rows per task: a sample, the same each time, in which each answer keeps its share. Default:
    all; that of the run where its test rows are scored."""
    batch_size: int = 64
    """Rows per batch. It does not change the answers."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: per task what the run noted from its training rows, else 64."""
    max_length: int | None = None
    """Tokens a prompt may have; a longer one loses its beginning, which is said. Default: as in the adapter's training,
    else as many as the model reads."""
    rouge: Literal["all", "published"] | None = None
    """What ROUGE-1 counts as words: "all", those of every script; "published", runs of a-z and 0-9 alone. Default: that
    of the adapter's run, else all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: float32 on CPU, bfloat16 on a GPU that has it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    out: str | None = None
    """Folder for predictions.jsonl and scores.json; must not exist. Default: nothing is written."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("limit", "batch_size", "max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a value above 0.")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to answer, and with what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder."""
    prompt: str = ""
    """What to ask; also without "--prompt". Default: standard input."""
    input: str = ""
    """Text that the instruction is about, where there is one."""
    file: str | None = None
    """JSONL file of rows to answer; "-" reads rows from standard input."""
    task: str | None = None
    """Task whose expert answers; needed by adapters with a task router, unless the rows name their task."""
    model: str | None = None
    """Base model. Default: the one the adapter was trained on."""
    form: Literal["auto", "alpaca", "prompt", "chat"] = "auto"
    """Form of the prompt: an Alpaca instruction; as it stands; one turn of the user's in the chat template. auto: that
    of the adapter's training rows."""
    raw: bool = False
    """The same as --form prompt: give the prompt to the model as it stands."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: what the run noted from its training rows, else 64."""
    max_length: int | None = None
    """Tokens a prompt may have; a longer one loses its beginning, which is said. Default: as in the adapter's training,
    else as many as the model reads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: float32 on CPU, bfloat16 on a GPU that has it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.adapter is None:
            raise ConfigError("--adapter is missing; give a run folder, such as runs/train-001.")
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a value above 0.")
        if self.raw and self.form not in ("auto", "prompt"):
            raise ConfigError(
                f"--raw is --form prompt, but --form {self.form} was given; leave one of them out."
            )
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
    form: Literal["auto", "alpaca", "prompt", "chat"] = "auto"
    """With --from-loras: form of the prompts that the LoRAs were trained on (see predict --help). auto: what each
    folder says, by its record or by a tokenizer with a chat template."""
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
    """Token router: at most this many rows per task: a sample, the same each time, in which each answer keeps its
    share. Default: all."""
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
        if not self.to:
            raise ConfigError("--to is missing; give a folder to write, such as --to exported.")
        check_values(self)
        if (self.adapter is None) == (self.from_loras is None):
            raise ConfigError(
                "Give either an adapter to export (manylora export runs/train-001 --to exported) or LoRA folders to "
                "put into one adapter (--from-loras)."
            )
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a value above 0.")
        if not self.max_loss >= 0:
            raise ConfigError(f"max_loss is {self.max_loss}; give points, 0 or more.")


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """What to look into, and what to measure on."""

    adapters: list[str] | str | None = None
    """Runs and adapter folders, ours and plain LoRAs; also without "--adapters". A federated run stands for its
    clients' personal models, a trainer's output folder for its checkpoint-STEP folders."""
    label: list[str] | str | None = None
    """Task and seed of an adapter that comes from no run here, as "PATH=TASK,SEED" (either may be empty); once each."""
    measure: Literal["auto", "none", "gradients", "gates", "all"] = "auto"
    """What to measure on rows, for which the base model is loaded. auto: what can be measured."""
    data: str | None = None
    """Rows to measure on: "embedded", a file or folder of JSON, JSONL, CSV, TSV or Parquet, or a Hub data set id.
    Default: the training rows of each adapter's run; the embedded suite for other adapters of the embedded base."""
    tasks: list[str] | str | None = None
    """Only rows of these tasks, as "a,b" or a YAML list. Default: all. With --figures the two tasks to train on."""
    task_column: str | None = None
    """Column of --data that names a row's task. Default: the column "task", else the file's name."""
    limit: int = 64
    """At most this many rows per task are measured on: a sample, the same each time, in which each answer keeps its
    share."""
    step: int | None = None
    """Measure on the weights that the runs kept at this step (train --keep-adapters). Default: the final ones."""
    model: str | None = None
    """Base model. Default: the one each adapter was trained on; with --figures the embedded one."""
    figures: bool = False
    """Repeat the paper's figures 1 and 2: train one LoRA for each of two tasks and two or more seeds, then compare
    them. Goes on where it was stopped; finished runs are not trained again."""
    task_type: TaskType = "CAUSAL_LM"
    """With --figures: what is trained, a language model that answers or (SEQ_CLS) an encoder that chooses labels."""
    seeds: list[int] | str = "0,1"
    """With --figures: seeds of the runs, as "0,1,2" or a YAML list."""
    r: int = 8
    """With --figures: rank of the LoRAs."""
    epochs: float | None = None
    """With --figures: passes over the training rows. Default: as `manylora train`."""
    learning_rate: float | None = None
    """With --figures: peak step size. Default: as `manylora train`."""
    seed: int = 0
    """Of the random subspaces that similarity is compared with."""
    batch_size: int = 16
    """Rows per forward pass."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: float32 on CPU, bfloat16 on a GPU that has it."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    out: str | None = None
    """Folder for analysis.json; must not exist. Default: the next free runs/analyze-NNN; with --figures runs/figures,
    which may exist."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("limit", "batch_size", "r", "epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; give a value above 0.")
        for name in ("seed", "step"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; give 0 or more.")
        if self.figures == bool(self.adapters):
            raise ConfigError(
                "--figures trains its own adapters; leave the folders out, or leave --figures out."
                if self.figures
                else "There is nothing to analyze; give runs or adapter folders, such as manylora analyze "
                "runs/train-001, or --figures."
            )
        unused = [name for name in ("label", "step") if self.figures and getattr(self, name)]
        if unused:
            raise ConfigError(f"--figures does nothing with --{unused[0]}; leave it out.")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Which study, where, and what to do with it."""

    study: str = ""
    """YAML file of the study (docs/compare.md). Default: a small study of the embedded suite."""
    out: str | None = None
    """Folder of the study; one that is there is continued. Default: runs/compare-NAME."""
    model: str | None = None
    """Base model of all methods, in place of the study's."""
    workers: int | None = None
    """Cells side by side. Default: as many as cores and memory allow."""
    launcher: str | None = None
    """Command that starts a cell elsewhere, such as "srun -c 4 {command}"."""
    dry_run: bool = False
    """Print the cells and about how long they take, and stop."""
    print_cells: bool = False
    """Print one command for every cell that can run now, and stop."""
    cell: str | None = None
    """Run this cell alone, in this process."""
    tables: bool = False
    """Print and write the tables of what is done, and run nothing."""
    from_cells: str | None = None
    """Rebuild the tables from this cells.jsonl; nothing is trained."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; give 1 or more.")
        chosen = [
            f"--{name.replace('_', '-')}"
            for name in ("dry_run", "print_cells", "cell", "tables", "from_cells")
            if getattr(self, name)
        ]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one.")
