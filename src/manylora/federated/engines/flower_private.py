"""Every name of Flower that its documentation does not have, in one file: what breaks when a release moves it.

The documented interface (`flwr.app`, `flwr.clientapp`, `flwr.serverapp`) has messages and their records, but neither
how a process that is no Flower app takes part in a run, nor how a worker keeps its model between messages. Those are
Flower's own parts, taken from here. `tests/unit/test_federated_flower.py` says which release has each name, and
`pyproject.toml` which releases have been tried.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

PLACES: Mapping[str, str] = {
    # submitting the bundle, and taking the task of its run
    "build_fab_from_files": "flwr.cli.build",
    "CliClientHttpInterceptor": "flwr.cli.cli_client_interceptor",
    "fab_to_proto": "flwr.common.serde",
    "run_from_proto": "flwr.common.serde",
    "RegisterNodeRequest": "flwr.proto.control_pb2",
    "StartRunRequest": "flwr.proto.control_pb2",
    "ControlHttpClient": "flwr.supercore.control",
    "Fab": "flwr.supercore.fab",
    "RuntimeTokenHttpInterceptor": "flwr.supercore.interceptors",
    "RuntimeVersionHttpInterceptor": "flwr.supercore.interceptors",
    "SuperExecAuthHttpInterceptor": "flwr.supercore.interceptors",
    "public_key_to_bytes": "flwr.supercore.primitives.asymmetric",
    "TaskIdentity": "flwr.supercore.task_identity",
    # tasks and their messages
    "ErrorCode": "flwr.common.constant",
    "SubStatus": "flwr.common.constant",
    "AcquireTaskRequest": "flwr.proto.runtime_pb2",
    "PullTaskInputRequest": "flwr.proto.runtime_pb2",
    "PushTaskOutputRequest": "flwr.proto.runtime_pb2",
    "SendTaskHeartbeatRequest": "flwr.proto.runtime_pb2",
    "TaskType": "flwr.supercore.constant",
    "HeartbeatSender": "flwr.supercore.heartbeat",
    "make_task_heartbeat_fn_http": "flwr.supercore.heartbeat",
    "ObjectPullError": "flwr.supercore.inflatable.inflatable_utils",
    "ObjectPushError": "flwr.supercore.inflatable.inflatable_utils",
    "RetryInvoker": "flwr.supercore.retry",
    "exponential": "flwr.supercore.retry",
    "RuntimeHttpClient": "flwr.supercore.runtime",
    "HttpGrid": "flwr.superlink.grid",
    "pull_task_input": "flwr.supernode.runtime.run_clientapp",
    "push_message": "flwr.supernode.runtime.run_clientapp",
    "push_task_output": "flwr.supernode.runtime.run_clientapp",
}
"""Name to its module in Flower; `flower_private.NAME` imports it when it is used, for most installations have none."""

GRID_PARTS = ("_connect", "_client", "_retry_invoker", "_runtime_client")
"""What this file reaches for inside an `HttpGrid`."""


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return getattr(importlib.import_module(PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def missing_names() -> list[str]:
    """Names of `PLACES` and `GRID_PARTS` that the installed release does not have, with their modules.

    Raises:
        ImportError: flwr is not installed.
    """
    importlib.import_module("flwr")
    missing = []
    for name, module in PLACES.items():
        try:
            __getattr__(name)
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
    if not any(name.endswith(".HttpGrid") for name in missing):
        grid = __getattr__("HttpGrid")(
            "127.0.0.1:1", insecure=True, token="none"
        )  # connects when it is first used
        # the class alone where reading the grid's own would connect it
        there = {*vars(type(grid)), *vars(grid)}
        missing += [f"HttpGrid.{part}" for part in GRID_PARTS if part not in there]
    return missing


def connected_grid(
    address: str, *, root: bytes | None, token: str, retries: Any, wrapped: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """A grid on a SuperLink, and what it speaks through.

    Args:
        address: HOST:PORT.
        root: certificate of the authority; None without TLS.
        token: of the task whose grid it is.
        retries: what repeats a request that was not answered, in place of Flower's own, which would do so for ever.
        wrapped: puts something of ours around Flower's client.
    """
    grid = __getattr__("HttpGrid")(address, root is None, root, token=token)
    grid._retry_invoker = retries
    grid._connect()  # now, for it makes the client that is to be wrapped
    grid._client = wrapped(grid._client)
    return grid, grid._runtime_client


def take_identity(task: Any) -> None:
    """Be the process of this task: Flower's messages take from there whose they are."""
    identity = __getattr__("TaskIdentity")
    identity.task_id, identity.run_id = task.task_id, task.run.run_id
    identity.node_id = task.context.node_id


def runtime_client(address: str, *, root: bytes | None = None, interceptors: list[Any]) -> Any:
    """A connection to the Runtime API of a SuperLink or SuperNode, which is told that we are none of Flower's parts."""
    version = __getattr__("RuntimeVersionHttpInterceptor")(component_name="manylora")
    return __getattr__("RuntimeHttpClient").from_server_address(
        address, root is None, root, interceptors=[version, *interceptors]
    )
