"""What the rounds tell a display."""

from __future__ import annotations

from collections.abc import Mapping


class RoundsDisplay:
    """What a display may want to know. This one shows nothing; another overrides what it shows."""

    def round_began(self, number: int, rounds: int, asked: int) -> None:
        """A round begins with so many clients."""

    def answered(self, client: str, loss: float, seconds: float) -> None:
        """A client's answer counts."""

    def refused(self, client: str, reason: str) -> None:
        """A client's answer does not count."""

    def noted(self, line: str) -> None:
        """Something that the operator should know."""

    def shared(self, number: int, shares: Mapping[str, float]) -> None:
        """What each client has of a round's change: its part's norm among the sum of all; empty where nothing travels.

        Comes before `round_ended`.
        """

    def round_ended(self, number: int, loss: float, update: float | None) -> None:
        """A round is saved."""

    def scored(self, client: str, done: int, total: int) -> None:
        """A client has scored its personal model."""
