"""What can go wrong, by name: every error a user can cause is a `ManyLoraError` and also a standard error.

The command line prints such an error as one line and ends with exit code 2; anything else is a bug and
keeps its traceback. A message names the offending value and then the remedy.
"""

from __future__ import annotations

import errno


class ManyLoraError(Exception):
    """Base of every error that bad input can cause."""


class ConfigError(ManyLoraError, ValueError):
    """A setting has a value that cannot work, or two settings contradict each other."""


class TargetModulesError(ConfigError):
    """`target_modules` match no layer that can carry an adapter."""


class NonFiniteError(ManyLoraError, ArithmeticError):
    """A loss, a gradient or a model's output is NaN or infinite."""


class RoutingError(ManyLoraError, ValueError):
    """Expert ids are missing, of the wrong shape or type, or out of range."""


class NotMergeableError(ManyLoraError, ValueError):
    """The adapter's delta depends on the input, so no single weight equals it."""


class DataError(ManyLoraError, ValueError):
    """Input rows are missing, broken or of the wrong type."""


class ModelError(ManyLoraError, ValueError):
    """A base model or adapter cannot be loaded, or the two do not belong together."""


class RunError(ManyLoraError, ValueError):
    """A run folder exists already, is incomplete or does not fit what is asked of it."""


class WireError(ManyLoraError, ValueError):
    """Bytes that should be a message between server and client are not one."""


class AnswerError(ManyLoraError, ValueError):
    """A client's answer must not count: it does not fit what was asked, or its numbers cannot be."""


def explain(error: BaseException) -> str | None:
    """The one line that a user needs, or `None` where the error is a bug of ours."""
    if isinstance(error, ManyLoraError):
        return str(error)
    if is_disk_full(error):
        return (
            f"the disk is full ({error}). What was written before is whole: free some space, then continue "
            "with --resume."
        )
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename or error}; choose a folder you may write to with --out."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the GPU is out of memory; try a smaller --micro-batch-size, --gradient-checkpointing or "
            "a shorter --max-length."
        )
    return None


_DISK_FULL = (
    "No space left on device",
    "os error 28",
    "iostream error",
    "enforce fail at inline_container.cc",
)
"""How the system, safetensors (Rust) and torch.save (C++) word a write that failed."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error means a full disk or quota, also in the words of safetensors and torch."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(phrase in str(error) for phrase in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
