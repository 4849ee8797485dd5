"""About how long a study's cells take, before they have run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from manylora.studies.cells import results_of
from manylora.studies.config import Study

_STARTING = 8.0
"""Seconds that a process takes to import, read and encode; from cells on the embedded base."""


def estimate_seconds(study: Study, out: Path) -> tuple[dict[str, float], str]:
    """Seconds of one cell of each method on one core, and where the figures come from.

    What is done tells about its method, and about the others on average; with nothing done, the first method of kind
    "train" is timed for a few steps.
    """
    found: dict[str, list[float]] = {}
    for row in results_of(study, out):
        seconds = row["seconds"] + row["evaluation_seconds"] + _STARTING
        found.setdefault(row["method"], []).append(seconds)
    if found:
        means = {name: sum(values) / len(values) for name, values in found.items()}
        rest = sum(means.values()) / len(means)
        return {name: means.get(name, rest) for name in study.names}, "from the cells that are done"
    guess = _timed(study)
    return dict.fromkeys(
        study.names, guess
    ), "from a few timed steps of one method; the load of the machine decides"


def _timed(study: Study) -> float:
    """Seconds of a cell of the first trained method, from a forward and backward pass over two batches."""
    import torch

    from manylora.studies.train_cells import train_config
    from manylora.training import build_model, prepare
    from manylora.training.batches import Collator, EncodedRows

    settings: Mapping[str, object] = next(
        (method.settings for method in study.methods if method.kind == "train"), {}
    )
    own = {key: value for key, value in settings.items() if key in train_config({}).to_dict()}
    prepared = prepare(train_config(own))
    model = build_model(prepared).train()
    rows = EncodedRows.of(prepared.train, prepared.task_names, prepared.order)
    size = prepared.config.rows_per_step
    batches = [[rows[i] for i in range(start, min(start + size, len(rows)))] for start in (0, size, 2 * size)]
    collate, times = Collator(pad_token_id=prepared.tokenizer.pad_token_id), []
    for batch in batches:
        if not batch:
            continue
        inputs = collate(batch)
        routed = prepared.config.router == "task" and prepared.config.num_experts != 1
        began = time.monotonic()
        loss = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            **({"expert_ids": inputs["task"]} if routed else {}),
        ).loss
        torch.autograd.backward(loss)
        times.append(time.monotonic() - began)
    step = min(times) * 1.5  # the optimizer, and validations
    answers = sum(map(len, prepared.splits.test.values()))
    return _STARTING + prepared.plan.steps * step + answers * min(times) / size
