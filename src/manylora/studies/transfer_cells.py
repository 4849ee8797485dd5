"""Cells of kind "transfer"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manylora.studies.kinds import Job, Measured

SETTINGS: frozenset[str] = frozenset({"frozen"})


def check(settings: Mapping[str, Any]) -> None:
    """Refuse values that cannot be."""


def run(job: Job) -> Measured:
    """Not yet."""
    raise NotImplementedError
