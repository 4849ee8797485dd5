"""The options of each verb, in a module that imports nothing heavy: `--help` must not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.files.settings import Bound, Count, CountOrZero, Positive, Settings
from manylora.training.config import TaskType, TrainConfig
from manylora.training.settings import (
    AdapterAnswerSettings,
    BatchSettings,
    DataSettings,
    ModelSettings,
    ScoringSettings,
)


@dataclass(frozen=True, kw_only=True)
class RunOptions(Settings):
    """The run"""

    out: str | None = None
    """Folder of the run; must not exist. Default: the next free runs/train-NNN or runs/federate-NNN."""
    resume: str | None = None
    """Continue this run folder where it broke off, a federated run after its last finished round; takes all settings
    from there."""
    dry_run: bool = False
    """Print the plan and stop: rows, adapters, parameters, steps and memory, or in parameters and bytes what would
    travel, as published and as sent."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig, RunOptions):
    """Settings of the run, and what to do with them."""


@dataclass(frozen=True, kw_only=True)
class FederateOptions(FederateConfig, RunOptions):
    """What to do with a federated run, and with one client of it."""

    from_round: int | None = None
    """With --resume: go back to this finished round, one of the last --keep-rounds; what came after it is forgotten."""
    reset_client: list[str] | str | None = None
    """With --resume: let these clients, as "a,b" or a YAML list, begin anew, whose private state is lost."""
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
class EvaluateOptions(ModelSettings, DataSettings, AdapterAnswerSettings, ScoringSettings, BatchSettings):
    """What to score, on what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder. Default: none, the bare model is scored."""
    model: str | None = None
    """Default: the one the adapter was trained on, else the embedded one."""
    data: str | None = None
    """Default: the test rows of the adapter's run, with its --tasks, --task-column and --limit, else the embedded
    suite."""
    out: str | None = None
    """Folder for predictions.jsonl and scores.json; must not exist. Default: nothing is written."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelSettings, AdapterAnswerSettings):
    """What to answer, and with what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder."""
    prompt: str = ""
    """What to ask; also without "--prompt". Default: standard input."""
    input: str = ""
    """Text that the instruction is about, where there is one."""
    file: str | None = None
    """JSONL file of rows to answer, or .jsonl.gz; "-" reads rows from standard input."""
    task: str | None = None
    """Task whose expert answers; needed by adapters with a task router, unless the rows name their task."""
    form: Literal["auto", "alpaca", "prompt", "chat"] = "auto"
    """Form of the prompt: an Alpaca instruction; as it stands; one turn of the user's in the chat template. auto: that
    of the adapter's training rows."""
    raw: bool = False
    """The same as --form prompt: give the prompt to the model as it stands."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter is None:
            raise ConfigError("--adapter is missing; give a run folder, such as runs/train-001.")
        if self.raw and self.form not in ("auto", "prompt"):
            raise ConfigError(
                f"--raw is --form prompt, but --form {self.form} was given; leave one of them out."
            )
        if self.file is not None and self.prompt:
            raise ConfigError("--file and a prompt were both given; give one of them.")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelSettings, DataSettings, BatchSettings):
    """What to export, where to, and what it may cost."""

    adapter: str | None = None
    """Run folder or adapter folder to export; also without "--adapter"."""
    to: str | None = None
    """Folder to write; must not exist. One LoRA goes into it, one per task into folders named after the tasks."""
    tasks: list[str] | str | None = None
    """Default: all the adapter (or, with a token router, its data) has."""
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
    """Token router: rows of its tasks, of which --limit may take a sample, to fit the LoRAs and to score them on.
    Default: the run's training rows for the fit and its validation rows for the scores."""
    collapse: Literal["fit", "mean"] = "fit"
    """Token router: what stands for it. fit: the LoRA of the same rank that is nearest to the adapter on the task's
    tokens; mean: the experts averaged with the task's mean routing weights."""
    max_loss: Annotated[float, Bound(lambda value: value >= 0, "points, 0 or more")] = 1.0
    """Token router: refuse when the LoRAs score more than this many points below the adapter, mean over tasks."""
    force: bool = False
    """Token router: write the LoRAs whatever they lose."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base. auto: for merged weights that of the base's files; for scores float32 on CPU, bfloat16 on a
    GPU that has it."""

    def __post_init__(self) -> None:
        if not self.to:
            raise ConfigError("--to is missing; give a folder to write, such as --to exported.")
        super().__post_init__()
        if (self.adapter is None) == (self.from_loras is None):
            raise ConfigError(
                "Give either an adapter to export (manylora export runs/train-001 --to exported) or LoRA folders to "
                "put into one adapter (--from-loras)."
            )


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(ModelSettings, DataSettings, BatchSettings):
    """What to look into, and what to measure on."""

    adapters: list[str] | str | None = None
    """Runs and adapter folders, ours and plain LoRAs; also without "--adapters". A federated run stands for its
    clients' personal models, a trainer's output folder for its checkpoint-STEP folders."""
    label: list[str] | str | None = None
    """Task and seed of an adapter that comes from no run here, as "PATH=TASK,SEED" (either may be empty); once each."""
    measure: Literal["auto", "none", "gradients", "gates", "all"] = "auto"
    """What to measure on rows, for which the base model is loaded. auto: what can be measured."""
    data: str | None = None
    """Default: the training rows of each adapter's run; the embedded suite for other adapters of the embedded base."""
    tasks: list[str] | str | None = None
    """Default: all. With --figures: the two to train on."""
    limit: Count = 64
    step: CountOrZero | None = None
    """Measure on the weights that the runs kept at this step (train --keep-adapters). Default: the final ones."""
    model: str | None = None
    """Default: the one each adapter was trained on; with --figures the embedded one."""
    figures: bool = False
    """Repeat the paper's figures 1 and 2: train one LoRA for each of two tasks and two or more seeds, then compare
    them. Goes on where it was stopped; finished runs are not trained again."""
    task_type: TaskType = "CAUSAL_LM"
    """With --figures: what is trained, a language model that answers or (SEQ_CLS) an encoder that chooses labels."""
    seeds: list[int] | str = "0,1"
    """With --figures: seeds of the runs, as "0,1,2" or a YAML list."""
    r: Count = 8
    """With --figures: rank of the LoRAs."""
    epochs: Positive | None = None
    """With --figures: passes over the training rows. Default: as `manylora train`."""
    learning_rate: Positive | None = None
    """With --figures: peak step size. Default: as `manylora train`."""
    seed: CountOrZero = 0
    """Of the random subspaces that similarity is compared with."""
    batch_size: Count = 16
    """Rows per forward pass."""
    out: str | None = None
    """Folder for analysis.json; must not exist. Default: the next free runs/analyze-NNN; with --figures runs/figures,
    which may exist."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
class CompareOptions(Settings):
    """Which study, where, and what to do with it."""

    study: str = ""
    """YAML file of the study (docs/compare.md). Default: a small study of the embedded suite."""
    out: str | None = None
    """Folder of the study; one that is there is continued. Default: runs/compare-NAME."""
    model: str | None = None
    """Base model of all methods, in place of the study's."""
    workers: Annotated[int, Bound(lambda value: value >= 1, "1 or more")] | None = None
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
        super().__post_init__()
        chosen = [
            f"--{name.replace('_', '-')}"
            for name in ("dry_run", "print_cells", "cell", "tables", "from_cells")
            if getattr(self, name)
        ]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one.")
