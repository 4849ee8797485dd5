"""A verb in several processes that torchrun or `accelerate launch` has started: one of them speaks.

The others are silent, and where something fails, the process that fails first says so in one line; all end with its
exit code. They tell each other through the launcher's key-value store, which works at any time; a collective operation
would wait for processes that are already gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from manylora.errors import ConfigError, explain

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from manylora.training import Processes

_FAILED, _SAID, _LEFT, _FOLDER = "failed", "said", "left", "folder"
_PATIENCE = 2.0
"""Seconds to wait for the other processes where one of them has failed."""


class Launch:
    """The processes of one run of a verb, and what they tell each other.

    Args:
        processes: how many, and which one this is.
        store: shared by all; None where there is one.
        complain: prints an error's one line; None: an error keeps its traceback.
    """

    def __init__(
        self,
        processes: Processes,
        store: Store | None = None,
        complain: Callable[[str], None] | None = None,
    ):
        self.processes = processes
        self._store = store
        self._complain = complain

    def folder(self, make: Callable[[], str]) -> str:
        """The run folder that the first process makes, in all of them."""
        if self._store is None:
            return make()
        if self.processes.first:
            path = make()
            self._store.set(_FOLDER, path)
            return path
        while not self._store.check([_FOLDER]):
            if self._store.check([_FAILED]):
                raise RuntimeError("another process has failed")  # which `fail` turns into an exit
            time.sleep(0.05)
        return self._store.get(_FOLDER).decode()

    def fail(self, error: BaseException) -> None:
        """Say what is wrong, if no other process has; returns when it is said.

        Raises:
            SystemExit: with code 2, where it is said and this process has nothing to add.
        """
        if self._store is None:
            return
        from torch.distributed import DistError

        try:
            others = self._store.add(_FAILED, 1) - 1
        except DistError:  # who kept the store is gone, so somebody has failed before
            raise SystemExit(2) from None
        if others:
            self._wait(lambda store: store.check([_SAID]))
            self._wait(lambda store: store.add(_LEFT, 1) > 0)
            raise SystemExit(2) from None
        line = explain(error)
        if line is None or self._complain is None:
            return  # a bug of ours, or the caller's to catch: its traceback is on its way
        self._complain(line)
        self._wait(lambda store: store.add(_SAID, 1) > 0)
        # A launcher ends the others as soon as one is gone; they should get to their own exit.
        self._wait(lambda store: store.add(_LEFT, 0) >= self.processes.count - 1)
        raise SystemExit(2) from None

    def _wait(self, done: Callable[[Store], bool]) -> None:
        from torch.distributed import DistError

        assert self._store is not None
        deadline = time.monotonic() + _PATIENCE
        with contextlib.suppress(DistError):  # who kept the store has gone
            while not done(self._store) and time.monotonic() < deadline:
                time.sleep(0.02)


@contextlib.contextmanager
def launched(complain: Callable[[str], None] | None = None) -> Iterator[Launch]:
    """The processes that share what is done inside the block; one where there was no launcher.

    Args:
        complain: prints the line of the error that the first process to fail has met. Default: it is raised.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):  # without torch, which takes seconds to import
        from manylora.training.processes import Processes

        yield Launch(Processes())
        return
    with _several(complain) as launch:
        yield launch


@contextlib.contextmanager
def _several(complain: Callable[[str], None] | None) -> Iterator[Launch]:
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from manylora.training.processes import Processes

    processes = Processes.here()
    store, _, _ = next(rendezvous("env://"))
    launch = Launch(processes, PrefixStore("manylora", store), complain)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with contextlib.ExitStack() as stack:
        if not processes.first:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            yield launch
        except KeyboardInterrupt:
            if not processes.first:
                raise SystemExit(130) from None
            raise
        except Exception as error:
            launch.fail(error)
            raise
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


def refuse_launcher(verb: str, complain: Callable[[str], None] | None = None) -> None:
    """For verbs of one process: several would each do all of it, and write over each other.

    Raises:
        ConfigError: a launcher has started several; the first one says so, the others just end.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1") or "RANK" not in os.environ:
        return
    with launched(complain):
        raise ConfigError(
            f"manylora {verb} runs in one process, but a launcher started {os.environ['WORLD_SIZE']}; start it "
            "without torchrun or accelerate launch."
        )
