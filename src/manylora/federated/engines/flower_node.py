"""The client's side of the Flower engine: works for one SuperNode, with the base kept in memory between messages.

Flower by itself starts a process for every message, which would load the base anew each round, and runs in it what the
server uploaded. With `--isolation process` a SuperNode only passes messages on; this worker takes them, as Flower's own
executor would, and answers them with the installed package. It runs no code from elsewhere.

`--node-config` tells who the client is and where its rows are; each key but `client` and `home` is an option of
`manylora federate` that is every machine's own:

    client="ada" data="/srv/rows" test="/srv/rows/test" model="/srv/base" home="/srv/manylora"

All rows of `data` are this client's. What must last stands under `home`, by run and by client name, because what
Flower keeps for a node is lost with the node's process, and node ids change.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora._version import __version__
from manylora.data import EMBEDDED
from manylora.errors import ConfigError, ManyLoraError
from manylora.federated.allowed import Allowed
from manylora.federated.config import NODE_SETTINGS, FederateConfig, check_sent_types
from manylora.federated.engines import flower_private
from manylora.federated.engines.flower_link import QUIET, envelope, opened, require_flower
from manylora.federated.faults import ClientError, Fault, clean_text, fault_of, shown
from manylora.files import locked

if TYPE_CHECKING:
    from manylora.federated.personal import ClientData
    from manylora.federated.workbench import Workbench

_KEPT_DAYS = 30.0
"""Days that a run's private state waits on a client's disk for the run to go on."""
_LOOK_SECONDS = 86_400.0
"""How long a worker has run, and between two looks, when it looks for runs that ended long ago. A running federation's
messages come in between: how old a file is, is read off a clock that may have jumped."""
_INTERVAL = 0.2
"""Seconds between two looks for a message."""


class NodeClient:
    """Answers messages for the client that `--node-config` describes, and keeps its base and rows in memory.

    Args:
        allowed: what this site lets leave.
        say: told, in a line, why a message could not be answered; that stays on this machine.
    """

    def __init__(
        self, *, allowed: Allowed | None = None, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.allowed, self.say = allowed or Allowed(), say
        self._key: tuple[str, FederateConfig] | None = None
        self._bench: Workbench | None = None
        self._rows: ClientData | None = None
        self._served: dict[Path, float] = {}  # folder of a run to when this worker had its last message
        self._looked = time.monotonic()

    def answer(self, content: Any, node_config: Mapping[str, Any]) -> Any:
        """Content of the answer to a message's content; of what went wrong, a code (`manylora.federated.faults`)."""
        labels, data = opened(content)
        own = {"version": __version__}
        answer = None
        try:
            own["client"] = _name(node_config)
            if data is not None:
                answer = self._handle(data, own["client"], str(labels.get("run", "")), node_config)
            else:
                settings_of(node_config)
        except Exception as error:
            own["code"] = fault_of(error).value
            if not isinstance(error, ManyLoraError):  # perhaps a bug of ours: the next message may go well
                traceback.print_exc()
            self.say(
                clean_text(f"a message could not be answered: {type(error).__name__}: {error}", most=2000)
            )
        return envelope(own, answer)

    def _handle(self, data: bytes, name: str, run: str, node_config: Mapping[str, Any]) -> bytes:
        from manylora.federated.client import Client
        from manylora.federated.home import folder_name
        from manylora.federated.messages import read_order
        from manylora.federated.personal import cut_prompts
        from manylora.federated.wire import unpack
        from manylora.federated.workbench import Workbench

        if not run or clean_text(run) != run:  # it becomes the name of a folder in `home`
            raise ClientError(Fault.MESSAGE, f"the server calls its run {shown(run)}; give it a name.")
        config = settings_of(node_config).accept_settings(read_order(unpack(data))["settings"]).resolved()
        self.allowed.check(config)
        if self._key != (name, config) or self._bench is None or self._rows is None:
            self._key = self._bench = self._rows = None
            notes: list[str] = []
            self._rows = rows_of(config, name, notes=notes)
            self._bench = Workbench(config)
            for note in (*notes, cut_prompts(self._bench, self._rows)):
                if note:
                    self.say(f"note: {note}")
            self._key = (name, config)
        home = Path(str(node_config.get("home", "~/.manylora"))).expanduser() / folder_name(run)
        self._look_for_old_runs(home)
        lock = home / f"{folder_name(name)}.lock"
        with locked(lock):  # waits for another worker of this client, such as one whose SuperNode was killed
            lock.touch()  # when the run's last message came (`forget_old_runs`)
            client = Client(name, self._rows, home=home, bench=self._bench, say=self.say)
            return client.handle(data)

    def _look_for_old_runs(self, home: Path) -> None:
        now = time.monotonic()
        self._served[home] = now
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            forget_old_runs(
                home.parent, served=[run for run, last in self._served.items() if _is_recent(now - last)]
            )


def forget_old_runs(home: Path, *, served: Collection[Path] = ()) -> None:
    """Remove the private rounds and the stacks of runs without a message for `_KEPT_DAYS`; personal models stay.

    Args:
        home: holds a folder for each run.
        served: folders of runs that are known to be going on, whatever the clock says.
    """
    now = time.time()
    for run in home.glob("*"):
        last = max((lock.stat().st_mtime for lock in run.glob("*.lock")), default=now)
        if run not in served and not _is_recent(now - last):
            for state in run.glob("*/round-*.safetensors"):
                state.unlink(missing_ok=True)


def _is_recent(seconds: float) -> bool:
    return seconds <= _KEPT_DAYS * 86_400


def settings_of(node_config: Mapping[str, Any]) -> FederateConfig:
    """This machine's own settings.

    Raises:
        ConfigError: a key is unknown, or a value impossible.
    """
    given = {key.replace("-", "_"): value for key, value in node_config.items()}
    given = {key: value for key, value in given.items() if key not in ("client", "home")}
    if unknown := sorted(set(given) - set(NODE_SETTINGS)):
        raise ConfigError(
            f"--node-config sets {unknown[0]!r}; it may set client, home, {', '.join(NODE_SETTINGS)}."
        )
    check_sent_types(given, "--node-config")
    return FederateConfig(**given)


def rows_of(config: FederateConfig, name: str, *, notes: list[str]) -> ClientData:
    """All rows that this machine names; of the embedded suite the client's share. `notes` takes what is left out.

    Raises:
        ConfigError, DataError: there are none.
    """
    from manylora.federated.dealing import all_rows, client_data
    from manylora.federated.personal import ClientData

    if config.data == EMBEDDED:
        shares = client_data(config)
        if name not in shares:
            raise ConfigError(
                f"the embedded suite has no share for client {name!r}; set data, or be one of {', '.join(shares)}."
            )
        return shares[name]
    splits = all_rows(config)
    notes += splits.notes
    return ClientData(train=splits.train, test=splits.test)


def work(supernode: str, *, say: Callable[[str], None], allowed: Allowed | None = None) -> None:
    """Answer the messages that come to a SuperNode, until this process is ended.

    Args:
        supernode: HOST:PORT of its Runtime API, on this machine.
        say: told what happens.
        allowed: what this site lets leave. Default: what the server's strategy sends.

    Raises:
        ConfigError: flwr is not installed.
    """
    require_flower()
    os.environ.update(QUIET)
    import httpx

    client = NodeClient(allowed=allowed, say=say)
    there = True  # told once until the next message
    wanted = flower_private.AcquireTaskRequest(supported_task_types=[flower_private.TaskType.CLIENT_APP])
    with contextlib.closing(flower_private.runtime_client(supernode, interceptors=[])) as runtime:

        def offered() -> str:
            """The token of a message that waits, or nothing."""
            got = runtime.AcquireTask(wanted)
            return str(got.token) if got.HasField("task") else ""

        while True:
            try:
                token = offered()
                while token:
                    there = True
                    try:
                        token = _answer_one(supernode, token, client, offered, say)
                    except httpx.HTTPStatusError as error:
                        say(f"SuperNode {supernode} has given a message up ({error.response.status_code})")
                        token = ""
            except httpx.HTTPError as error:
                if there:
                    say(f"SuperNode {supernode} does not answer ({error}); waiting for it")
                there = False
            time.sleep(_INTERVAL)


def _answer_one(
    supernode: str, token: str, client: NodeClient, offered: Callable[[], str], say: Callable[[str], None]
) -> str:
    """Take one message from the SuperNode and give it the answer.

    Returns:
        The token of the next message, where that came before this one was whole.
    """
    from flwr.app import Error, Message

    status = flower_private.SubStatus
    its_token = flower_private.RuntimeTokenHttpInterceptor(token)
    with contextlib.closing(flower_private.runtime_client(supernode, interceptors=[its_token])) as connection:
        runtime = _TaskRuntime(connection, offered)
        with _heartbeat(runtime):
            taken = _take_message(runtime, say)
            if taken is None:
                return runtime.next
            message, context = taken
            ended, began = status.COMPLETED, time.monotonic()
            try:
                reply = Message(client.answer(message.content, context.node_config), reply_to=message)
            except Exception as error:  # what `answer` itself cannot answer: only a code leaves
                traceback.print_exc()
                code = flower_private.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                reply = Message(Error(code=code, reason=fault_of(error).value), reply_to=message)
                ended = status.FAILED
            try:
                flower_private.push_message(runtime, reply, context)
            except flower_private.ObjectPushError as error:
                say(f"an answer did not get to the SuperNode: {error}; restart it")
                return ""
            flower_private.push_task_output(runtime, context, ended, "")
            say(f"answered a message in {time.monotonic() - began:.1f} s")
            return ""


@contextlib.contextmanager
def _heartbeat(runtime: _TaskRuntime) -> Iterator[None]:
    """Tell the SuperNode that its task goes on."""
    heart = flower_private.HeartbeatSender(flower_private.make_task_heartbeat_fn_http(runtime))
    heart.start()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # it ends by itself where the SuperNode forgot the task
            heart.stop()


def _take_message(runtime: _TaskRuntime, say: Callable[[str], None]) -> tuple[Any, Any] | None:
    """The task's message and context; None where they do not come whole."""
    import httpx

    try:
        message, context, _, _ = flower_private.pull_task_input(runtime)
    except (flower_private.ObjectPullError, RuntimeError, httpx.HTTPError) as error:
        if isinstance(error, httpx.HTTPError) and not runtime.next:
            raise  # the SuperNode does not answer, and sees to the message by itself if it is there
        say(f"a message did not come whole: {error}")
        if runtime.next:
            # Otherwise the SuperNode would answer it itself, a minute later and in place of the next one.
            flower_private.push_task_output(runtime, None, flower_private.SubStatus.FAILED, Fault.OTHER.value)
        return None
    return message, context


class _TaskRuntime:
    """A SuperNode as the worker of one task sees it.

    A SuperNode offers a task a moment before it has stored the task's message and while it still fetches the parts, and
    goes on to the next message without a word where the run ends meanwhile. So the worker waits for message and parts,
    until the next task is offered.
    """

    def __init__(self, runtime: Any, offered: Callable[[], str]) -> None:
        self._runtime, self._offered, self._lock = runtime, offered, threading.Lock()
        self.next = ""
        """Token of the next task."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def SendTaskHeartbeat(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """Say that the task goes on; it is never called off, for which Flower would interrupt this process."""
        answer = self._runtime.SendTaskHeartbeat(request)
        answer.success = True
        return answer

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """The task's message; none where the SuperNode goes on without it."""
        while not (answer := self._runtime.PullMessages(request)).messages_list and not self._goes_on():
            time.sleep(_INTERVAL)
        return answer

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """A part of the message; not found where the SuperNode goes on without it."""
        while (answer := self._runtime.PullObject(request)).object_found and not answer.object_available:
            if self._goes_on():
                answer.object_found = False
                break
            time.sleep(_INTERVAL)
        return answer

    def _goes_on(self) -> bool:
        """Whether the SuperNode has offered the next task. Parts are asked for in several threads."""
        with self._lock:
            self.next = self.next or self._offered()
        return bool(self.next)


def _name(node_config: Mapping[str, Any]) -> str:
    name = node_config.get("client")
    if not isinstance(name, str) or not name:
        raise ConfigError(f'client is {name!r} in --node-config; give the node a name, as client="ada".')
    return name
