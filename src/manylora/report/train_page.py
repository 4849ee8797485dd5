"""The page of `manylora train`: scores per task, loss curves, some answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from manylora.evaluation.metrics import ACCURACY, EXACT_MATCH
from manylora.evaluation.scores import SavedScores, ScoredExample, scores_table
from manylora.files import forgive_lines
from manylora.report.common import (
    Recipe,
    Settings,
    between,
    counted,
    first_few,
    interval,
    read_if_there,
    read_recipe,
    signed,
    text,
)
from manylora.report.page import Figure, Page, Section
from manylora.report.plots import Intervals, Line, LinePanel, Lines, Point, Series, named_and_others
from manylora.table import Table
from manylora.training.facts import LogLine

_ANSWERS = 32
"""Answers shown at most; two of a task."""
_PROMPT = 500


def train_page(folder: Path) -> Page:
    """The page of a run folder.

    Raises:
        RunError: a file of it is broken.
    """
    recipe = read_recipe(folder)
    scores = read_if_there(folder / "scores.json", SavedScores)
    sections = [
        None if scores is None else _scores_section(scores),
        _loss_section(list(forgive_lines(folder / "metrics.jsonl", LogLine))),
        _answers_section(forgive_lines(folder / "predictions.jsonl", ScoredExample)),
    ]
    return Page(
        kind="train",
        question=_question(recipe.values, scores),
        summary=_summary(recipe, scores),
        warnings=(*recipe.warnings, *(scores.notes if scores else ())),
        sections=tuple(section for section in sections if section is not None),
        limits=_limits(recipe, scores),
        command=recipe.command,
        versions=recipe.versions,
        settings=recipe.settings,
    )


# ---- words


def _adapter_words(values: Settings) -> str:
    """What was trained: "3 experts of rank 8 that share B, token router"."""
    if values.num_experts is None:
        return "an adapter"
    if values.num_experts == 1:
        return f"one LoRA of rank {text(values.r)}"
    share = {"A": "that share A", "B": "that share B", "none": "that share nothing"}.get(
        values.share or "", ""
    )
    return f"{values.num_experts} experts of rank {text(values.r)} {share}, {text(values.router)} router"


def _question(values: Settings, scores: SavedScores | None) -> str:
    tasks = counted(len(scores.tasks), "task") if scores else "its tasks"
    model = values.model or "the base"
    base = "the embedded base" if model == "embedded" else model
    return f"How well does {base} with {values.method or 'one adapter'} do {tasks}?"


def _summary(recipe: Recipe, scores: SavedScores | None) -> str:
    adapter = _adapter_words(recipe.values)
    if scores is None:
        return f"Trained {adapter}; no test rows were scored."
    best = max(scores.tasks, key=lambda one: one.score)
    worst = min(scores.tasks, key=lambda one: one.score)
    ends = f" Best {best.task} ({signed(best.score)}), worst {worst.task} ({signed(worst.score)})."
    seed = recipe.values.seed
    return (
        f"Mean {scores.metric_label or 'score'} {signed(scores.mean)} "
        f"({between(interval(scores.mean, scores.standard_error))}, {counted(scores.n, 'test row')}, one run"
        f"{'' if seed is None else f' with seed {seed}'}) for {adapter}.{ends if len(scores.tasks) > 1 else ''}"
    )


def _limits(recipe: Recipe, scores: SavedScores | None) -> tuple[str, ...]:
    found = [
        f"One run{recipe.seed_in_words}: another seed gives other scores, and the intervals know nothing of that. "
        "A difference from another single run is no verdict on a method; manylora compare runs several seeds and "
        "tests them."
    ]
    if scores is not None:
        found.append(
            "The intervals hold the trained model fixed and describe the sampling of test rows alone, by the normal "
            "approximation; where all rows of a task scored alike they have no width, which is not certainty."
        )
    if recipe.values.limit is not None:
        found.append(f"Only {recipe.values.limit} rows per task were read (limit).")
    if scores is None:
        found.append("Without scores on test rows nothing is known about the quality of the answers.")
    return tuple(found)


# ---- sections


def _scores_section(scores: SavedScores) -> Section:
    several = len(scores.tasks) > 1
    baselines = {name: values for name, values in scores.baselines.items() if values}
    metric = scores.metric_label
    title = f"Scores on the test rows{f' ({metric})' if metric else ''}, and their standard errors over these rows"
    table = scores_table(scores, title=title, baselines=baselines, gains=scores.gains, every=True)
    points: list[Point | None] = [interval(one.score, one.standard_error) for one in scores.tasks]
    points += [interval(scores.mean, scores.standard_error)] if several else []
    series = [Series(name="adapter", points=tuple(points))]
    for name, values in baselines.items():
        known = [values.get(one.task) for one in scores.tasks]
        average = None if None in known else sum(v or 0.0 for v in known) / len(known)
        shown = [*known, average] if several else known
        series.append(Series(name=name, points=tuple(None if v is None else Point(value=v) for v in shown)))
    figure = Figure(
        name="scores",
        title="Score per task",
        caption=(
            f"{metric or 'Each task’s main metric'}, 0 to 100, on test rows ({_rows_per_task(scores)}); bars are score "
            "± 1.96 standard errors over those rows."
            + (f" Beside it, without a model: {', '.join(baselines)}." if baselines else "")
        ),
        alt="Score with 95 % interval: "
        + first_few((f"{one.task} {signed(one.score)}" for one in scores.tasks), 20)
        + f"; mean {signed(scores.mean)}.",
        plot=Intervals(
            rows=(*(one.task for one in scores.tasks), *(["mean"] if several else [])),
            series=tuple(series),
            xlabel=metric or "score",
            least=0.0,
            most=100.0,
            separated=int(several),
        ),
    )
    return Section(title="Scores", figures=(figure,), tables=(table,))


def _rows_per_task(scores: SavedScores) -> str:
    sizes = {one.n for one in scores.tasks}
    if len(sizes) == 1:
        return f"n = {sizes.pop():,}{' a task' if len(scores.tasks) > 1 else ''}"
    return f"n = {min(sizes):,} to {max(sizes):,} a task"


def _loss_section(log: list[LogLine]) -> Section | None:
    training = [(row.step, row.loss) for row in log if row.loss is not None]
    validation = [(row.step, row.eval_mean_task_loss) for row in log if row.eval_mean_task_loss is not None]
    tasks: dict[str, list[tuple[float, float]]] = {}
    for row in log:
        for task, loss in row.eval_losses.items():
            tasks.setdefault(task, []).append((row.step, loss))
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


def _answers_section(answers: Iterable[ScoredExample]) -> Section | None:
    """Of each task the first answer that is wrong and the first that is right."""
    picked: dict[tuple[str, bool], ScoredExample] = {}
    for row in answers:
        score = row.metrics.get(ACCURACY, row.metrics.get(EXACT_MATCH))
        if score is None or len(picked) >= _ANSWERS:
            continue
        picked.setdefault((row.task, score > 50), row)
    if not picked:
        return None
    order = {task: place for place, task in enumerate(dict.fromkeys(task for task, _ in picked))}
    rows = [
        {
            "task": task,
            "prompt": text(picked[task, right].prompt, limit=_PROMPT),
            "answer": text(picked[task, right].prediction),
            "reference": text(picked[task, right].reference),
            "right": "yes" if right else "no",
        }
        for task, right in sorted(picked, key=lambda key: (order[key[0]], key[1]))
    ]
    return Section(
        title="Some answers",
        text=("Of each task the first wrong and the first right answer; all stand in predictions.jsonl.",),
        tables=(Table.of("answers", f"{len(rows)} answers", rows),),
        folded=True,
    )
