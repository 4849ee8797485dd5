"""ManyLoRA: fine-tune one language model for many tasks and many clients.

Importing this package registers the method with PEFT: at once where PEFT is imported already, else at the
moment it is. So `import manylora` costs nothing where no model is needed, as in `manylora --help`.

What the command line prints, Python returns:

    run = manylora.train(data="flan8/train", test="flan8/test", r=16)
    run.scores["entailment"].score, run.scores.mean
    manylora.predict(run, ["Add punctuation: hello world"])

Every function takes the settings of its verb, as `manylora VERB --help` names them (with underscores), or a
configuration of them; shows its progress as the command line does, unless `progress` is False (or shows it elsewhere,
where `progress` is a `manylora.jobs.progress.Progress`); and raises, for bad input, a `manylora.errors.ManyLoraError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from manylora import _registration
from manylora._libraries import calm_libraries
from manylora._version import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from manylora.adapters import ManyLoraConfig
    from manylora.analysis import Analysis
    from manylora.evaluation import Scores
    from manylora.federated import FederateConfig
    from manylora.jobs.evaluate import EvaluateConfig
    from manylora.jobs.export import Exported
    from manylora.jobs.predict import Answer, PredictConfig
    from manylora.jobs.progress import Progress
    from manylora.jobs.run import FederatedRun, Run, open_run
    from manylora.jobs.settings import AnalyzeConfig, ExportConfig
    from manylora.studies.compare import CompareConfig, Comparison
    from manylora.training import TrainConfig

    Place: TypeAlias = str | PathLike[str]
    _Config = TypeVar("_Config", bound=DataclassInstance)

_LAZY = {
    "AnalyzeConfig": "manylora.jobs.settings",
    "CompareConfig": "manylora.studies.compare",
    "EvaluateConfig": "manylora.jobs.evaluate",
    "ExportConfig": "manylora.jobs.settings",
    "FederateConfig": "manylora.federated",
    "ManyLoraConfig": "manylora.adapters",
    "PredictConfig": "manylora.jobs.predict",
    "TrainConfig": "manylora.training",
    "open_run": "manylora.jobs.run",
}

__all__ = [
    "AnalyzeConfig",
    "CompareConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FederateConfig",
    "ManyLoraConfig",
    "PredictConfig",
    "TrainConfig",
    "__version__",
    "analyze",
    "compare",
    "evaluate",
    "export",
    "federate",
    "open_run",
    "predict",
    "train",
]

_registration.register_with_peft()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'manylora' has no attribute {name!r}")


@calm_libraries()
def train(
    config: TrainConfig | None = None,
    *,
    out: Place | None = None,
    resume: Place | bool = False,
    report: bool = True,
    progress: bool | Progress = True,
    **settings: Any,
) -> Run:
    """Train an adapter on many tasks and score it on their test rows; see `manylora train --help`.

    Args:
        config: what to train.
        out: the run folder. Default: the next free `runs/train-NNN`.
        resume: a run folder: go on with that run, which has all settings; True: go on with the run in `out` where
            there is one with these settings. A finished run is only read.
        report: whether to draw report.html.
        settings: fields of `TrainConfig`, in place of those of `config`.
    """
    from manylora.errors import ConfigError
    from manylora.jobs import train as job
    from manylora.jobs.launch import launched
    from manylora.training import TrainConfig

    show = _display(progress)
    with launched() as launch:
        if resume is True and out is None:
            raise ConfigError(
                "resume=True goes on with the run in out; name its folder with out, or with resume."
            )
        if isinstance(resume, bool):
            chosen = _config(TrainConfig, config, settings)
            run = job.train(chosen, out=_path(out), or_resume=resume, progress=show, launch=launch)
        else:
            _refuse_beside_resume(config, out, settings)
            run = job.resume(_path(resume), progress=show, launch=launch)
        if report and launch.processes.first:
            _draw_report(run, progress)
    return run


@calm_libraries()
def federate(
    config: FederateConfig | None = None,
    *,
    out: Place | None = None,
    resume: Place | None = None,
    from_round: int | None = None,
    reset_client: str | Sequence[str] = (),
    report: bool = True,
    progress: bool | Progress = True,
    **settings: Any,
) -> FederatedRun:
    """Fine-tune one base with many clients, of whose adapters only a part travels; see `manylora federate --help`.

    Args:
        config: what to train.
        out: the run folder. Default: the next free `runs/federate-NNN`.
        resume: go on with the run in this folder, which has all settings.
        from_round: with `resume`: go back to this round.
        reset_client: with `resume`: clients that begin anew.
        report: whether to draw report.html.
        settings: fields of `FederateConfig`, in place of those of `config`.
    """
    from manylora.errors import ConfigError
    from manylora.federated import FederateConfig
    from manylora.jobs import federate as job
    from manylora.jobs.launch import refuse_launcher

    refuse_launcher("federate")
    show = _display(progress)
    if resume is None:
        if from_round is not None or reset_client:
            raise ConfigError(
                "from_round and reset_client are about a run that there is; name it with resume."
            )
        run = job.federate(_config(FederateConfig, config, settings), out=_path(out), progress=show)
    else:
        _refuse_beside_resume(config, out, settings)
        reset = [reset_client] if isinstance(reset_client, str) else reset_client
        run = job.resume(_path(resume), from_round=from_round, reset=reset, progress=show)
    if report:
        _draw_report(run, progress)
    return run


@calm_libraries()
def evaluate(
    adapter: Place | None = None,
    config: EvaluateConfig | None = None,
    *,
    progress: bool | Progress = True,
    **settings: Any,
) -> Scores:
    """Score an adapter, or a bare model, on test rows; see `manylora evaluate --help`.

    Args:
        adapter: a run, its folder, or an adapter's. Default: the one in `config`, else the bare model is scored.
        config: what to score, and how.
        settings: fields of `manylora.jobs.evaluate.EvaluateConfig`, such as `data`, `tasks`, `limit`, `out`, in place
            of those of `config`.
    """
    from manylora.jobs.evaluate import EvaluateConfig, evaluate

    chosen = _config(EvaluateConfig, config, _named(settings, adapter=adapter))
    return evaluate(chosen, progress=_display(progress))


@calm_libraries()
def predict(
    adapter: Place,
    prompts: str | Sequence[str],
    config: PredictConfig | None = None,
    *,
    progress: bool | Progress = True,
    **settings: Any,
) -> list[Answer]:
    """Answer prompts with a trained adapter; see `manylora predict --help`.

    Args:
        adapter: a run, its folder, or an adapter's.
        prompts: what to ask; put into the form of the adapter's training.
        config: how to answer.
        settings: fields of `manylora.jobs.predict.PredictConfig`, such as `task`, `form`, `max_new_tokens`, in place of
            those of `config`.

    Returns:
        An answer for every prompt, in order.
    """
    from manylora.errors import ConfigError
    from manylora.files import lone_surrogate
    from manylora.files.settings import check_type
    from manylora.jobs.predict import PredictConfig, predict

    asked = (
        [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Sequence) else prompts
    )
    check_type("prompts", asked, list[str], remedy="give a text or a list of texts")
    for prompt in asked:
        if lone := lone_surrogate(prompt):
            raise ConfigError(f"a prompt holds {lone}, no character of UTF-8; write it in UTF-8.")
    chosen = _config(PredictConfig, config, _named(settings, adapter=adapter))
    return predict(chosen, asked, progress=_display(progress))


@calm_libraries()
def export(
    adapter: Place | None = None,
    config: ExportConfig | None = None,
    *,
    to: Place | None = None,
    progress: bool | Progress = True,
    **settings: Any,
) -> Exported:
    """Write an adapter as plain LoRAs or merged models, or LoRAs as one adapter; see `manylora export --help`.

    Args:
        adapter: a run, its folder, or an adapter's.
        config: what to write.
        to: folder to write; must not exist.
        settings: fields of `manylora.jobs.settings.ExportConfig`, such as `merge`, `tasks`, `from_loras`, in place of
            those of `config`.
    """
    from manylora.jobs.export import export
    from manylora.jobs.settings import ExportConfig

    chosen = _config(ExportConfig, config, _named(settings, adapter=adapter, to=to))
    given = settings.keys() | _changed(config)
    return export(chosen, given=given, progress=_display(progress))


@calm_libraries()
def analyze(
    adapters: Place | Sequence[Place] = (),
    config: AnalyzeConfig | None = None,
    *,
    report: bool = True,
    progress: bool | Progress = True,
    **settings: Any,
) -> Analysis:
    """Look into adapters: how alike they are, how far they moved; see `manylora analyze --help`.

    Args:
        adapters: runs, their folders, or adapters'.
        config: what to measure.
        report: whether to draw report.html beside analysis.json.
        settings: fields of `manylora.jobs.settings.AnalyzeConfig`, such as `measure`, `data`, `figures`, in place of
            those of `config`.
    """
    from manylora.jobs.analyze import analyze
    from manylora.jobs.settings import AnalyzeConfig

    several = adapters if isinstance(adapters, Sequence) and not isinstance(adapters, str) else [adapters]
    names = [_path(adapter) for adapter in several]
    chosen = _config(AnalyzeConfig, config, {**settings, **({"adapters": names} if names else {})})
    found, path = analyze(chosen, progress=_display(progress))
    if report:
        _draw_report(path, progress)
    return found


@calm_libraries()
def compare(
    study: Place | None = None,
    config: CompareConfig | None = None,
    *,
    report: bool = True,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Run a study, methods × seeds × tasks, and try its claims with statistics; see `manylora compare --help`.

    Args:
        study: YAML file of the study. Default: a small study of the embedded suite.
        config: how to run it.
        report: whether to draw report.html into the study's folder.
        settings: fields of `manylora.studies.compare.CompareConfig`, such as `out`, `workers`, `tables`, in place of
            those of `config`.
    """
    from manylora.cli.studying import CellProgress
    from manylora.studies.compare import CompareConfig, compare

    chosen = _config(CompareConfig, config, _named(settings, study=study))
    found = compare(chosen, progress=CellProgress() if progress is True else None)
    if report and found.path is not None and found.summary is not None:
        _draw_report(found.path, progress)
    return found


def _config(kind: type[_Config], config: _Config | None, settings: Mapping[str, Any]) -> _Config:
    """A configuration with settings in place of its own, checked as those of a file are."""
    from manylora.errors import ConfigError
    from manylora.files import build_config

    if config is not None and not isinstance(config, kind):
        raise ConfigError(
            f"config is of type {type(config).__name__}, not {kind.__name__}; give one, or the settings by name."
        )
    known = {} if config is None else {field.name: getattr(config, field.name) for field in fields(config)}
    plain = {
        name: fspath(value) if isinstance(value, PathLike) else value for name, value in settings.items()
    }
    return build_config(
        kind,
        plain,
        source="",
        remedy=f"see help({kind.__module__}.{kind.__name__})",
        **{name: value for name, value in known.items() if name not in plain},
    )


def _named(settings: Mapping[str, Any], **places: Place | None) -> dict[str, Any]:
    """Settings, and those of the places that were given."""
    return {**settings, **{name: _path(place) for name, place in places.items() if place is not None}}


def _changed(config: DataclassInstance | None) -> set[str]:
    """Fields of a configuration that are not at their defaults."""
    own = [] if config is None else fields(config)
    return {field.name for field in own if getattr(config, field.name) != field.default}


def _path(place: Place | None) -> Any:
    """A path as text; None stays.

    Raises:
        ConfigError: it is neither a text nor a path.
    """
    from manylora.errors import ConfigError

    if place is None or isinstance(place, (str, PathLike)):
        return None if place is None else fspath(place)
    raise ConfigError(f"{place!r:.60} is neither a path nor a run; give the name of a folder.")


def _refuse_beside_resume(config: object, out: object, settings: Mapping[str, Any]) -> None:
    from manylora.errors import ConfigError

    given = [*(["config"] if config is not None else []), *(["out"] if out is not None else []), *settings]
    if given:
        raise ConfigError(
            f"resume takes all settings from the run folder; leave out {', '.join(sorted(given))}."
        )


def _display(progress: bool | Progress) -> Progress:
    from manylora.cli.progress import ConsoleProgress
    from manylora.jobs.progress import Progress

    if isinstance(progress, Progress):
        return progress
    return ConsoleProgress() if progress else Progress()


def _draw_report(folder: Place, progress: bool | Progress) -> None:
    """Draw the page of a run; a page that cannot be drawn costs a line, never the result."""
    from pathlib import Path

    from manylora.cli.console import draw_report

    draw_report(Path(folder), show=progress is not False)
