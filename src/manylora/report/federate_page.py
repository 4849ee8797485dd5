"""The page of `manylora federate`: personal models against clients on their own, rounds, and what travelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.report.common import (
    Recipe,
    Score,
    between,
    counted,
    interval,
    mean_score,
    read_recipe,
    read_scores,
    shared_metric,
    signed,
)
from manylora.report.files import mapping, mean, number, numbers, read_if_there, read_lines, text
from manylora.report.page import Figure, Page, Section
from manylora.report.plots import Intervals, Line, LinePanel, Lines, Scatter, Series, Spot
from manylora.table import Cell, Column, Table

_MOST_ROWS = 60
"""Clients in a figure; the table has all."""
_FOLDED = 24
_KIB, _MIB = 1024.0, 1024.0**2


@dataclass(frozen=True, kw_only=True)
class Round:
    """One line of metrics.jsonl."""

    number: float
    loss: float | None
    norm: float | None
    losses: Mapping[str, float]
    shares: Mapping[str, float]
    """What each client has of the round's change."""
    up: Mapping[str, float]
    down: Mapping[str, float]
    asked: float | None
    refused: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client's personal model, and the model it would have without the others."""

    name: str
    score: Score
    alone: Score | None


def federate_page(folder: Path) -> Page:
    """The page of a run folder.

    Raises:
        RunError: a file of it is broken.
    """
    recipe = read_recipe(folder)
    saved = read_if_there(folder / "scores.json")
    clients = _clients(mapping(saved.get("clients")), mapping(saved.get("reference")))
    rounds = _rounds(folder / "metrics.jsonl")
    alone = _rounds(folder / "reference" / "metrics.jsonl")
    strategy = text(recipe.values.get("strategy", "the strategy"))
    sections = (
        _scores_section(clients, strategy),
        _rounds_section(rounds, alone, strategy),
        _traffic_section(rounds, clients, strategy),
    )
    names = {name for one in rounds for name in one.losses} | {client.name for client in clients}
    count = len(names) if names else None
    return Page(
        kind="federate",
        question=f"Do {count if count else 'the'} clients gain by sharing with {strategy}?"
        if count != 1
        else f"What does {strategy} reach?",
        summary=_summary(recipe, clients, rounds, strategy),
        warnings=(*recipe.warnings, *_refusals(rounds)),
        sections=tuple(section for section in sections if section is not None),
        limits=_limits(recipe, clients),
        command=recipe.command,
        versions=recipe.versions,
        settings=recipe.settings,
    )


def _clients(saved: Mapping[str, Any], reference: Mapping[str, Any]) -> list[Client]:
    """By name; the tasks of the only client, where there is one, count as clients."""
    own = {text(name): read_scores(mapping(value)) for name, value in saved.items()}
    alone = {text(name): read_scores(mapping(value)) for name, value in reference.items()}
    if len(own) == 1:
        own = {one.task: [one] for scores in own.values() for one in scores}
        alone = {one.task: [one] for scores in alone.values() for one in scores}
    return [
        Client(
            name=name,
            score=_summed(name, scores),
            alone=_summed(name, alone[name]) if alone.get(name) else None,
        )
        for name, scores in own.items()
        if scores
    ]


def _summed(name: str, scores: list[Score]) -> Score:
    """A client's mean over its tasks."""
    value, error = mean_score(scores)
    return Score(
        task=name,
        metric=shared_metric(scores),
        value=value,
        standard_error=error,
        n=sum(one.n or 0 for one in scores),
        others={one.task: one.value for one in scores},
    )


def _rounds(path: Path) -> list[Round]:
    return [
        Round(
            number=step,
            loss=number(row.get("loss")),
            norm=number(row.get("update_norm")),
            losses=numbers(row.get("losses")),
            shares=numbers(row.get("shares")),
            up=numbers(row.get("up")),
            down=numbers(row.get("down")),
            asked=number(row.get("asked")),
            refused=mapping(row.get("refused")),
        )
        for row in read_lines(path)
        if (step := number(row.get("step"))) is not None
    ]


# ---- words


def _summary(recipe: Recipe, clients: list[Client], rounds: list[Round], strategy: str) -> str:
    if not clients:
        return f"{counted(len(rounds), 'round')} of {strategy} ran; no personal model was scored."
    value, error = mean_score([client.score for client in clients])
    found = (
        f"Personal models reach a mean {shared_metric([c.score for c in clients])} of {signed(value)} "
        f"({between(interval(value, error))})"
    )
    alone = [client.alone for client in clients if client.alone is not None]
    if len(alone) == len(clients):
        other, other_error = mean_score(alone)
        change = _delta(clients)
        found += (
            f", clients on their own {signed(other)} ({between(interval(other, other_error))})"
            + (f", Δm% {signed(change, 2)} (negative: sharing wins)" if change is not None else "")
        )  # fmt: skip
    rows = sum(client.score.n or 0 for client in clients)
    seed = "" if recipe.seed is None else f" with seed {recipe.seed}"
    return f"{found}; {counted(rows, 'test row')}, {counted(len(rounds), 'round')}, one run{seed}."


def _delta(clients: list[Client]) -> float | None:
    """Δm% over tasks against the clients on their own; `None` where a score of theirs is 0 or missing."""
    own, alone = (_by_task([getattr(client, side) for client in clients]) for side in ("score", "alone"))
    if own.keys() != alone.keys() or not own or any(value == 0 for value in alone.values()):
        return None
    changes = [(own[task] - alone[task]) / alone[task] for task in own]
    return -100.0 * sum(changes) / len(changes)


def _by_task(scores: list[Score | None]) -> dict[str, float]:
    """Each task's mean over the clients that hold it."""
    found: dict[str, list[float]] = {}
    for one in scores:
        for task, value in (one.others if one is not None else {}).items():
            found.setdefault(task, []).append(value)
    return {task: sum(values) / len(values) for task, values in found.items()}


def _refusals(rounds: list[Round]) -> tuple[str, ...]:
    refused = [(one.number, name, reason) for one in rounds for name, reason in one.refused.items()]
    if not refused:
        return ()
    when, name, reason = refused[0]
    return (
        f"{counted(len(refused), 'answer')} did not count, the first in round {when:g} from {text(name)}: "
        f"{text(reason)}.",
    )


def _limits(recipe: Recipe, clients: list[Client]) -> tuple[str, ...]:
    seed = "" if recipe.seed is None else f" (seed {recipe.seed})"
    found = [
        f"One run{seed}: another seed, or another dealing of the rows, gives other scores, and the intervals know "
        "nothing of that. manylora compare runs several seeds and tests the difference."
    ]
    if clients:
        found.append(
            "The intervals describe the sampling of test rows alone. Personal models and clients on their own answer "
            "the same rows, so their intervals may overlap although the difference is real, and the other way round."
        )
    if recipe.values.get("engine") == "local":
        found.append("All clients ran in one process: times and losses of a real network are not in it.")
    found.append(
        "Bytes are those of the messages, without what the network adds. No claim of privacy is made."
    )
    return tuple(found)


# ---- sections


def _scores_section(clients: list[Client], strategy: str) -> Section | None:
    if not clients:
        return None
    drawn = clients[:_MOST_ROWS]
    alone = any(client.alone is not None for client in clients)
    own_mean = mean_score([client.score for client in clients])
    known = [client.alone for client in clients if client.alone is not None]
    other_mean = mean_score(known) if len(known) == len(clients) else None
    series = [Series(name=strategy, points=(*(c.score.point for c in drawn), interval(*own_mean)))]
    if alone:
        points = [None if c.alone is None else c.alone.point for c in drawn]
        series.append(
            Series(name="on their own", points=(*points, interval(*other_mean) if other_mean else None))
        )
    metric = shared_metric([client.score for client in clients])
    cut = f" The first {_MOST_ROWS} of {len(clients)} clients." if len(clients) > _MOST_ROWS else ""
    figure = Figure(
        name="scores",
        title="Score of each client’s personal model on its own tasks",
        caption=f"Score, 0 to 100; bars are ± 1.96 standard errors over test rows. The mean is over all clients.{cut}",
        alt=f"Mean score with {strategy} {signed(own_mean[0])}"
        + (f", on their own {signed(other_mean[0])}" if other_mean else "")
        + "; by client: "
        + ", ".join(f"{c.name} {signed(c.score.value)}" for c in drawn[:12])
        + (", …" if len(clients) > 12 else "")
        + ".",
        plot=Intervals(
            rows=(*(client.name for client in drawn), "mean"),
            series=tuple(series),
            xlabel=metric,
            least=0.0,
            most=100.0,
            separated=1,
        ),
    )
    names = [
        "client",
        "score",
        "s.e.",
        "n",
        *(["on its own", "s.e. on its own", "difference"] if alone else []),
    ]
    rows = [_row(client.name, client.score, client.alone, alone) for client in clients]
    total = Score(
        task="mean", metric="", value=own_mean[0], standard_error=own_mean[1],
        n=sum(c.score.n or 0 for c in clients), others={},
    )  # fmt: skip
    other = None
    if other_mean:
        other = Score(
            task="", metric="", value=other_mean[0], standard_error=other_mean[1], n=None, others={}
        )
    table = Table(
        name="scores",
        caption=f"Scores of {counted(len(clients), 'personal model')} on their own tasks",
        columns=tuple(Column(name=name) for name in names),
        rows=tuple(rows),
        footer=(_row("mean", total, other, alone),),
    )
    return Section(title="Scores", figures=(figure,), tables=(table,), folded=len(clients) > _FOLDED)


def _row(name: str, own: Score, other: Score | None, wide: bool) -> tuple[Cell, ...]:
    cells: tuple[Cell, ...] = (name, own.value, own.standard_error, own.n)
    if not wide:
        return cells
    if other is None:
        return (*cells, None, None, None)
    return (*cells, other.value, other.standard_error, own.value - other.value)


def _rounds_section(rounds: list[Round], alone: list[Round], strategy: str) -> Section | None:
    steps = [one for one in rounds if one.loss is not None]
    if not steps:
        return None
    spread = all(one.losses for one in steps)
    lines = [
        Line(
            name=strategy,
            x=tuple(one.number for one in steps),
            y=tuple(one.loss or 0.0 for one in steps),
            low=tuple(min(one.losses.values()) for one in steps) if spread else (),
            high=tuple(max(one.losses.values()) for one in steps) if spread else (),
        )
    ]
    others = [one for one in alone if one.loss is not None]
    if others:
        x, y = tuple(one.number for one in others), tuple(one.loss or 0.0 for one in others)
        lines.append(Line(name="on their own", x=x, y=y))
    panels = [LinePanel(title="Training loss", lines=tuple(lines), ylabel="loss", least=0.0)]
    norms = [(one.number, one.norm) for one in rounds if one.norm is not None]
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
    shares = _shares(rounds)
    return Section(
        title="Training",
        text=_participation(rounds),
        figures=(figure,),
        tables=() if shares is None else (shares,),
        folded=shares is not None and len(shares.rows) > _FOLDED,
    )


def _shares(rounds: list[Round]) -> Table | None:
    """How much of the rounds' changes each client had; `None` where nothing travels."""
    shared = [one for one in rounds if one.shares]
    names = sorted({name for one in shared for name in one.shares})
    if not names:
        return None
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        own = [(one.shares[name], one.number) for one in shared if name in one.shares]
        largest, when = max(own)
        average = mean([share for share, _ in own])
        rows.append((name, None if average is None else 100 * average, 100 * largest, int(when), len(own)))
    return Table(
        name="shares",
        caption="Each client’s share of a round’s change: the norm of its weighted part among the sum of all parts",
        columns=(
            Column(name="client"),
            Column(name="mean share, %", digits=1),
            Column(name="largest, %", digits=1),
            Column(name="in round"),
            Column(name="rounds"),
        ),
        rows=tuple(rows),
    )


def _participation(rounds: list[Round]) -> tuple[str, ...]:
    asked = [one.asked for one in rounds if one.asked is not None]
    answered = [len(one.losses) for one in rounds]
    if not asked or sum(asked) == sum(answered):
        return ()
    return (f"{sum(answered):,} of {int(sum(asked)):,} asked answers counted, over all rounds.",)


def _traffic_section(rounds: list[Round], clients: list[Client], strategy: str) -> Section | None:
    names = list(dict.fromkeys(name for one in rounds for name in (*one.up, *one.down)))
    if not names:
        return None
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        up = [one.up[name] for one in rounds if name in one.up]
        down = [one.down[name] for one in rounds if name in one.down]
        average_up, average_down = mean(up), mean(down)
        rows.append(
            (
                name,
                None if average_up is None else average_up / _KIB,
                None if average_down is None else average_down / _KIB,
                (sum(up) + sum(down)) / _MIB,
                len(up),
            )
        )
    total = sum(sum(one.up.values()) + sum(one.down.values()) for one in rounds)
    columns = (
        Column(name="client"),
        Column(name="KiB up a round", digits=1),
        Column(name="KiB down a round", digits=1),
        Column(name="MiB in all", digits=2),
        Column(name="rounds"),
    )
    table = Table(
        name="traffic",
        caption=f"Messages of {counted(len(names), 'client')}: means over the rounds a client took part in",
        columns=columns,
        rows=tuple(rows),
        footer=(("all", *_mean_cells(rows), total / _MIB, len(rounds)),),
    )
    known = [client.alone for client in clients if client.alone is not None]
    figures = (_quality(clients, known, total, strategy),) if clients and len(known) == len(clients) else ()
    return Section(title="What travelled", figures=figures, tables=(table,), folded=len(names) > _FOLDED)


def _mean_cells(rows: list[tuple[Cell, ...]]) -> tuple[Cell, Cell]:
    up = mean(row[1] for row in rows if isinstance(row[1], float))
    return up, mean(row[2] for row in rows if isinstance(row[2], float))


def _quality(clients: list[Client], alone: list[Score], total: float, strategy: str) -> Figure:
    own, other = mean_score([client.score for client in clients]), mean_score(alone)
    spots = (
        Spot(name=strategy, x=total / _MIB, y=interval(*own)),
        Spot(name="on their own", x=0.0, y=interval(*other)),
    )
    return Figure(
        name="quality-bytes",
        title="Quality against bytes",
        caption="Mean score of the personal models with its 95 % interval over test rows; to the right all messages of "
        "all clients and rounds, up and down.",
        alt=f"{strategy}: {signed(own[0])} for {signed(total / _MIB)} MiB; on their own: {signed(other[0])} for none.",
        plot=Scatter(spots=spots, xlabel="MiB that travelled", ylabel="mean score"),
    )
