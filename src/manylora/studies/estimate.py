"""About how long a study's cells take, before they have run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from manylora.studies.cells import results_of
from manylora.studies.config import Study
from manylora.studies.kinds import kind_of

_ANSWERS_PER_STEP = 20
"""Answers that take as long as a step of 8 rows, on the embedded base."""
_STARTING = 8.0
"""Seconds that a process takes to import, read and encode; from cells on the embedded base."""


def estimate_seconds(study: Study, out: Path) -> tuple[dict[str, float], str]:
    """Seconds of one cell of each method on one core, and where the figures come from.

    What is done tells about its method, and about the others on average; with nothing done, three steps
    are timed and each method's steps and answers counted.
    """
    found: dict[str, list[float]] = {}
    for row in results_of(study, out):
        seconds = (row.seconds or 0.0) + row.evaluation_seconds + _STARTING
        found.setdefault(row.method, []).append(seconds)
    if found:
        means = {name: sum(values) / len(values) for name, values in found.items()}
        rest = sum(means.values()) / len(means)
        return {name: means.get(name, rest) for name in study.names}, "from the cells that are done"
    step = _step_seconds(study)
    estimates = {}
    for method in study.methods:
        steps, answers = kind_of(method.kind).work(method.settings)
        estimates[method.name] = _STARTING + (steps + answers / _ANSWERS_PER_STEP) * step
    return estimates, "from three timed steps; other programs on the machine come on top"


def _step_seconds(study: Study) -> float:
    """Processor seconds of an optimizer step: ALoRA over a batch of the first method's rows, forward and backward."""
    import torch

    from manylora.training import TrainConfig, build_model, prepare
    from manylora.training.batches import Collator, EncodedRows

    known = {field.name for field in dataclasses.fields(TrainConfig)} - {"method", "router", "num_experts"}
    settings = {key: value for key, value in study.methods[0].settings.items() if key in known}
    prepared = prepare(TrainConfig(**{"epochs": 1.0, "template": "alpaca", **settings}))
    model = build_model(prepared).train()
    rows = EncodedRows.of(prepared.train, prepared.task_names, prepared.order)
    size = min(prepared.config.rows_per_step, len(rows))
    collate, times = Collator(pad_token_id=prepared.kind.tokenizer.pad_token_id), []
    for _ in range(3):
        inputs = collate([rows[index] for index in range(size)])
        began = time.process_time()
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        # as much work as any loss, of labels or of text
        torch.autograd.backward(logits.float().logsumexp(-1).mean())
        times.append(time.process_time() - began)
    return 1.5 * min(times)  # the optimizer and what is between steps
