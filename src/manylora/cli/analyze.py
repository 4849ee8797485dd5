"""`manylora analyze`: how alike adapters are, how far they moved, where tasks conflict, what routers do."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.cli.console import draw_report
from manylora.cli.parsing import parse
from manylora.cli.progress import ConsoleProgress
from manylora.jobs.analyze import analyze
from manylora.jobs.settings import AnalyzeConfig

DESCRIPTION = """\
Look into adapters, ours or plain PEFT LoRAs, and write what is found to analysis.json:

  similarity   of A's and of B's between adapters and between experts, beside that of random subspaces
  change       of A and of B during training, from the weights that a run kept (train --keep-adapters 4)
  gradients    norms and conflict between tasks on the shared matrix, measured on rows
  gates        what a token router does with each task

The first two look at matrices alone; the last two load the base model.

  manylora analyze runs/train-001                              one run
  manylora analyze runs/train-001 runs/train-002               two, compared
  manylora analyze loras/a loras/b --label loras/a=sums,0 --label loras/b=stories,0
  manylora analyze --figures                                   the paper's figures 1 and 2; a few minutes

docs/analyze.md says what each number means."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    config, _ = parse(
        AnalyzeConfig, arguments, verb="analyze", description=DESCRIPTION, several=("adapters", "label")
    )
    found, path = analyze(config, progress=ConsoleProgress())
    from manylora.cli.analysis_tables import print_analysis

    print_analysis(found)
    print(f"written to {path / 'analysis.json'}")
    draw_report(path)
    return 0
