"""What the package carries besides code: the embedded base model (see `base/README.md`, its model card)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["embedded_base_path"]


def embedded_base_path() -> Path:
    """Folder of the embedded base model, to be loaded with transformers' `from_pretrained`."""
    return Path(__file__).parent / "base"
