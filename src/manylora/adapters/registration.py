"""Tells PEFT about the method; done by importing `manylora.adapters`."""

from __future__ import annotations

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from manylora.adapters.config import ManyLoraConfig, ManyLoraType
from manylora.adapters.model import ManyLoraModel
from manylora.errors import ManyLoraError


def register() -> None:
    """Enter the method into PEFT's tables; `peft.register_peft_method` only takes names of its closed enum.

    Raises:
        ManyLoraError: another package holds the name.
    """
    kind = ManyLoraType.MANYLORA
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, ManyLoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, ManyLoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, ManyLoraModel.prefix),
    ]
    for table, value in entries:
        if kind in table and table[kind] != value:
            raise ManyLoraError(f"PEFT type {kind.value!r} is taken by {table[kind]!r}; unload that package.")
    for table, value in entries:
        table[kind] = value
