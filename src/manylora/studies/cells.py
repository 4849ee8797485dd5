"""Cells of a study: who they are, where they live, and how they run.

OUT/study.yaml                          the study as it was given
OUT/cells/screen/METHOD/lrRATE-seedN/   scored on validation rows, to choose the learning rate
OUT/cells/final/METHOD/seedN/           scored on test rows
    cell.json      its settings          result.json    what it found; written last, so a cell that has it is done
    log.txt        its output            run*/          the run folder, or one for each task
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.data import check_date, today
from manylora.errors import RunError
from manylora.files import locked, read_object, read_record, write_json, write_text
from manylora.studies.config import Study
from manylora.studies.costs import measure_cell
from manylora.studies.kinds import Job, kind_of
from manylora.studies.records import Screened
from manylora.studies.results import CellResult, Stage, pack_scores

WORKERS = "MANYLORA_STUDY_WORKERS"
"""Environment variable in which the runner tells a cell how many ran side by side."""
_REMEDY = "remove it to run the cell again"


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

    def result(self, out: Path) -> CellResult | None:
        """What it found; None where it is not done.

        Raises:
            RunError: the file is broken.
        """
        path = self.folder(out) / "result.json"
        if not path.is_file():
            return None
        return read_record(path, CellResult, remedy=_REMEDY)


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


def final_cells(study: Study, rates: Mapping[str, float | None] | None = None) -> list[Cell]:
    """The cells that count, without their learning rates where `rates` are not chosen yet; those of one seed stand
    together, so that a study that is cut short is balanced."""
    return [
        Cell(stage="final", method=name, seed=seed, learning_rate=rates[name] if rates else None)
        for seed in study.seeds
        for name in study.names
    ]


def screened(study: Study, results: Iterable[CellResult]) -> list[Screened]:
    """Mean validation scores of every method and rate of which a cell is done."""
    scores: dict[tuple[str, float], list[float]] = {}
    for row in results:
        if row.stage == "screen" and row.learning_rate is not None:
            scores.setdefault((row.method, row.learning_rate), []).append(row.mean)
    return [
        Screened(method=name, learning_rate=rate, validation=math.fsum(found) / len(found), n=len(found))
        for name in study.names
        for rate in study.learning_rates
        if (found := scores.get((name, rate)))
    ]


def screened_methods(study: Study, results: Iterable[CellResult]) -> dict[str, float | None]:
    """Per method the rate with the best mean validation score, of equals the smaller one; a method without a rate that
    was tried with every screening seed is left out."""
    if len(study.learning_rates) < 2:
        return dict.fromkeys(study.names, study.learning_rates[0] if study.learning_rates else None)
    full = [row for row in screened(study, results) if row.n == len(study.screening_seeds)]
    worst_first = sorted(full, key=lambda row: (row.validation, -row.learning_rate))
    best = {row.method: row.learning_rate for row in worst_first}
    return {name: best[name] for name in study.names if name in best}


def choose_rates(study: Study, results: Iterable[CellResult]) -> dict[str, float | None]:
    """`screened_methods`, all of which must have a rate.

    Raises:
        RunError: a method has no finished screening cell.
    """
    chosen = screened_methods(study, results)
    if lost := [name for name in study.names if name not in chosen]:
        raise RunError(f"method {lost[0]} has no learning rate yet: none of its screening cells is done.")
    return chosen


def at_the_edge(study: Study, rates: Mapping[str, float | None]) -> list[str]:
    """Methods whose chosen rate is the smallest or largest of the grid, so that a better one may lie outside."""
    if len(study.learning_rates) < 2:
        return []
    edges = {min(study.learning_rates), max(study.learning_rates)}
    return [name for name, rate in rates.items() if rate in edges]


def results_of(study: Study, out: Path) -> list[CellResult]:
    """The results that lie in a study's folder, in the order of the study."""
    found = (cell.result(out) for cell in (*screening_cells(study), *final_cells(study)))
    return [result for result in found if result is not None]


def run_cell(study: Study, cell: Cell, out: Path) -> None:
    """Run one cell in this process, unless it is done; waits where another process is at it.

    Raises:
        RunError: the folder holds a cell of other settings.
    """
    import torch

    method = study.method(cell.method)
    folder = cell.folder(out)
    settings = cell_settings(study, cell)
    with locked(folder / ".held"):  # a runner that was killed leaves its cells running: wait for them here
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
        found = measured.model_dump(exclude={"extra", "examples"})
        write_json(
            folder / "result.json",
            {
                "stage": cell.stage,
                "method": cell.method,
                "seed": cell.seed,
                "learning_rate": cell.learning_rate,
                **found,
                **measure_cell(),
                "threads": torch.get_num_threads(),
                "workers": int(os.environ.get(WORKERS, "1")),
                **measured.extra,
                "examples": {task: pack_scores(scores) for task, scores in measured.examples.items()},
            },
        )


def study_date(out: Path) -> str:
    """The day that chat templates are told in all cells of a study: the one on which its first cell ran."""
    path = out / "shared" / "date.txt"
    with locked(path.parent / ".held"):
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
            settings["learning_rate"] = read_object(path, remedy=_REMEDY).get("learning_rate")
        check_same(cell.folder(out), settings)


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a cell that was begun with other settings.

    Raises:
        RunError: naming the first that differs.
    """
    path = folder / "cell.json"
    if not path.is_file():
        return
    known, wanted = read_object(path, remedy=_REMEDY), json.loads(json.dumps(settings))
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
