"""`manylora predict`: answer prompts with a trained adapter."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.options import PredictOptions
from manylora.cli.parsing import parse
from manylora.data import Example, Row, parse_row
from manylora.errors import DataError

if TYPE_CHECKING:
    from manylora.cli.subjects import Subject

DESCRIPTION = """\
Answer prompts with a trained adapter; an answer is printed as it is generated.

  manylora predict --adapter runs/train-001 "Add punctuation: hello world how are you"
  echo "Add punctuation: hello world" | manylora predict --adapter runs/train-001
  manylora predict --adapter runs/train-001 --file questions.jsonl > answers.jsonl

A prompt is an instruction; it is put into the template that the adapter was trained with. Rows of a JSONL file
have the fields of training rows (instruction and input, or prompt, or messages), an answer being optional, and
come back with a field "prediction"."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    options, _ = parse(
        PredictOptions,
        arguments,
        verb="predict",
        description=DESCRIPTION,
        positional=("prompt",),
        texts=("prompt", "input"),
    )
    examples = None if options.file is not None else [_single(options)]
    if options.file == "-" and sys.stdin is None:
        raise DataError("There is no standard input to read rows from; give a file.")
    if options.file not in (None, "-") and not Path(options.file or "").is_file():
        raise DataError(f"{options.file} is not a file; give a JSONL file of rows, or - for standard input.")
    from manylora.cli.subjects import load_subject

    subject = load_subject(options.adapter, model=options.model, dtype=options.dtype, device=options.device)
    if options.task is not None:
        subject.check_task(options.task)
    if examples is not None:
        for example in examples:
            _answer(subject, example, options)
        return 0
    for row, example in _rows(options):
        answer = "".join(_pieces(subject, example, options))
        print(json.dumps({**row, "prediction": answer}), flush=True)
    return 0


def _single(options: PredictOptions) -> Example:
    text = options.prompt
    if not text:
        if sys.stdin is not None and sys.stdin.isatty():
            print("prompt (end with Ctrl-D):", file=sys.stderr)
        text = sys.stdin.read().strip() if sys.stdin is not None else ""
    text = text.encode("utf-8", "replace").decode("utf-8")  # what the shell gave may be no UTF-8
    if not text:
        raise DataError(
            "The prompt is empty; give it as an argument, on standard input, or rows with --file."
        )
    return Example(
        task=options.task or "",
        instruction=text,
        input=options.input,
        form="prompt" if options.raw else "alpaca",
        origin="the prompt",
    )


def _answer(subject: Subject, example: Example, options: PredictOptions) -> None:
    for piece in _pieces(subject, example, options):
        print(piece, end="", flush=True)
    print()


def _pieces(subject: Subject, example: Example, options: PredictOptions) -> Iterator[str]:
    from manylora.cli.scoring import DEFAULT_ANSWER_TOKENS
    from manylora.evaluation import stream_answer

    known = subject.answer_tokens
    limit = known.get(example.task) or max(known.values(), default=DEFAULT_ANSWER_TOKENS)
    return stream_answer(
        subject.model,
        subject.tokenizer,
        example,
        max_new_tokens=options.max_new_tokens or limit,
        max_length=subject.max_length,
        expert_id=subject.expert(options.task or example.task or None),
    )


def _rows(options: PredictOptions) -> Iterator[tuple[dict[str, object], Example]]:
    """Rows one by one, so that answers flow while a pipe is still being written."""
    name = "standard input" if options.file == "-" else str(options.file)
    with contextlib.ExitStack() as open_files:
        source = sys.stdin.buffer
        if options.file != "-":
            source = open_files.enter_context(Path(name).open("rb"))
        for number, line in enumerate(source, start=1):
            place = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{place} is not valid JSON ({error}); write one object per line, in UTF-8."
                ) from error
            if not text:
                continue
            if not isinstance(row, dict):
                raise DataError(f"{place} is no object but {text[:40]!r}; write one object per line.")
            task = str(row.get("task") or options.task or "")
            yield row, parse_row(Row(fields=row, place=place), task=task, require_output=False)
