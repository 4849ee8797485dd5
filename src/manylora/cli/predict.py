"""`manylora predict`: answer prompts with a trained adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.options import PredictOptions
from manylora.cli.parsing import parse
from manylora.cli.progress import ConsoleProgress
from manylora.errors import DataError
from manylora.files import without_nan
from manylora.jobs.predict import Predictor, read_lines

if TYPE_CHECKING:
    from manylora.data import Example

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
    predictor = Predictor(options, progress=ConsoleProgress())
    if text is not None:
        _answer(predictor, predictor.question(text))
    else:
        _answer_rows(predictor, str(options.file))
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


def _answer(predictor: Predictor, example: Example) -> None:
    for piece in predictor.stream(example, on_cut=lambda left: _note(_cut_words(left))):
        print(piece, end="", flush=True)
    print()


def _answer_rows(predictor: Predictor, file: str) -> None:
    cut = count = 0
    source, lines = _named_lines(file)
    for row, example in predictor.read_rows(lines, source=source):
        count += 1
        left: list[int] = []
        answer = "".join(predictor.stream(example, on_cut=left.append))
        # In ASCII, as standard output may have any encoding; JSON has no NaN.
        print(json.dumps({**without_nan(row), "prediction": answer}), flush=True)
        cut += len(left)
        if left and cut == 1:
            _note(f"{example.origin}: {_cut_words(left[0])}")
    if cut:
        _note(f"{cut} of {count} prompts were cut ({100 * cut / count:.1f} %)")


def _named_lines(file: str) -> tuple[str, Iterator[bytes]]:
    """What a file, or standard input ("-"), is called in errors, and its lines."""
    if file == "-":
        return "standard input", read_lines("standard input", stream=sys.stdin.buffer)
    return file, read_lines(file)


def _cut_words(left: int) -> str:
    return f"the prompt is too long and cut to its last {left} tokens; give more with --max-length"


def _note(text: str) -> None:
    """A line beside the answers, on standard error."""
    print(f"note: {text}", file=sys.stderr, flush=True)
