"""`manylora predict`: answer prompts with a trained adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.cli.options import PredictOptions
from manylora.cli.parsing import parse
from manylora.data import Example, Row, TaskPrompts, parse_row, question
from manylora.errors import DataError
from manylora.files import MOST_BYTES, parse_json, reason, without_nan

if TYPE_CHECKING:
    from manylora.cli.subjects import Subject

DESCRIPTION = """\
Answer prompts with a trained adapter; an answer is printed as it is generated.

  manylora predict --adapter runs/train-001 "Add punctuation: hello world how are you"
  echo "Add punctuation: hello world" | manylora predict --adapter runs/train-001
  manylora predict --adapter runs/train-001 --file questions.jsonl > answers.jsonl

A prompt is put into the form that the adapter was trained with, which stands in its folder: an Alpaca instruction,
one turn of the chat template, or the text as it stands; --form and --raw choose another. Rows of a JSONL file (or
.jsonl.gz) have the fields of training rows (instruction and input, or prompt, or messages), an answer being optional,
and come back with a field "prediction"."""


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
    text = None if options.file is not None else _text(options)
    if options.file == "-" and sys.stdin is None:
        raise DataError("There is no standard input to read rows from; give a file.")
    if options.file not in (None, "-") and not Path(options.file or "").is_file():
        raise DataError(f"{options.file} is not a file; give a JSONL file of rows, or - for standard input.")
    from manylora.cli.subjects import load_subject

    subject = load_subject(options.adapter, model=options.model, dtype=options.dtype, device=options.device)
    if options.task is not None:
        subject.check_task(options.task)
    if text is not None:
        _answer(subject, _question(subject, text, options), options)
        return 0
    cut = count = 0
    for row, example in _rows(subject, options):
        count += 1
        told: list[int] = []
        answer = "".join(_pieces(subject, example, options, on_cut=told.append))
        # In ASCII, as standard output may have any encoding; JSON has no NaN.
        print(json.dumps({**without_nan(row), "prediction": answer}), flush=True)
        cut += len(told)
        if told and cut == 1:
            _note(f"{example.origin}: {_cut_words(told[0])}")
    if cut:
        _note(f"{cut} of {count} prompts were cut ({100 * cut / count:.1f} %)")
    return 0


def _text(options: PredictOptions) -> str:
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
    return text


def _question(subject: Subject, text: str, options: PredictOptions) -> Example:
    """The text in the form that was asked for, else in that of the adapter's training.

    Raises:
        ConfigError: the adapter's tasks were asked in different forms, and none is named.
    """
    form = "prompt" if options.raw else options.form
    known = subject.prompts.prompts_of(options.task) if subject.prompts and form == "auto" else None
    if form != "auto":
        known = TaskPrompts(form=form)
    elif known is None:
        _note(
            f"{options.adapter} does not say which form its training prompts had; the Alpaca form is used (--form "
            "chat, or --form prompt for the text as it stands)"
        )
    return question(
        text, known or TaskPrompts(form="alpaca"), input_text=options.input, task=options.task or ""
    )


def _answer(subject: Subject, example: Example, options: PredictOptions) -> None:
    for piece in _pieces(subject, example, options, on_cut=lambda left: _note(_cut_words(left))):
        print(piece, end="", flush=True)
    print()


def _cut_words(left: int) -> str:
    return f"the prompt is too long and cut to its last {left} tokens; give more with --max-length"


def _note(text: str) -> None:
    """A line beside the answers, on standard error."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def _pieces(
    subject: Subject, example: Example, options: PredictOptions, *, on_cut: Callable[[int], None]
) -> Iterator[str]:
    from manylora.cli.scoring import DEFAULT_ANSWER_TOKENS
    from manylora.evaluation import stream_answer

    known = subject.answer_tokens
    limit = known.get(example.task) or max(known.values(), default=DEFAULT_ANSWER_TOKENS)
    return stream_answer(
        subject.model,
        subject.tokenizer,
        example,
        max_new_tokens=options.max_new_tokens or limit,
        max_length=options.max_length or subject.max_length,
        on_cut=on_cut,
        expert_id=subject.expert(options.task or example.task or None),
    )


def _rows(subject: Subject, options: PredictOptions) -> Iterator[tuple[dict[str, object], Example]]:
    """Rows one by one, so that answers flow while a pipe is still being written."""
    name = "standard input" if options.file == "-" else str(options.file)
    for number, line in enumerate(_lines(name, from_stdin=options.file == "-"), start=1):
        place = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()
            row = parse_json(text, finite=False) if text else None
        except ValueError as error:
            zipped = (
                " It is gzip: name the file so that it ends in .gz, or unzip it." if line[:2] == _GZIP else ""
            )
            raise DataError(
                f"{place} is not valid JSON ({reason(error)}); write one object per line, in UTF-8.{zipped}"
            ) from error
        if not text:
            continue
        if not isinstance(row, dict):
            raise DataError(f"{place} is no object but {text[:40]!r}; write one object per line.")
        task = str(row.get("task") or options.task or "")
        example = parse_row(Row(fields=row, place=place), task=task, require_output=False)
        thinks = subject.prompts is not None and subject.prompts.thinks(task)
        yield row, dataclasses.replace(example, thinks=thinks)


_GZIP = b"\x1f\x8b"
"""How a gzip file begins."""


def _lines(name: str, *, from_stdin: bool) -> Iterator[bytes]:
    """The lines of standard input or a file, unzipped where its name ends in .gz, as those of data are."""
    with contextlib.ExitStack() as open_files:
        source: Any = sys.stdin.buffer
        if not from_stdin:
            source = open_files.enter_context(
                (gzip.open if name.lower().endswith(".gz") else open)(name, "rb")
            )
        try:
            while line := source.readline(MOST_BYTES + 1):
                if len(line) > MOST_BYTES:
                    raise DataError(f"{name} has a line of more than {MOST_BYTES:,} bytes; split it.")
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{name} is not a whole gzip file ({error}). Write it again.") from error
