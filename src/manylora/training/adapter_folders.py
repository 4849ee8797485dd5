"""Adapters as users name them, a run or a PEFT folder, and what its files say without any weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.adapters import read_settings
from manylora.errors import ModelError
from manylora.files import check_noted
from manylora.training.config import TrainConfig
from manylora.training.runs import RunFolder

if TYPE_CHECKING:
    from manylora.training.config import Quantisation


def adapter_folder(adapter: str | Path) -> Path:
    """The PEFT folder meant by `adapter`: itself, or the `adapter/` of a finished run folder.

    Raises:
        ModelError: neither; a run that has not finished says how to finish it.
    """
    path = Path(adapter).expanduser()
    if (path / "adapter_config.json").is_file():
        return path
    if (path / "adapter" / "adapter_config.json").is_file():
        return path / "adapter"
    if clients := sorted(path.glob("clients/*/adapter/adapter_config.json")):
        raise ModelError(
            f"{adapter} is a federated run, with an adapter for each client; give one of them, such as "
            f"{shlex.quote(str(clients[0].parents[1]))}"
        )
    if (path / "state.json").is_file():
        raise ModelError(_unfinished(path))
    raise ModelError(
        f"{adapter} is neither a run folder nor a PEFT adapter folder (no adapter_config.json in it)."
    )


def _unfinished(run: Path) -> str:
    """What to do with a run that has no adapter."""
    settings = RunFolder(run).read_config() if (run / "config.yaml").is_file() else {}
    verb = "federate" if "strategy" in settings else "train"
    if "measure" in settings:
        return f"{run} is an analysis and has no adapter; give a run of manylora train."
    return f"{run} has no adapter yet; finish the run with: manylora {verb} --resume {shlex.quote(str(run))}"


def adapter_base_name(adapter: str | Path) -> str:
    """Name of the base that an adapter folder was trained on.

    Raises:
        ModelError: the folder's configuration is broken or names none.
    """
    path = adapter_folder(adapter) / "adapter_config.json"
    name = read_settings(path.parent).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ModelError(f"{path} names no base model; give it with --model.")
    return name


def adapter_quantisation(adapter: str | Path) -> Quantisation | None:
    """How the base of an adapter folder was quantised in its training; None: not at all.

    Raises:
        ModelError: the folder's configuration is broken.
    """
    folder = adapter_folder(adapter)
    found = read_settings(folder).get("base_quantization")
    if found not in (None, "4bit", "8bit"):
        raise ModelError(f"{folder / 'adapter_config.json'} names no known base_quantization ({found!r}).")
    return found


def adapter_task_type(adapter: str | Path) -> str | None:
    """PEFT's task type of an adapter folder ("CAUSAL_LM", "SEQ_CLS"), where it names one.

    Raises:
        ModelError: the folder's configuration is broken.
    """
    found = read_settings(adapter_folder(adapter)).get("task_type")
    return found if isinstance(found, str) else None


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
