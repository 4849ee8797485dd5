"""The command line as users start it: in a process of its own."""

from __future__ import annotations

import os
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
