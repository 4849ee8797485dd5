"""From a folder that a verb wrote to its page, unless an adapter in it is no number: its scores would mean nothing.

Adapters are read from the files' bytes, as pages are drawn where no torch is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from manylora.errors import ModelError, RunError
from manylora.report.common import State, read_if_there, read_page_file
from manylora.report.page import Page, write_page

_FILE = "adapter_model.safetensors"
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Safetensors' name of a type to integers of its width, and the bits that are all set in NaN and infinity alone."""
_CHUNK = 2**22


def write_report(folder: Path) -> Path:
    """Draw the page of a folder of `train`, `federate`, `analyze` or `compare`; what is missing in it is left out.

    Args:
        folder: holds study.json, analysis.json, or a run's config.yaml and state.json.

    Returns:
        Path of report.html; figures/ and tables/ stand beside it.

    Raises:
        RunError: the folder is none of these, or a file in it is broken.
        ModelError: an adapter in it holds values that are not finite.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    return write_page(build_page(folder), folder)


def build_page(folder: Path) -> Page:
    """The page of a folder as a value; see `write_report`."""
    kind = kind_of(folder)
    check_adapters(folder)
    if kind == "compare":
        from manylora.report.compare_page import compare_page as build
    elif kind == "analyze":
        from manylora.report.analyze_page import analyze_page as build
    elif kind == "federate":
        from manylora.report.federate_page import federate_page as build
    else:
        from manylora.report.train_page import train_page as build
    return build(folder)


def kind_of(folder: Path) -> str:
    """The verb that wrote `folder`.

    Raises:
        RunError: none did.
    """
    if (folder / "study.json").is_file():
        return "compare"
    if (folder / "analysis.json").is_file():
        return "analyze"
    if not (folder / "config.yaml").is_file() or not (folder / "state.json").is_file():
        raise RunError(
            f"{folder} has no page to draw: it holds neither study.json, analysis.json, nor a run's config.yaml and "
            "state.json. Give a folder that train, federate, analyze or compare wrote."
        )
    state = read_if_there(folder / "state.json", State)
    if state is not None and state.kind in ("train", "federate"):
        return state.kind
    return "federate" if "strategy" in read_page_file(folder / "config.yaml") else "train"


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
