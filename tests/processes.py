"""The command line as users start it: in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def cli_process(arguments: Sequence[str | Path], cwd: Path, **options: object) -> subprocess.Popen[str]:
    """The real command in a process of its own, on one thread so that its arithmetic is the same every time."""
    return subprocess.Popen(
        [sys.executable, "-m", "manylora.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


_KILLED = """
import os, signal, sys

moment = sys.argv.pop(1)

def die(event, arguments):
    if event in ("os.mkdir", "os.rename") and str(arguments[event == "os.rename"]).endswith(moment):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
from manylora.cli import main
sys.exit(main())
"""


def killed_process(arguments: Sequence[str | Path], cwd: Path, *, before: str | Path) -> None:
    """The real command, killed (-9) in the moment before it makes or renames something to a path that ends so.

    It kills itself, as one that watches from outside comes too late on a busy machine.
    """
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(before), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, f"it ended before it could be killed\n{done.stderr}"
