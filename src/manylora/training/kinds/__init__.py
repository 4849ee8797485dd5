"""The two kinds of task, by PEFT's task type. Nothing else branches on it, but `training.heads` for the bases."""

from __future__ import annotations

from collections.abc import Mapping

from manylora.training.adapter_folders import adapter_task_type
from manylora.training.kinds.choosing import Choosing
from manylora.training.kinds.kind import TaskKind
from manylora.training.kinds.writing import Writing

KINDS: Mapping[str | None, type[TaskKind]] = {"CAUSAL_LM": Writing, "SEQ_CLS": Choosing}
"""Task type to kind."""

__all__ = ["KINDS", "Choosing", "TaskKind", "Writing", "kind_of_adapter"]


def kind_of_adapter(adapter: str) -> type[TaskKind]:
    """The kind of an adapter's tasks; writing where its folder names no type that is known.

    Raises:
        ModelError: the folder's configuration is broken.
    """
    return KINDS.get(adapter_task_type(adapter), Writing)
