"""What is said across the line between a client and the server: codes out of a closed list, never words.

An error text may hold a piece of a row, a path or a name, so it stays with the client, in its own log. What crosses is
which kind of fault it was; the server has the words for it. Whatever else comes from the other side and is shown to a
person goes through `clean_text`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from enum import Enum

from manylora.errors import AnswerError, RunError


class Fault(str, Enum):
    """Why a client could not answer."""

    DATA = "data"
    MODEL = "model"
    SETTINGS = "settings"
    NOT_ALLOWED = "not_allowed"
    MESSAGE = "message"
    STATE_MISSING = "state_missing"
    STATE_DAMAGED = "state_damaged"
    STATE_OTHER = "state_other"
    BASE_OTHER = "base_other"
    NOT_FINITE = "not_finite"
    MEMORY = "memory"
    DISK = "disk"
    OTHER = "other"

    @property
    def words(self) -> str:
        """What the server says of it, with the remedy."""
        return _WORDS[self]


_RESET = "put its folder back, or let it begin anew with --resume RUN --reset-client NAME"
_WORDS: Mapping[Fault, str] = {
    Fault.DATA: "its rows cannot be used; its own log says which",
    Fault.MODEL: "its base model cannot be loaded; its own log says why",
    Fault.SETTINGS: "its settings do not fit the run's; its own log says which",
    Fault.NOT_ALLOWED: "its site does not allow what this run lets leave (--allow-strategy, --allow-parts there)",
    Fault.MESSAGE: "it cannot read the server's message; compare the versions of manylora",
    Fault.STATE_MISSING: f"its private state is missing; {_RESET}",
    Fault.STATE_DAMAGED: f"its private state is damaged; {_RESET}",
    Fault.STATE_OTHER: "its private state is of another rank or base; start a new run",
    Fault.BASE_OTHER: "its base model is not the one that the run was begun with; put that one back there",
    Fault.NOT_FINITE: "its training is not finite; lower the learning rate",
    Fault.MEMORY: "it ran out of memory; a smaller --micro-batch-size or --max-length needs less",
    Fault.DISK: "its disk is full, or a file of its own cannot be read or written; its own log says which",
    Fault.OTHER: "it could not answer; its own log says why",
}

_BY_CLASS: Mapping[str, Fault] = {
    "MissingStateError": Fault.STATE_MISSING,
    "DamagedStateError": Fault.STATE_DAMAGED,
    "DataError": Fault.DATA,
    "NonFiniteError": Fault.NOT_FINITE,
    "ModelError": Fault.MODEL,
    "ConfigError": Fault.SETTINGS,
    "WireError": Fault.MESSAGE,
    "AnswerError": Fault.MESSAGE,
    "MemoryError": Fault.MEMORY,
    "OutOfMemoryError": Fault.MEMORY,
    "OSError": Fault.DISK,
    "SafetensorError": Fault.DISK,
}
"""Class of an error, by name because torch and safetensors are not imported for it, to its fault."""
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""How torch words it on a CPU, where it raises a plain RuntimeError."""


class ClientError(RunError):
    """What a client cannot do, with its code; the text is for the client's own log."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


class FailedError(AnswerError):
    """A client says that it could not answer."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.words)
        self.fault = fault


def fault_of(error: BaseException) -> Fault:
    """The code of an error at a client."""
    if isinstance(error, (ClientError, FailedError)):
        return error.fault
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
        return Fault.MEMORY
    found = (_BY_CLASS[of.__name__] for of in type(error).__mro__ if of.__name__ in _BY_CLASS)
    return next(found, Fault.OTHER)


def fault_named(code: object) -> Fault:
    """The fault that a client sent the code of; one that this version does not know is `OTHER`."""
    try:
        return Fault(code)
    except ValueError:
        return Fault.OTHER


def clean_text(text: object, *, most: int = 200) -> str:
    """Text from elsewhere as one printable line: control characters and the like become "?", the rest is cut off.

    Args:
        text: whatever came.
        most: characters of the result.
    """
    whole = str(text)
    line = "".join(
        letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in whole[:most]
    )
    return line if len(whole) <= most else line[: most - 1] + "…"


def shown(value: object) -> str:
    """A value from elsewhere for an error text: short, whatever it is."""
    return clean_text(_SHORT.repr(value), most=60)


class _Short(reprlib.Repr):
    """`repr` that looks at no more than it shows; Python refuses to write integers of 4,300 digits."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
