"""`manylora export`: an adapter as plain LoRAs or merged weights, and plain LoRAs as one adapter."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.options import ExportOptions
from manylora.cli.parsing import parse
from manylora.errors import ConfigError, ManyLoraError, ModelError, RunError

if TYPE_CHECKING:
    from peft import PeftConfig

    from manylora.adapters import PlainLora
    from manylora.data import PromptRecord

DESCRIPTION = """\
Write an adapter as plain LoRAs, which PEFT, vLLM and SGLang load without this package.

  manylora export runs/train-001 --to exported                  LoRAs
  manylora export runs/train-001 --to merged --merge            whole models with the adapter merged in
  manylora export --from-loras loras/sums,loras/stories --to one   the other way: LoRAs into one adapter

What is written depends on the adapter's router:

  task       one LoRA per task, exact: exported/TASK/
  uniform    one LoRA, exact; so has an adapter with one expert
  token      one LoRA per task, an approximation: the router weighs the experts anew for each token, a LoRA
             cannot. Each LoRA is fitted to the adapter on the task's rows; adapter and LoRAs are scored on rows, and
             nothing is written if that loses more than --max-loss points, unless --force is given.

Nothing is left behind half-written: the folder appears when it is whole."""

_UNCHECKED = "not checked: whether the files are whole, as the configuration of {base} is not on this machine"
_FOR_TOKEN_ROUTERS = ("data", "task_column", "collapse", "limit", "max_loss", "force", "batch_size")


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    options, given = parse(
        ExportOptions, arguments, verb="export", description=DESCRIPTION, positional=("adapter",)
    )
    for_scoring = _first_of(given, _FOR_TOKEN_ROUTERS)
    if options.from_loras is not None and (unused := _first_of(given, ("tasks", "merge")) or for_scoring):
        raise ConfigError(f"--from-loras does nothing with {unused}; leave it out.")
    with _placed(str(options.to)) as folder:
        return (
            _import(options, folder)
            if options.from_loras is not None
            else _export(options, for_scoring, folder)
        )


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


def _export(options: ExportOptions, for_scoring: str, folder: Path) -> int:
    from manylora.adapters import expert_names, export_lora, read_adapter, read_settings
    from manylora.data import find_prompts
    from manylora.training import adapter_base_name, adapter_folder, adapter_task_type, check_layers
    from manylora.training.config import as_list

    source = adapter_folder(str(options.adapter))
    if adapter_task_type(source) == "SEQ_CLS":
        raise ModelError(
            f"{options.adapter} classifies: it has a head that a plain LoRA has no place for; load it with PEFT."
        )
    base = options.model or adapter_base_name(source)
    if options.merge and read_settings(source).get("peft_type") == "LORA":
        _merge_lora(options, folder, source, for_scoring, base=base)
        return 0
    config, weights = read_adapter(source)
    config.base_model_name_or_path = _outside_name(base)
    if not check_layers(config, weights, base=base, source=str(options.adapter)):
        print(_UNCHECKED.format(base=base))
    tasks = as_list(options.tasks)
    if for_scoring and (config.num_experts == 1 or config.router != "token"):
        raise ConfigError(
            f"{options.adapter} is exported exactly, so nothing is fitted or scored; leave out {for_scoring}."
        )
    if config.num_experts == 1 or config.router == "uniform":
        if tasks:
            raise ConfigError(
                f"{options.adapter} is one and the same LoRA for every task; leave out --tasks {','.join(tasks)}."
            )
        loras = {"": export_lora(config, weights, "all")}
        notes = {"": "It gives what the adapter gives, to rounding."}
    elif config.router == "task":
        names = expert_names(config)
        if unknown := [task for task in tasks or () if task not in names]:
            raise ConfigError(f"The adapter has no task {unknown[0]!r}; its tasks: {', '.join(names)}.")
        loras = {task: export_lora(config, weights, names.index(task)) for task in tasks or names}
        notes = dict.fromkeys(loras, "It gives what the adapter gives for this task, to rounding.")
    else:
        from manylora.cli.collapsing import collapse

        loras, notes = collapse(options, source, config, weights, report_to=folder)
    mark = config.base_fingerprint
    _write(options, folder, loras, notes, base=base, trained=config, prompts=find_prompts(source), mark=mark)
    return 0


def _merge_lora(options: ExportOptions, folder: Path, source: Path, for_scoring: str, *, base: str) -> None:
    """A LoRA as PEFT saves it, such as a client's personal model, written into its base."""
    from manylora.adapters import read_lora
    from manylora.data import find_prompts

    if other := for_scoring or (f"--tasks {options.tasks}" if options.tasks else ""):
        raise ConfigError(f"{options.adapter} is one plain LoRA, merged exactly; leave out {other}.")
    lora, prompts = read_lora(source), find_prompts(source)
    mark = prompts.base_fingerprint if prompts else None
    _write(options, folder, {"": lora}, {}, base=base, trained=lora.config, prompts=prompts, mark=mark)


def _write(
    options: ExportOptions,
    folder: Path,
    loras: Mapping[str, PlainLora],
    notes: Mapping[str, str],
    *,
    base: str,
    trained: PeftConfig,
    prompts: PromptRecord | None,
    mark: str | None,
) -> None:
    """Fill `folder` and print what it holds; how to ask goes along."""
    from manylora.adapters import write_folder
    from manylora.adapters.card import lora_card, server_rank
    from manylora.data import PromptRecord
    from manylora.training import write_merged

    places = _places(list(loras))
    obstacles: list[str] = []
    for task, lora in loras.items():
        place = folder / places[task]
        obstacles = _obstacles(lora)
        if options.merge:
            write_merged(
                place, base, lora, dtype=options.dtype, device=options.device, trained=trained, mark=mark
            )
        else:
            name = places[task] or Path(str(options.to)).name
            outside = lora.config.base_model_name_or_path
            card = lora_card(
                name, base=outside, hub=outside == base, rank=lora.rank, source=str(options.adapter),
                note=notes[task] + _asked(prompts, task), obstacles=obstacles,
            )  # fmt: skip
            if place == folder:
                place.rmdir()
            write_folder(place, lora.config, lora.weights, card=card)
        # A merged model has become a base of its own.
        own = replace(prompts or PromptRecord(tasks={}), base_fingerprint=None if options.merge else mark)
        if prompts is not None or own.base_fingerprint is not None:
            own.only([task]).write(place)
        what = "merged model" if options.merge else f"LoRA of rank {lora.rank}"
        print(f"{Path(str(options.to)) / places[task]}: {what}")
    if options.merge:
        return
    if obstacles:
        print(f"vLLM and SGLang will refuse these: {'; '.join(obstacles)}. Use --merge for them.")
        return
    rank = server_rank(max(lora.rank for lora in loras.values()))
    modules = " ".join(
        f"{places[task] or Path(str(options.to)).name}={Path(str(options.to)) / places[task]}"
        for task in loras
    )
    served = next(iter(loras.values())).config.base_model_name_or_path
    print(
        f"serve with vLLM: vllm serve {served} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"
    )


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


def _import(options: ExportOptions, folder: Path) -> int:
    from manylora.adapters import import_loras, read_lora, write_folder
    from manylora.adapters.card import add_loading_section, combined_card
    from manylora.training import check_layers

    paths = _lora_folders(options)
    loras = {name: read_lora(path) for name, path in paths.items()}
    for lora in loras.values():
        if options.model is not None:
            lora.config.base_model_name_or_path = options.model
        lora.config.base_model_name_or_path = _inside_name(lora.config.base_model_name_or_path)
    config, weights = import_loras(loras)
    config.base_fingerprint = _common_mark(paths)
    base = config.base_model_name_or_path
    checked = [
        check_layers(lora.config, lora.weights, base=base, source=str(paths[name]))
        for name, lora in loras.items()
    ]
    if not all(checked):
        print(_UNCHECKED.format(base=base))
    folder.rmdir()
    hub = base is not None and not os.path.isabs(base) and "/" in base
    write_folder(folder, config, weights, card=combined_card(list(loras), base=base, hub=hub))
    add_loading_section(folder, task_type=config.task_type)
    _joined_prompts(options, paths).write(folder)
    print(f"{options.to}: {len(loras)} experts of rank {config.r}, for the tasks {', '.join(loras)}")
    print(f"next: manylora predict --adapter {options.to} --task {next(iter(loras))} 'your prompt'")
    return 0


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


def _joined_prompts(options: ExportOptions, paths: Mapping[str, Path]) -> PromptRecord:
    """How the LoRAs were asked, one task each; what no folder says is said to the user.

    Raises:
        ConfigError: two of them were trained on different chat templates or dates, of which an adapter has one.
    """
    from manylora.data import PromptRecord, TaskPrompts, find_prompts

    records = {task: record for task, path in paths.items() if (record := find_prompts(path))}
    tasks: dict[str, TaskPrompts] = {}
    for task in paths:
        known = records[task].prompts_of(task) if task in records else None
        form = known.form if known and options.form == "auto" else options.form
        if form != "auto":
            tasks[task] = known if known and known.form == form else TaskPrompts(form=form)
    if unknown := [task for task in paths if task not in tasks]:
        print(
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


def _lora_folders(options: ExportOptions) -> dict[str, Path]:
    """Task name to LoRA folder, from "DIR" and "NAME=DIR"."""
    from manylora.adapters import find_loras
    from manylora.training.config import as_list

    paths: dict[str, Path] = {}
    for word in as_list(options.from_loras) or ():
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
