"""The adapter's weights at chosen steps of a run, for `manylora analyze`: adapters/step-STEP.safetensors.

A snapshot holds what `adapter/` will hold, without optimizer state. It appears under its name only when it is whole,
and a resumed run writes those that come after its checkpoint again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import TrainerCallback

from manylora.files import make_folder, remove, whole_number

EARLY = 0.05
"""Where in a run the early snapshot is taken. B is zero at step 0 and cannot be compared with; a convention of ours."""

_FOLDER, _PREFIX, _SUFFIX = "adapters", "step-", ".safetensors"


def snapshot_steps(steps: int, count: int) -> list[int]:
    """Steps whose weights are kept: 0, an early one (5 %, at least 2), and `count` evenly spread ones, the last too.

    At least 2, because the first optimizer step of a warm-up has learning rate 0 and leaves B at zero.

    Args:
        steps: of the whole run.
        count: `keep_adapters` of the configuration; 0 keeps none.
    """
    if count == 0:
        return []
    most = min(count, steps)
    early = min(steps, max(2, math.ceil(EARLY * steps)))
    return sorted({0, early, *(round(steps * i / most) for i in range(1, most + 1))})


def find_snapshots(run: Path) -> dict[int, Path]:
    """Step to file of the snapshots that a run folder holds, in order."""
    found = {}
    for path in (run / _FOLDER).glob(f"{_PREFIX}*{_SUFFIX}"):
        number = whole_number(path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX))
        if number is not None:
            found[number] = path
    return dict(sorted(found.items()))


class SnapshotRecorder(TrainerCallback):
    """Writes the snapshots of a run.

    Args:
        run: the run folder.
        model: whose active adapter is kept.
        steps: see `snapshot_steps`.
    """

    def __init__(self, run: Path, model: PeftModel, steps: Sequence[int]) -> None:
        self.run, self.model, self.steps = run, model, frozenset(steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep step 0, and drop what a killed run wrote beyond its checkpoint."""
        if not state.is_world_process_zero:
            return
        for partial in (self.run / _FOLDER).glob("*.partial"):
            remove(partial)
        for step, path in find_snapshots(self.run).items():
            if step > state.global_step:
                path.unlink()
        self._keep(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the weights after a chosen step."""
        if state.is_world_process_zero:
            self._keep(state.global_step)

    def _keep(self, step: int) -> None:
        if step not in self.steps:
            return
        weights = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        final = self.run / _FOLDER / f"{_PREFIX}{step:06d}{_SUFFIX}"
        make_folder(final.parent)
        partial = final.with_name(final.name + ".partial")
        remove(partial)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, partial, metadata={"format": "pt"})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(final)
