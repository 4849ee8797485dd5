"""From the run to a server: the files that serving engines read."""

from __future__ import annotations

__all__: list[str] = []
