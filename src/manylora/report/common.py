"""What the pages of all verbs have in common: how a run is repeated, failed runs, scores in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from manylora.report.files import mapping, number, read_if_there, read_settings, rows, text, whole
from manylora.report.plots import Point

Z_95 = 1.959964
"""Two-sided 95 % of the normal distribution."""
_METRICS = {
    "rouge1_all": "ROUGE-1",
    "rouge1": "ROUGE-1 a–z",  # of runs of earlier versions, too: their words were a–z and 0–9 alone
    "accuracy": "accuracy",
    "strict_accuracy": "strict accuracy",
    "exact_match": "exact match",
    "option_accuracy": "option accuracy",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to repeat a run, as `Page` shows it."""

    command: str
    versions: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    values: Mapping[str, Any]
    """The settings as they stand in the file."""
    seed: int | None
    warnings: tuple[str, ...]


def read_recipe(folder: Path, *, environment: Mapping[str, Any] | None = None) -> Recipe:
    """config.yaml, environment.json and state.json of a folder, each of which may be absent.

    Args:
        folder: of the run.
        environment: what to take for an absent environment.json.

    Raises:
        RunError: one of them is broken.
    """
    config = read_settings(folder / "config.yaml")
    environment = read_if_there(folder / "environment.json") or environment or {}
    state = read_if_there(folder / "state.json")
    return Recipe(
        command=command_line(environment.get("command")),
        versions=tuple(_versions(environment, state)),
        settings=tuple((text(key), text(value)) for key, value in config.items()),
        values=config,
        seed=whole(config.get("seed", environment.get("seed"))),
        warnings=_state_warnings(state),
    )


def notes_of(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What the verb itself noted about its numbers."""
    notes = found.get("notes")
    return (
        tuple(text(note, limit=600) for note in notes if isinstance(note, str))
        if isinstance(notes, list)
        else ()
    )


def command_line(words: object) -> str:
    """What `sys.argv` was, as one types it; empty where it is not known."""
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        return ""
    program = PurePath(words[0])
    if program.stem == "manylora" or program.parts[-3:] == ("manylora", "cli", "__main__.py"):
        return shlex.join(["manylora", *words[1:]])
    return shlex.join(["python", *words] if program.suffix == ".py" else words)


def _versions(environment: Mapping[str, Any], state: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, text(environment[name])) for name in ("manylora", "python") if name in environment]
    found += [(text(name), text(version)) for name, version in mapping(environment.get("packages")).items()]
    found += [
        (name, text(environment[name])) for name in ("platform", "threads", "seed") if name in environment
    ]
    if "cuda" in environment:
        found.append(("CUDA", text(environment["cuda"]) if environment["cuda"] else "none"))
    found += [
        (f"fingerprint of the {text(name)}", text(value))
        for name, value in mapping(state.get("fingerprints")).items()
    ]
    if "time" in state:
        found.append(("finished" if state.get("state") == "finished" else "last change", text(state["time"])))
    return found


def _state_warnings(state: Mapping[str, Any]) -> tuple[str, ...]:
    if state.get("state") == "failed":
        return (f"This run failed: {text(state.get('error'), limit=600)} What it wrote before stands below.",)
    if state.get("state") == "running":
        return ("This run had not ended when the page was drawn; what it had written stands below.",)
    return ()


@dataclass(frozen=True, kw_only=True)
class Score:
    """One task's (or client's) score."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    n: int | None
    others: Mapping[str, float]
    """Further metrics by name."""

    @property
    def point(self) -> Point:
        """With its 95 % interval over test rows, inside 0 to 100."""
        return interval(self.value, self.standard_error)


def interval(value: float, standard_error: float | None) -> Point:
    """value ± 1.96 standard errors, inside 0 to 100."""
    if standard_error is None:
        return Point(value=value)
    half = Z_95 * standard_error
    return Point(value=value, low=max(0.0, value - half), high=min(100.0, value + half))


def point_of(row: Mapping[str, Any], value: str = "mean") -> Point | None:
    """A row of the study as a drawn value with its interval; `None` where it has no number."""
    middle = number(row.get(value))
    if middle is None:
        return None
    return Point(value=middle, low=number(row.get("low")), high=number(row.get("high")))


def read_scores(saved: Mapping[str, Any]) -> list[Score]:
    """The tasks of a `Scores` as it stands in scores.json; those without a number are left out."""
    found = []
    for row in rows(saved.get("tasks")):
        value = number(row.get("score"))
        if value is None:
            continue
        others = {
            text(name): mean
            for name, estimate in mapping(row.get("metrics")).items()
            if name != row.get("metric") and (mean := number(mapping(estimate).get("mean"))) is not None
        }
        found.append(
            Score(
                task=text(row.get("task")),
                metric=metric_name(text(row.get("metric"))),
                value=value,
                standard_error=number(row.get("standard_error")),
                n=whole(row.get("n")),
                others=others,
            )
        )
    return found


def mean_score(scores: list[Score]) -> tuple[float, float | None]:
    """Mean over tasks, and its standard error from the sampling of test rows: sqrt(Σ se²) / tasks."""
    known = [one.standard_error for one in scores if one.standard_error is not None]
    error = math.sqrt(math.fsum(e**2 for e in known)) / len(scores) if len(known) == len(scores) else None
    return math.fsum(one.value for one in scores) / len(scores), error


def metric_name(metric: str) -> str:
    """A metric as people call it."""
    return _METRICS.get(metric, metric)


def shared_metric(scores: list[Score]) -> str:
    """The metric of all, or "score" where they differ."""
    names = {one.metric for one in scores}
    return names.pop() if len(names) == 1 else "score"


def between(point: Point, *, digits: int = 1) -> str:
    """An interval in words."""
    if point.low is None or point.high is None:
        return "no interval known"
    return f"95 % interval {signed(point.low, digits)} to {signed(point.high, digits)}"


def signed(value: float, digits: int = 1) -> str:
    """A number with a real minus sign."""
    return f"{value:,.{digits}f}".replace("-", "−")


def counted(count: int, noun: str) -> str:
    """ "1 task", "8 tasks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
