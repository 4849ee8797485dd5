"""Cells of kind "federate": one federated run in this process, its personal models scored on their own tasks."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.errors import RunError
from manylora.federated.config import FederateConfig
from manylora.federated.results import mean_by_task, read_rounds
from manylora.files import build_config
from manylora.files.settings import field_types, settings_of
from manylora.studies.kinds import Job
from manylora.studies.results import Measured
from manylora.studies.settings import FederateCellSettings

if TYPE_CHECKING:
    from manylora.evaluation import Scores
    from manylora.federated import ClientData

SETTINGS = frozenset(field_types(FederateCellSettings))


def check(settings: Mapping[str, Any]) -> None:
    """Refuse values that cannot be.

    Raises:
        ConfigError: see `FederateCellSettings`.
    """
    _config(settings)


def _config(settings: Mapping[str, Any], **more: Any) -> FederateConfig:
    """The settings that `manylora federate` has too; it knows one limit, for training and test rows."""
    cell = build_config(FederateCellSettings, settings, source="", remedy="see docs/compare.md", **more)
    config = settings_of(cell, FederateConfig)
    return config if cell.train_limit is None else dataclasses.replace(config, limit=cell.train_limit)


def tasks(settings: Mapping[str, Any]) -> list[str]:
    """Names of a cell's scores: the tasks of all clients."""
    from manylora.federated import client_data

    clients = client_data(_config(settings).resolved()).values()
    return list(dict.fromkeys(task for client in clients for task in client.train))


def work(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Optimizer steps and answers of a cell."""
    from manylora.federated import client_data

    config = _config(settings).resolved()
    clients, rounds, batch = client_data(config), config.rounds or 1, config.batch_size or 1
    steps = math.fsum(
        config.local_steps or (config.local_epochs or 1) * sum(map(len, own.train.values())) / batch
        for own in clients.values()
    )
    answers = sum(len(rows) for own in clients.values() for rows in own.test.values())
    return math.ceil(steps * rounds * config.participation), answers


def run(job: Job) -> Measured:
    """Run all rounds and score every personal model; goes on after the last saved round."""
    from manylora.federated import LocalClients, Rounds, Workbench
    from manylora.jobs.federate import write_client_scores
    from manylora.jobs.progress import Progress
    from manylora.jobs.session import Session

    more: dict[str, Any] = {"seed": job.seed, "reference": "none"}
    if job.learning_rate is not None:
        more["learning_rate"] = job.learning_rate
    config = _config(job.settings, **more).resolved()
    data = _for_split(config, job)
    path = job.folder / "run"
    settings = config.to_dict()
    with Session.begin(
        path, config=settings, kind="federate", or_resume=True, progress=Progress()
    ) as session:
        bench = Workbench(config)
        rounds = Rounds(config, LocalClients(data, home=path / "clients", bench=bench), path)
        began, cpu = time.monotonic(), time.process_time()
        rounds.run()
        middle, cpu = time.monotonic(), time.process_time() - cpu
        scores = rounds.score()
        ended = time.monotonic()
        if missing := sorted(set(data) - set(scores)):
            raise RunError(f"the clients {', '.join(missing)} could not score their models.")
        write_client_scores(path, scores, {})
        session.finish(seconds=round(middle - began, 1))
    return Measured(
        scores=mean_by_task(own.by_task() for own in scores.values()),
        metrics={task.task: task.metric for own in scores.values() for task in own.tasks},
        others={
            name: mean_by_task(own.other_metrics().get(name, {}) for own in scores.values())
            for name in dict.fromkeys(name for own in scores.values() for name in own.other_metrics())
        },
        examples=_examples(path / "clients", scores),
        parameters=sum(p.numel() for p in bench.model.parameters() if p.requires_grad) * len(data),
        seconds=middle - began,
        cpu_seconds=cpu,
        evaluation_seconds=ended - middle,
        resumed=session.resumed,
        extra=_traffic(path / "metrics.jsonl"),
    )


def _for_split(config: FederateConfig, job: Job) -> dict[str, ClientData]:
    """Every client's rows, to be tested on those of the cell's split: the validation rows are the data's own, or cut
    off the client's training rows."""
    from manylora.data import cut_validation
    from manylora.federated import ClientData, client_data
    from manylora.federated.dealing import all_rows

    clients = client_data(config)
    splits = all_rows(dataclasses.replace(config, limit=job.settings.get("limit")))
    found = {}
    for name, own in clients.items():
        train, rows = own.train, splits.validation if job.split == "validation" else splits.test
        test = {task: rows[task] for task in train if task in rows}
        if job.split == "validation" and len(test) < len(train):
            train, test = cut_validation(own.train, seed=config.seed)
        found[name] = ClientData(train=train, test=test)
    return found


def _examples(home: Path, scores: Mapping[str, Scores]) -> dict[str, list[float]]:
    """Per task every row's score, averaged over the clients that hold the task; all of them answer all its rows."""
    from manylora.federated.home import folder_name

    found: dict[str, list[list[float]]] = {}
    for client, own in scores.items():
        metrics = {task.task: task.metric for task in own.tasks}
        rows: dict[str, list[float]] = {task: [] for task in metrics}
        path = home / folder_name(client) / "predictions.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["task"]].append(row[metrics[row["task"]]])
        for task, values in rows.items():
            found.setdefault(task, []).append(values)
    averaged = {}
    for task, clients in sorted(found.items()):
        if len({len(values) for values in clients}) == 1:
            averaged[task] = [math.fsum(column) / len(column) for column in zip(*clients, strict=True)]
    return averaged


def _traffic(path: Path) -> dict[str, Any]:
    """Mean bytes per client and round, up and down."""
    rounds = read_rounds(path)
    sums = {
        "bytes_up": [size for one in rounds for size in one.up.values()],
        "bytes_down": [size for one in rounds for size in one.down.values()],
    }
    return {name: math.fsum(sizes) / len(sizes) if sizes else 0.0 for name, sizes in sums.items()}
