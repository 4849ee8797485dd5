"""The other way of `export`: plain LoRAs, one per task, → one adapter that routes by task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.errors import ConfigError, ManyLoraError, ModelError

if TYPE_CHECKING:
    from manylora.data import PromptRecord
    from manylora.jobs.progress import Progress
    from manylora.jobs.settings import ExportConfig

UNCHECKED = "not checked: whether the files are whole, as the configuration of {base} is not on this machine"
"""What is said where a base's configuration is not at hand."""


def combine_loras(config: ExportConfig, folder: Path, *, progress: Progress) -> None:
    """Put plain LoRAs into one adapter, an expert each, in `folder`.

    Raises:
        ConfigError, ModelError: they do not fit together.
    """
    from manylora.adapters import import_loras, read_lora, write_folder
    from manylora.adapters.card import add_loading_section, combined_card
    from manylora.training import check_layers

    paths = _lora_folders(config)
    loras = {name: read_lora(path) for name, path in paths.items()}
    for lora in loras.values():
        if config.model is not None:
            lora.config.base_model_name_or_path = config.model
        lora.config.base_model_name_or_path = _inside_name(lora.config.base_model_name_or_path)
    joined, weights = import_loras(loras)
    joined.base_fingerprint = _common_mark(paths)
    base = joined.base_model_name_or_path
    checked = [
        check_layers(lora.config, lora.weights, base=base, source=str(paths[name]))
        for name, lora in loras.items()
    ]
    if not all(checked):
        progress.show_line(UNCHECKED.format(base=base))
    folder.rmdir()
    hub = base is not None and not os.path.isabs(base) and "/" in base
    write_folder(folder, joined, weights, card=combined_card(list(loras), base=base, hub=hub))
    add_loading_section(folder, task_type=joined.task_type)
    _joined_prompts(config, paths, progress).write(folder)
    progress.show_line(
        f"{config.to}: {len(loras)} experts of rank {joined.r}, for the tasks {', '.join(loras)}"
    )
    progress.show_line(
        f"next: manylora predict --adapter {config.to} --task {next(iter(loras))} 'your prompt'"
    )


def _common_mark(paths: Mapping[str, Path]) -> str | None:
    """The mark of the base that LoRAs were trained on; None where one of them bears none, or one of an earlier version.

    Raises:
        ModelError: they were trained on different bases.
    """
    from manylora.data import find_prompts
    from manylora.training import comparable, same_base

    marks = {
        task: record.base_fingerprint if (record := find_prompts(path)) else None
        for task, path in paths.items()
    }
    known = {task: mark for task, mark in marks.items() if mark is not None}
    first, *others = known or [""]
    for other in others:
        if comparable(known[first], known[other]) and not same_base(known[first], known[other]):
            raise ModelError(
                f"{paths[first]} and {paths[other]} were trained on different bases (fingerprints {known[first]} and "
                f"{known[other]}), and an adapter has one; put them into two."
            )
    alike = len(known) == len(marks) and all(comparable(known[first], known[other]) for other in others)
    return known[first] if alike else None


def _joined_prompts(config: ExportConfig, paths: Mapping[str, Path], progress: Progress) -> PromptRecord:
    """How the LoRAs were asked, one task each; what no folder says is said to the user.

    Raises:
        ConfigError: two of them were trained on different chat templates or dates, of which an adapter has one.
    """
    from manylora.data import PromptRecord, TaskPrompts, find_prompts

    records = {task: record for task, path in paths.items() if (record := find_prompts(path))}
    tasks: dict[str, TaskPrompts] = {}
    for task in paths:
        known = records[task].prompts_of(task) if task in records else None
        form = known.form if known and config.form == "auto" else config.form
        if form != "auto":
            tasks[task] = known if known and known.form == form else TaskPrompts(form=form)
    if unknown := [task for task in paths if task not in tasks]:
        progress.show_line(
            f"note: {', '.join(unknown)}: nothing says which form the training prompts had; predict will use the "
            "Alpaca form. Say it with --form chat, prompt or alpaca."
        )
    chats = {task: records[task] for task in records if task in tasks and tasks[task].form == "chat"}
    for what in ("template", "date"):
        values = {task: getattr(record, what) for task, record in chats.items()}
        for task, value in values.items():
            if value != (first := next(iter(values.items())))[1]:
                raise ConfigError(
                    f"{first[0]} and {task} were trained with different chat templates (their {what} differs), of "
                    "which one adapter has one; put them into two."
                )
    one = next(iter(chats.values()), None)
    lengths = [record.max_length for record in records.values() if record.max_length]
    return PromptRecord(
        tasks=tasks,
        template=one.template if one else None,
        date=one.date if one else None,
        max_length=max(lengths, default=None),
    )


def _lora_folders(config: ExportConfig) -> dict[str, Path]:
    """Task name to LoRA folder, from "DIR" and "NAME=DIR"."""
    from manylora.adapters import find_loras
    from manylora.training.config import as_list

    paths: dict[str, Path] = {}
    for word in as_list(config.from_loras) or ():
        name, equals, text = word.partition("=")
        given = Path(text if equals else word).expanduser()
        found = find_loras(given)
        if equals and len(found) > 1:
            raise ConfigError(
                f"{word}: {given} holds {len(found)} LoRAs; one name cannot stand for all, leave it out."
            )
        for path in found:
            task = name if equals else path.resolve().name
            if task in paths:
                raise ConfigError(
                    f"Two LoRAs are called {task!r}; name them: --from-loras one={paths[task]},two={path}."
                )
            paths[task] = path
    if not paths:
        raise ConfigError(
            "--from-loras names no folder; give LoRA folders, such as --from-loras loras/a,loras/b."
        )
    return paths


def _inside_name(base: str | None) -> str | None:
    """The base's name as this package writes it: the embedded base by its word."""
    from manylora.assets import embedded_base_path
    from manylora.data import EMBEDDED

    with contextlib.suppress(OSError, ManyLoraError):
        if base is not None and Path(base).resolve() == Path(embedded_base_path()).resolve():
            return EMBEDDED
    return base
