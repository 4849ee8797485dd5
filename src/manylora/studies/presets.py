"""Methods by name: what a study may call a method without writing its settings down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    **{
        name: ("federate", {"strategy": name})
        for name in ("fed-alora", "fedsa", "fedit", "ffa", "zero-padding", "flora", "flexlora")
    },
    "fed-local": ("federate", {"strategy": "local"}),
    "fed-centralized": ("federate", {"strategy": "centralized"}),
    "transfer-b": ("transfer", {"frozen": "B"}),
    "transfer-a": ("transfer", {"frozen": "A"}),
    "transfer-none": ("transfer", {"frozen": "none"}),
}
"""Kind and settings; `manylora.studies.settings` says what `match`, `alone` and `frozen` are."""
