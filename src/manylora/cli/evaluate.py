"""`manylora evaluate`: score an adapter, or a bare model, on test rows."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.cli.parsing import parse
from manylora.cli.progress import ConsoleProgress
from manylora.jobs.evaluate import EvaluateConfig, evaluate

DESCRIPTION = """\
Generate an answer to every test row, greedily, and print a table of scores per task.

  manylora evaluate --adapter runs/train-001                         the test rows of that run
  manylora evaluate --adapter runs/train-001 --data flan8/test       other rows
  manylora evaluate --data embedded                                  the bare base model, zero-shot

ROUGE-1 and exact match for every row; accuracy where the rows carry a gold `answer` (commonsense and math
files); option accuracy where a prompt lists OPTIONS. A classifier (train --task-type SEQ_CLS) chooses instead of
writing, and is scored by accuracy."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    config, _ = parse(EvaluateConfig, arguments, verb="evaluate", description=DESCRIPTION)
    evaluate(config, progress=ConsoleProgress())
    if config.out is not None:
        print(f"written to {config.out}")
    return 0
