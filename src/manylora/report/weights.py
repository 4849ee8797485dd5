"""Whether the adapters in a folder are numbers: a page about one that is not would show scores of nothing.

Read from the files' bytes, as pages are drawn where no torch is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from manylora.errors import ModelError

_FILE = "adapter_model.safetensors"
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Safetensors' name of a type to integers of its width, and the bits that are all set in NaN and infinity alone."""
_CHUNK = 2**22


def check_adapters(folder: Path) -> None:
    """Refuse a folder whose adapter, or a client's, holds NaN or infinity.

    What is no readable file of weights is left to the verbs that load it.

    Raises:
        ModelError: naming the file and the weight.
    """
    for path in (folder / "adapter" / _FILE, *sorted(folder.glob(f"clients/*/adapter/{_FILE}"))):
        if path.is_file() and (name := _first_not_finite(path)):
            raise ModelError(
                f"{path} holds values that are not finite (NaN or infinity), first in {name!r}: its training "
                "diverged, or the file is damaged. Its numbers mean nothing; train again."
            )


def _first_not_finite(path: Path) -> str:
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        size = int.from_bytes(bytes(data[:8]), "little")
        header: Any = json.loads(bytes(data[8 : 8 + size]))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in _EXPONENTS:
                start, end = (8 + size + int(offset) for offset in entry["data_offsets"])
                if _has_not_finite(data[start:end], *_EXPONENTS[entry["dtype"]]):
                    return str(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return ""


def _has_not_finite(data: np.ndarray, kind: str, exponent: int) -> bool:
    for start in range(0, len(data), _CHUNK):
        values = np.frombuffer(data[start : start + _CHUNK].tobytes(), dtype=kind)
        if bool(((values & values.dtype.type(exponent)) == exponent).any()):
            return True
    return False
