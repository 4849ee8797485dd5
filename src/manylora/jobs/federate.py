"""Federate: clients' rows → rounds of local training and exchange → every client's personal model, scored."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.data import resolve_template, unread_note
from manylora.errors import RunError
from manylora.evaluation import Scores, score_all
from manylora.federated import FederateConfig, LocalClients, Rounds, Workbench, client_data, cut_prompts
from manylora.federated.home import DamagedStateError, MissingStateError, VersionedState
from manylora.files import changed_file, noted, write_json
from manylora.jobs.run import FederatedRun
from manylora.jobs.session import Session
from manylora.training import RunFolder, load_tokenizer
from manylora.training.fingerprint import weakness

if TYPE_CHECKING:
    from manylora.federated import ClientData, Clients
    from manylora.federated.server_state import ServerState
    from manylora.jobs.progress import Progress


def federate(config: FederateConfig, *, out: str | Path | None = None, progress: Progress) -> FederatedRun:
    """Fine-tune one base with many clients, and, to compare with, the same without any exchange.

    Args:
        config: of the run.
        out: the run folder. Default: the next free `runs/federate-NNN`.
        progress: told of everything on the way.

    Raises:
        DataError, ModelError, ConfigError, TargetModulesError: what is wrong with the input.
        RunError: `out` exists.
    """
    config = config.resolved()
    data = _data(config, progress)
    if (
        config.engine == "local"
    ):  # elsewhere the clients have the base; each sees by its tokenizer what auto means
        template = resolve_template(config.template, load_tokenizer(config.model), model=config.model)
        config = dataclasses.replace(config, template=template)
    _check_test(config, data, progress)
    with Session.begin(out, config=config.to_dict(), kind="federate", progress=progress) as session:
        _work(config, data, session, progress=progress)
    return FederatedRun(session.path)


def resume(
    path: str | Path,
    *,
    from_round: int | None = None,
    reset: Sequence[str] = (),
    progress: Progress,
) -> FederatedRun:
    """Go on with a run after its last saved round, with the settings in its folder; a finished one is only read, where
    nothing of its result is gone.

    Args:
        path: the run folder.
        from_round: go back to this finished round; what came after it is forgotten.
        reset: clients that begin anew, as their private state is lost.
        progress: told of everything on the way.

    Raises:
        RunError: `path` is no run of `federate`, is damaged, or is worked on; a client's state is lost.
    """
    folder = RunFolder.open(path)
    config = folder.config(FederateConfig, verb="federate").resolved()
    if from_round is None and not reset:
        if (run := finished_run(path)) is not None:
            return run
        if folder.state["state"] == "finished":
            missing = _missing(folder, config)
            progress.show_line(
                f"{path} was finished, but its {missing} is gone; what is missing is made again."
            )
    with Session.resume(path, kind="federate", progress=progress) as session:
        session.folder.set_state("running")
        _work(config, _data(config, progress), session, from_round=from_round, reset=reset, progress=progress)
    return FederatedRun(session.path)


def finished_run(path: str | Path) -> FederatedRun | None:
    """A run that is finished and whose results are all there; None where `resume` has something to do.

    Raises:
        RunError: `path` is no run of `federate`; or one of its results is not what the run noted.
    """
    folder = RunFolder.open(path)
    config = folder.config(FederateConfig, verb="federate").resolved()
    whole = folder.state["state"] == "finished" and _missing(folder, config) is None
    return FederatedRun(folder.path) if whole else None


def _missing(folder: RunFolder, config: FederateConfig) -> str | None:
    """The first file of a finished run's result that is not there; None where all are.

    Raises:
        RunError: all are, but one is not what the run noted.
    """
    notes = noted(folder.path)
    last = VersionedState(folder.path / "rounds").file(config.rounds or 0).relative_to(folder.path)
    wanted = (last.as_posix(), "scores.json", "metrics.jsonl", *notes)
    missing = next((name for name in wanted if not (folder.path / name).is_file()), None)
    changed = None if missing else changed_file(folder.path, notes)
    if changed is not None:
        raise RunError(
            f"{folder.path / changed} is broken or was changed: it is not what the run wrote. Put a copy of it back, "
            "or remove it and go on with --resume, which makes it again."
        )
    return missing


def _data(config: FederateConfig, progress: Progress) -> dict[str, ClientData]:
    """The rows of all clients; none where they are on the clients' machines."""
    if config.engine != "local":
        return {}
    notes: list[str] = []
    data = client_data(config, notes=notes)
    progress.show_notes(notes)
    return data


def _check_test(config: FederateConfig, data: Mapping[str, ClientData], progress: Progress) -> None:
    """Refuse, before anything is trained, test rows that could not be scored afterwards."""
    tokenizer = load_tokenizer(config.model) if data else None
    if tokenizer is not None:
        parts = (part for client in data.values() for part in (client.train, client.test))
        every = (row for part in parts for found in part.values() for row in found)
        progress.show_notes(unread_note(every, tokenizer))
    seen: set[str] = set()
    for client in data.values():
        for task, rows in client.test.items():
            if task not in seen:
                seen.add(task)
                score_all({task: rows}, {task: [""] * len(rows)}, tokenizer=tokenizer, rouge=config.rouge)


def _work(
    config: FederateConfig,
    data: Mapping[str, ClientData],
    session: Session,
    *,
    from_round: int | None = None,
    reset: Sequence[str] = (),
    progress: Progress,
) -> None:
    """Train, score, do the same without any exchange, finish the run."""
    if config.engine == "local":
        progress.show_clients(config, data)
    progress.show_folder(session.path)
    began = time.monotonic()
    scores = _run(config, data, session.path, from_round=from_round, reset=reset, progress=progress)
    session.folder.set_state("running", seconds=round(time.monotonic() - began, 1))
    reference: dict[str, Scores] = {}
    if config.reference == "local" and config.strategy != "local":
        progress.show_line("the same without any exchange, to compare with:")
        alone = config.local_reference()
        if config.strategy == "centralized":
            data = client_data(alone)
        reference = _reference(alone, data, session.path, progress)
    write_client_scores(session.path, scores, reference)
    session.finish(seconds=round(time.monotonic() - began, 1))


def _reference(
    config: FederateConfig, data: Mapping[str, ClientData], path: Path, progress: Progress
) -> dict[str, Scores]:
    try:
        return _run(config, data, path, inside="reference", progress=progress)
    except (DamagedStateError, MissingStateError) as error:
        raise RunError(f"{error} Or remove {path / 'reference'}, to train the reference anew.") from error


def _run(
    config: FederateConfig,
    data: Mapping[str, ClientData],
    path: Path,
    *,
    inside: str = "",
    from_round: int | None = None,
    reset: Sequence[str] = (),
    progress: Progress,
) -> dict[str, Scores]:
    """All rounds, and every personal model's scores."""
    home, shown = path / inside, progress.follow_rounds()
    with contextlib.ExitStack() as stack:
        clients: Clients
        if config.engine == "flower":
            from manylora.jobs.flower import flower_clients

            clients = stack.enter_context(
                flower_clients(config, path, inside=inside, say=progress.show_warning)
            )
        else:
            bench = Workbench(config)
            clients = LocalClients(data, home=home / "clients", bench=bench, say=shown.noted)
            for name, rows in data.items() if not inside else ():
                if line := cut_prompts(bench, rows):
                    progress.show_line(f"{name}: {line}")
        rounds = Rounds(config, clients, home, progress=shown)

        def check(state: ServerState) -> None:
            if isinstance(clients, LocalClients) and state.members:
                _check_base(clients.bench, state, home, progress)

        state = rounds.load(from_round=from_round, reset=reset, check=check)
        if isinstance(clients, LocalClients):
            _check_states(clients, state.counted, inside=inside)
        rounds.run()
        return rounds.score()


def _check_base(bench: Workbench, state: ServerState, path: Path, progress: Progress) -> None:
    """Stop where the base of this machine is not the one that the run was begun on."""
    if not bench.is_on(state.base):
        raise RunError(f"{path}: {bench.other_base(state.base)}")
    if dict(bench.shapes) != dict(state.shapes):
        raise RunError(
            f"{path}: the run was begun on other layers than the base has; put the old base and config.yaml back, or "
            "start a new run."
        )
    if weak := weakness(state.base, bench.fingerprint):
        progress.show_line(f"note: {path}: {weak}")


def _check_states(clients: LocalClients, counted: Mapping[str, int], *, inside: str) -> None:
    """Stop, before anything is trained, where a client of this machine has lost what it must go on from. Elsewhere a
    client says so itself, and the others go on without it.
    """
    for name, version in sorted(counted.items()):
        try:
            clients.check_states({name: version})
        except (DamagedStateError, MissingStateError) as error:
            if inside:
                raise
            raise type(error)(
                f"{error} Or let the client begin anew with --reset-client {shlex.quote(name)}, or go back to a round "
                "before with --from-round."
            ) from error


def write_client_scores(path: Path, scores: Mapping[str, Scores], reference: Mapping[str, Scores]) -> None:
    """Write a federated run's scores.json."""
    write_json(
        path / "scores.json",
        {
            "clients": {name: value.to_dict() for name, value in scores.items()},
            "reference": {name: value.to_dict() for name, value in reference.items()},
        },
    )
