"""The one place that talks to a Flower SuperLink: a run of our own, its nodes, and bytes there and back.

Flower starts the server's side of a run as a process of its own beside the SuperLink, from an application that was
uploaded. Here that side is this very process: it submits a bundle that only names modules of the installed package
(there is no project folder), takes the run's task itself, as Flower's own executor would, and then uses Flower's grid.
So the run folder, --resume, progress and errors are those of every other engine, and the SuperLink runs no code of
anybody's. It has to be started with `--isolation process`.

What submits a bundle and takes a task is not part of Flower's documented interface: `flower_private` has its names, and
tests/integration/test_flower.py holds this against real processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora._version import __version__
from manylora.errors import ConfigError, RunError
from manylora.federated.engines import flower_private
from manylora.federated.engines.flower_runtime import PatientRuntime
from manylora.federated.faults import clean_text

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment under which Flower neither reports home nor installs anything."""

STYPE = "manylora.message"
"""How the one array of a message is encoded: bytes of `manylora.federated.wire`."""

_BUNDLE = """\
[project]
name = "manylora"
version = "{version}"

[tool.flwr.app]
publisher = "manylora"

[tool.flwr.app.components]
serverapp = "manylora.federated.engines.flower_bundle:server"
clientapp = "manylora.federated.engines.flower_bundle:client"
"""
_TASK_SECONDS = 20.0
"""How long the SuperLink may take to give this process the run's task; it does so at once or never."""
_AWAY_SECONDS = 120.0
"""How long a SuperLink may not answer."""
_OVER = (401, 403)
"""HTTP's answers to whoever speaks for a run that has ended."""
_LABELS = 2**16
"""Bytes that a message may have beside what was asked for: labels, and what Flower writes around each part."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that is online. Its id is of this SuperLink and this start of the node; names are what lasts."""

    number: int
    since: str
    """When it came online; a restart changes it, or the number."""
    key: bytes
    """Its public key, of its own making unless the SuperLink authenticates nodes."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one message: labels and perhaps bytes, or an error."""

    message: str
    labels: Mapping[str, Any]
    data: bytes | None = None
    error: str | None = None
    gone: bool = False
    """Whether the error means that the message was lost on the way and can be sent again."""


class FlowerLink:
    """A run at a SuperLink.

    Args:
        address: HOST:PORT.
        certificate: PEM file of the authority that signed the SuperLink's certificate; None without TLS.
        secret: file with the secret under which the SuperLink gives out tasks, where it has one.

    Raises:
        ConfigError: flwr is not installed, or a file cannot be read.
        RunError: the SuperLink cannot be reached, or does not give this process the run.
    """

    def __init__(self, address: str, *, certificate: Path | None, secret: Path | None = None) -> None:
        self.address = address
        os.environ.update(QUIET)
        require_flower()
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self._root = None if certificate is None else _read(certificate, "certificate")
        self._secret = None if secret is None else _read(secret, "secret")
        self._lost = threading.Event()
        self._one_by_one = False
        self.run_id: int | None = None
        with self._reached():
            token, self.run_id = self._acquire(self._submit())
            self._retries = _retries()
            self._grid, self._runtime = flower_private.connected_grid(
                address, root=self._root, token=token, retries=self._retries, wrapped=PatientRuntime
            )
            self._begin()

    # ---- before the first message

    def _submit(self) -> int:
        files = {"pyproject.toml": _BUNDLE.format(version=__version__).encode()}
        bundle, _ = flower_private.build_fab_from_files(files)
        fab = flower_private.Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = flower_private.StartRunRequest(fab=flower_private.fab_to_proto(fab))
        with self._control() as control:
            answer = control.StartRun(request)
        return int(answer.run_id)

    def _acquire(self, run: int) -> tuple[str, int]:
        """The token with which this process is the server's side of `run`."""
        interceptors = []
        if self._secret is not None:
            protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
            interceptors.append(
                flower_private.SuperExecAuthHttpInterceptor(
                    master_secret=self._secret, protected_methods=protected
                )
            )
        wanted = flower_private.AcquireTaskRequest(supported_task_types=[flower_private.TaskType.SERVER_APP])
        client = flower_private.runtime_client(self.address, root=self._root, interceptors=interceptors)
        with contextlib.closing(client):
            end = time.monotonic() + _TASK_SECONDS
            while time.monotonic() < end:
                got = client.AcquireTask(wanted)
                # A task of another run is one that a killed server left before it took it; it expires by itself.
                if got.HasField("task") and got.token and got.task.run_id == run:
                    return got.token, run
                time.sleep(0.1)
        raise RunError(
            f"the SuperLink at {self.address} does not hand over the run; start it with --isolation process."
        )

    def _begin(self) -> None:
        import httpx

        runtime = self._runtime

        def beat() -> bool:
            try:
                request = flower_private.SendTaskHeartbeatRequest()
                alive = bool(runtime.SendTaskHeartbeat(request).success)
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _OVER:
                    return False
                alive = False
            except Exception:  # no answer now; it is tried again
                return False
            if not alive:
                self._lost.set()
            return True

        self._heart = flower_private.HeartbeatSender(beat)
        self._heart.start()
        task = runtime.PullTaskInput(flower_private.PullTaskInputRequest())
        flower_private.take_identity(task)
        self._grid.set_run(flower_private.run_from_proto(task.run))

    def register(self, keys: Mapping[str, bytes]) -> dict[str, bytes]:
        """Let nodes with these public keys in; those that are in already stay so.

        Args:
            keys: client name to its public key, as in an OpenSSH file.

        Returns:
            Client name to the key as `Node.key` has it.
        """
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key

        known: dict[str, bytes] = {}
        with self._reached(), self._control() as control:
            for name, text in keys.items():
                try:
                    known[name] = flower_private.public_key_to_bytes(load_ssh_public_key(text))
                except (ValueError, AttributeError) as error:
                    raise ConfigError(
                        f"the public key of {name!r} is no OpenSSH key ({error}); make one as --recipe says."
                    ) from error
                try:
                    request = flower_private.RegisterNodeRequest(public_key=known[name], name=name)
                    control.RegisterNode(request)
                except Exception as error:
                    if "already" not in _words(error):
                        raise
        return known

    # ---- messages

    def nodes(self) -> list[Node]:
        """Every node that is online, as far as the SuperLink knows: a killed one counts for up to a minute."""
        with self._reached():
            return [
                Node(number=node.node_id, since=node.last_activated_at, key=bytes(node.public_key))
                for node in self._grid.get_nodes()
            ]

    def push(self, node: int, labels: Mapping[str, str], data: bytes | None, *, seconds: float) -> str:
        """Send a message that nobody works on after `seconds`; returns its id, empty where it was not taken."""
        from flwr.app import Message

        content = envelope(labels, data)
        with self._reached():
            try:
                sent = list(self._grid.push_messages([Message(content, node, "query", ttl=seconds)]))
            except flower_private.ObjectPushError:
                # The run, or Flower's session for it, ended while the message was on its way.
                self._grid.get_nodes()  # raises where it was the run
                return ""
        return str(sent[0]) if sent and sent[0] else ""

    def pull(self, messages: Sequence[str], *, most: int) -> list[Answer]:
        """The answers to these messages that are there by now; of one with more than `most` bytes, that it has."""
        if not messages:
            return []
        self._runtime.most = most + _LABELS
        with self._reached():
            answers = self._answers(messages)
        return [
            Answer(message=one.message, labels={}, error=f"its answer has more than {most:,} bytes")
            if one.message in self._runtime.too_large
            else one
            for one in answers
        ]

    def _answers(self, messages: Sequence[str]) -> list[Answer]:
        """What there is, all at once until one of them cannot be read: Flower would raise, and the others be lost."""
        if not self._one_by_one:
            try:
                return [_answer(reply) for reply in self._grid.pull_messages(list(messages))]
            except Exception as error:
                if _is_of_the_connection(error):
                    raise
                self._one_by_one = True
        found = []
        for message in messages:
            try:
                found += [_answer(reply) for reply in self._grid.pull_messages([message])]
            except Exception as error:
                if _is_of_the_connection(error):
                    raise
                found.append(Answer(message=message, labels={}, error="its answer cannot be read"))
        return found

    def close(self, *, failed: str = "") -> None:
        """End the run at the SuperLink."""
        status = flower_private.SubStatus
        output = flower_private.PushTaskOutputRequest(
            sub_status=status.FAILED if failed else status.COMPLETED, details=failed
        )
        self._retries.max_time = 0.0  # of a heartbeat that is being repeated, too
        with contextlib.suppress(Exception):  # a SuperLink that is gone has ended the run
            self._runtime.PushTaskOutput(output)
        self._heart.stop()
        self._grid.close()

    # ---- within

    def _ended(self) -> RunError:
        return RunError(
            f"the SuperLink at {self.address} has ended the run, as it does when this process does not answer for a "
            "minute (a machine that slept), when someone stops it, or when it is itself started anew; continue with "
            "--resume."
        )

    @contextlib.contextmanager
    def _control(self) -> Iterator[Any]:
        client = flower_private.ControlHttpClient.from_server_address(
            self.address,
            self._root is None,
            self._root,
            interceptors=[
                flower_private.CliClientHttpInterceptor(),
                flower_private.RuntimeVersionHttpInterceptor(component_name="manylora"),
            ],
        )
        with contextlib.closing(client):
            yield client

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """What goes wrong with the SuperLink, in a line."""
        import httpx

        if self._lost.is_set():
            raise self._ended()
        try:
            yield
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _OVER and self.run_id is not None:
                raise self._ended() from error
            raise RunError(f"the SuperLink at {self.address} refused: {_words(error)}.") from error
        except (httpx.HTTPError, OSError) as error:
            raise RunError(
                f"no SuperLink answers at {self.address} ({error}); start it, compare the port and the certificate "
                "(manylora federate --engine flower --recipe shows how), then continue with --resume."
            ) from error


def _retries() -> Any:
    """Repeat what a SuperLink that is away did not answer.

    Flower's own would do so for ever, and would end this process by a signal where the run has ended.
    """
    import httpx

    away = (502, 503, 504)
    return flower_private.RetryInvoker(
        lambda: flower_private.exponential(max_delay=20),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=_AWAY_SECONDS,
        should_giveup=lambda error: (
            isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in away
        ),
    )


def require_flower() -> None:
    """Raise a ConfigError where Flower is missing."""
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the engine flower needs Flower ({error}); pip install 'manylora[flower]' (Python 3.11 or later)."
        ) from error


def envelope(labels: Mapping[str, str], data: bytes | None) -> Any:
    """The content of a message: labels, and all bytes as one array.

    One array, because Flower moves every array as an object of its own: 10 MB took 5 s a round as one and 17 to 24 s
    as 128.
    """
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    content = RecordDict({"labels": ConfigRecord(dict(labels))})
    if data is not None:
        array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
        content["message"] = ArrayRecord({"bytes": array})
    return content


def opened(content: Any) -> tuple[dict[str, Any], bytes | None]:
    """Labels and bytes of a message's content; nothing in it is trusted to be there."""
    labels = dict(content.config_records.get("labels", {}))
    arrays = content.array_records.get("message", {})
    array = arrays.get("bytes")
    return labels, array.data if array is not None and array.stype == STYPE else None


def _answer(reply: Any) -> Answer:
    message, codes = reply.metadata.reply_to_message_id, flower_private.ErrorCode
    if reply.has_error():
        lost = {
            codes.NODE_UNAVAILABLE, codes.MESSAGE_UNAVAILABLE, codes.REPLY_MESSAGE_UNAVAILABLE,
            codes.CLIENT_APP_CRASHED,
        }  # fmt: skip
        reason = clean_text(reply.error.reason or f"Flower's error {reply.error.code}")
        return Answer(message=message, labels={}, error=reason, gone=reply.error.code in lost)
    labels, data = opened(reply.content)
    return Answer(message=message, labels=labels, data=data)


def _is_of_the_connection(error: Exception) -> bool:
    """Whether an error is about the SuperLink, and not about what a node has put there."""
    import httpx

    return isinstance(error, (httpx.HTTPError, OSError))


def _words(error: Exception) -> str:
    response = getattr(error, "response", None)
    return " ".join((response.text if response is not None else str(error)).split())[:300]


def _read(path: Path, what: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be read ({error.strerror}).") from error
