"""Flower's connection to a SuperLink with limits of our own: to how long it waits, and to how much it fetches."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

_PART_SECONDS = 240.0
"""How long the next part of a message may take; longer than the 180 s after which a SuperLink forgets an upload."""


class PatientRuntime:
    """A runtime that gives up a message of which nothing more comes: Flower's own would be asked for over an hour for
    the parts of one whose sender or run ended on the way. It also gives up one that is larger than what was asked for,
    of which Flower's own would fetch every part into memory.
    """

    def __init__(self, runtime: Any, *, patience: float = _PART_SECONDS) -> None:
        self._runtime, self._patience = runtime, patience
        self._asked: dict[str, float] = {}
        self.most: int | None = None
        """Bytes that a message may have in all its parts; None where nobody has said."""
        self.too_large: set[str] = set()
        """Messages whose answers had more."""
        self._lock = threading.Lock()  # parts are asked for in several threads
        self._answers: dict[str, str] = {}  # part to the message that it answers
        self._fetched: dict[str, int] = {}  # bytes so far

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """The messages that are there, without their parts."""
        answer = self._runtime.PullMessages(request)
        self._answers, self._fetched = {}, {}
        for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            waiting = [tree]
            while waiting:
                part = waiting.pop()
                self._answers.setdefault(part.object_id, message.metadata.reply_to_message_id)
                waiting.extend(part.children)
        return answer

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """A part of a message; one that does not come counts as lost, and so does one of too large a message."""
        if self._answers.get(request.object_id) in self.too_large:
            return _NotFound()
        answer = self._runtime.PullObject(request)
        now = time.monotonic()
        if answer.object_available:
            self._asked.clear()  # something came
            if self._is_too_large(request.object_id, answer):
                return _NotFound()
        elif now - self._asked.setdefault(request.object_id, now) > self._patience:
            self._asked.clear()  # it may be sent again, and its parts have the same ids
            answer.object_found = False
        return answer

    def _is_too_large(self, part: str, answer: Any) -> bool:
        message = self._answers.get(part)
        if message is None or self.most is None:
            return False
        with self._lock:
            self._fetched[message] = self._fetched.get(message, 0) + len(answer.object_content)
            if self._fetched[message] > self.most:
                self.too_large.add(message)
        return message in self.too_large


@dataclass(frozen=True)
class _NotFound:
    """What a SuperLink answers of a part that it does not have."""

    object_found: bool = False
    object_available: bool = False
    object_content: bytes = b""
