"""What a cell costs: time, memory, parameters, bytes.

A new figure is one entry of `CELL_METRICS`: it then stands in study.json, in the printed table and on the page; with a
`measure`, also in every cell's result.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from manylora.files import Record, Several
from manylora.studies.results import CellResult

_MIB = 2.0**20


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def peak_bytes() -> int:
    """Most memory this process has held: on a GPU what was allocated there, else the resident set."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:  # getrusage would count what the parent held when it forked
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        if sys.platform == "win32":
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, kw_only=True)
class CellMetric:
    """One entry of `CELL_METRICS`."""

    read: Callable[[CellResult], float | None]
    """Its value in a cell; `None` where the cell has none."""
    combine: Callable[[Sequence[float]], float] = _mean
    """From a method's cells to one value."""
    timed: bool = False
    """Whether a cell that went on after a kill says nothing of it, as it has no time of its own."""
    measure: Callable[[], float] | None = None
    """Takes it in the cell's own process, when all is done; kept in the result under the metric's name."""
    heading: str = ""
    """Of its column in tables; without one it has none."""
    optional: bool = False
    """Whether the column stands only where a cell has a value."""
    unit: float = 1.0
    """What the column divides it by."""
    digits: int = 1

    def of(self, cells: Sequence[CellResult]) -> float | None:
        """One value for the cells of a method; `None` where none of them has one."""
        whole = [cell for cell in cells if not cell.resumed] if self.timed else []
        values = [value for cell in whole or cells if (value := self.read(cell)) is not None]
        return self.combine(values) if values else None


def _bytes_sent(cell: CellResult) -> float | None:
    known = [size for size in (cell.bytes_up, cell.bytes_down) if size is not None]
    return sum(known) if known else None


CELL_METRICS: dict[str, CellMetric] = {
    "parameters": CellMetric(
        heading="parameters", read=lambda cell: cell.parameters, combine=lambda values: values[0]
    ),
    "seconds": CellMetric(heading="seconds", read=lambda cell: cell.seconds, timed=True),
    "seconds_low": CellMetric(read=lambda cell: cell.seconds, combine=min, timed=True),
    "seconds_high": CellMetric(read=lambda cell: cell.seconds, combine=max, timed=True),
    "cpu_seconds": CellMetric(heading="CPU s", read=lambda cell: cell.cpu_seconds, timed=True),
    "peak_bytes": CellMetric(
        heading="peak MiB",
        read=lambda cell: cell.peak_bytes,
        combine=max,
        measure=peak_bytes,
        unit=_MIB,
        digits=0,
    ),
    "bytes_sent": CellMetric(
        heading="MiB sent a client and round", read=_bytes_sent, optional=True, unit=_MIB, digits=2
    ),
}
"""Name in files to metric, in the order of columns."""


class Costs(Record):
    """What the cells of a method cost; metrics that were added later stand beside these."""

    model_config = ConfigDict(extra="allow")

    method: str
    parameters: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    peak_bytes: int | None = None
    threads: Several[int] = ()
    workers: Several[int] = ()
    n: int = 0
    """Cells whose time counts."""

    def value_of(self, name: str) -> float | None:
        """Of a metric; `None` where no cell has it."""
        value = getattr(self, name, None)
        return value if isinstance(value, (int, float)) else None


def measure_cell() -> dict[str, float]:
    """Every metric that is taken in the cell's own process."""
    return {name: metric.measure() for name, metric in CELL_METRICS.items() if metric.measure is not None}


def costs_of(method: str, cells: Sequence[CellResult]) -> Costs:
    """Parameters, time, memory and more; a cell that was killed on the way has no time of its own."""
    values = {name: value for name, metric in CELL_METRICS.items() if (value := metric.of(cells)) is not None}
    return Costs.model_validate(
        {
            "method": method,
            **values,
            "threads": sorted({cell.threads for cell in cells}),
            "workers": sorted({cell.workers for cell in cells}),
            "n": sum(not cell.resumed for cell in cells) or len(cells),
        }
    )
