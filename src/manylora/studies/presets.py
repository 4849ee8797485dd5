"""Methods by name, whose settings a study need not write down, and the study that runs without a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manylora.federated.strategies import STRATEGIES

PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # kind, settings
    "lora": ("train", {"method": "lora"}),
    "lora-matched": ("train", {"method": "lora", "match": "alora"}),
    "lora-per-task": ("train", {"method": "lora", "alone": True}),
    "moelora": ("train", {"method": "moelora"}),
    "moelora-task": ("train", {"method": "moelora", "router": "task"}),
    "hydralora": ("train", {"method": "hydralora"}),
    "hydralora-task": ("train", {"method": "hydralora", "router": "task"}),
    "alora": ("train", {"method": "alora"}),
    "alora-task": ("train", {"method": "alora", "router": "task"}),
    "alora-uniform": ("train", {"method": "alora", "router": "uniform"}),
    **{name: ("federate", {"strategy": name}) for name, strategy in STRATEGIES.items() if strategy.travels},
    "fed-local": ("federate", {"strategy": "local"}),
    "fed-centralized": ("federate", {"strategy": "centralized"}),
    "transfer-b": ("transfer", {"frozen": "B"}),
    "transfer-a": ("transfer", {"frozen": "A"}),
    "transfer-none": ("transfer", {"frozen": "none"}),
}
"""Kind and settings; `manylora.studies.settings` says what `match`, `alone` and `frozen` are."""

DEFAULT = """\
name: first-look
question: Which way of sharing does best on four tasks of the embedded suite?
caveat: Four of the suite's eight tasks with 100 training and 100 test rows each, 4 epochs.
reference: alora
settings:
  tasks: [praised_thing, blamed_thing, former_owner, record_to_text]
  train_limit: 100
  limit: 100
  epochs: 4
methods: [lora, lora-matched, lora-per-task, hydralora, alora]
seeds: [0, 1]
"""
"""Small enough for two cores and ten minutes; a first look, not evidence."""
