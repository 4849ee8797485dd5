"""Stop a training whose validation loss no longer improves.

transformers' own callback counts in memory; its count is restored on resume only with all other callbacks' states, the
trainer's flags among them. Here the count is read from the log of validations, which each checkpoint holds, so that a
run that was killed stops where an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME


class EarlyStopping(TrainerCallback):
    """Ends a training when the lowest of its validation losses is `patience` validations old.

    Args:
        metric: name of the validation loss in the log.
        patience: validations.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience

    def is_due(self, log: Iterable[Mapping[str, float]]) -> bool:
        """Whether a training with this log has to end."""
        losses = [row[self.metric] for row in log if self.metric in row]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def stopped_at(self, checkpoint: Path) -> int | None:
        """The step of a checkpoint that was written as the training stopped; None where it had not."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        return state.global_step if self.is_due(state.log_history) else None

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Look at the log, which holds this validation already."""
        if self.is_due(state.log_history):
            control.should_training_stop = True
        return control

    def sentence(self, state: TrainerState, steps: int) -> str | None:
        """Where and why a training of `steps` steps stopped; None where it did not stop early."""
        if state.global_step >= steps or not self.is_due(state.log_history):
            return None
        return (
            f"stopped at step {state.global_step} of {steps}: the mean validation loss has not improved in "
            f"{self.patience} validations; the result is that of step {state.best_global_step} "
            f"({state.best_metric:.4f})"
        )
