"""What the pages of all verbs have in common: reading without trust, how a run is repeated, numbers in words.

Whatever stands in these files may come from strangers: a damaged value is a missing one
(`manylora.files.forgive_record`), a file that cannot be read is one line that names it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pydantic import Field

from manylora.files import Record, Several, forgive_record, read_object
from manylora.report.plots import Point
from manylora.table import clean

Z_95 = 1.959964
"""Two-sided 95 % of the normal distribution."""
FOLDED = 24
"""Rows of a table that is shown without a click."""
Kind = TypeVar("Kind", bound=Record)


# ---- files


class Environment(Record):
    """What a page says of environment.json."""

    manylora: str | None = None
    python: str | None = None
    platform: str | None = None
    threads: int | None = None
    seed: int | None = None
    cuda: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    command: Several[str] = ()


class State(Record):
    """What a page says of state.json."""

    kind: str | None = None
    state: str | None = None
    time: str | None = None
    error: str | None = None
    fingerprints: dict[str, str] = Field(default_factory=dict)


class Settings(Record):
    """The settings that a page's words are about; all stand in its table."""

    model: str | None = None
    method: str | None = None
    share: str | None = None
    router: str | None = None
    num_experts: int | None = None
    r: int | None = None
    seed: int | None = None
    limit: int | None = None
    strategy: str | None = None
    engine: str | None = None


def read_page_file(path: Path) -> dict[str, Any]:
    """The object in a JSON or YAML file; an absent one is empty.

    Raises:
        RunError: the file is broken, or holds something else than an object.
    """
    return read_object(path, remedy="mend or remove it") if path.is_file() else {}


def read_if_there(path: Path, kind: type[Kind]) -> Kind | None:
    """The record in a JSON file, `None` where there is no file or what it must have is damaged.

    Raises:
        RunError: the file is broken, or holds something else than an object.
    """
    return forgive_record(read_page_file(path), kind) if path.is_file() else None


# ---- how to repeat a run


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to repeat a run, as `Page` shows it."""

    command: str
    versions: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    values: Settings
    warnings: tuple[str, ...]

    @property
    def seed_in_words(self) -> str:
        """ " (seed 3)", or nothing where it is not known."""
        return "" if self.values.seed is None else f" (seed {self.values.seed})"


def read_recipe(folder: Path, *, environment: Environment | None = None) -> Recipe:
    """config.yaml, environment.json and state.json of a folder, each of which may be absent.

    Args:
        folder: of the run.
        environment: what to take for an absent environment.json.

    Raises:
        RunError: one of them is broken.
    """
    config = read_page_file(folder / "config.yaml")
    found = read_if_there(folder / "environment.json", Environment) or environment or Environment()
    state = read_if_there(folder / "state.json", State) or State()
    values = forgive_record(config, Settings) or Settings()
    return Recipe(
        command=command_line(found.command),
        versions=tuple(_versions(found, state)),
        settings=tuple((text(key), text(value)) for key, value in config.items()),
        values=values if values.seed is not None else values.model_copy(update={"seed": found.seed}),
        warnings=_state_warnings(state),
    )


def command_line(words: tuple[str, ...]) -> str:
    """What `sys.argv` was, as one types it; empty where it is not known."""
    if not words:
        return ""
    program = PurePath(words[0])
    if program.stem == "manylora" or program.parts[-3:] == ("manylora", "cli", "__main__.py"):
        return shlex.join(["manylora", *words[1:]])
    return shlex.join(["python", *words] if program.suffix == ".py" else words)


def _versions(found: Environment, state: State) -> list[tuple[str, str]]:
    plain = {
        "manylora": found.manylora,
        "python": found.python,
        **found.packages,
        "platform": found.platform,
        "threads": found.threads,
        "seed": found.seed,
        "CUDA": found.cuda or "none" if "cuda" in found.model_fields_set else None,
        **{f"fingerprint of the {name}": value for name, value in state.fingerprints.items()},
        "finished" if state.state == "finished" else "last change": state.time,
    }
    return [(name, text(value)) for name, value in plain.items() if value is not None]


def _state_warnings(state: State) -> tuple[str, ...]:
    if state.state == "failed":
        return (f"This run failed: {text(state.error, limit=600)} What it wrote before stands below.",)
    if state.state == "running":
        return ("This run had not ended when the page was drawn; what it had written stands below.",)
    return ()


# ---- numbers and words


def interval(value: float, standard_error: float) -> Point:
    """value ± 1.96 standard errors, inside 0 to 100; without an interval where the error is NaN."""
    if math.isnan(standard_error):
        return Point(value=value)
    half = Z_95 * standard_error
    return Point(value=value, low=max(0.0, value - half), high=min(100.0, value + half))


def between(point: Point) -> str:
    """An interval in words."""
    if point.low is None or point.high is None:
        return "no interval known"
    return f"95 % interval {signed(point.low)} to {signed(point.high)}"


def mean(values: Iterable[float]) -> float | None:
    """Mean, `None` of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def signed(value: float, digits: int = 1) -> str:
    """A number with a real minus sign."""
    return f"{value:,.{digits}f}".replace("-", "−")


def counted(count: int, noun: str) -> str:
    """ "1 task", "8 tasks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def text(value: object, *, limit: int = 300) -> str:
    """Any scalar or list of scalars in words; what is longer than `limit` characters is cut."""
    if isinstance(value, (list, tuple)):
        shown = ", ".join(text(item, limit=60) for item in value[:40])
        return _cut(shown + (", …" if len(value) > 40 else ""), limit)
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return "…"
    if isinstance(value, float):
        return f"{value:g}"
    return _cut(clean(str(value)), limit)


def first_few(words: Iterable[str], most: int) -> str:
    """ "a, b, …"."""
    found = list(words)
    return ", ".join(found[:most]) + (", …" if len(found) > most else "")


def _cut(words: str, limit: int) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"
