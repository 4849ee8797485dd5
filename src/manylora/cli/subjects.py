"""The model that `evaluate` and `predict` are about: a base, with an adapter or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from manylora.data import EMBEDDED, PromptRecord, find_prompts
from manylora.errors import ConfigError, ModelError
from manylora.files import check_noted
from manylora.training import (
    RunFolder,
    TrainConfig,
    adapter_base_name,
    adapter_folder,
    adapter_task_type,
    load_adapter,
    load_base,
    load_tokenizer,
    read_task_facts,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from manylora.data import TaskData
    from manylora.federated.config import FederateConfig


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model ready to generate, and what is known of the tasks it was trained on."""

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    experts: Mapping[str, int] | None
    """Task to expert under a task router, else `None`."""
    answer_tokens: Mapping[str, int]
    """Task to the longest answer worth generating, in tokens; empty where nothing is known."""
    max_length: int | None = None
    """Tokens a prompt may have, as in training; None: as many as the model's context has, where there was none."""
    prompts: PromptRecord | None = None
    """How the prompts of the training were made; None where the adapter does not say, and without one."""

    def check_task(self, task: str) -> None:
        """Refuse a task that the adapter was not trained on, where its tasks are known.

        Raises:
            ConfigError: it is another one.
        """
        known = self.experts or self.answer_tokens
        if known and task not in known:
            raise ConfigError(f"Task {task!r} is unknown to this adapter; it knows {', '.join(known)}.")

    def expert(self, task: str | None) -> int | None:
        """The expert of `task`; `None` where the adapter has no task router.

        Raises:
            ConfigError: a task router and no task, or one that it does not know.
        """
        if self.experts is None:
            return None
        if task is None:
            raise ConfigError(f"This adapter routes by task: give --task, one of {', '.join(self.experts)}.")
        return self.model.active_peft_config.expert_of(task)


def run_settings(adapter: str | None) -> dict[str, Any]:
    """The settings of the run that an adapter comes from; empty where there is no run to ask.

    Raises:
        RunError, ConfigError: they are damaged.
    """
    if adapter is None:
        return {}
    folder = adapter_folder(adapter).parent
    check_noted(folder / "config.yaml")
    if not (folder / "config.yaml").is_file():
        return {}
    return RunFolder(folder).config(TrainConfig, verb="train").to_dict()


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
    """
    if adapter is None:
        name = model or EMBEDDED
        tokenizer = load_tokenizer(name)
        base = load_base(name, dtype=dtype, device=device).eval()
        return Subject(model=base, tokenizer=tokenizer, experts=None, answer_tokens={})
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
    config = adapted.active_peft_config
    experts = None
    if getattr(config, "routes_by_task", False):
        if not config.task_names:
            raise ModelError(
                f"{folder} routes by task but does not name its tasks; add task_names to its adapter_config.json."
            )
        experts = {task: index for index, task in enumerate(config.task_names)}
    facts = read_task_facts(folder)
    answer_tokens: dict[str, int] = {}
    max_length = prompts.max_length if prompts else None
    if facts is not None:
        max_length = facts.max_length
        for task, known in facts.tasks.items():
            if known.answer_tokens is None:
                raise ModelError(
                    f"{folder.parent / 'tasks.json'} names no answer_tokens of {task!r}; remove it to go on without."
                )
            answer_tokens[task] = known.answer_tokens
    return Subject(
        model=adapted,
        tokenizer=tokenizer,
        experts=experts,
        answer_tokens=answer_tokens,
        max_length=max_length,
        prompts=prompts,
    )
