"""What a study is: methods × seeds × tasks, the learning rates to choose from, and the claims named beforehand."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora.errors import ConfigError
from manylora.evaluation.claims import ClaimKind
from manylora.files import check_types, read_yaml, reason
from manylora.files.settings import CountOrZero, NotNegative, Settings, check_type
from manylora.studies.presets import PRESETS

MEAN = "mean"
"""Where a task may be named: the mean over all tasks."""

SCREENING = 5
"""Fewer seeds than this are a first look, and the page says so."""

_MOST_SEEDS = 10_000
_REMEDY = "see docs/compare.md"

_RESERVED = frozenset({"seed", "learning_rate", "out"})
"""Settings that a study gives each cell itself."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a study's table."""

    name: str
    kind: str
    """Which code runs its cells; see `manylora.studies.kinds`."""
    settings: Mapping[str, Any]
    """Of the kind: those of the study, overridden by the method's own."""
    single: str | None = None
    """The method that Δm% compares with. Default: the study's."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A claim about two methods, named before the study runs."""

    first: str
    second: str
    claim: ClaimKind = "better"
    """better: first scores higher than second; no worse: it loses less than the margin."""
    task: str = MEAN
    """A task, a group of tasks, or "mean", over all tasks."""
    text: str = ""
    """The claim in words. Default: made from the names."""

    @property
    def sentence(self) -> str:
        """The claim in words."""
        if self.text:
            return self.text
        where = "" if self.task == MEAN else f" on {self.task}"
        verb = "scores higher than" if self.claim == "better" else "is no worse than"
        return f"{self.first} {verb} {self.second}{where}"


@dataclass(frozen=True, kw_only=True)
class Study(Settings):
    """A study, checked; `load_study` reads it from YAML."""

    name: str
    methods: tuple[Method, ...]
    question: str = ""
    reference: str = "alora"
    """The method that all others are tried against where no contrasts are named. Default where there is no "alora":
    the first contrast's first, or the first method."""
    single: str | None = None
    """The method that Δm% compares with. Default: "lora-per-task" where the study has it."""
    seeds: tuple[CountOrZero, ...] = (0, 1)
    """Seeds of the cells that are scored on the test rows."""
    learning_rates: tuple[NotNegative, ...] = ()
    """The grid, the same for every method; chosen on validation rows. Default: none, each kind's own rate."""
    screening_seeds: tuple[CountOrZero, ...] = (1000,)
    """Seeds of the cells that choose the learning rate, scored on validation rows."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further means: name to tasks, or patterns such as "*@8"."""
    contrasts: tuple[Contrast, ...] = ()
    """Default: the reference is better than each other method."""
    margin: NotNegative = 1.0
    """Points that count as nothing."""
    caveat: str = ""
    """Printed under every table: what was cut."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The settings as they were written down."""

    def method(self, name: str) -> Method:
        """The method of this name."""
        return next(method for method in self.methods if method.name == name)

    @property
    def names(self) -> list[str]:
        """Every method's name, in order."""
        return [method.name for method in self.methods]

    @property
    def claims(self) -> tuple[Contrast, ...]:
        """The contrasts; without any, the reference against each other method."""
        return self.contrasts or tuple(
            Contrast(first=self.reference, second=name) for name in self.names if name != self.reference
        )

    def single_of(self, method: str) -> str | None:
        """The method that this one's Δm% compares with."""
        own = self.method(method).single or self.single
        return own or ("lora-per-task" if "lora-per-task" in self.names else None)

    def tasks_of(self, on: str, tasks: Sequence[str]) -> list[str]:
        """The tasks that a task, a group or "mean" stands for.

        Raises:
            ConfigError: none of `tasks`.
        """
        if on == MEAN:
            return list(tasks)
        patterns = self.groups.get(on, (on,))
        found = [task for task in tasks if any(fnmatch.fnmatchcase(task, pattern) for pattern in patterns)]
        if not found:
            raise ConfigError(f"{on!r} is no task of this study; its tasks are {', '.join(tasks)}.")
        return found


_KEYS = {field.name for field in dataclasses.fields(Study)} - {"source"} | {"model", "settings"}


def load_study(path: str | Path) -> Study:
    """Read a study from a YAML file.

    Raises:
        ConfigError: the file cannot be read, or what it says cannot be; the message names the file.
    """
    try:
        values = read_yaml(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({reason(error)}); give a study as a YAML file.") from error
    try:
        return parse_study(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_study(values: object) -> Study:
    """Check a study's settings.

    Raises:
        ConfigError: an unknown key (with a guess), a value that cannot be, or a contrast of unknown methods.
    """
    if not isinstance(values, Mapping):
        raise ConfigError("a study is a mapping with name, methods and more; see docs/compare.md.")
    refuse_unknown(values, _KEYS, "the study")
    common = _value(values, "settings", dict[str, Any], {})
    if "model" in values:
        common = {**common, "model": values["model"]}
    methods = _methods(values.get("methods"), common)
    names = [method.name for method in methods]
    _check_one_metric(methods)
    plain = {
        key: _value(values, key, str, "")
        for key in ("name", "question", "reference", "single", "caveat")
        if values.get(key)
    }
    if "name" not in plain or not all(c.isalnum() or c in "-_." for c in plain["name"]):
        raise ConfigError(f"name is {values.get('name')!r}; give one of letters, digits, - and _.")
    study = Study(
        **plain,
        methods=methods,
        seeds=_seeds(values, "seeds", [0, 1]),
        learning_rates=_learning_rates(values),
        screening_seeds=_seeds(values, "screening_seeds", [1000]),
        groups={
            name: (tasks,) if isinstance(tasks, str) else tuple(tasks)
            for name, tasks in _value(values, "groups", dict[str, list[str] | str], {}).items()
        },
        contrasts=tuple(map(_contrast, _value(values, "contrasts", list[dict[str, Any]], []))),
        margin=float(_value(values, "margin", float, 1.0)),
        source=dict(values),
    )
    if not study.seeds:
        raise ConfigError("seeds is empty; give two to screen, five or more to confirm.")
    if study.learning_rates and not study.screening_seeds:
        raise ConfigError("screening_seeds is empty; give one or more to choose the learning rate with.")
    if "reference" not in plain and study.reference not in names:
        first = study.contrasts[0].first if study.contrasts else names[0]
        study = dataclasses.replace(study, reference=first)
    for where, name in _named(study):
        if name not in names:
            raise ConfigError(f"{where} is {name!r}, which is no method of this study{guess(name, names)}.")
    return study


def check_tasks(study: Study) -> None:
    """Refuse claims and groups about tasks that the study does not have, before it runs.

    Raises:
        ConfigError: naming the task.
        DataError: the tasks' rows cannot be read.
    """
    from manylora.studies.kinds import kind_of

    first = study.methods[0]
    tasks = kind_of(first.kind).tasks(first.settings)
    for on in dict.fromkeys([*study.groups, *(contrast.task for contrast in study.claims)]):
        study.tasks_of(on, tasks)


def _named(study: Study) -> list[tuple[str, str]]:
    """Every place that names a method, and the name."""
    named = [("reference", study.reference)]
    named += [("single", study.single)] if study.single else []
    named += [(f"single of {method.name}", method.single) for method in study.methods if method.single]
    for contrast in study.contrasts:
        named += [("a contrast's first", contrast.first), ("a contrast's second", contrast.second)]
    return [(where, name) for where, name in named if name is not None]


def refuse_unknown(values: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Refuse keys that mean nothing.

    Raises:
        ConfigError: naming the first such key and, where one is near, the key that may have been meant.
    """
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has no setting {key!r}{guess(str(key), known)}.")


def guess(word: str, known: Collection[str]) -> str:
    """ "; did you mean X?" without its question mark, or what there is."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"


def _methods(value: object, common: Mapping[str, Any]) -> tuple[Method, ...]:
    if isinstance(value, list):
        if len(set(map(str, value))) != len(value):
            raise ConfigError(f"methods {value} names one twice; give each once.")
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"methods is {value!r}; give a list of names, or a mapping from names to settings.")
    return tuple(
        _method(str(name), _value({name: own}, name, dict[str, Any], {}), common)
        for name, own in value.items()
    )


def _method(name: str, own: Mapping[str, Any], common: Mapping[str, Any]) -> Method:
    from manylora.studies.kinds import KINDS

    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"method {name!r} cannot be a folder's name; leave out / and a leading dot.")
    own = dict(own)
    single = own.pop("single", None)
    preset = own.pop("preset", name if name in PRESETS and "kind" not in own else None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ConfigError(f"method {name}: preset is {preset!r}{guess(str(preset), PRESETS)}.")
    kind, settings = PRESETS[preset] if preset is not None else ("train", {})
    if preset is None and not own:
        raise ConfigError(f"method {name!r} has no settings and is no preset{guess(name, PRESETS)}.")
    kind = own.pop("kind", kind)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"method {name}: kind is {kind!r}{guess(str(kind), KINDS)}.")
    if reserved := sorted(_RESERVED & (set(own) | set(common))):
        raise ConfigError(
            f"method {name} sets {reserved[0]}, which a study gives each cell itself; use seeds and learning_rates."
        )
    merged = {**common, **settings, **own}
    try:
        _check_settings(kind, merged, own=own)
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from error
    return Method(name=name, kind=kind, settings=merged, single=None if single is None else str(single))


def _check_settings(kind: str, settings: Mapping[str, Any], *, own: Collection[str]) -> None:
    """Refuse settings that a kind does not know, or that cannot be; those of the method's own are named first."""
    from manylora.studies.kinds import kind_of

    module = kind_of(kind)
    refuse_unknown({key: settings[key] for key in own}, module.SETTINGS, f"kind {kind}")
    refuse_unknown(settings, module.SETTINGS, f"kind {kind} (settings of the whole study)")
    module.check(settings)


def _check_one_metric(methods: Sequence[Method]) -> None:
    """Refuse methods whose scores are measured differently: their differences would mean nothing."""
    for setting, usual in (("task_type", "CAUSAL_LM"), ("rouge", "all")):
        kinds = {method.name: method.settings.get(setting, usual) for method in methods}
        if len(set(kinds.values())) > 1:
            shown = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise ConfigError(
                f"{setting} differs between the methods ({shown}); give it once, under settings."
            )


def _contrast(values: Mapping[str, Any]) -> Contrast:
    refuse_unknown(values, {f.name for f in dataclasses.fields(Contrast)}, "a contrast")
    for key in ("first", "second"):
        if key not in values:
            raise ConfigError(f"the contrast {dict(values)} has no {key}; name two methods.")
    if values["first"] == values["second"]:
        raise ConfigError(f"a contrast compares {values['first']!r} with itself; name two methods.")
    check_types(Contrast, values, source="", remedy=_REMEDY)
    return Contrast(**values)


def _value(values: Mapping[Any, Any], key: str, hint: Any, default: Any) -> Any:
    """A setting of the study, of the type that it has."""
    value = values.get(key)
    if value is None:
        return default
    check_type(key, value, hint, remedy=_REMEDY)
    return value


def _seeds(values: Mapping[str, Any], key: str, default: list[int]) -> tuple[int, ...]:
    """Several seeds; "seeds: 5" are 0 to 4."""
    seeds = _value(values, key, list[int] | int, default)
    if isinstance(seeds, int):
        if not 0 <= seeds <= _MOST_SEEDS:
            raise ConfigError(f"{key} is {seeds!r}; give a list, or a number of at most {_MOST_SEEDS:,}.")
        seeds = list(range(seeds))
    return _each_once(key, seeds)


def _learning_rates(values: Mapping[str, Any]) -> tuple[float, ...]:
    rates = _value(values, "learning_rates", list[float], [])
    if 0 in rates:
        raise ConfigError(f"learning_rates {rates} holds 0, with which nothing is learnt.")
    return _each_once("learning_rates", [float(rate) for rate in rates])


def _each_once(key: str, numbers: list[Any]) -> tuple[Any, ...]:
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"{key} {numbers} names one twice; give each once.")
    return tuple(numbers)
