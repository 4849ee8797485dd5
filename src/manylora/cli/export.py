"""`manylora export`: an adapter as plain LoRAs or merged weights, and plain LoRAs as one adapter."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.cli.parsing import parse
from manylora.cli.progress import ConsoleProgress
from manylora.jobs.export import export
from manylora.jobs.settings import ExportConfig

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


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    config, given = parse(
        ExportConfig, arguments, verb="export", description=DESCRIPTION, positional=("adapter",)
    )
    export(config, given=given, progress=ConsoleProgress())
    return 0
