"""What a job tells while it works."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manylora.evaluation import Baselines, Gains, Loss, Scores
    from manylora.federated import ClientData, FederateConfig, RoundsDisplay
    from manylora.training import Plan, TrainConfig


class Progress:
    """Shows nothing; a display overrides what it wants to show."""

    def show_line(self, line: str) -> None:
        """A sentence that belongs to the result."""

    def show_notes(self, notes: Iterable[str]) -> None:
        """Sentences on what a reader of the result should know of its rows."""
        for note in notes:
            self.show_line(f"note: {note}")

    def show_warning(self, line: str) -> None:
        """A sentence beside the result."""

    def show_plan(self, plan: Plan, config: TrainConfig) -> None:
        """What a training will do, before it begins."""

    def show_folder(self, path: Path) -> None:
        """The run folder, which is locked now and in which work begins."""

    def show_step(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
        """A training's step, the number of steps, and the trainer's log."""

    def show_count(self, what: str, done: int, total: int) -> None:
        """How much of something countable is done, such as answers."""

    def show_scores(
        self, scores: Scores, baselines: Baselines, notes: Sequence[str], gains: Gains | None = None
    ) -> None:
        """Scores, baselines and what training changed as further columns, and what is to be said of them."""

    def show_loss(self, before: Scores, after: Scores, loss: Loss, *, title: str) -> None:
        """What is lost where LoRAs stand for a token router: scores of both, and the differences."""

    def show_clients(self, config: FederateConfig, data: Mapping[str, ClientData]) -> None:
        """Who takes part in a federated run with what."""

    def follow_rounds(self) -> RoundsDisplay:
        """A new display of federated rounds."""
        from manylora.federated import RoundsDisplay

        return RoundsDisplay()
