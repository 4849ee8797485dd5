"""The page of `manylora train`: scores per task, loss curves, some answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manylora.report.common import (
    Recipe,
    Score,
    between,
    counted,
    interval,
    mean_score,
    metric_name,
    notes_of,
    read_recipe,
    read_scores,
    shared_metric,
    signed,
)
from manylora.report.files import mapping, number, numbers, read_if_there, read_lines, text
from manylora.report.page import Figure, Page, Section
from manylora.report.plots import Intervals, Line, LinePanel, Lines, Point, Series, named_and_others
from manylora.table import Cell, Column, Table

_ANSWERS = 32
"""Answers shown at most; two of a task."""
_PROMPT = 500


def train_page(folder: Path) -> Page:
    """The page of a run folder.

    Raises:
        RunError: a file of it is broken.
    """
    recipe = read_recipe(folder)
    saved = read_if_there(folder / "scores.json")
    scores = read_scores(saved)
    sections = [
        _scores_section(scores, mapping(saved.get("baselines"))),
        _loss_section(folder / "metrics.jsonl"),
        _answers_section(folder / "predictions.jsonl"),
    ]
    return Page(
        kind="train",
        question=_question(recipe, scores),
        summary=_summary(recipe, scores),
        warnings=(*recipe.warnings, *notes_of(saved)),
        sections=tuple(section for section in sections if section is not None),
        limits=_limits(recipe, scores),
        command=recipe.command,
        versions=recipe.versions,
        settings=recipe.settings,
    )


def adapter_words(values: Mapping[str, Any]) -> str:
    """What was trained: "3 experts of rank 8 that share B (alora), token router"."""
    experts, rank = number(values.get("num_experts")), text(values.get("r"))
    if experts is None:
        return "an adapter"
    if experts == 1:
        return f"one LoRA of rank {rank}"
    share = {"A": "that share A", "B": "that share B", "none": "that share nothing"}.get(
        text(values.get("share")), ""
    )
    return f"{experts:g} experts of rank {rank} {share}, {text(values.get('router'))} router"


def _question(recipe: Recipe, scores: list[Score]) -> str:
    tasks = counted(len(scores), "task") if scores else "its tasks"
    method, model = (
        text(recipe.values.get("method", "one adapter")),
        text(recipe.values.get("model", "the base")),
    )
    base = "the embedded base" if model == "embedded" else model
    return f"How well does {base} with {method} do {tasks}?"


def _summary(recipe: Recipe, scores: list[Score]) -> str:
    if not scores:
        return f"Trained {adapter_words(recipe.values)}; no test rows were scored."
    mean, error = mean_score(scores)
    best, worst = max(scores, key=lambda one: one.value), min(scores, key=lambda one: one.value)
    ends = f" Best {best.task} ({signed(best.value)}), worst {worst.task} ({signed(worst.value)})."
    return (
        f"Mean {shared_metric(scores)} {signed(mean)} ({between(interval(mean, error))}, "
        f"{counted(sum(one.n or 0 for one in scores), 'test row')}, one run"
        f"{'' if recipe.seed is None else f' with seed {recipe.seed}'}) for {adapter_words(recipe.values)}."
        f"{ends if len(scores) > 1 else ''}"
    )


def _scores_section(scores: list[Score], baselines: Mapping[str, Any]) -> Section | None:
    if not scores:
        return None
    mean, error = mean_score(scores)
    several = len(scores) > 1
    points: list[Point | None] = [one.point for one in scores]
    columns = {text(name): numbers(values) for name, values in baselines.items()}
    columns = {name: values for name, values in columns.items() if values}
    series = [Series(name="adapter", points=(*points, *([interval(mean, error)] if several else [])))]
    for name, values in columns.items():
        known: list[Point | None] = [
            Point(value=values[one.task]) if one.task in values else None for one in scores
        ]
        average = _average(values, scores)
        known += [None if average is None else Point(value=average)] if several else []
        series.append(Series(name=name, points=tuple(known)))
    metric = shared_metric(scores)
    figure = Figure(
        name="scores",
        title="Score per task",
        caption=(
            f"{metric if metric != 'score' else 'Each task’s main metric'}, 0 to 100, on test rows "
            f"({_rows_per_task(scores)}); bars are score ± 1.96 standard errors over those rows."
            + (f" Beside it, without a model: {', '.join(columns)}." if columns else "")
        ),
        alt="Score with 95 % interval: "
        + ", ".join(f"{one.task} {signed(one.value)}" for one in scores[:20])
        + (", …" if len(scores) > 20 else "")
        + f"; mean {signed(mean)}.",
        plot=Intervals(
            rows=(*(one.task for one in scores), *(["mean"] if several else [])),
            series=tuple(series),
            xlabel=metric,
            least=0.0,
            most=100.0,
            separated=int(several),
        ),
    )
    return Section(title="Scores", figures=(figure,), tables=(_scores_table(scores, columns, mean, error),))


def _scores_table(
    scores: list[Score], baselines: Mapping[str, Mapping[str, float]], mean: float, error: float | None
) -> Table:
    others = list(dict.fromkeys(name for one in scores for name in one.others))
    metric = shared_metric(scores)
    mixed = metric == "score"
    headings = [
        "task",
        *(["metric"] if mixed else []),
        "score",
        "s.e.",
        "n",
        *map(metric_name, others),
        *baselines,
    ]

    def row(task: str, name: str, *cells: Cell) -> tuple[Cell, ...]:
        return (task, *((name,) if mixed else ()), *cells)

    rows = [
        row(
            one.task,
            one.metric,
            one.value,
            one.standard_error,
            one.n,
            *(one.others.get(name) for name in others),
            *(values.get(one.task) for values in baselines.values()),
        )
        for one in scores
    ]
    averages = [_average(one, scores) for one in baselines.values()]
    whole = [
        _average({s.task: s.others[name] for s in scores if name in s.others}, scores) for name in others
    ]
    total = sum(one.n or 0 for one in scores)
    summed = row("mean", "", mean, error, total, *whole, *averages)
    return Table(
        name="scores",
        caption=f"Scores on the test rows{'' if mixed else f' ({metric})'}, and their standard errors over these rows",
        columns=tuple(Column(name=name) for name in headings),
        rows=tuple(rows),
        footer=(summed,) if len(scores) > 1 else (),
    )


def _average(values: Mapping[str, float], scores: list[Score]) -> float | None:
    """Mean over tasks, where all of them have a value."""
    if any(one.task not in values for one in scores):
        return None
    return sum(values[one.task] for one in scores) / len(scores)


def _rows_per_task(scores: list[Score]) -> str:
    sizes = {one.n for one in scores if one.n is not None}
    if not sizes:
        return "n unknown"
    if len(sizes) == 1:
        return f"n = {sizes.pop():,} a task" if len(scores) > 1 else f"n = {sizes.pop():,}"
    return f"n = {min(sizes):,} to {max(sizes):,} a task"


def _loss_section(path: Path) -> Section | None:
    training: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    tasks: dict[str, list[tuple[float, float]]] = {}
    for row in read_lines(path):
        step = number(row.get("step"))
        if step is None:
            continue
        if (loss := number(row.get("loss"))) is not None:
            training.append((step, loss))
        if (loss := number(row.get("eval_mean_task_loss"))) is not None:
            validation.append((step, loss))
        for key, value in row.items():
            if key.startswith("eval_loss/") and (loss := number(value)) is not None:
                tasks.setdefault(text(key.removeprefix("eval_loss/")), []).append((step, loss))
    lines = [_line("training, mean of the rows seen", training)] if training else []
    lines += [_line("validation, mean over tasks", validation)] if validation else []
    figures = []
    if lines:
        ends = ", ".join(f"{line.name} {signed(line.y[-1], 3)}" for line in lines)
        figures.append(
            Figure(
                name="loss",
                title="Loss during training",
                caption="Mean cross-entropy per answer token; dropout is on in training and off in validation.",
                alt=f"Loss against training step; at the end {ends}.",
                plot=_loss_plot(lines),
            )
        )
    if len(tasks) > 1 and any(len(values) > 1 for values in tasks.values()):
        figures.append(_task_curves(tasks))
    return Section(title="Training", figures=tuple(figures)) if figures else None


def _task_curves(tasks: Mapping[str, list[tuple[float, float]]]) -> Figure:
    lines, which = named_and_others([_line(name, values) for name, values in tasks.items()])
    named = [line for line in lines if not line.aside]
    return Figure(
        name="loss-per-task",
        title="Validation loss per task",
        caption=f"{which}A curve that turns up again is a task that is being unlearnt or overfitted.",
        alt="Validation loss against training step; at the end "
        + ", ".join(f"{line.name} {signed(line.y[-1], 2)}" for line in named)
        + ".",
        plot=_loss_plot(lines),
    )


def _loss_plot(lines: list[Line]) -> Lines:
    panel = LinePanel(title="", lines=tuple(lines), ylabel="loss", least=0.0)
    return Lines(panels=(panel,), xlabel="step", whole=True)


def _line(name: str, values: list[tuple[float, float]]) -> Line:
    return Line(name=name, x=tuple(x for x, _ in values), y=tuple(y for _, y in values))


def _answers_section(path: Path) -> Section | None:
    """Of each task the first answer that is wrong and the first that is right."""
    picked: dict[tuple[str, bool], tuple[Cell, ...]] = {}
    for row in read_lines(path):
        right = number(row.get("accuracy", row.get("exact_match")))
        if right is None or len(picked) >= _ANSWERS:
            continue
        task = text(row.get("task"))
        picked.setdefault(
            (task, right > 50),
            (
                task,
                text(row.get("prompt"), limit=_PROMPT),
                text(row.get("prediction")),
                text(row.get("reference")),
                "yes" if right > 50 else "no",
            ),
        )
    if not picked:
        return None
    order = {task: place for place, task in enumerate(dict.fromkeys(task for task, _ in picked))}
    rows = [picked[key] for key in sorted(picked, key=lambda key: (order[key[0]], key[1]))]
    names = ("task", "prompt", "answer", "reference", "right")
    return Section(
        title="Some answers",
        text=("Of each task the first wrong and the first right answer; all stand in predictions.jsonl.",),
        tables=(
            Table(
                name="answers",
                caption=f"{len(rows)} answers",
                columns=tuple(Column(name=name) for name in names),
                rows=tuple(rows),
            ),
        ),
        folded=True,
    )


def _limits(recipe: Recipe, scores: list[Score]) -> tuple[str, ...]:
    seed = "" if recipe.seed is None else f" (seed {recipe.seed})"
    found = [
        f"One run{seed}: another seed gives other scores, and the intervals know nothing of that. A difference from "
        "another single run is no verdict on a method; manylora compare runs several seeds and tests them."
    ]
    if scores:
        found.append(
            "The intervals hold the trained model fixed and describe the sampling of test rows alone, by the normal "
            "approximation; where all rows of a task scored alike they have no width, which is not certainty."
        )
    if recipe.values.get("limit") is not None:
        found.append(f"Only {text(recipe.values['limit'])} rows per task were read (limit).")
    if not scores:
        found.append("Without scores on test rows nothing is known about the quality of the answers.")
    return tuple(found)
