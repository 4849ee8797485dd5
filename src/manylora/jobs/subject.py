"""The model that `evaluate`, `predict` and others are about: a base, with an adapter or without, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from manylora.data import EMBEDDED, PromptRecord
from manylora.errors import ConfigError, ModelError
from manylora.training import RunFolder, TaskKind, Writing, adapter_folder, kind_of_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from manylora.data import TaskData
    from manylora.evaluation import Scores
    from manylora.federated.config import FederateConfig
    from manylora.jobs.progress import Progress


Kind = TypeVar("Kind", bound=TaskKind, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Subject(Generic[Kind]):
    """A model ready to answer, and how it does."""

    model: PeftModel | PreTrainedModel
    kind: Kind
    prompts: PromptRecord | None = None
    """How the prompts of the training were made; None where the adapter does not say, and without one."""


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


def load_subject(adapter: str | None, *, model: str | None, dtype: str, device: str) -> Subject[TaskKind]:
    """Load the base and put the adapter, if any, onto it.

    Raises:
        ModelError: unknown model, unknown adapter, or two that do not belong together.
        DataError: the adapter classifies, and nothing says which output of its head is which label.
    """
    if adapter is None:
        base, writing = Writing.load_bare(model or EMBEDDED, dtype=dtype, device=device)
        return Subject(model=base, kind=writing)
    adapted, kind, prompts = kind_of_adapter(adapter).load(adapter, model=model, dtype=dtype, device=device)
    return Subject(model=adapted, kind=kind, prompts=prompts)


def load_writer(adapter: str, *, model: str | None, dtype: str, device: str) -> Subject[Writing]:
    """The same of an adapter that writes.

    Raises:
        ModelError: see `load_subject`; or the adapter classifies.
    """
    if reason := kind_of_adapter(adapter).cannot_write:
        raise ModelError(f"{adapter} {reason}; score it with: manylora evaluate --adapter {adapter}")
    adapted, kind, prompts = Writing.load(adapter, model=model, dtype=dtype, device=device)
    return Subject(model=adapted, kind=kind, prompts=prompts)


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
