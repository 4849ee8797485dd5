"""Export: an adapter → plain LoRAs or merged models, which need this package no more; or plain LoRAs → an adapter."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.errors import ConfigError, ModelError, RunError
from manylora.jobs.combine_loras import UNCHECKED, combine_loras
from manylora.jobs.settings import ExportConfig

if TYPE_CHECKING:
    from peft import PeftConfig

    from manylora.adapters import PlainLora
    from manylora.data import PromptRecord
    from manylora.jobs.progress import Progress

_FOR_TOKEN_ROUTERS = ("data", "task_column", "collapse", "limit", "max_loss", "force", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    path: Path
    """The folder."""
    folders: Mapping[str, Path]
    """Task to its LoRA or merged model; "" where one stands for all tasks."""


def export(config: ExportConfig, *, given: Collection[str] = (), progress: Progress) -> Exported:
    """Write an adapter as plain LoRAs or merged models, or (`from_loras`) plain LoRAs as one adapter.

    Args:
        config: what to write, and where.
        given: settings that the user has named: those that would do nothing are refused.
        progress: told of everything on the way.

    Raises:
        ModelError, DataError, ConfigError: what is wrong with the input.
        NotMergeableError: LoRAs in place of a token router lose more than `config.max_loss` points.
        RunError: `config.to` exists, or cannot be written.
    """
    if not config.to:
        raise ConfigError("--to is missing; give a folder to write, such as --to exported.")
    if (config.adapter is None) == (config.from_loras is None):
        raise ConfigError(
            "Give either an adapter to export (manylora export runs/train-001 --to exported) or LoRA folders to "
            "put into one adapter (--from-loras)."
        )
    for_scoring = _first_of(given, _FOR_TOKEN_ROUTERS)
    if config.from_loras is not None and (unused := _first_of(given, ("tasks", "merge")) or for_scoring):
        raise ConfigError(f"--from-loras does nothing with {unused}; leave it out.")
    to = Path(config.to).expanduser()
    with _placed(str(to)) as folder:
        if config.from_loras is not None:
            combine_loras(config, folder, progress=progress)
            return Exported(path=to, folders={"": to})
        places = _export(config, for_scoring, folder, progress=progress)
    return Exported(path=to, folders={task: to / place for task, place in places.items()})


def _first_of(given: Collection[str], names: Sequence[str]) -> str:
    """The first of these options that was given, as it is typed; "" where none was."""
    return next((f"--{name.replace('_', '-')}" for name in names if name in given), "")


@contextlib.contextmanager
def _placed(to: str) -> Iterator[Path]:
    """A folder to fill, renamed to `to` when the block is through; after an error nothing is left.

    Made at once, so that a name that cannot be written is refused before hours of scoring.

    Raises:
        RunError: `to` exists and is not an empty folder, or no folder can be made there.
    """
    final = Path(os.path.abspath(Path(to).expanduser()))
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise RunError(f"{to} exists already; choose another --to.")
    made = [parent for parent in final.parents if not parent.exists()]  # innermost first
    partial = final.with_name(final.name + ".partial")
    try:
        if partial.exists():  # a killed export's
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{to} cannot be written ({error.strerror}); choose another --to.") from error
    try:
        yield partial
        if final.exists():
            final.rmdir()
        partial.replace(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def _export(config: ExportConfig, for_scoring: str, folder: Path, *, progress: Progress) -> dict[str, str]:
    """Fill `folder`; task to the place of its LoRA in it."""
    from manylora.adapters import expert_names, export_lora, read_adapter, read_lora, read_settings
    from manylora.data import find_prompts
    from manylora.training import adapter_base_name, adapter_folder, check_layers, kind_of_adapter
    from manylora.training.config import as_list

    source = adapter_folder(str(config.adapter))
    if reason := kind_of_adapter(str(source)).cannot_export:
        raise ModelError(f"{config.adapter} {reason}; load it with PEFT.")
    base, prompts = config.model or adapter_base_name(source), find_prompts(source)
    write = partial(_write, config, folder, base=base, prompts=prompts, progress=progress)
    if config.merge and read_settings(source).get("peft_type") == "LORA":
        # as PEFT saves it, such as a client's personal model
        if other := for_scoring or (f"--tasks {config.tasks}" if config.tasks else ""):
            raise ConfigError(f"{config.adapter} is one plain LoRA, merged exactly; leave out {other}.")
        lora, mark = read_lora(source), prompts.base_fingerprint if prompts else None
        return write({"": lora}, {}, trained=lora.config, mark=mark)
    adapter, weights = read_adapter(source)
    adapter.base_model_name_or_path = _outside_name(base)
    if not check_layers(adapter, weights, base=base, source=str(config.adapter)):
        progress.show_line(UNCHECKED.format(base=base))
    tasks = as_list(config.tasks)
    if for_scoring and (adapter.num_experts == 1 or adapter.router != "token"):
        raise ConfigError(
            f"{config.adapter} is exported exactly, so nothing is fitted or scored; leave out {for_scoring}."
        )
    if adapter.num_experts == 1 or adapter.router == "uniform":
        if tasks:
            raise ConfigError(
                f"{config.adapter} is one and the same LoRA for every task; leave out --tasks {','.join(tasks)}."
            )
        loras = {"": export_lora(adapter, weights, "all")}
        notes = {"": "It gives what the adapter gives, to rounding."}
    elif adapter.router == "task":
        names = expert_names(adapter)
        if unknown := [task for task in tasks or () if task not in names]:
            raise ConfigError(f"The adapter has no task {unknown[0]!r}; its tasks: {', '.join(names)}.")
        loras = {task: export_lora(adapter, weights, names.index(task)) for task in tasks or names}
        notes = dict.fromkeys(loras, "It gives what the adapter gives for this task, to rounding.")
    else:
        from manylora.jobs.collapse import collapse

        loras, notes = collapse(config, source, adapter, weights, report_to=folder, progress=progress)
    return write(loras, notes, trained=adapter, mark=adapter.base_fingerprint)


def _write(
    config: ExportConfig,
    folder: Path,
    loras: Mapping[str, PlainLora],
    notes: Mapping[str, str],
    *,
    base: str,
    trained: PeftConfig,
    prompts: PromptRecord | None,
    mark: str | None,
    progress: Progress,
) -> dict[str, str]:
    """Fill `folder` and tell what it holds; how to ask goes along."""
    from manylora.adapters import write_folder
    from manylora.adapters.card import lora_card, server_rank
    from manylora.data import PromptRecord
    from manylora.training import write_merged

    to, places = Path(str(config.to)), _places(list(loras))
    obstacles: list[str] = []
    for task, lora in loras.items():
        place = folder / places[task]
        obstacles = _obstacles(lora)
        if config.merge:
            write_merged(
                place, base, lora, dtype=config.dtype, device=config.device, trained=trained, mark=mark
            )
        else:
            name = places[task] or to.name
            outside = lora.config.base_model_name_or_path
            card = lora_card(
                name, base=outside, hub=outside == base, rank=lora.rank, source=str(config.adapter),
                note=notes[task] + _asked(prompts, task), obstacles=obstacles,
            )  # fmt: skip
            if place == folder:
                place.rmdir()
            write_folder(place, lora.config, lora.weights, card=card)
        # A merged model has become a base of its own.
        own = (prompts or PromptRecord(tasks={})).with_mark(None if config.merge else mark)
        if prompts is not None or own.base_fingerprint is not None:
            own.only([task]).write(place)
        what = "merged model" if config.merge else f"LoRA of rank {lora.rank}"
        progress.show_line(f"{to / places[task]}: {what}")
    if config.merge:
        return places
    if obstacles:
        progress.show_line(
            f"vLLM and SGLang will refuse these: {'; '.join(obstacles)}. Use --merge for them."
        )
        return places
    rank = server_rank(max(lora.rank for lora in loras.values()))
    modules = " ".join(f"{places[task] or to.name}={to / places[task]}" for task in loras)
    served = next(iter(loras.values())).config.base_model_name_or_path
    progress.show_line(
        f"serve with vLLM: vllm serve {served} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"
    )
    return places


_ASKED = {
    "alpaca": "Its training prompts had the Alpaca form: '### Instruction:', the instruction, '### Response:'.",
    "prompt": "Its training prompts stood alone, without a template.",
    "chat": "Its training prompts went through the tokenizer's chat template.",
}


def _asked(prompts: PromptRecord | None, task: str) -> str:
    """A sentence on how to ask, for a model card."""
    forms = {known.form for known in prompts.only([task]).tasks.values()} if prompts else set()
    return f" {_ASKED[forms.pop()]} See manylora_prompts.json." if len(forms) == 1 else ""


def _places(tasks: Sequence[str]) -> dict[str, str]:
    """Task to a folder name; a task may be called "sums/easy"."""
    places = {task: re.sub(r"[^\w.-]+", "_", task).strip(".") for task in tasks}
    for task, place in places.items():
        clash = [other for other in tasks if other != task and places[other].lower() == place.lower()]
        if clash or (task and not place):
            raise ConfigError(
                f"The tasks {task!r} and {(clash or ['that name'])[0]!r} would share a folder; use --tasks."
            )
    return places


def _obstacles(lora: PlainLora) -> list[str]:
    """What vLLM's and SGLang's documentation and loaders refuse in a LoRA."""
    found = []
    if lora.config.modules_to_save:
        found.append(f"it trains whole modules ({', '.join(sorted(lora.config.modules_to_save))})")
    if lora.config.trainable_token_indices:
        found.append("it trains single token embeddings (trainable_token_indices)")
    if lora.config.bias != "none":
        found.append(f"it trains biases (bias={lora.config.bias!r})")
    return found


def _outside_name(base: str) -> str:
    """The base as a program without this package finds it: a Hub id, or an absolute path."""
    from manylora.training import base_location

    location = base_location(base)
    return str(Path(location).absolute()) if Path(location).is_dir() else location
