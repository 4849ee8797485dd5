"""What the two jobs that stand on several files are asked: `analyze` (with its figures) and `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from manylora.errors import ConfigError
from manylora.files.settings import Bound, Count, CountOrZero, Positive
from manylora.training.config import TaskType
from manylora.training.settings import BatchSettings, DataSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(ModelSettings, DataSettings, BatchSettings):
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
        if self.figures and self.adapters:
            raise ConfigError(
                "--figures trains its own adapters; leave the folders out, or leave --figures out."
            )
        unused = [name for name in ("label", "step") if self.figures and getattr(self, name)]
        if unused:
            raise ConfigError(f"--figures does nothing with --{unused[0]}; leave it out.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelSettings, DataSettings, BatchSettings):
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
    """Token router: rows of its tasks, in the formats of train --data, to fit the LoRAs and to score them on.
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
