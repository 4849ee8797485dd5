"""`manylora federate` as a user runs it, in processes of its own, on a tiny base."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from manylora.cli import main
from processes import cli_process, killed_process


def federate(base: Path, data: Path, *more: object) -> list[str]:
    fixed = [
        "federate", "--model", base, "--data", data, "--rounds", 4, "--batch-size", 8, "--learning-rate", 0.02,
        "--device", "cpu", "--wire", "int8", "--optimizer", "persist", "--ranks", "6,4,2",
    ]  # fmt: skip
    return [str(word) for word in (*fixed, *more)]


def results(run: Path) -> dict[str, bytes]:
    """Everything that must not depend on whether the run was broken off."""
    kept = [run / "scores.json", run / "metrics.jsonl", run / "reference" / "metrics.jsonl"]
    kept += run.glob("**/clients/*/adapter/adapter_model.safetensors")
    kept += run.glob("**/round-*.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def finished(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    process = cli_process([*federate(tiny_base, small_data), "--out", "whole"], folder)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    (folder / "whole" / "printed.txt").write_text(out, encoding="utf-8")
    (folder / "whole" / "progress.txt").write_text(err, encoding="utf-8")
    return folder / "whole"


def test_a_run_shows_its_rounds_and_a_row_for_each_client(finished: Path) -> None:
    printed = (finished / "printed.txt").read_text(encoding="utf-8")
    for name in ("first_word", "last_word", "swap", "mean", "local only", "KiB up", "Δm%"):
        assert name in printed
    progress = (finished / "progress.txt").read_text(encoding="utf-8")
    assert progress.count("round 4/4  loss") == 2  # of the run and of its reference
    assert "update norm" in progress


def test_a_run_leaves_what_the_docs_promise(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Do 3 clients gain by sharing with fed-alora?" in page
    assert page.count("<figure ") == 3
    assert "report: " in (finished / "printed.txt").read_text(encoding="utf-8")
    assert json.loads((finished / "state.json").read_text(encoding="utf-8"))["state"] == "finished"
    scores = json.loads((finished / "scores.json").read_text(encoding="utf-8"))
    assert list(scores["clients"]) == list(scores["reference"]) == ["first_word", "last_word", "swap"]
    assert all(client["n"] == 6 for client in scores["clients"].values())
    rows = [
        json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not list(finished.rglob("*.partial"))
    assert not (finished / "answers").exists()


def test_the_bytes_on_the_wire_are_those_that_were_counted(finished: Path) -> None:
    """Two layers of each size: the payload is what `--dry-run` counts, the header comes on top."""
    from manylora.federated.accounting import as_sent
    from manylora.federated.strategies import FED_ALORA_UNEQUAL

    layers = {(32, 32): 8, (64, 32): 4, (32, 64): 2}
    counted = as_sent(FED_ALORA_UNEQUAL, layers, [6, 4, 2], r=8, wire="int8")
    row = json.loads((finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    for name, traffic in zip(("first_word", "last_word", "swap"), counted, strict=True):
        assert 0 < row["up"][name] - traffic.bytes_up < 1000
        assert 0 < row["down"][name] - traffic.bytes_down < 2000


def test_a_personal_model_is_scored_by_evaluate(
    finished: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "evaluate",
        "--adapter",
        finished / "clients" / "swap" / "adapter",
        "--data",
        small_data / "test",
    ]
    out = finished.parent / "scored"
    assert main([*map(str, command), "--tasks", "swap", "--device", "cpu", "--out", str(out)]) == 0
    capsys.readouterr()
    again = json.loads((out / "scores.json").read_text(encoding="utf-8"))["tasks"]
    first = json.loads((finished / "scores.json").read_text(encoding="utf-8"))["clients"]["swap"]["tasks"]
    assert again == first


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/manylora_prompts.json",
        "tasks.json",
        "complete.json",
        "../../state.json",
    ],
)
@pytest.mark.parametrize("gone", [False, True])
def test_a_personal_model_that_was_changed_is_not_asked(
    name: str, gone: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = tmp_path / "run" / "clients" / "swap"
    shutil.copytree(finished, tmp_path / "run")
    path = client / name
    if gone:
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:])
    capsys.readouterr()
    assert main(["predict", "--adapter", str(client), "--device", "cpu", "--max-new-tokens", "2", "hi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    # without settings a folder is no adapter's
    assert path.name in line


@pytest.mark.parametrize(
    "words", [["evaluate", "--adapter"], ["predict", "hi", "--adapter"], ["export", "--to", "x", "--adapter"]]
)
def test_a_federated_run_stands_for_its_clients_adapters(
    words: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*words, str(finished)]) == 2
    line = capsys.readouterr().err
    assert "an adapter for each client" in line
    assert str(finished / "clients" / "first_word") in line
    assert main(["train", "--resume", str(finished)]) == 2
    assert f"manylora federate --resume {finished}" in capsys.readouterr().err


def test_the_recipe_quotes_a_host_for_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    address = "a b$(id);c:80"
    assert main(["federate", "--engine", "flower", "--superlink", address, "--clients", "2", "--recipe"]) == 0
    lines = capsys.readouterr().out.replace("\\\n", " ").splitlines()
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    assert words.count(address) == 2
    assert "/CN=a b$(id);c" in words


def test_a_killed_run_resumes_to_the_same_bytes(
    finished: Path, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """Killed twice: in its third round, and in the second of its reference."""
    run = tmp_path / "broken"
    begin = [*federate(tiny_base, small_data), "--out", run]
    killed_process(begin, tmp_path, before=run / "rounds" / "round-0003.safetensors")
    assert json.loads((run / "state.json").read_text(encoding="utf-8"))["state"] == "running"
    reference = run / "reference" / "rounds" / "round-0002.safetensors"
    killed_process(["federate", "--resume", run], tmp_path, before=reference)
    resumed = cli_process(["federate", "--resume", run], tmp_path)
    _, err = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, err
    assert results(run) == results(finished)


def test_resuming_a_finished_run_shows_its_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["federate", "--resume", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "finished already" in out
    assert "last_word" in out


def test_a_finished_run_whose_results_are_damaged_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (
        ("scores.json", "{"),
        ("scores.json", "[]"),
        ("metrics.jsonl", "{}\n"),
        ("state.json", "[]"),
    ):
        run = shutil.copytree(finished, tmp_path / f"{name}-{len(text)}")
        (run / name).write_text(text, encoding="utf-8")
        assert main(["federate", "--resume", str(run)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert str(run) in line


def unfinished(finished: Path, folder: Path) -> Path:
    """The run as if it had been killed while it scored."""
    run = shutil.copytree(finished, folder)
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    (run / "state.json").write_text(json.dumps({**state, "state": "running"}), encoding="utf-8")
    return run


def flip(path: Path) -> None:
    """One bit of the last number."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_is_one_line_with_the_choice_and_going_back_ends_as_before(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(finished, tmp_path / "run")
    damaged = run / "rounds" / "round-0004.safetensors"
    flip(damaged)
    assert main(["federate", "--resume", str(run)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("manylora:"))
    assert f"{damaged} is damaged" in line
    assert "--from-round 3" in line
    assert main(["federate", "--resume", str(run), "--from-round", "3"]) == 0
    assert results(run) == results(finished)


def test_a_private_state_that_is_lost_stops_a_run_of_one_machine_with_the_choice(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(finished, tmp_path / "run")
    state = run / "clients" / "swap" / "round-0004.safetensors"
    whole = state.read_bytes()
    for damage in (lambda: flip(state), state.unlink):
        damage()
        assert main(["federate", "--resume", str(run)]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("manylora:"))
        assert str(state) in line or "has no state of round 4" in line
        assert "--reset-client swap" in line
        assert "--from-round" in line
    assert main(["federate", "--resume", str(run), "--reset-client", "swap"]) == 0
    state.write_bytes(whole)
    flip(run / "reference" / "rounds" / "round-0004.safetensors")
    unfinished(run, tmp_path / "again")
    assert main(["federate", "--resume", str(tmp_path / "again")]) == 2
    assert f"remove {tmp_path / 'again' / 'reference'}" in capsys.readouterr().err


def test_clients_that_did_not_count_are_named_at_the_end(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[1:3]:
        row["refused"] = {"swap": "its private state is missing\x1b[2J"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["federate", "--resume", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "swap did not count in 2 of 4 rounds (last in round 3: its private state is missing?[2J)" in printed
    )


def test_a_dry_run_counts_and_writes_nothing(
    tiny_base: Path, small_data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*federate(tiny_base, small_data), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "14 adapted layers" in out
    assert "3 clients, ranks 6,4,2" in out
    assert (
        main(
            [
                "federate",
                "--dry-run",
                "--dimensions",
                "llama2-7b",
                "--ranks",
                "64,64,32,32,16,16,8,8",
                "--r",
                "16",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    for figure in ("12.12", "12.06", "49.28", "37.73", "9.23", "7.87", "8.39", "4.19", "6.42", "3.21"):
        assert figure in out
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--strategy", "fedavg"], "fedavg"),
        (["--strategy", "fedit", "--ranks", "4,2,2"], "needs one rank for all"),
        (["--ranks", "4,2,2,2"], "ranks names 4 clients, but there are 3"),
        (["--dry-run", "--clients", "2", "--ranks", "4,2,2"], "ranks names 3 clients, but there are 2"),
        (["--clients", "1000"], "cannot be dealt out to 1000 clients"),
        (["--dimensions", "llama2-7b"], "add --dry-run"),
        (["--wire", "fp8"], "fp8"),
        (["--a-state", "reset", "--strategy", "fedit"], "keep no A of their own"),
        (["--partition", "dirichlet", "--dirichlet-alpha", "0"], "dirichlet_alpha is 0"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--from-round", "2"], "name it with --resume"),
        (["--reset-client", "swap"], "name it with --resume"),
        (["--allow-strategy", "fed-alora"], "give them beside --node"),
        (["--node", "127.0.0.1:9", "--allow-strategy", "fedavg"], "there is no strategy 'fedavg'"),
        (["--node", "127.0.0.1:9", "--allow-parts", "B,M"], "there is no part 'M'"),
        (["--robust", "median", "--strategy", "flora"], "robust median means nothing to strategy flora"),
        (["--trim", "0.5"], "trim is 0.5"),
        (["--keep-rounds", "0"], "keep_rounds is 0"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str], reason: str, tiny_base: Path, small_data: Path, in_empty_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fixed = (
        [] if {"--resume", "--node"} & {*words} else ["--model", str(tiny_base), "--data", str(small_data)]
    )
    assert main(["federate", *fixed, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert reason in lines[0]
    assert list(in_empty_folder.iterdir()) == []
