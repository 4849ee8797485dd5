"""The model that `evaluate`, `predict` and others are about: a base, with an adapter or without, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from manylora.data import EMBEDDED, PromptRecord, find_prompts
from manylora.errors import ConfigError, ModelError
from manylora.evaluation import Choosing, TaskKind, Writing, read_labels
from manylora.files import check_noted
from manylora.training import (
    RunFolder,
    TrainConfig,
    adapter_base_name,
    adapter_folder,
    adapter_task_type,
    context_of,
    load_adapter,
    load_base,
    load_classifier,
    load_tokenizer,
    read_task_facts,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from manylora.data import TaskData
    from manylora.evaluation import Scores
    from manylora.federated.config import FederateConfig
    from manylora.jobs.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model ready to answer, and how it does."""

    model: PeftModel | PreTrainedModel
    kind: TaskKind
    prompts: PromptRecord | None = None
    """How the prompts of the training were made; None where the adapter does not say, and without one."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's."""
        return self.kind.tokenizer


@dataclass(frozen=True, kw_only=True)
class Writer(Subject):
    """A `Subject` that writes."""

    kind: Writing

    def check_task(self, task: str) -> None:
        """Refuse a task that the adapter was not trained on, where its tasks are known.

        Raises:
            ConfigError: it is another one.
        """
        known = self.kind.experts or self.kind.answer_tokens
        if known and task not in known:
            raise ConfigError(f"Task {task!r} is unknown to this adapter; it knows {', '.join(known)}.")

    def expert(self, task: str | None) -> int | None:
        """The expert of `task`; `None` where the adapter has no task router.

        Raises:
            ConfigError: a task router and no task, or one that it does not know.
        """
        experts = self.kind.experts
        if experts is None:
            return None
        if task is None:
            raise ConfigError(f"This adapter routes by task: give --task, one of {', '.join(experts)}.")
        return self.model.active_peft_config.expert_of(task)


def config_of_run(adapter: str | None) -> TrainConfig | None:
    """The configuration of the run that an adapter comes from; None where there is no run to ask.

    Raises:
        RunError, ConfigError: it is damaged.
    """
    if adapter is None:
        return None
    folder = adapter_folder(adapter).parent
    check_noted(folder / "config.yaml")
    return RunFolder(folder).config(TrainConfig, verb="train") if (folder / "config.yaml").is_file() else None


def client_of(adapter: str | None) -> tuple[Path, str, bool] | None:
    """The federated run that a client's adapter lies in, the client's folder name, and whether it is of the reference
    that the run compares with; None for every other adapter.
    """
    if adapter is None:
        return None
    client = adapter_folder(adapter).absolute().parent
    inside = client.parent.parent
    reference = inside.name == "reference" and not (inside / "config.yaml").is_file()
    run = inside.parent if reference else inside
    if client.parent.name != "clients" or not (run / "config.yaml").is_file():
        return None
    return (run, client.name, reference) if "strategy" in RunFolder(run).read_config() else None


def client_rows(
    run: Path, name: str, *, reference: bool, part: Literal["train", "test"] = "test"
) -> tuple[FederateConfig, TaskData]:
    """The settings of a federated run, and the rows of one of its clients.

    Args:
        run: the run's folder.
        name: of the client's folder.
        reference: the client is one of the run's reference.
        part: which of its rows.

    Raises:
        ConfigError: the rows are on another machine, there is no such client, or it has no such rows.
        DataError: the rows cannot be read.
    """
    from manylora.federated import client_data
    from manylora.federated.config import FederateConfig
    from manylora.federated.home import folder_name

    config = RunFolder(run).config(FederateConfig, verb="federate").resolved()
    config = config.local_reference() if reference else config
    rows = client_data(config) if config.engine == "local" else {}
    found: TaskData = next(
        (getattr(data, part) for client, data in rows.items() if folder_name(client) == name), {}
    )
    if not found:
        raise ConfigError(f"{run} has no {part} rows of client {name}; give rows with --data.")
    return config, dict(found)


def load_subject(adapter: str | None, *, model: str | None, dtype: str, device: str) -> Subject:
    """Load the base and put the adapter, if any, onto it.

    Raises:
        ModelError: unknown model, unknown adapter, or two that do not belong together.
        DataError: the adapter classifies, and nothing says which output of its head is which label.
    """
    if adapter is not None and adapter_task_type(adapter) == "SEQ_CLS":
        return _load_classifier(adapter, model=model, dtype=dtype, device=device)
    return load_writer(adapter, model=model, dtype=dtype, device=device)


def load_writer(adapter: str | None, *, model: str | None, dtype: str, device: str) -> Writer:
    """The same of a model that writes.

    Raises:
        ModelError: see `load_subject`; or the adapter classifies.
    """
    if adapter is None:
        name = model or EMBEDDED
        tokenizer = load_tokenizer(name)
        base = load_base(name, dtype=dtype, device=device).eval()
        return Writer(model=base, kind=Writing(tokenizer=tokenizer, max_length=None, answer_tokens={}))
    folder = adapter_folder(adapter)
    if adapter_task_type(folder) == "SEQ_CLS":
        raise ModelError(
            f"{adapter} classifies and writes no text; score it with: manylora evaluate --adapter {adapter}"
        )
    name = model or adapter_base_name(folder)
    tokenizer = load_tokenizer(name)
    prompts = find_prompts(folder)
    if prompts is not None:
        prompts.prepare(tokenizer)
    adapted = load_adapter(load_base(name, dtype=dtype, device=device), folder)
    answer_tokens, max_length = _answer_tokens(folder), prompts.max_length if prompts else None
    if (facts := read_task_facts(folder)) is not None:
        max_length = facts.max_length
    run = config_of_run(adapter)
    kind = Writing(
        tokenizer=tokenizer,
        max_length=max_length,
        answer_tokens=answer_tokens,
        experts=_experts(adapted, folder),
        rouge=run.rouge if run else "all",
    )
    return Writer(model=adapted, kind=kind, prompts=prompts)


def _experts(model: PeftModel, folder: Path) -> dict[str, int] | None:
    """Task to expert under a task router, else `None`."""
    config = model.active_peft_config
    if not getattr(config, "routes_by_task", False):  # a plain LoRA's has no such thing
        return None
    if not config.task_names:
        raise ModelError(
            f"{folder} routes by task but does not name its tasks; add task_names to its adapter_config.json."
        )
    return {task: index for index, task in enumerate(config.task_names)}


def _answer_tokens(folder: Path) -> dict[str, int]:
    """Task to the longest answer worth generating, in tokens; empty where nothing is known."""
    facts = read_task_facts(folder)
    answer_tokens: dict[str, int] = {}
    for task, known in facts.tasks.items() if facts else ():
        if known.answer_tokens is None:
            raise ModelError(
                f"{folder.parent / 'tasks.json'} names no answer_tokens of {task!r}; remove it to go on without."
            )
        answer_tokens[task] = known.answer_tokens
    return answer_tokens


def _load_classifier(adapter: str, *, model: str | None, dtype: str, device: str) -> Subject:
    folder = adapter_folder(adapter)
    facts = read_task_facts(folder)
    if facts is None:
        raise ModelError(
            f"{adapter} has no tasks.json beside it, so its head's labels are unknown; give the run folder."
        )
    labels = read_labels(facts, source=folder.parent / "tasks.json")
    name = model or adapter_base_name(folder)
    tokenizer = load_tokenizer(name, task_type="SEQ_CLS")
    base = load_classifier(
        name,
        labels=labels.count,
        pad_token_id=tokenizer.pad_token_id,
        seed=0,  # of a head that the adapter's replaces
        dtype=dtype,
        device=device,
    )
    adapted = load_adapter(base, adapter)
    kind = Choosing(
        tokenizer=tokenizer, max_length=facts.max_length, labels=labels, context=context_of(adapted.config)
    )
    return Subject(model=adapted, kind=kind)


def score_rows(
    kind: TaskKind, model: PeftModel | PreTrainedModel, rows: TaskData, *, progress: Progress
) -> Scores:
    """A model's answers to rows, scored; see `TaskKind.score`."""
    count = sum(map(len, rows.values()))
    return kind.score(
        model,
        rows,
        on_progress=lambda done: progress.show_count("answers", done, count),
        on_cut=progress.show_warning,
    )
