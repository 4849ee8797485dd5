"""`manylora evaluate`: score an adapter, or a bare model, on test rows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from manylora.cli.options import EvaluateOptions
from manylora.cli.parsing import parse
from manylora.errors import RunError

DESCRIPTION = """\
Generate an answer to every test row, greedily, and print a table of scores per task.

  manylora evaluate --adapter runs/train-001                         the test rows of that run
  manylora evaluate --adapter runs/train-001 --data flan8/test       other rows
  manylora evaluate --data embedded                                  the bare base model, zero-shot

ROUGE-1 and exact match for every row; accuracy where the rows carry a gold `answer` (commonsense and math
files); option accuracy where a prompt lists OPTIONS."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    options, _ = parse(EvaluateOptions, arguments, verb="evaluate", description=DESCRIPTION)
    if options.out is not None:
        if Path(options.out).exists():
            raise RunError(f"{options.out} exists already; choose another --out.")
        Path(options.out).mkdir(parents=True)  # at once, so that hours of answers are not lost to a bad name
    try:
        return _evaluate(options)
    except BaseException:
        if options.out is not None:
            with contextlib.suppress(OSError):
                Path(options.out).rmdir()  # only while it is empty
        raise


def _evaluate(options: EvaluateOptions) -> int:
    from manylora.cli.scoring import score, suite_baselines, write_scores
    from manylora.cli.subjects import load_subject, run_test_source
    from manylora.cli.tables import print_scores
    from manylora.data import load_examples
    from manylora.training.config import as_list

    data = options.data or run_test_source(options.adapter)
    test = load_examples(
        data,
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
    baselines = suite_baselines(data, list(test), limit=options.limit)
    print_scores(scores, baselines)
    if options.out is not None:
        folder = Path(options.out)
        write_scores(folder, scores, baselines)
        print(f"written to {folder}")
    return 0
