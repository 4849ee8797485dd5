"""Train: data → base model + adapter → training → scores, in one run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.evaluation import Scores, gains_line, gains_of, write_scores
from manylora.jobs.publish import check_publishing, push_to_hub, save_merged
from manylora.jobs.run import Run
from manylora.jobs.session import ALONE, Session, check_same_settings, with_date_of
from manylora.jobs.subject import score_rows
from manylora.training import RunFolder, TrainConfig, finetune, load_config, prepare, token_rows
from manylora.training.memory import check_memory
from manylora.training.models import pick_device

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerCallback

    from manylora.data import TaskData
    from manylora.jobs.launch import Launch
    from manylora.jobs.progress import Progress
    from manylora.training import Prepared


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model fresh from its training, and what that cost."""

    model: PeftModel
    scores: Scores | None
    """None: there was nothing to score."""
    seconds: float
    """Of training alone."""
    cpu_seconds: float
    evaluation_seconds: float


def plan(config: TrainConfig, *, progress: Progress) -> Prepared:
    """Prepare a run and show what it will do; nothing is written.

    Raises:
        DataError, ModelError, ConfigError, TargetModulesError, RoutingError: what is wrong with the input.
    """
    prepared = prepare(config)
    check_publishing(prepared.config)
    progress.show_plan(prepared.plan, prepared.config)
    _check_test(prepared, progress)
    return prepared


def train(
    config: TrainConfig,
    *,
    out: str | Path | None = None,
    or_resume: bool = False,
    progress: Progress,
    launch: Launch = ALONE,
) -> Run:
    """Train an adapter and score it on the test rows.

    Args:
        config: what to train.
        out: the run folder. Default: the next free `runs/train-NNN`.
        or_resume: go on with the run in `out` where there is one with these settings; a finished one is read.
        progress: told of everything on the way.
        launch: the processes that train together.

    Raises:
        DataError, ModelError, ConfigError, TargetModulesError, RoutingError: what is wrong with the input.
        RunError: `out` exists; with `or_resume`: it holds a run with other settings.
    """
    if or_resume and out is not None:
        out = Path(out).expanduser()
        config = with_date_of(out, config)
    prepared = plan(config, progress=progress)
    if or_resume and isinstance(out, Path):
        check_same_settings(out, prepared.config)
        if is_whole(out):
            return Run(out)
    if not isinstance(prepared.plan.memory, str):
        check_memory(prepared.plan.memory, device=pick_device(config.device))
    settings = prepared.config.to_dict()
    with Session.begin(
        out, config=settings, or_resume=or_resume, progress=progress, launch=launch
    ) as session:
        train_prepared(prepared, session, progress=progress)
    return Run(session.path)


def resume(path: str | Path, *, progress: Progress, launch: Launch = ALONE) -> Run:
    """Go on with a run where it broke off, with the settings in its folder; a finished one is only read.

    Raises:
        RunError: `path` is no run of `train`, is damaged, was begun on other data, or is worked on.
    """
    folder = RunFolder.open(path)
    config = folder.config(TrainConfig, verb="train")
    if (run := finished_run(path)) is not None:
        return run
    if folder.state["state"] == "finished":
        progress.show_line(
            f"{path} was finished, but its {folder.missing_result()} is gone; it is made again."
        )
    with Session.resume(path, progress=progress, launch=launch) as session:
        prepared = prepare(config)
        check_publishing(prepared.config)
        train_prepared(prepared, session, progress=progress)
    return Run(session.path)


def finished_run(path: str | Path) -> Run | None:
    """A run that is finished and whose results are all there; None where `resume` has something to do.

    Raises:
        RunError: `path` is no run of `train`, or one of its results is not what the run noted.
    """
    folder = RunFolder.open(path)
    folder.config(TrainConfig, verb="train")
    whole = folder.state["state"] == "finished" and folder.missing_result() is None
    return Run(folder.path) if whole else None


def is_whole(path: Path) -> bool:
    """Whether there is a `finished_run` in a folder, which may not be there yet."""
    return (path / "state.json").is_file() and finished_run(path) is not None


def train_prepared(prepared: Prepared, session: Session, *, progress: Progress) -> None:
    """Train, score on the test rows, write both down, finish the run; merge and upload where that is asked for."""
    if not session.writes:  # of several processes, this one only trains
        finetune(prepared, session.folder)
        return
    progress.show_folder(session.path)
    config = prepared.config
    trained = train_and_score(prepared, session, prepared.splits.test, progress=progress)
    if trained.scores is not None:
        before = None
        if config.score_base:
            progress.show_line("scoring the base without the adapter")
            with trained.model.disable_adapter():
                before = score_rows(prepared.kind, trained.model, prepared.splits.test, progress=progress)
        write_judged(prepared, session, trained.scores, before=before, progress=progress)
    if config.save_merged:
        save_merged(session.path, config, progress=progress)
    seconds = {"training": round(trained.seconds, 1), "evaluation": round(trained.evaluation_seconds, 1)}
    session.finish(seconds=seconds)
    if config.push_to_hub is not None:
        push_to_hub(session.path, config.push_to_hub, progress=progress)


def train_and_score(
    prepared: Prepared,
    session: Session,
    test: TaskData,
    *,
    model: PeftModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress,
) -> Trained:
    """Train from the start or from where the run broke off, then score; `adapter/` stands in the run folder before.

    Args:
        prepared: the plan.
        session: the run.
        test: rows to score; may be none.
        model: the model to train. Default: the base with a fresh adapter.
        callbacks: further ones for the trainer.
        progress: told of steps and answers.
    """
    began, cpu = time.monotonic(), time.process_time()
    model = finetune(prepared, session.folder, report=progress.show_step, model=model, callbacks=callbacks)
    trained, cpu = time.monotonic(), time.process_time() - cpu
    if stopped := session.folder.state.get("stopped"):
        progress.show_line(str(stopped))
    scores = score_rows(prepared.kind, model, test, progress=progress) if test else None
    return Trained(
        model=model,
        scores=scores,
        seconds=trained - began,
        cpu_seconds=cpu,
        evaluation_seconds=time.monotonic() - trained,
    )


def write_judged(
    prepared: Prepared, session: Session, scores: Scores, *, before: Scores | None = None, progress: Progress
) -> None:
    """Write scores of the test rows and what they are to be compared with: predictions.jsonl and scores.json.

    Args:
        prepared: the plan.
        session: the run.
        scores: of the adapter.
        before: of the base on the same rows, where it was scored.
        progress: shown the table.
    """
    config, splits, kind = prepared.config, prepared.splits, prepared.kind
    baselines = kind.baselines(splits.test, source=config.test or config.data, limit=config.limit)
    notes = kind.notes(scores, baselines, splits.test, train=splits.train, router=config.router)
    gains = gains_of(before, scores) if before else {}
    notes = [*([gains_line(gains, scores)] if gains else []), *notes]
    write_scores(session.path, scores, baselines, notes, gains)
    progress.show_scores(scores, baselines, notes, gains)


def _check_test(prepared: Prepared, progress: Progress) -> None:
    """Refuse, before anything is trained, test rows that could not be scored afterwards."""
    config = prepared.config
    vocabulary = token_rows(load_config(config.model, task_type=config.task_type))
    for line in prepared.kind.check(prepared.splits.test, vocabulary=vocabulary):
        progress.show_line(line)
