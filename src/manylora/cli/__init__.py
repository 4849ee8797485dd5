"""The command line: one thin module per verb, each of which composes the rooms below it.

Exit codes: 0 done, 2 bad input (one line says what and how to mend it), 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

from manylora._libraries import calm_libraries
from manylora._version import __version__
from manylora.cli.console import complain
from manylora.errors import explain

__all__ = ["VERBS", "main"]

VERBS = {
    "train": "fine-tune one model on many tasks and print a table of scores",
    "evaluate": "score an adapter, or a bare model, on test rows",
    "predict": "answer prompts with a trained adapter",
    "export": "write an adapter as plain LoRAs or merged weights, for programs without this package",
    "federate": "fine-tune one model with many clients, of whose adapters only a part travels",
    "analyze": "look into adapters: how alike their A's and B's are, how far they moved, where tasks conflict",
    "compare": "run a study, methods × seeds × tasks, and try its claims with statistics",
}
"""Verb to what it does, in the order of a first visit."""

_USAGE = f"""manylora {__version__}: fine-tune one language model for many tasks.

usage: manylora VERB [options]

{{verbs}}

Each verb explains itself: manylora VERB --help
First run: manylora train      (8 tasks and a small model come with the package)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE.format(verbs="\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())))
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"manylora {__version__}")
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "×" shows "?" instead of ending the run
    verb = arguments[0]
    if verb not in VERBS:
        complain(f"there is no verb {verb!r}; choose from {', '.join(VERBS)}.")
        return 2
    try:
        with calm_libraries():
            return importlib.import_module(f"manylora.cli.{verb}").run(arguments[1:])
    except KeyboardInterrupt:
        complain("stopped by Ctrl-C.")
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `manylora predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        complain(line)
        return 2
