"""Cells of a study: who they are, where they live, how they run, and how their results are kept small enough to commit.

OUT/study.yaml                          the study as it was given
OUT/cells/screen/METHOD/lrRATE-seedN/   scored on validation rows, to choose the learning rate
OUT/cells/final/METHOD/seedN/           scored on test rows
    cell.json      its settings          result.json    what it found; written last, so a cell that has it is done
    log.txt        its output            run*/          the run folder, or one for each task
OUT/cells.jsonl                         all results, per-example scores packed
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from pydantic import Field

from manylora.data import check_date, today
from manylora.errors import ConfigError, RunError
from manylora.files import (
    Record,
    check_record,
    json_text,
    parse_json,
    read_json,
    reason,
    write_json,
    write_text,
)
from manylora.studies.config import Study
from manylora.studies.kinds import Job, held, kind_of

Stage: TypeAlias = Literal["screen", "final"]
_MEASURED = ("parameters", "seconds", "peak_bytes")
"""What every cell has beside its scores."""
WORKERS = "MANYLORA_STUDY_WORKERS"
"""Environment variable in which the runner tells a cell how many ran side by side."""


class _Result(Record):
    """What the choice of a learning rate needs of a result.json; a table asks for more (`read_cells`)."""

    stage: Stage
    method: str
    learning_rate: float | None
    scores: dict[str, float] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One training and its scores."""

    stage: Stage
    method: str
    seed: int
    learning_rate: float | None

    @property
    def id(self) -> str:
        """Unique in its study; also the path of its folder."""
        rate = f"lr{self.learning_rate:g}-" if self.stage == "screen" else ""
        return f"{self.stage}/{self.method}/{rate}seed{self.seed}"

    def folder(self, out: Path) -> Path:
        """Where it lives in a study's folder."""
        return out / "cells" / self.id

    def result(self, out: Path) -> dict[str, Any] | None:
        """What it found; None where it is not done.

        Raises:
            RunError: the file is broken.
        """
        path = self.folder(out) / "result.json"
        if not path.is_file():
            return None
        found = _read(path)
        check_record(found, _Result, source=path, remedy="remove it to run the cell again")
        return found


def _read(path: Path) -> dict[str, Any]:
    """An object that a cell wrote.

    Raises:
        RunError: the file is broken.
    """
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({reason(error)}); remove it to run the cell again.") from error


def screening_cells(study: Study) -> list[Cell]:
    """The cells that choose each method's learning rate; none where there is nothing to choose."""
    if len(study.learning_rates) < 2:
        return []
    return [
        Cell(stage="screen", method=name, seed=seed, learning_rate=rate)
        for name in study.names
        for rate in study.learning_rates
        for seed in study.screening_seeds
    ]


def final_cells(study: Study, rates: Mapping[str, float | None]) -> list[Cell]:
    """The cells that count; those of one seed stand together, so that a study that is cut short is balanced."""
    return [
        Cell(stage="final", method=name, seed=seed, learning_rate=rates[name])
        for seed in study.seeds
        for name in study.names
    ]


def choose_rates(study: Study, results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Per method the rate with the best mean validation score; of equals the smaller one.

    Raises:
        RunError: a method has no finished screening cell.
    """
    if len(study.learning_rates) < 2:
        return dict.fromkeys(study.names, study.learning_rates[0] if study.learning_rates else None)
    chosen: dict[str, float | None] = {}
    for name in study.names:
        scores: dict[float, list[float]] = {}
        for row in results:
            if row["stage"] == "screen" and row["method"] == name:
                scores.setdefault(row["learning_rate"], []).append(_mean(row["scores"].values()))
        full = {rate: _mean(s) for rate, s in scores.items() if len(s) == len(study.screening_seeds)}
        if not full:
            raise RunError(f"method {name} has no learning rate yet: none of its screening cells is done.")
        chosen[name] = max(sorted(full), key=lambda rate: full[rate])
    return chosen


def at_the_edge(study: Study, rates: Mapping[str, float | None]) -> list[str]:
    """Methods whose chosen rate is the smallest or largest of the grid, so that a better one may lie outside."""
    if len(study.learning_rates) < 2:
        return []
    edges = {min(study.learning_rates), max(study.learning_rates)}
    return [name for name, rate in rates.items() if rate in edges]


def results_of(study: Study, out: Path) -> list[dict[str, Any]]:
    """The results that lie in a study's folder, in the order of the study."""
    found = [cell.result(out) for cell in screening_cells(study)]
    for seed in study.seeds:
        for name in study.names:
            cell = Cell(stage="final", method=name, seed=seed, learning_rate=None)
            found.append(cell.result(out))
    return [result for result in found if result is not None]


def run_cell(study: Study, cell: Cell, out: Path) -> None:
    """Run one cell in this process, unless it is done; waits where another process is at it.

    Raises:
        RunError: the folder holds a cell of other settings.
    """
    method = study.method(cell.method)
    folder = cell.folder(out)
    settings = cell_settings(study, cell)
    with held(folder):
        check_same(folder, settings)
        if cell.result(out) is not None:
            return
        write_json(folder / "cell.json", settings)
        measured = kind_of(method.kind).run(
            Job(
                settings={"date": study_date(out), **method.settings},
                seed=cell.seed,
                learning_rate=cell.learning_rate,
                split="validation" if cell.stage == "screen" else "test",
                folder=folder,
                shared=out / "shared",
            )
        )
        found = measured.to_dict()
        extra, examples = found.pop("extra"), found.pop("examples")
        write_json(
            folder / "result.json",
            {
                "stage": cell.stage,
                "method": cell.method,
                "seed": cell.seed,
                "learning_rate": cell.learning_rate,
                **found,
                "peak_bytes": peak_bytes(),
                "threads": _threads(),
                "workers": int(os.environ.get(WORKERS, "1")),
                **extra,
                "examples": {task: pack_scores(scores) for task, scores in examples.items()},
            },
        )


def study_date(out: Path) -> str:
    """The day that chat templates are told in all cells of a study: the one on which its first cell ran."""
    path = out / "shared" / "date.txt"
    with held(path.parent):
        if not path.is_file():
            write_text(path, today())
        date = path.read_text(encoding="utf-8").strip()
    check_date(date)
    return date


def cell_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """All that decides what a cell finds."""
    method = study.method(cell.method)
    return {
        "kind": method.kind,
        "settings": dict(method.settings),
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
    }


def check_folder(study: Study, out: Path) -> None:
    """Refuse a study's folder whose cells were run with other settings, before another is run.

    Raises:
        RunError: naming the cell's folder and what differs.
    """
    for cell in screening_cells(study):
        check_same(cell.folder(out), cell_settings(study, cell))
    rates = dict.fromkeys(study.names, study.learning_rates[0] if study.learning_rates else None)
    for cell in final_cells(study, rates):
        path, settings = cell.folder(out) / "cell.json", cell_settings(study, cell)
        if len(study.learning_rates) > 1 and path.is_file():  # not chosen yet; the cell itself will look
            settings["learning_rate"] = _read(path).get("learning_rate")
        check_same(cell.folder(out), settings)


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a cell that was begun with other settings.

    Raises:
        RunError: naming the first that differs.
    """
    path = folder / "cell.json"
    if not path.is_file():
        return
    known, wanted = _read(path), json.loads(json.dumps(settings))
    if known == wanted:
        return
    if not isinstance(known.get("settings"), dict):
        raise RunError(f"{path} is damaged (it has no settings); remove {folder} to run the cell again.")
    old, new = ({**side, **side["settings"]} for side in (known, wanted))
    differs = next((key for key in sorted({*old, *new} - {"settings"}) if old.get(key) != new.get(key)), "")
    raise RunError(
        f"{folder} was run with {differs} {old.get(differs)!r}, now it is {new.get(differs)!r}; give another --out, "
        "or remove that folder to run the cell again."
    )


def _threads() -> int:
    import torch

    return torch.get_num_threads()


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


def pack_scores(scores: Sequence[float]) -> str:
    """Per-example scores as short text: a bit each where all are 0 or 100, else hundredths in two bytes, and where
    they are no scores of 0 to 100 at all, four bytes.

    >>> unpack_scores(pack_scores([0.0, 100.0, 100.0]))
    [0.0, 100.0, 100.0]
    """
    if all(score in (0.0, 100.0) for score in scores):
        bits = "".join("1" if score else "0" for score in scores)
        whole = bits.ljust(-(-len(bits) // 8) * 8, "0")
        data = bytes(int(whole[start : start + 8], 2) for start in range(0, len(whole), 8))
        return f"b{len(bits)}:" + base64.b64encode(data).decode()
    if not all(0 <= score <= 655 for score in scores):  # no score of 0 to 100, such as a perplexity
        return f"f{len(scores)}:" + base64.b64encode(struct.pack(f">{len(scores)}f", *scores)).decode()
    data = b"".join(round(100 * score).to_bytes(2, "big") for score in scores)
    return f"h{len(scores)}:" + base64.b64encode(data).decode()


def unpack_scores(text: str) -> list[float]:
    """What `pack_scores` wrote, to the nearest hundredth.

    Raises:
        RunError: it is no such text.
    """
    head, _, body = text.partition(":")
    try:
        data, count = base64.b64decode(body, validate=True), int(head[1:])
        if head[:1] == "b" and len(data) == -(-count // 8):
            bits = "".join(f"{byte:08b}" for byte in data)
            return [100.0 * (bit == "1") for bit in bits[:count]]
        if head[:1] == "f" and len(data) == 4 * count:
            return list(struct.unpack(f">{count}f", data))
        if head[:1] == "h" and len(data) == 2 * count:
            return [int.from_bytes(data[i : i + 2], "big") / 100 for i in range(0, len(data), 2)]
    except (ValueError, IndexError):
        pass
    raise RunError(f"{text[:20]!r} are no packed scores; the cells file is damaged.")


def write_cells(
    path: Path, study: Study, results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> None:
    """One line for the study, then one for each cell."""
    head = {"kind": "cells", "study": study.source, **facts}
    write_text(path, "".join(json_text(row) + "\n" for row in (head, *results)))


def read_cells(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the cells of a file that `write_cells` wrote.

    Raises:
        ConfigError: it cannot be read or is no such file.
    """
    try:
        rows = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a study's cells.jsonl.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({reason(error)}); give a study's cells.jsonl.") from error
    head = rows[0] if rows and isinstance(rows[0], dict) else {}
    if head.get("kind") != "cells" or not isinstance(head.get("study"), dict):
        raise ConfigError(f"{path} is no cells file; give a cells.jsonl that manylora compare wrote.")
    for line, row in enumerate(rows[1:], start=2):
        if wrong := _wrong_in(row):
            raise ConfigError(f"{path} is damaged (cell {line - 1}: {wrong}); give a study's cells.jsonl.")
    return head, rows[1:]


def _wrong_in(row: Any) -> str:
    """What a table could not be made from, in words; "" where all is there."""
    if not isinstance(row, dict):
        return f"{row!r:.40} is no cell"
    if row.get("stage") not in get_args(Stage) or not isinstance(row.get("method"), str):
        return "no stage or method"
    rate, scores = row.get("learning_rate"), row.get("scores")
    if type(row.get("seed")) is not int or not (rate is None or _finite(rate)):
        return "no seed or learning rate"
    if not isinstance(scores, dict) or not scores:
        return "no scores"
    for name, value in [*scores.items(), *((name, row.get(name)) for name in _MEASURED)]:
        if not _finite(value):
            return f"{name} is {value!r}"
    examples = row.get("examples", {})
    if not isinstance(examples, dict) or not all(isinstance(packed, str) for packed in examples.values()):
        return "examples are not packed scores"
    metrics = row.get("metrics", {})
    if not isinstance(metrics, dict) or not all(isinstance(metric, str) for metric in metrics.values()):
        return "metrics are no names"
    return ""


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
