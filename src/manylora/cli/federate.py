"""`manylora federate`: many clients, rounds of local training, and what a strategy lets travel between."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from manylora.cli.launch import refuse_launcher
from manylora.cli.options import FederateOptions
from manylora.cli.parsing import parse
from manylora.errors import ConfigError, RunError
from manylora.federated.config import FederateConfig
from manylora.training.config import as_list

if TYPE_CHECKING:
    from pathlib import Path

    from manylora.evaluation import Scores
    from manylora.federated import ClientData, Clients, LocalClients, Workbench
    from manylora.federated.server_state import ServerState
    from manylora.training import RunFolder

DESCRIPTION = """\
Fine-tune one base model with many clients; each keeps its rows, and what else leaves it is the strategy's choice.

Without options: the 8 tasks of the embedded suite as 8 clients, Fed-ALoRA (only B travels), 5 rounds of one local
epoch, in one process; then the same training without any exchange, to compare with. A few minutes on two CPU cores.

  manylora federate --dry-run                                 what would travel, counted
  manylora federate --strategy fedit --wire fp32              another strategy, nothing rounded
  manylora federate --ranks 16,16,8,8,4,4,2,2                 clients of unequal ranks
  manylora federate --partition dirichlet --clients 20 --participation 0.3
  manylora federate --data flan8/train --test flan8/test      your own rows (JSON, JSONL, CSV, Parquet, Hub id)
  manylora federate --engine flower --superlink HOST:PORT --clients 3 --recipe    clients on machines of their own
  manylora federate --resume runs/federate-001                go on after a crash
  manylora federate --resume runs/federate-001 --from-round 3    go back to a round"""

_ON_RESUME = frozenset({"resume", "from_round", "reset_client"})
"""Options that may stand beside --resume."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    refuse_launcher("federate")
    options, given = parse(FederateOptions, arguments, verb="federate", description=DESCRIPTION)
    if options.resume is not None:
        if given - _ON_RESUME:
            extra = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given - _ON_RESUME))
            raise ConfigError(f"--resume takes all settings from the run folder; leave out {extra}.")
        reset = as_list(options.reset_client) or []
        return _resume(options.resume, from_round=options.from_round, reset=reset)
    if given & _ON_RESUME:
        raise ConfigError(
            "--from-round and --reset-client are about a run that there is; name it with --resume."
        )
    if options.node is not None:
        from manylora.cli.flower import run_node
        from manylora.federated.allowed import Allowed

        allowed = Allowed(strategies=as_list(options.allow_strategy), parts=as_list(options.allow_parts))
        return run_node(options.node, given, allowed=allowed)
    if given & {"allow_strategy", "allow_parts"}:
        raise ConfigError("--allow-strategy and --allow-parts are for a client; give them beside --node.")
    if options.dimensions is not None and not options.dry_run:
        raise ConfigError("--dimensions has no weights behind it; add --dry-run.")
    config = _settings(options).resolved()
    if options.dry_run:
        from manylora.cli.dry_run import print_traffic

        print_traffic(config, dimensions=options.dimensions)
        return 0
    if options.recipe:
        from manylora.federated.engines.flower_recipe import recipe

        print(recipe(config))
        return 0
    from manylora.training import RunFolder

    data = _data(config)
    _check_test(config, data)
    with RunFolder.create(options.out, config=config.to_dict(), seed=config.seed, kind="federate") as folder:
        return _work(config, data, folder)


def _data(config: FederateConfig) -> dict[str, ClientData]:
    """The rows of all clients; none where they are on the clients' machines."""
    from manylora.federated import client_data

    if config.engine != "local":
        return {}
    notes: list[str] = []
    data = client_data(config, notes=notes)
    for note in notes:
        print(f"note: {note}")
    return data


def _settings(options: FederateOptions) -> FederateConfig:
    names = {field.name for field in dataclasses.fields(FederateConfig)}
    return FederateConfig(**{name: getattr(options, name) for name in names})


def _resume(path: str, *, from_round: int | None, reset: Sequence[str]) -> int:
    from manylora.cli.console import draw_report
    from manylora.cli.traffic import print_result
    from manylora.training import RunFolder

    folder = RunFolder.open(path)
    config = folder.config(FederateConfig, verb="federate").resolved()
    back = from_round is not None or bool(reset)
    finished = folder.state["state"] == "finished" and not back
    missing = _missing(folder, config) if finished else None
    if missing:
        print(f"{path} was finished, but its {missing} is gone; what is missing is made again.")
    elif finished:
        print(f"{path} is finished already.")
        print_result(folder.path)
        draw_report(folder.path)
        return 0
    with folder:
        folder.lock()
        folder.set_state("running")
        return _work(config, _data(config), folder, from_round=from_round, reset=reset)


def _missing(folder: RunFolder, config: FederateConfig) -> str | None:
    """The first file of a finished run's result that is not there; None where all are.

    Raises:
        RunError: all are, but one is not what the run noted.
    """
    from manylora.federated.home import VersionedState
    from manylora.files import changed_file, noted

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


def _check_test(config: FederateConfig, data: Mapping[str, ClientData]) -> None:
    """Refuse, before anything is trained, test rows that could not be scored afterwards."""
    from manylora.data import unread_note
    from manylora.evaluation import score_all
    from manylora.training import load_tokenizer

    tokenizer = load_tokenizer(config.model) if data else None
    if tokenizer is not None:
        parts = (part for client in data.values() for part in (client.train, client.test))
        for note in unread_note(
            (row for part in parts for found in part.values() for row in found), tokenizer
        ):
            print(f"note: {note}")
    seen: set[str] = set()
    for client in data.values():
        for task, rows in client.test.items():
            if task not in seen:
                seen.add(task)
                score_all({task: rows}, {task: [""] * len(rows)}, tokenizer=tokenizer, rouge=config.rouge)


def _work(
    config: FederateConfig,
    data: Mapping[str, ClientData],
    folder: RunFolder,
    *,
    from_round: int | None = None,
    reset: Sequence[str] = (),
) -> int:
    from manylora.cli.console import draw_report, explain
    from manylora.cli.traffic import print_clients, print_result

    if config.engine == "local":
        print_clients(config, data)
    print(f"run folder: {folder.path}", flush=True)
    began = time.monotonic()
    try:
        scores = _run(config, data, folder, from_round=from_round, reset=reset)
        folder.set_state("running", seconds=round(time.monotonic() - began, 1))
        reference: dict[str, Scores] = {}
        if config.reference == "local" and config.strategy != "local":
            print("the same without any exchange, to compare with:", flush=True)
            alone = config.local_reference()
            if config.strategy == "centralized":
                from manylora.federated import client_data

                data = client_data(alone)
            reference = _reference(alone, data, folder)
        _write(folder, scores, reference)
        print_result(folder.path)
        folder.set_state("finished", seconds=round(time.monotonic() - began, 1))
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        reason = "stopped by Ctrl-C" if stopped else explain(error) or repr(error)
        with contextlib.suppress(OSError):
            folder.set_state("failed", error=reason)
        if stopped:
            print(f"continue with: manylora federate --resume {shlex.quote(str(folder.path))}")
        raise
    print(f"{time.monotonic() - began:.0f} s")
    draw_report(folder.path)
    return 0


def _reference(
    config: FederateConfig, data: Mapping[str, ClientData], folder: RunFolder
) -> dict[str, Scores]:
    from manylora.federated.home import DamagedStateError, MissingStateError

    try:
        return _run(config, data, folder, inside="reference")
    except (DamagedStateError, MissingStateError) as error:
        raise RunError(
            f"{error} Or remove {folder.path / 'reference'}, to train the reference anew."
        ) from error


def _run(
    config: FederateConfig,
    data: Mapping[str, ClientData],
    folder: RunFolder,
    *,
    inside: str = "",
    from_round: int | None = None,
    reset: Sequence[str] = (),
) -> dict[str, Scores]:
    """All rounds, and every personal model's scores."""
    from manylora.cli.traffic import RoundsProgress
    from manylora.federated import LocalClients, Rounds, Workbench, cut_prompts

    path = folder.path / inside
    progress = RoundsProgress()
    with contextlib.ExitStack() as stack:
        clients: Clients
        if config.engine == "flower":
            from manylora.cli.flower import flower_clients

            clients = stack.enter_context(flower_clients(config, folder.path, inside=inside))
        else:
            bench = Workbench(config)
            clients = LocalClients(data, home=path / "clients", bench=bench, say=progress.noted)
            for name, rows in data.items() if not inside else ():
                if line := cut_prompts(bench, rows):
                    print(f"{name}: {line}", flush=True)
        rounds = Rounds(config, clients, path, progress=progress)

        def check(state: ServerState) -> None:
            if isinstance(clients, LocalClients) and state.members:
                _check_base(clients.bench, state, path)

        state = rounds.load(from_round=from_round, reset=reset, check=check)
        if isinstance(clients, LocalClients):
            _check_states(clients, state.counted, inside=inside)
        rounds.run()
        return rounds.score()


def _check_base(bench: Workbench, state: ServerState, path: Path) -> None:
    """Stop where the base of this machine is not the one that the run was begun on."""
    from manylora.training.fingerprint import weakness

    if not bench.is_on(state.base):
        raise RunError(f"{path}: {bench.other_base(state.base)}")
    if dict(bench.shapes) != dict(state.shapes):
        raise RunError(
            f"{path}: the run was begun on other layers than the base has; put the old base and config.yaml back, or "
            "start a new run."
        )
    if weak := weakness(state.base, bench.fingerprint):
        print(f"note: {path}: {weak}")


def _check_states(clients: LocalClients, counted: Mapping[str, int], *, inside: str) -> None:
    """Stop, before anything is trained, where a client of this machine has lost what it must go on from. Elsewhere a
    client says so itself, and the others go on without it.
    """
    from manylora.federated.home import DamagedStateError, MissingStateError

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


def _write(folder: RunFolder, scores: Mapping[str, Scores], reference: Mapping[str, Scores]) -> None:
    from manylora.files import write_json

    write_json(
        folder.path / "scores.json",
        {
            "clients": {name: value.to_dict() for name, value in scores.items()},
            "reference": {name: value.to_dict() for name, value in reference.items()},
        },
    )
