"""`manylora train`: data → base model + adapter → training → evaluation → table."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.launch import Launch, launched
from manylora.cli.options import TrainOptions
from manylora.cli.parsing import parse
from manylora.errors import ConfigError
from manylora.training.config import TrainConfig

if TYPE_CHECKING:
    from manylora.training import Prepared

DESCRIPTION = """\
Fine-tune one model on many tasks, then score it on every task's test rows.

Without options this is the main job: ALoRA (3 experts, one shared B, rank 8) on the embedded suite of
8 tasks and the embedded base model; a few minutes on two CPU cores.

  manylora train --dry-run                                  what would be done, and what it needs
  manylora train --data flan8/train --test flan8/test       your own rows (JSON, JSONL, CSV, Parquet, Hub id)
  manylora train --model meta-llama/Llama-3.2-1B --r 16     another base model
  manylora train --task-type SEQ_CLS --model DIR --data …   an encoder such as BERT that chooses among labels
  manylora train --resume runs/train-001                    go on after a crash
  torchrun --nproc-per-node 2 -m manylora.cli train         in several processes, each with its part of every step"""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    with launched() as launch:
        return _run(arguments, launch)


def _run(arguments: Sequence[str], launch: Launch) -> int:
    options, given = parse(TrainOptions, arguments, verb="train", description=DESCRIPTION)
    if options.resume is not None:
        if given - {"resume"}:
            extra = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given - {"resume"}))
            raise ConfigError(f"--resume takes all settings from the run folder; leave out {extra}.")
        return _resume(options.resume, launch)
    config = _settings(options)
    from manylora.cli.scoring import check_test
    from manylora.cli.tables import print_plan
    from manylora.training import RunFolder, prepare
    from manylora.training.memory import check_memory
    from manylora.training.models import pick_device

    prepared = prepare(config)
    print_plan(prepared.plan, prepared.config)
    check_test(prepared)
    if options.dry_run:
        return 0
    if not isinstance(prepared.plan.memory, str):
        check_memory(prepared.plan.memory, device=pick_device(config.device))
    with contextlib.ExitStack() as stack:

        def create() -> str:
            settings = prepared.config.to_dict()
            folder = RunFolder.create(options.out, config=settings, seed=config.seed)
            stack.enter_context(folder)
            return str(folder.path)

        return _work(prepared, launch.folder(create), launch)


def _settings(options: TrainOptions) -> TrainConfig:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: getattr(options, name) for name in names})


def _resume(path: str, launch: Launch) -> int:
    from manylora.cli.console import draw_report
    from manylora.cli.tables import print_saved_scores
    from manylora.training import RunFolder, prepare

    folder = RunFolder.open(path)
    config = folder.config(TrainConfig, verb="train")
    missing = folder.missing_result() if folder.state["state"] == "finished" else None
    if missing:
        print(f"{path} was finished, but its {missing} is gone; it is made again.")
    elif folder.state["state"] == "finished":
        print(f"{path} is finished already.")
        print_saved_scores(folder)
        draw_report(folder.path)
        return 0
    with folder:

        def lock() -> str:
            folder.lock()
            return str(folder.path)

        place = launch.folder(lock)
        return _work(prepare(config), place, launch)


def _work(prepared: Prepared, place: str, launch: Launch) -> int:
    from manylora.cli.console import TrainingProgress, draw_report, explain
    from manylora.cli.scoring import score_run
    from manylora.training import RunFolder, finetune

    folder = RunFolder(Path(place))
    if not launch.processes.first:
        finetune(prepared, folder)
        return 0
    print(f"run folder: {folder.path}")
    began = time.monotonic()
    try:
        model = finetune(prepared, folder, report=TrainingProgress())
        trained = time.monotonic()
        score_run(prepared, folder, model)
        seconds = {"training": round(trained - began, 1), "evaluation": round(time.monotonic() - trained, 1)}
        folder.set_state("finished", seconds=seconds)
    except BaseException as error:
        reason = (
            "stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else explain(error) or repr(error)
        )
        with contextlib.suppress(OSError):  # a full disk cannot take this either; "running" resumes alike
            folder.set_state("failed", error=reason)
        if isinstance(error, KeyboardInterrupt):
            print(f"continue with: manylora train --resume {shlex.quote(str(folder.path))}")
        raise
    print(f"training {seconds['training']:.0f} s, evaluation {seconds['evaluation']:.0f} s")
    draw_report(folder.path)
    name = shlex.quote(str(folder.path))
    if prepared.labels is None:
        experts = model.peft_config["default"].task_names  # only a task router has them here
        task = f" --task {shlex.quote(experts[0])}" if experts else ""
        print(f"next: manylora predict --adapter {name}{task} 'your prompt'")
    else:
        print(f"next: manylora evaluate --adapter {name} --data FILE")
    return 0
