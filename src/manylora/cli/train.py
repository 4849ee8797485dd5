"""`manylora train`: data → base model + adapter → training → evaluation → table."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manylora.cli.console import complain, draw_report
from manylora.cli.options import TrainOptions, refuse_beside_resume
from manylora.cli.parsing import parse
from manylora.cli.progress import ConsoleProgress
from manylora.files.settings import settings_of
from manylora.jobs.launch import Launch, launched
from manylora.training.config import TrainConfig

if TYPE_CHECKING:
    from manylora.jobs.run import Run

DESCRIPTION = """\
Fine-tune one model on many tasks, then score it on every task's test rows.

Without options this is the main job: ALoRA (3 experts, one shared B, rank 8) on the embedded suite of
8 tasks and the embedded base model; a few minutes on two CPU cores.

  manylora train --dry-run                                  what would be done, and what it needs
  manylora train --show-rows 3                              rows as the model gets them, and what carries loss
  manylora train --data flan8/train --test flan8/test       your own rows (JSON, JSONL, CSV, Parquet, Hub id)
  manylora train --model meta-llama/Llama-3.2-1B --r 16     another base model
  manylora train --task-type SEQ_CLS --model DIR --data …   an encoder such as BERT that chooses among labels
  manylora train --resume runs/train-001                    go on after a crash
  torchrun --nproc-per-node 2 -m manylora.cli train         in several processes, each with its part of every step"""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    with launched(complain) as launch:
        options, given = parse(TrainOptions, arguments, verb="train", description=DESCRIPTION)
        if options.resume is not None:
            refuse_beside_resume(given, {"resume"})
            return _resume(options.resume, launch)
        config = settings_of(options, TrainConfig)
        if options.dry_run or options.show_rows:
            _show(config, options)
            return 0
        from manylora.jobs.train import train

        return _conclude(train(config, out=options.out, progress=ConsoleProgress(), launch=launch), launch)


def _show(config: TrainConfig, options: TrainOptions) -> None:
    """Print the plan, or rows, or both."""
    from manylora.jobs.train import plan
    from manylora.training import prepare

    prepared = plan(config, progress=ConsoleProgress()) if options.dry_run else prepare(config)
    if options.show_rows:
        from manylora.cli.rows import print_rows

        print_rows(prepared, options.show_rows)


def _resume(path: str, launch: Launch) -> int:
    from manylora.jobs.train import finished_run, resume

    if (run := finished_run(path)) is not None:
        print(f"{path} is finished already.")
        if run.has_scores:
            ConsoleProgress().show_scores(run.scores, run.baselines, run.notes, run.gains)
        draw_report(run.path)
        return 0
    return _conclude(resume(path, progress=ConsoleProgress(), launch=launch), launch)


def _conclude(run: Run, launch: Launch) -> int:
    """Say where the result is, and what comes next."""
    if not launch.processes.first:
        return 0
    if not run.has_scores:
        print(f"no test rows (give them with --test); the adapter is in {run.adapter}")
    seconds = run.state["seconds"]
    print(f"training {seconds['training']:.0f} s, evaluation {seconds['evaluation']:.0f} s")
    from manylora.training import KINDS

    draw_report(run.path)
    name = shlex.quote(str(run.path))
    task = next(iter(run.facts.tasks)) if run.config.routes_by_task else None
    print(f"next: {KINDS[run.config.task_type].next_command(name, task=task)}")
    return 0
