"""The jobs: each is one file whose function takes a configuration and returns a typed result.

`train`, `evaluate`, `predict`, `export`, `federate`, `analyze` do what the command line's verbs of these names do, for
whoever calls them: the command line, Python (`import manylora`), studies. `session` is how a run begins, is held, goes
on and ends; `launch` are the processes of one run; `progress` is what a job tells on the way, `run` what is left;
`subject` is a trained model, ready to answer.

Its names are imported on first use, because torch and transformers take seconds and `--help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.jobs.launch import Launch, launched, refuse_launcher
    from manylora.jobs.progress import Progress
    from manylora.jobs.run import FederatedRun, Run, open_run
    from manylora.jobs.session import Session
    from manylora.jobs.subject import Subject, load_subject

_HOME = {
    "launch": ("Launch", "launched", "refuse_launcher"),
    "progress": ("Progress",),
    "run": ("FederatedRun", "Run", "open_run"),
    "session": ("Session",),
    "subject": ("Subject", "load_subject"),
}

__all__ = [
    "FederatedRun",
    "Launch",
    "Progress",
    "Run",
    "Session",
    "Subject",
    "launched",
    "load_subject",
    "open_run",
    "refuse_launcher",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"manylora.jobs.{module}"), name)
    raise AttributeError(f"module 'manylora.jobs' has no attribute {name!r}")
