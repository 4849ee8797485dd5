"""A federated run that lost something, or whose base is another one; and its clients' adapters, used alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from manylora.cli import main
from manylora.federated.home import VersionedState

SHARED = ["--batch-size", "8", "--learning-rate", "0.02", "--device", "cpu", "--local-steps", "1"]


@pytest.fixture(scope="module")
def finished(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kept") / "run"
    where = ["--model", str(tiny_base), "--data", str(small_data), "--out", str(run)]
    assert main(["federate", *where, *SHARED, "--rounds", "2", "--max-new-tokens", "2"]) == 0
    return run


def copy(finished: Path, folder: Path) -> Path:
    return Path(shutil.copytree(finished, folder / "run"))


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("manylora:"))
    return line


@pytest.mark.parametrize(
    "gone", ["scores.json", "clients/swap/adapter", "clients/swap/adapter/adapter_config.json"]
)
def test_what_a_finished_run_lost_is_made_again(
    gone: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path)
    weights = Path("clients/swap/adapter/adapter_model.safetensors")
    (shutil.rmtree if (run / gone).is_dir() else Path.unlink)(run / gone)
    assert main(["federate", "--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"was finished, but its {gone}" in out
    assert "finished already" not in out
    for name in ("scores.json", weights):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert main(["federate", "--resume", str(run)]) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("rounds", "has no round, though the run was begun"),
        ("clients", "--reset-client"),
    ],
)
def test_what_cannot_be_made_again_is_named(
    gone: str, words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path)
    shutil.rmtree(run / gone)
    assert main(["federate", "--resume", str(run)]) == 2
    assert words in line_of(capsys)


def test_a_personal_model_that_was_changed_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path)
    weights = run / "clients" / "swap" / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert main(["federate", "--resume", str(run)]) == 2
    assert f"{weights} is broken or was changed" in line_of(capsys)


def test_a_base_that_was_swapped_stops_a_run_before_anything_is_removed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path)
    store = VersionedState(run / "rounds")
    before = store.versions()
    for number in before:
        state, facts = store.read(number)
        head, _, tail = str(facts["base"]).partition("/")
        store.write(number, state, {**facts, "base": f"{head[:-1]}{'0' if head[-1] != '0' else '1'}/{tail}"})
    assert main(["federate", "--resume", str(run), "--from-round", "0"]) == 2
    assert "the run was begun on the base with fingerprint" in line_of(capsys)
    assert store.versions() == before


def test_a_clients_adapter_is_scored_on_its_own_test_rows(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, folder in (("clients", finished), ("reference", finished / "reference")):
        out = tmp_path / part
        command = [
            "evaluate",
            "--adapter",
            str(folder / "clients" / "swap"),
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
        assert main(command) == 0
        again = json.loads((out / "scores.json").read_text(encoding="utf-8"))["tasks"]
        first = json.loads((finished / "scores.json").read_text(encoding="utf-8"))[part]["swap"]["tasks"]
        assert again == first
    capsys.readouterr()
    (finished / "clients" / "swap" / "adapter").rename(tmp_path / "alone")
    try:
        assert main(["evaluate", "--adapter", str(tmp_path / "alone"), "--device", "cpu"]) == 2
    finally:
        (tmp_path / "alone").rename(finished / "clients" / "swap" / "adapter")
    assert "lies in no run, so its test rows are unknown; give rows to score with --data" in line_of(capsys)


def test_a_clients_adapter_without_rows_asks_for_them(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(finished, tmp_path)
    (run / "clients" / "swap").rename(run / "clients" / "eve")
    assert main(["evaluate", "--adapter", str(run / "clients" / "eve"), "--device", "cpu"]) == 2
    assert "has no test rows of client eve; give rows with --data" in line_of(capsys)
