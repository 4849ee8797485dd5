"""Scores at given epochs within one training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from manylora.errors import RunError
from manylora.files import append_line, check_record, json_text, parse_json
from manylora.studies.results import CurvePoint

if TYPE_CHECKING:
    from manylora.data import TaskData
    from manylora.studies.kinds import Job
    from manylora.training import Prepared, RunFolder


class _Line(CurvePoint):
    step: int


class Curve(TrainerCallback):
    """Score the model on the cell's rows when the given epochs are reached.

    Answers are greedy and no random number is drawn, so the training goes on as if it had not been looked at. Each
    point is a line of `curve.jsonl` in the run folder, so a run that is continued keeps them.
    """

    def __init__(self, prepared: Prepared, folder: RunFolder, test: TaskData, steps: Mapping[int, float]):
        self.prepared, self.test, self.steps = prepared, test, steps
        self.path = folder.path / "curve.jsonl"
        self.seconds = self.cpu_seconds = 0.0

    @classmethod
    def wanted(cls, prepared: Prepared, job: Job, folder: RunFolder, test: TaskData) -> Curve | None:
        """A curve where the settings ask for one; epochs beyond the training's end are its end."""
        epochs = job.settings.get("score_epochs")
        if not epochs:
            return None
        total, in_all = prepared.config.epochs, prepared.plan.steps
        assert total is not None
        steps = {max(1, min(in_all, round(in_all * epoch / total))): float(epoch) for epoch in epochs}
        return cls(prepared, folder, test, steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Score where this step is one of the wanted."""
        if state.global_step not in self.steps or state.global_step in self._known():
            return
        began, cpu = time.monotonic(), time.process_time()
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            scores = self.prepared.kind.score(model, self.test).by_task()
        model.train(was_training)
        epoch = self.steps[state.global_step]
        append_line(self.path, json_text({"step": state.global_step, "epoch": epoch, "scores": scores}))
        self.seconds += time.monotonic() - began
        self.cpu_seconds += time.process_time() - cpu

    def _known(self) -> dict[int, _Line]:
        points: dict[int, _Line] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, RunError):  # half a line, from a kill
                    found = check_record(parse_json(line), _Line, source=self.path, remedy="remove it")
                    points[found.step] = found
        return points

    def points(self) -> list[dict[str, Any]]:
        """Epoch and scores, in order."""
        known = self._known()
        return [known[step].model_dump(exclude={"step"}) for step in sorted(known)]
