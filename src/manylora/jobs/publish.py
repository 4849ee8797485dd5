"""What is made of a training's adapter on request: merged models in the run folder, a repository on the Hub."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from manylora.errors import ConfigError, ModelError
from manylora.files import remove
from manylora.jobs.export import export
from manylora.jobs.settings import ExportConfig
from manylora.training.kinds import KINDS
from manylora.training.models import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from manylora.jobs.progress import Progress
    from manylora.training import TrainConfig

MERGED = "merged"
"""Folder of a run: the merged model, or one per task."""


def check_publishing(config: TrainConfig) -> None:
    """Refuse, before anything is trained, what could not be made of the adapter afterwards.

    Args:
        config: resolved, with its number of experts.

    Raises:
        ConfigError: a token router cannot be merged, a classifier not be exported; or nobody is logged in to the Hub.
    """
    if config.save_merged:
        if reason := KINDS[config.task_type].cannot_export:
            raise ConfigError(f"save_merged: the adapter {reason}; leave it out, and load it with PEFT.")
        if config.router == "token" and config.num_experts != 1:
            raise ConfigError(
                "save_merged: a token router mixes its experts anew for each token, so no one matrix stands for them; "
                "take --router task or --method lora, or export LoRAs fitted to it (manylora export RUN --to DIR)."
            )
    if config.push_to_hub is not None:
        _check_hub(config.push_to_hub)


def _check_hub(name: str) -> None:
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ConfigError(
            f"push_to_hub is {name!r}, no name of a repository; give one such as me/my-adapter."
        ) from error
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub {name}: nobody is logged in to the Hub here; run hf auth login or set HF_TOKEN."
        )
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        raise ConfigError(
            f"push_to_hub {name}: the Hub does not accept the token here ({first_line(error)}); run hf auth login "
            "again."
        ) from error
    except OSError as error:  # of whatever the Hub's library speaks HTTP with; offline mode too
        raise ConfigError(
            f"push_to_hub {name}: the Hub cannot be reached ({first_line(error)}); leave it out, and upload the "
            "run's adapter later (hf upload)."
        ) from error


def save_merged(run: Path, config: TrainConfig, *, progress: Progress) -> None:
    """Write the merged model of a run that is trained, or one per task, to its folder `merged`.

    Raises:
        ModelError: the result is not finite.
    """
    remove(run / MERGED)  # of a run that was killed after it
    export(
        ExportConfig(adapter=str(run), to=str(run / MERGED), merge=True, device=config.device),
        progress=progress,
    )


def push_to_hub(run: Path, name: str, *, progress: Progress) -> None:
    """Upload a run's adapter folder, with its card; a repository that is not there yet is made, and is private.

    Raises:
        ModelError: it cannot be; the run itself is whole.
    """
    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository.repo_id,
            folder_path=run / "adapter",
            commit_message="Upload the adapter of manylora train",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"The run is finished, but its adapter could not be uploaded ({first_line(error)}); try again with: hf "
            f"upload {name} {shlex.quote(str(run / 'adapter'))}"
        ) from error
    progress.show_line(f"adapter uploaded to {repository}")
