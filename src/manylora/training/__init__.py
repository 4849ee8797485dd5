"""The training room: base models, the plan, the run folder, and the main job on transformers' Trainer.

Its names are imported on first use, because torch and transformers take seconds and `--help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from manylora.training.config import METHODS, RECIPES, TrainConfig

if TYPE_CHECKING:
    from manylora.training.adapter_folders import adapter_base_name, adapter_folder, config_of_run
    from manylora.training.batches import ExpertCollator
    from manylora.training.facts import TaskFacts, read_task_facts
    from manylora.training.fingerprint import base_fingerprint, comparable, same_base
    from manylora.training.job import build_model, finetune
    from manylora.training.kinds import KINDS, Choosing, TaskKind, Writing, kind_of_adapter
    from manylora.training.labels import LabelSets
    from manylora.training.memory import MemoryPlan
    from manylora.training.merge import write_merged
    from manylora.training.models import (
        base_location,
        check_layers,
        load_adapter,
        load_base,
        load_classifier,
        load_config,
        load_tokenizer,
        token_rows,
    )
    from manylora.training.plan import Plan, TaskPlan, plan_lines
    from manylora.training.prepared import Prepared, prepare
    from manylora.training.processes import Processes
    from manylora.training.runs import RunFolder, environment
    from manylora.training.snapshots import find_snapshots

_HOME = {
    "adapter_folders": ("adapter_base_name", "adapter_folder", "config_of_run"),
    "batches": ("ExpertCollator",),
    "facts": ("TaskFacts", "read_task_facts"),
    "job": ("build_model", "finetune"),
    "fingerprint": ("base_fingerprint", "comparable", "same_base"),
    "kinds": ("KINDS", "Choosing", "TaskKind", "Writing", "kind_of_adapter"),
    "labels": ("LabelSets",),
    "memory": ("MemoryPlan",),
    "merge": ("write_merged",),
    "models": (
        "base_location",
        "check_layers",
        "load_adapter",
        "load_base",
        "load_classifier",
        "load_config",
        "load_tokenizer",
        "token_rows",
    ),
    "plan": ("Plan", "TaskPlan", "plan_lines"),
    "prepared": ("Prepared", "prepare"),
    "processes": ("Processes",),
    "runs": ("RunFolder", "environment"),
    "snapshots": ("find_snapshots",),
}

__all__ = [
    "KINDS",
    "METHODS",
    "RECIPES",
    "Choosing",
    "ExpertCollator",
    "LabelSets",
    "MemoryPlan",
    "Plan",
    "Prepared",
    "Processes",
    "RunFolder",
    "TaskFacts",
    "TaskKind",
    "TaskPlan",
    "TrainConfig",
    "Writing",
    "adapter_base_name",
    "adapter_folder",
    "base_fingerprint",
    "base_location",
    "build_model",
    "check_layers",
    "comparable",
    "config_of_run",
    "environment",
    "find_snapshots",
    "finetune",
    "kind_of_adapter",
    "load_adapter",
    "load_base",
    "load_classifier",
    "load_config",
    "load_tokenizer",
    "plan_lines",
    "prepare",
    "read_task_facts",
    "same_base",
    "token_rows",
    "write_merged",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"manylora.training.{module}"), name)
    raise AttributeError(f"module 'manylora.training' has no attribute {name!r}")
