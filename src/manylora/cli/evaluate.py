"""`manylora evaluate`: score an adapter, or a bare model, on test rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manylora.cli.options import EvaluateOptions
from manylora.cli.parsing import parse
from manylora.data import EMBEDDED
from manylora.errors import RunError

DESCRIPTION = """\
Generate an answer to every test row, greedily, and print a table of scores per task.

  manylora evaluate --adapter runs/train-001                         the run's own kind of data: the embedded suite
  manylora evaluate --adapter runs/train-001 --data flan8/test       other rows
  manylora evaluate --data embedded                                  the bare base model, zero-shot

ROUGE-1 and exact match for every row; accuracy where the rows carry a gold `answer` (commonsense and math
files); option accuracy where a prompt lists OPTIONS."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    options, _ = parse(EvaluateOptions, arguments, verb="evaluate", description=DESCRIPTION)
    if options.out is not None and Path(options.out).exists():
        raise RunError(f"{options.out} exists already; choose another --out.")
    from manylora.cli.scoring import score, suite_baselines, write_scores
    from manylora.cli.subjects import load_subject
    from manylora.cli.tables import print_scores
    from manylora.data import load_examples
    from manylora.training.config import as_list

    test = load_examples(
        options.data,
        task_column=options.task_column,
        tasks=as_list(options.tasks),
        split="test",
        limit=options.limit,
    )
    subject = load_subject(options.adapter, model=options.model, dtype=options.dtype, device=options.device)
    scores = score(
        subject.model,
        subject.tokenizer,
        test,
        answer_tokens=dict.fromkeys(test, options.max_new_tokens)
        if options.max_new_tokens
        else subject.answer_tokens,
        batch_size=options.batch_size,
        max_length=subject.max_length,
        experts=subject.experts,
    )
    baselines = suite_baselines(list(test)) if options.data == EMBEDDED and options.limit is None else {}
    print_scores(scores, baselines)
    if options.out is not None:
        folder = Path(options.out)
        folder.mkdir(parents=True)
        write_scores(folder, scores, baselines)
        print(f"written to {folder}")
    return 0
