"""From cells to numbers: scores, Δm%, and the trial of every claim. Pure: the same cells give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manylora.errors import DataError, RunError
from manylora.evaluation.claims import Trial, try_claims
from manylora.evaluation.statistics import delta_m, mean_interval
from manylora.studies.cells import at_the_edge, screened
from manylora.studies.config import MEAN, SCREENING, Contrast, Study
from manylora.studies.costs import costs_of
from manylora.studies.records import (
    ClaimTrial,
    CurveMean,
    DeltaM,
    Interval,
    OtherScore,
    Score,
    Summary,
)
from manylora.studies.results import CellResult, unpack_scores


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells that count, by method and seed."""

    study: Study
    tasks: tuple[str, ...]
    cells: Mapping[str, Mapping[int, CellResult]]

    @classmethod
    def of(cls, study: Study, results: Iterable[CellResult]) -> Grid:
        """Sort results.

        Raises:
            RunError: no cell is done, or cells differ in their tasks.
        """
        cells: dict[str, dict[int, CellResult]] = {name: {} for name in study.names}
        tasks: tuple[str, ...] | None = None
        for row in results:
            if row.stage != "final" or row.method not in cells or row.seed not in study.seeds:
                continue
            own = tuple(row.scores)
            if tasks is not None and set(own) != set(tasks):
                raise RunError(
                    f"the cell {row.method} seed {row.seed} has the tasks {sorted(own)}, others {sorted(tasks)}; "
                    "give all methods the same."
                )
            tasks = tasks or own
            cells[row.method][row.seed] = row
        if tasks is None:
            raise RunError("no cell of the study is done, so there is nothing to compare.")
        return cls(study=study, tasks=tasks, cells={name: found for name, found in cells.items() if found})

    def seeds(self, *methods: str) -> list[int]:
        """Seeds that all these methods have."""
        return [seed for seed in self.study.seeds if all(seed in self.cells.get(m, {}) for m in methods)]

    def values(self, method: str, on: str, seeds: Sequence[int]) -> list[float]:
        """The method's score per seed: of a task, or the mean over a group's tasks."""
        tasks = self.study.tasks_of(on, self.tasks)
        rows = [self.cells[method][seed].scores for seed in seeds]
        return [math.fsum(row[task] for task in tasks) / len(tasks) for row in rows]

    def paired(
        self, first: str, second: str, on: str, seeds: Sequence[int]
    ) -> dict[str, list[list[float]]] | None:
        """Task to paired differences per example, (seeds, examples); None where some are not there."""
        found: dict[str, list[list[float]]] = {}
        for task in self.study.tasks_of(on, self.tasks):
            rows = []
            for seed in seeds:
                a, b = (self.cells[m][seed].examples.get(task) for m in (first, second))
                if a is None or b is None:
                    return None
                one, other = unpack_scores(a), unpack_scores(b)
                if len(one) != len(other):
                    return None
                rows.append([x - y for x, y in zip(one, other, strict=True)])
            found[task] = rows
        return found


def summarise(study: Study, results: Sequence[CellResult], facts: Mapping[str, Any]) -> Summary:
    """All numbers of a study.

    Args:
        study: whose claims to try.
        results: of cells, per-example scores packed.
        facts: of the cells file's first line, such as versions.

    Raises:
        RunError: no cell is done.
    """
    grid = Grid.of(study, results)
    rates = {name: next(iter(cells.values())).learning_rate for name, cells in grid.cells.items()}
    columns = [*grid.tasks, *study.groups, MEAN]
    return Summary(
        name=study.name,
        question=study.question,
        reference=study.reference,
        tasks=grid.tasks,
        methods=tuple(grid.cells),
        seeds=study.seeds,
        screening_seeds=study.screening_seeds if len(study.learning_rates) > 1 else (),
        learning_rates=rates,
        grid=study.learning_rates,
        at_the_edge=tuple(at_the_edge(study, rates)),
        screening=tuple(screened(study, results)),
        cells=tuple(cell for cells in grid.cells.values() for cell in cells.values()),
        missing=tuple(
            f"{m} seed {s}" for m in study.names for s in study.seeds if s not in grid.cells.get(m, {})
        ),
        table=tuple(
            Score(method=name, task=column, **_interval(grid.values(name, column, grid.seeds(name))))
            for name in grid.cells
            for column in columns
        ),
        delta_m=tuple(_delta_rows(grid)),
        costs=tuple(costs_of(name, list(cells.values())) for name, cells in grid.cells.items()),
        curves=tuple(_curves(grid)),
        claims=tuple(claims(grid)),
        notes=tuple(notes(study, grid, rates)),
        others=tuple(_others(grid)),
        **facts,
    )


def _interval(values: Sequence[float]) -> dict[str, Any]:
    return mean_interval(values)._asdict()


def _others(grid: Grid) -> list[OtherScore]:
    """Means of the further metrics over seeds, on each task that they were measured on in all of them."""
    rows = []
    for name, cells in grid.cells.items():
        for metric in dict.fromkeys(metric for cell in cells.values() for metric in cell.others):
            measured = [cell.others.get(metric, {}) for cell in cells.values()]
            for task in grid.tasks:
                values = [own[task] for own in measured if task in own]
                if values:
                    rows.append(OtherScore(method=name, metric=metric, task=task, **_interval(values)))
    return rows


def _delta(grid: Grid, method: str, seed: int, scores: Mapping[str, float]) -> float | None:
    single = grid.study.single_of(method)
    if single is None or seed not in grid.cells.get(single, {}):
        return None
    return _delta_or_none(scores, grid.cells[single][seed].scores)


def _delta_or_none(scores: Mapping[str, float], single: Mapping[str, float]) -> float | None:
    try:
        return delta_m(scores, single)
    except DataError:  # a single-task score of 0 has no relative change
        return None


def _delta_rows(grid: Grid) -> list[DeltaM]:
    """Δm% per seed, each against the single-task scores of its own seed."""
    rows = []
    for name, cells in grid.cells.items():
        values = [_delta(grid, name, seed, cell.scores) for seed, cell in cells.items()]
        known = [value for value in values if value is not None]
        if known:
            rows.append(DeltaM(method=name, **_interval(known)))
    return rows


def _curves(grid: Grid) -> list[CurveMean]:
    """Scores and Δm% over epochs, where cells were scored on the way."""
    rows = []
    for name, cells in grid.cells.items():
        points: dict[float, list[tuple[int, Mapping[str, float]]]] = {}
        for seed, cell in cells.items():
            for point in cell.curve:
                points.setdefault(point.epoch, []).append((seed, point.scores))
        for epoch, found in sorted(points.items()):
            means = [math.fsum(scores.values()) / len(scores) for _, scores in found]
            deltas = [_curve_delta(grid, name, seed, epoch, scores) for seed, scores in found]
            known = [value for value in deltas if value is not None]
            tasks = {task: math.fsum(scores[task] for _, scores in found) / len(found) for task in grid.tasks}
            delta = Interval(**_interval(known)) if known else None
            rows.append(CurveMean(method=name, epoch=epoch, **_interval(means), delta_m=delta, tasks=tasks))
    return rows


def _curve_delta(
    grid: Grid, method: str, seed: int, epoch: float, scores: Mapping[str, float]
) -> float | None:
    """Against single-task training of as many epochs."""
    single = grid.study.single_of(method)
    cell = grid.cells.get(single, {}).get(seed) if single else None
    same = [point.scores for point in cell.curve if point.epoch == epoch] if cell else []
    return _delta_or_none(scores, same[0]) if same else None


def claims(grid: Grid) -> list[ClaimTrial]:
    """Every claim that the study names, tried on the seeds that both methods have."""
    study = grid.study
    tried = [contrast for contrast in study.claims if grid.seeds(contrast.first, contrast.second)]
    seeds = [grid.seeds(contrast.first, contrast.second) for contrast in tried]
    trials = try_claims(
        [contrast.claim for contrast in tried],
        [grid.values(c.first, c.task, s) for c, s in zip(tried, seeds, strict=True)],
        [grid.values(c.second, c.task, s) for c, s in zip(tried, seeds, strict=True)],
        [grid.paired(c.first, c.second, c.task, s) for c, s in zip(tried, seeds, strict=True)],
        margin=study.margin,
    )
    return [
        ClaimTrial(
            **trial.model_dump(),
            text=f"{contrast.sentence}: {trial.verdict}. {_reading(contrast, trial)}",
            claim=contrast.sentence,
            kind=contrast.claim,
            first=contrast.first,
            second=contrast.second,
            task=contrast.task,
        )
        for contrast, trial in zip(tried, trials, strict=True)
    ]


def _reading(contrast: Contrast, trial: Trial) -> str:
    """The numbers behind a verdict, as a sentence."""
    seen = f"The difference is {trial.difference:+.2f} points"
    if trial.n == 1:
        return f"{seen} with one seed, which cannot tell chance from effect."
    if math.isnan(trial.detectable):
        return f"{seen} in each of {trial.n} seeds, without any spread; nothing is known of chance."
    seen += f" (95 % over {trial.n} seeds {trial.low:+.2f} to {trial.high:+.2f}"
    low, high = trial.bootstrap
    if not math.isnan(low):
        seen += f"; over seeds and test rows {low:+.2f} to {high:+.2f}"
    if contrast.claim == "better":
        found = f"this study finds {trial.detectable:.1f} or more"
        return f"{seen}; p {trial.p:.3g}, after Holm {trial.p_holm:.3g}); {found}."
    loss = max(0.0, -trial.one_sided[0])
    return f"{seen}); with 95 % confidence it loses less than {loss:.2f} (margin {trial.margin:g})."


def notes(study: Study, grid: Grid, rates: Mapping[str, float | None]) -> list[str]:
    """What a reader must know about the numbers."""
    found = [study.caveat] if study.caveat else []
    seeds = max(len(cells) for cells in grid.cells.values())
    if seeds < SCREENING:
        found.append(
            f"{seeds} seed{'s' if seeds > 1 else ''}: a screening. Intervals are wide and verdicts provisional; "
            f"confirm with {SCREENING} or more."
        )
    if edge := at_the_edge(study, rates):
        found.append(
            f"The best learning rate of {', '.join(edge)} is at the edge of the grid; a better one may lie outside."
        )
    singles = {single for name in grid.cells if (single := study.single_of(name)) and single in grid.cells}
    nothing = any(not all(cell.scores.values()) for one in singles for cell in grid.cells[one].values())
    if nothing and not _delta_rows(grid):
        found.append(
            f"No Δm%: {', '.join(sorted(singles))} scored 0 on a task, and nothing is relative to that."
        )
    cells = [cell for own in grid.cells.values() for cell in own.values()]
    found += _metric_notes(grid, cells)
    workers = max(cell.workers for cell in cells)
    threads = sorted({cell.threads for cell in cells})
    side = f", up to {workers} cells side by side on one machine" if workers > 1 else ", one cell at a time"
    found.append(
        f"Time is of training alone, memory the peak of a cell's process with its libraries; "
        f"{' or '.join(map(str, threads))} thread{'s' if threads != [1] else ''} per cell{side}."
    )
    return found


def _metric_notes(grid: Grid, cells: Sequence[CellResult]) -> list[str]:
    """Tasks whose cells were scored by different metrics, as where a study of an earlier version was continued."""
    mixed = []
    for task in grid.tasks:
        names = {cell.metrics.get(task, "that of an earlier version") for cell in cells}
        if len(names) > 1:
            mixed.append(f"{task} ({', '.join(sorted(names))})")
    return [f"Cells were scored by different metrics: {'; '.join(mixed)}. Run them again."] if mixed else []
