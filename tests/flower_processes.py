"""A federation for tests: a SuperLink, SuperNodes and workers as real processes on 127.0.0.1, with keys and TLS."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = ("first_word", "last_word", "swap")
HERE = Path(sys.executable).parent
PATIENCE = 400.0
"""Seconds; a machine under load takes ten times what an idle one does."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Processes:
    """Processes in one folder, each with a log; ended one by one at the end, whatever happened."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, {}  # type: Path, dict[str, subprocess.Popen[bytes]]

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        quiet |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_HOME": str(self.folder / "flwr")}
        path = f"{HERE}{os.pathsep}{os.environ.get('PATH', '')}"
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env={**os.environ, **quiet, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self.running[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def until(self, what: Callable[[], bool], *needed: str) -> None:
        """Wait; fail where a process that is needed ends."""
        end = time.monotonic() + PATIENCE
        while not what():
            for name in needed:
                assert self.running[name].poll() is None, f"{name} ended:\n{self.log(name)[-3000:]}"
            assert time.monotonic() < end, self.where_all_stand()
            time.sleep(0.05)

    def where_all_stand(self) -> str:
        """The last lines of every log, after the processes have written into it where each of their threads is."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)
                process.send_signal(signal.SIGCONT)  # one that was stopped would wait for ever
                process.wait(timeout=30)
        last = {name: self.log(name).partition("Extension modules:")[0] for name in reversed(self.running)}
        return "\n".join(f"--- {name}\n{text[-2500:]}" for name, text in last.items())

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def close(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def certificates(folder: Path) -> None:
    """As the recipe makes them."""
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    (folder / "server.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n", encoding="utf-8")
    for command in (
        [*new, "-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt"],
        [*new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr"],
        ["openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
         "-days", "2", "-extfile", "server.ext", "-out", "server.crt"],
    ):  # fmt: skip
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "keys").mkdir()
    for name in NAMES:
        key = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", name]
        subprocess.run(key, cwd=folder, check=True, capture_output=True)
        (folder / f"{name}.pub").rename(folder / "keys" / f"{name}.pub")


SLOW_NODE = """
import sys, time
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supernode.cli import flower_supernode
once = InMemoryObjectStore.preregister
InMemoryObjectStore.preregister = lambda *args: time.sleep(1) or once(*args)
sys.exit(flower_supernode())
"""
"""A SuperNode on a slow machine: it offers the task of a message a second before it has stored the message."""

MANYLORA = [sys.executable, "-m", "manylora.cli", "federate"]
SETTINGS = [
    "--batch-size", "8", "--learning-rate", "0.02", "--target-modules", "q_proj,v_proj", "--r", "4", "--device", "cpu",
]  # fmt: skip
BREAKABLE = [
    *SETTINGS, "--rounds", "3", "--wire", "int8", "--optimizer", "persist", "--reference", "none",
    "--scored-clients", "0",
]  # fmt: skip
FLORA = [
    *SETTINGS, "--rounds", "3", "--strategy", "flora", "--ranks", "4,3,2", "--participation", "0.67", "--wire", "bf16",
    "--max-new-tokens", "6",
]  # fmt: skip


def figures_and_sizes(metrics: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rounds of a run without the sizes of their messages, and these."""
    rounds = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    sizes = [size for row in rounds for way in ("up", "down") for _, size in sorted(row.pop(way).items())]
    return rounds, sizes


class Federation(Processes):
    """A SuperLink and three nodes, each with a worker; two runs in one process beside it, to compare with."""

    def __init__(self, folder: Path, base: Path, data: Path) -> None:
        super().__init__(folder)
        self.base, self.data = base, data
        self.superlink = f"127.0.0.1:{free_port()}"
        self.ports = {name: free_port() for name in NAMES}
        certificates(folder)
        self.start(
            "superlink", HERE / "flower-superlink", "--isolation", "process", "--enable-supernode-auth", "--host",
            "127.0.0.1", "--port", self.superlink.rpartition(":")[2], "--ssl-certfile", "server.crt", "--ssl-keyfile",
            "server.key", "--ssl-ca-certfile", "ca.crt",
        )  # fmt: skip
        self.until(lambda: "Uvicorn running" in self.log("superlink"), "superlink")

    def node(self, name: str) -> None:
        rows = f'data="{self.data / "train" / name}.jsonl" test="{self.data / "test" / name}.jsonl"'
        own = f'client="{name}" {rows} model="{self.base}" device="cpu" home="{self.folder / "homes" / name}"'
        command = [sys.executable, "-c", SLOW_NODE] if name == NAMES[0] else [HERE / "flower-supernode"]
        self.start(
            f"node-{name}", *command, "--isolation", "process", "--root-certificates", "ca.crt",
            "--superlink", self.superlink, "--auth-supernode-private-key", name, "--port", self.ports[name],
            "--node-config", own,
        )  # fmt: skip

    def worker(self, name: str) -> None:
        self.start(f"worker-{name}", *MANYLORA, "--node", f"127.0.0.1:{self.ports[name]}")

    def server(self, *settings: str, out: str) -> subprocess.Popen[bytes]:
        return self.start(
            f"server-{out}", *MANYLORA, "--engine", "flower", "--superlink", self.superlink, "--certificate", "ca.crt",
            "--node-keys", "keys", *settings, "--out", out,
        )  # fmt: skip

    def alone(self, *settings: str, out: str) -> None:
        """The same run in one process, into another folder."""
        rows = ["--data", self.data / "train", "--test", self.data / "test"]
        self.start(f"alone-{out}", *MANYLORA, "--model", self.base, *rows, *settings, "--out", f"{out}-alone")

    def assert_like_alone(self, out: str, *files: str) -> None:
        """These files of a run, and its metrics, are those of the run in one process.

        Messages may differ by a few bytes: each has the run's id, drawn at random, in its compressed header.
        """
        assert self.running[f"alone-{out}"].wait(timeout=PATIENCE) == 0, self.log(f"alone-{out}")
        for file in ("metrics.jsonl", *files):
            ours, theirs = self.folder / out / file, self.folder / f"{out}-alone" / file
            if ours.name == "metrics.jsonl":
                (figures, sizes), (own_figures, own_sizes) = (
                    figures_and_sizes(ours),
                    figures_and_sizes(theirs),
                )
                assert figures == own_figures, file
                assert sizes == pytest.approx(own_sizes, abs=8), file
            else:
                assert ours.read_bytes() == theirs.read_bytes(), file

    def link(self) -> Any:
        """To the SuperLink, in this process."""
        from manylora.federated.engines.flower_link import FlowerLink

        return FlowerLink(self.superlink, certificate=self.folder / "ca.crt")

    def stop(self, link: Any, run: int) -> None:
        """End a run at the SuperLink, as when the server's machine slept for a minute."""
        from flwr.proto.control_pb2 import StopRunRequest

        with link._control() as control:
            assert control.StopRun(StopRunRequest(run_id=run)).success

    def home(self, out: str, name: str, inside: str = "") -> Path:
        """Where a client keeps what is its own in a run."""
        run = json.loads((self.folder / out / "flower.json").read_text(encoding="utf-8"))["run"]
        return self.folder / "homes" / name / f"{run}{inside}" / name
