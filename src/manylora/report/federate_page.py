"""The page of `manylora federate`: personal models against clients on their own, rounds, and what travelled."""

from __future__ import annotations

import contextlib
from pathlib import Path

from manylora.errors import DataError
from manylora.evaluation.scores import ClientScores, Scores
from manylora.federated.results import (
    FederatedResult,
    Round,
    clients_table,
    mean_score,
    shares_table,
    traffic_table,
)
from manylora.files import forgive_lines
from manylora.report.common import (
    FOLDED,
    Recipe,
    between,
    counted,
    first_few,
    interval,
    read_if_there,
    read_recipe,
    signed,
)
from manylora.report.page import Figure, Page, Section
from manylora.report.plots import Intervals, Line, LinePanel, Lines, Point, Scatter, Series, Spot

_MOST_ROWS = 60
"""Clients in a figure; the table has all."""
_MIB = 1024.0**2


def federate_page(folder: Path) -> Page:
    """The page of a run folder.

    Raises:
        RunError: a file of it is broken.
    """
    recipe = read_recipe(folder)
    rounds = list(forgive_lines(folder / "metrics.jsonl", Round))
    alone = list(forgive_lines(folder / "reference" / "metrics.jsonl", Round))
    found = FederatedResult.of(read_if_there(folder / "scores.json", ClientScores), rounds)
    strategy = recipe.values.strategy or "the strategy"
    sections = (
        _scores_section(found, strategy) if found.clients else None,
        _rounds_section(rounds, alone, strategy),
        _traffic_section(found, strategy) if found.sent() else None,
    )
    count = len({name for one in rounds for name in one.losses} | set(found.clients))
    return Page(
        kind="federate",
        question=f"Do {count or 'the'} clients gain by sharing with {strategy}?"
        if count != 1
        else f"What does {strategy} reach?",
        summary=_summary(recipe, found, strategy),
        warnings=(*recipe.warnings, *_refusals(rounds)),
        sections=tuple(section for section in sections if section is not None),
        limits=_limits(recipe, found),
        command=recipe.command,
        versions=recipe.versions,
        settings=recipe.settings,
    )


# ---- words


def _summary(recipe: Recipe, found: FederatedResult, strategy: str) -> str:
    rounds = counted(len(found.rounds), "round")
    if not found.clients:
        return f"{rounds} of {strategy} ran; no personal model was scored."
    own = mean_score(found.clients.values())
    words = f"Personal models reach a mean {_metric(found)} of {signed(own[0])} ({between(interval(*own))})"
    if found.compared:
        other = mean_score(found.alone.values())
        words += f", clients on their own {signed(other[0])} ({between(interval(*other))})"
        with contextlib.suppress(DataError):  # a score of 0, to which nothing is relative
            words += f", Δm% {signed(found.delta_m(), 2)} (negative: sharing wins)"
    rows = sum(scores.n for scores in found.clients.values())
    seed = "" if recipe.values.seed is None else f" with seed {recipe.values.seed}"
    return f"{words}; {counted(rows, 'test row')}, {rounds}, one run{seed}."


def _metric(found: FederatedResult) -> str:
    """The main metric of all clients, as tables call it, or "score"."""
    labels = {own.metric_label for own in found.clients.values()}
    return (labels.pop() if len(labels) == 1 else "") or "score"


def _refusals(rounds: list[Round]) -> tuple[str, ...]:
    refused = [(one.step, name, reason) for one in rounds for name, reason in one.refused.items()]
    if not refused:
        return ()
    when, name, reason = refused[0]
    return (
        f"{counted(len(refused), 'answer')} did not count, the first in round {when} from {name}: {reason}.",
    )


def _limits(recipe: Recipe, result: FederatedResult) -> tuple[str, ...]:
    found = [
        f"One run{recipe.seed_in_words}: another seed, or another dealing of the rows, gives other scores, and the "
        "intervals know nothing of that. manylora compare runs several seeds and tests the difference."
    ]
    if result.clients:
        found.append(
            "The intervals describe the sampling of test rows alone. Personal models and clients on their own answer "
            "the same rows, so their intervals may overlap although the difference is real, and the other way round."
        )
    if recipe.values.engine == "local":
        found.append("All clients ran in one process: times and losses of a real network are not in it.")
    found.append(
        "Bytes are those of the messages, without what the network adds. No claim of privacy is made."
    )
    return tuple(found)


# ---- sections


def _point(scores: Scores | None) -> Point | None:
    return None if scores is None else interval(scores.mean, scores.standard_error)


def _scores_section(found: FederatedResult, strategy: str) -> Section:
    drawn, many = list(found.clients)[:_MOST_ROWS], len(found.clients)
    own_mean = mean_score(found.clients.values())
    other_mean = mean_score(found.alone.values()) if found.compared else None
    own = (_point(found.clients[name]) for name in drawn)
    series = [Series(name=strategy, points=(*own, interval(*own_mean)))]
    if found.alone:
        others = (_point(found.alone.get(name)) for name in drawn)
        series.append(
            Series(name="on their own", points=(*others, interval(*other_mean) if other_mean else None))
        )
    cut = f" The first {_MOST_ROWS} of {many} clients." if many > _MOST_ROWS else ""
    figure = Figure(
        name="scores",
        title="Score of each client’s personal model on its own tasks",
        caption=f"Score, 0 to 100; bars are ± 1.96 standard errors over test rows. The mean is over all clients.{cut}",
        alt=f"Mean score with {strategy} {signed(own_mean[0])}"
        + (f", on their own {signed(other_mean[0])}" if other_mean else "")
        + "; by client: "
        + first_few((f"{name} {signed(scores.mean)}" for name, scores in found.clients.items()), 12)
        + ".",
        plot=Intervals(
            rows=(*drawn, "mean"),
            series=tuple(series),
            xlabel=_metric(found),
            least=0.0,
            most=100.0,
            separated=1,
        ),
    )
    tables = (clients_table(found, traffic=False),)
    return Section(title="Scores", figures=(figure,), tables=tables, folded=many > FOLDED)


def _rounds_section(rounds: list[Round], alone: list[Round], strategy: str) -> Section | None:
    lines = [
        line
        for line in (_loss_line(strategy, rounds), _loss_line("on their own", alone, band=False))
        if line is not None
    ]
    if not lines or lines[0].name != strategy:
        return None
    panels = [LinePanel(title="Training loss", lines=tuple(lines), ylabel="loss", least=0.0)]
    norms = [(float(one.step), one.update_norm) for one in rounds if one.update_norm is not None]
    if norms:
        line = Line(name=strategy, x=tuple(x for x, _ in norms), y=tuple(y for _, y in norms))
        panels.append(LinePanel(title="Change of what is shared", lines=(line,), ylabel="norm", least=0.0))
    figure = Figure(
        name="rounds",
        title="Round by round",
        caption="Mean loss of the clients that counted, weighted by their rows; the band spans the lowest and highest. "
        "A change that does not shrink means that the clients still pull in different directions.",
        alt=f"Mean training loss per round, from {signed(lines[0].y[0], 3)} to {signed(lines[0].y[-1], 3)}.",
        plot=Lines(panels=tuple(panels), xlabel="round", whole=True),
    )
    shares = shares_table(rounds)
    return Section(
        title="Training",
        text=_participation(rounds),
        figures=(figure,),
        tables=(shares,) if shares.rows else (),
        folded=len(shares.rows) > FOLDED,
    )


def _loss_line(name: str, rounds: list[Round], *, band: bool = True) -> Line | None:
    known = [(one, one.loss) for one in rounds if one.loss is not None]
    spread = band and all(one.losses for one, _ in known)
    return (
        Line(
            name=name,
            x=tuple(float(one.step) for one, _ in known),
            y=tuple(loss for _, loss in known),
            low=tuple(min(one.losses.values()) for one, _ in known) if spread else (),
            high=tuple(max(one.losses.values()) for one, _ in known) if spread else (),
        )
        if known
        else None
    )


def _participation(rounds: list[Round]) -> tuple[str, ...]:
    asked = sum(one.asked for one in rounds if one.asked is not None)
    answered = sum(len(one.losses) for one in rounds)
    if not asked or asked == answered:
        return ()
    return (f"{answered:,} of {asked:,} asked answers counted, over all rounds.",)


def _traffic_section(found: FederatedResult, strategy: str) -> Section:
    total = sum(sum(up) + sum(down) for up, down in found.sent().values())
    figures = (_quality(found, total / _MIB, strategy),) if found.compared else ()
    table = traffic_table(found)
    return Section(title="What travelled", figures=figures, tables=(table,), folded=len(table.rows) > FOLDED)


def _quality(found: FederatedResult, mib: float, strategy: str) -> Figure:
    own, other = mean_score(found.clients.values()), mean_score(found.alone.values())
    spots = (
        Spot(name=strategy, x=mib, y=interval(*own)),
        Spot(name="on their own", x=0.0, y=interval(*other)),
    )
    return Figure(
        name="quality-bytes",
        title="Quality against bytes",
        caption="Mean score of the personal models with its 95 % interval over test rows; to the right all messages of "
        "all clients and rounds, up and down.",
        alt=f"{strategy}: {signed(own[0])} for {signed(mib)} MiB; on their own: {signed(other[0])} for none.",
        plot=Scatter(spots=spots, xlabel="MiB that travelled", ylabel="mean score"),
    )
