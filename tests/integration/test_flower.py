"""The engine flower over real processes on 127.0.0.1: a SuperLink, three SuperNodes with keys, workers, TLS on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from federation import final_state
from manylora.cli import main

needs_flower = pytest.mark.skipif(
    shutil.which("flower-superlink", path=str(Path(sys.executable).parent)) is None,
    reason="Flower is not installed (pip install 'manylora[flower]', Python 3.11 or later)",
)

NAMES = ("first_word", "last_word", "swap")
HERE = Path(sys.executable).parent
PATIENCE = 500.0


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
                env={**os.environ, **quiet, "PATH": path, "OMP_NUM_THREADS": "1"},
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
            logs = "\n".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in self.running)
            assert time.monotonic() < end, logs
            time.sleep(0.05)

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


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.close()


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


SETTINGS = [
    "--rounds", "3", "--batch-size", "8", "--learning-rate", "0.02", "--target-modules", "q_proj,v_proj", "--r", "4",
    "--wire", "int8", "--optimizer", "persist", "--reference", "none", "--scored-clients", "0", "--device", "cpu",
]  # fmt: skip


@needs_flower
def test_three_nodes_end_with_the_weights_of_one_process_though_one_is_killed_and_the_server_too(
    processes: Processes, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    certificates(tmp_path)
    superlink, ports = f"127.0.0.1:{free_port()}", {name: free_port() for name in NAMES}
    manylora = [sys.executable, "-m", "manylora.cli", "federate"]

    def supernode(name: str) -> None:
        own = f'client="{name}" data="{small_data / "train" / name}.jsonl" model="{tiny_base}" device="cpu"'
        processes.start(
            f"node-{name}", HERE / "flower-supernode", "--isolation", "process", "--root-certificates", "ca.crt",
            "--superlink", superlink, "--auth-supernode-private-key", name, "--port", ports[name],
            "--node-config", f'{own} home="{tmp_path / "homes" / name}"',
        )  # fmt: skip

    def worker(name: str) -> None:
        processes.start(f"worker-{name}", *manylora, "--node", f"127.0.0.1:{ports[name]}")

    processes.start(
        "superlink", HERE / "flower-superlink", "--isolation", "process", "--enable-supernode-auth", "--host",
        "127.0.0.1", "--port", superlink.rpartition(":")[2], "--ssl-certfile", "server.crt", "--ssl-keyfile",
        "server.key", "--ssl-ca-certfile", "ca.crt",
    )  # fmt: skip
    processes.until(lambda: "Uvicorn running" in processes.log("superlink"), "superlink")
    run = tmp_path / "run"
    server = processes.start(
        "server", *manylora, "--engine", "flower", "--superlink", superlink, "--certificate", "ca.crt", "--node-keys",
        "keys", *SETTINGS, "--out", run,
    )  # fmt: skip
    processes.until(lambda: "waiting for clients" in processes.log("server"), "server", "superlink")
    for name in NAMES:
        supernode(name)
        worker(name)

    # After the first round one machine dies, node and worker; it comes back when the SuperLink lets it in.
    processes.until(lambda: (run / "rounds" / "round-0001").exists(), "server", "superlink")
    processes.kill("node-swap")
    processes.kill("worker-swap")
    # So does the server, at some moment of the second round; a new run at the SuperLink goes on where it was.
    processes.kill("server")
    assert not (run / "rounds" / "round-0003").exists()
    server = processes.start("server", *manylora, "--resume", run)
    worker("swap")

    def finished() -> bool:
        if processes.running["node-swap"].poll() is not None:
            supernode("swap")
        return server.poll() is not None

    processes.until(finished, "superlink", "worker-swap", "node-last_word")
    assert server.returncode == 0, processes.log("server")

    alone = processes.start(
        "alone", *manylora, "--model", tiny_base, "--data", small_data / "train", *SETTINGS, "--out", tmp_path / "alone"
    )  # fmt: skip
    assert alone.wait(timeout=PATIENCE) == 0, processes.log("alone")
    assert final_state(run) == final_state(tmp_path / "alone")
    lines, others = (
        (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for folder in (run, tmp_path / "alone")
    )
    for line, other in zip(lines, others, strict=True):
        ours, theirs = json.loads(line), json.loads(other)
        assert ours["losses"] == theirs["losses"]
        assert set(ours["losses"]) == set(NAMES)
        assert ours["refused"] == {}
    for name in NAMES:  # A stayed with each client, as it would have in one process
        kept = next((tmp_path / "homes" / name).glob(f"*/{name}/round-0003/private.safetensors"))
        assert (
            kept.read_bytes() == (tmp_path / "alone/clients" / name / "round-0003" / kept.name).read_bytes()
        )


def test_the_recipe_names_the_superlink(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--engine", "flower", "--superlink", "hub.example.org:8000", "--clients", "3", "--recipe"]
    assert main(["federate", *words]) == 0
    out = capsys.readouterr().out
    for part in ("DNS:hub.example.org", "--superlink hub.example.org:8000", "--enable-supernode-auth", "--port 8000",
                 "--node-config", "ssh-keygen", "--clients 3", "FLWR_TELEMETRY_ENABLED=0"):  # fmt: skip
        assert part in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--engine flower --clients 3", "needs the SuperLink's HOST:PORT"),
        ("--engine flower --superlink here --clients 3", "needs the SuperLink's HOST:PORT"),
        ("--engine flower --superlink 127.0.0.1:9", "--clients"),
        ("--engine flower --superlink 127.0.0.1:9 --node-keys keys", "--certificate"),
        (
            "--engine flower --superlink 127.0.0.1:9 --clients 2 --strategy centralized",
            "all rows in one place",
        ),
        ("--superlink 127.0.0.1:9", "add --engine flower"),
        ("--node 127.0.0.1:9094 --rounds 3", "--node-config"),
        pytest.param(
            "--engine flower --superlink 127.0.0.1:9 --clients 2",
            "no SuperLink answers at 127.0.0.1:9",
            # Flower 1.41 asks click and pathspec in old ways; nothing of ours can change that.
            marks=[needs_flower, pytest.mark.filterwarnings("ignore::DeprecationWarning")],
        ),
    ],
)
def test_bad_input_is_one_line(
    words: str, reason: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["federate", *words.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("manylora:")]
    assert len(lines) == 1
    assert reason in lines[0]
