"""Bad input: one clear line with the value and the remedy, exit code 2, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from manylora.cli import main
from processes import cli_process


def row(**fields: object) -> str:
    return json.dumps(fields) + "\n"


GOOD = row(instruction="Say hi", output="hi") * 4

CASES: dict[str, tuple[str | None, list[str], list[str]]] = {
    # name: (contents of data.jsonl, further arguments, what the line must contain)
    "missing path": (None, ["--data", "nowhere/rows.jsonl"], ["nowhere/rows.jsonl", "does not exist"]),
    "empty file": ("", [], ["data.jsonl", "empty"]),
    "broken line": (GOOD + '{"instruction": "x"\n', [], ["data.jsonl:5"]),
    "missing field": (row(question="x", output="y"), [], ["data.jsonl:1", "question", "instruction"]),
    "output of the wrong type": (row(instruction="x", output=[1]), [], ["data.jsonl:1", "output"]),
    "task of the wrong type": (row(instruction="x", output="y", task=3.5), [], ["data.jsonl:1", "task"]),
    "missing task column": (GOOD, ["--task-column", "kind"], ["kind"]),
    "unknown task": (GOOD, ["--tasks", "poetry"], ["poetry", "data"]),
    "unknown model folder": (GOOD, ["--model", "./no/such/model"], ["./no/such/model", "folder"]),
    "unknown hub model": (GOOD, ["--model", "nobody/nothing"], ["nobody/nothing", "Hub"]),
    "nothing to adapt": (GOOD, ["--target-modules", "query_proj"], ["query_proj", "q_proj"]),
    "unknown option": (GOOD, ["--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
    "wrong choice": (GOOD, ["--share", "C"], ["--share", "C"]),
    "not a number": (GOOD, ["--r", "eight"], ["--r", "eight"]),
    "negative rank": (GOOD, ["--r", "-1"], ["r is -1"]),
    "more than all memory": (GOOD, ["--r", "100000000"], ["needs about", "MiB", "lower --r"]),
    "micro batch": (GOOD, ["--batch-size", "16", "--micro-batch-size", "5"], ["5", "16"]),
    "missing config file": (GOOD, ["--config", "absent.yaml"], ["absent.yaml"]),
    "experts against tasks": (GOOD, ["--router", "task", "--num-experts", "4"], ["4", "task"]),
    "experts beyond all use": (
        GOOD,
        ["--num-experts", "1000000000", "--dry-run"],
        ["num_experts=1000000000"],
    ),
    "epochs beyond all time": (GOOD, ["--epochs", "1e12"], ["epochs 1e+12", "fewer"]),
    "an expression that backtracks": (
        GOOD,
        ["--target-modules", r"(a|aa|\w|\.|\w\w)+(\w+)+(\w+)+\$", "--dry-run"],
        ["target_modules", "backtracks"],
    ),
    "no data": (GOOD, ["--data", ""], ["data is empty"]),
    "a name that is no UTF-8": (GOOD, ["--out", "run\udcff"], ["out is", "UTF-8"]),
}


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("manylora: ")
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_to_train_is_one_line_and_exit_code_2(
    case: str, tiny_base: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents, more, wanted = CASES[case]
    if contents is not None:
        Path("data.jsonl").write_text(contents, encoding="utf-8")
    before = set(in_empty_folder.iterdir())
    model = [] if "--model" in more else ["--model", str(tiny_base)]
    data = [] if "--data" in more else ["--data", "data.jsonl"]
    assert main(["train", *model, *data, "--device", "cpu", *more]) == 2
    line = only_line(capsys)
    for text in wanted:
        assert text in line
    assert set(in_empty_folder.iterdir()) == before, "something was written"


def test_a_line_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", "a" * 100_000]) == 2
    assert len(only_line(capsys)) < 2_100


def test_in_a_process_of_its_own_it_is_one_line_too(tmp_path: Path) -> None:
    # here the libraries are imported anew, and what they log at import would stand beside our line
    process = cli_process(["evaluate", "--data", "absent.jsonl"], tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("manylora: absent.jsonl does not exist")


def test_a_router_that_is_none_is_refused(
    tiny_base: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.jsonl").write_text(GOOD, encoding="utf-8")
    assert main(["train", "--model", str(tiny_base), "--data", "data.jsonl", "--router", "none"]) == 2
    line = only_line(capsys)
    assert "--router" in line
    assert "token" in line


def test_an_existing_run_folder_is_not_touched(
    tiny_base: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.jsonl").write_text(GOOD, encoding="utf-8")
    Path("run").mkdir()
    Path("run/precious.txt").write_text("mine", encoding="utf-8")
    assert main(["train", "--model", str(tiny_base), "--data", "data.jsonl", "--out", "run"]) == 2
    line = only_line(capsys)
    assert "run exists already" in line
    assert "--resume" in line
    assert [path.name for path in Path("run").iterdir()] == ["precious.txt"]


@pytest.fixture(scope="module")
def small_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data.jsonl").write_text(GOOD, encoding="utf-8")
    command = ["train", "--model", str(tiny_base), "--data", str(folder / "data.jsonl"), "--epochs", "1"]
    assert main([*command, "--device", "cpu", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_training_rows_are_not_scored_as_test_rows(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--adapter", str(small_run), "--device", "cpu"]) == 2
    line = only_line(capsys)
    assert "no test rows" in line
    assert "--data" in line


def test_predict_refuses_a_task_that_the_run_does_not_know(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", "--adapter", str(small_run), "--device", "cpu", "--max-new-tokens", "1", "hello"]
    assert main([*command, "--task", "nonsense"]) == 2
    line = only_line(capsys)
    assert "'nonsense' is unknown" in line
    known = line.rpartition("it knows ")[2].rstrip(".\n").split(", ")
    assert main([*command, "--task", known[0]]) == 0


def damaged(run: Path, to: Path, spoil: Callable[[Path], object]) -> str:
    shutil.copytree(run, to)
    spoil(to)
    return str(to)


def test_an_adapter_of_another_base_is_refused(
    small_run: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, set_seed

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    set_seed(1)
    config = AutoModelForCausalLM.from_pretrained(tiny_base).config
    AutoModelForCausalLM.from_config(config).save_pretrained(other)  # same shapes, other weights
    command = ["predict", "--adapter", str(small_run), "--device", "cpu", "Say hi"]
    capsys.readouterr()
    assert main([*command, "--model", str(other)]) == 2
    assert "another base model" in only_line(capsys)
    config.intermediate_size = 48
    AutoModelForCausalLM.from_config(config).save_pretrained(other)  # other shapes
    assert main([*command, "--model", str(other)]) == 2
    assert "--model" in only_line(capsys)


def test_broken_adapters_are_refused(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(run: Path) -> None:
        path = run / "adapter" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def scribble(run: Path) -> None:
        (run / "adapter" / "adapter_config.json").write_text("{", encoding="utf-8")

    def pickle(run: Path) -> None:
        (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "adapter_model.bin")

    cases = {
        damaged(small_run, tmp_path / "cut", cut): "broken",
        damaged(small_run, tmp_path / "scribbled", scribble): "adapter_config.json",
        damaged(small_run, tmp_path / "unfinished", lambda run: shutil.rmtree(run / "adapter")): "--resume",
        damaged(small_run, tmp_path / "pickled", pickle): "pickled weights are not read",
        str(tmp_path / "absent"): "neither a run folder nor",
    }
    capsys.readouterr()
    for path, wanted in cases.items():
        assert main(["predict", "--adapter", path, "--device", "cpu", "Say hi"]) == 2
        assert wanted in only_line(capsys)


def test_resume_refuses_what_it_cannot_continue(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change_data(run: Path) -> None:
        rows = run / "rows.jsonl"
        rows.write_text(GOOD + row(instruction="More", output="rows"), encoding="utf-8")
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": str(rows)}), encoding="utf-8")
        state = json.loads((run / "state.json").read_text(encoding="utf-8"))
        (run / "state.json").write_text(json.dumps({**state, "state": "failed"}), encoding="utf-8")

    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "absent")]) == 2
    assert "not a run folder" in only_line(capsys)
    assert main(["train", "--resume", damaged(small_run, tmp_path / "changed", change_data)]) == 2
    assert "changed" in only_line(capsys)
    assert main(["train", "--resume", str(small_run), "--r", "4"]) == 2
    assert "leave out --r" in only_line(capsys)
    assert main(["train", "--resume", str(small_run)]) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["fly"], "train, evaluate, predict"),
        (["predict", "hello"], "--adapter"),
        (["evaluate", "--data", "absent.jsonl"], "absent.jsonl"),
        (["evaluate", "--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_other_verbs_complain_in_one_line(
    words: list[str], wanted: str, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert wanted in only_line(capsys)


def test_code_beside_a_model_never_runs(
    tiny_base: Path,
    in_empty_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("data.jsonl").write_text(GOOD, encoding="utf-8")
    Path("strange").mkdir()
    config = {"model_type": "weird", "auto_map": {"AutoConfig": "evil.Cfg"}}
    Path("strange/config.json").write_text(json.dumps(config), encoding="utf-8")
    Path("strange/evil.py").write_text("open('ran.txt', 'w')\nclass Cfg: pass\n", encoding="utf-8")
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("y\ny\n")
    )  # the answer to the question that must not be asked
    assert main(["train", "--model", "./strange", "--data", "data.jsonl", "--dry-run"]) == 2
    assert str(Path("strange").absolute()) in only_line(capsys)  # a run keeps absolute paths
    assert not Path("ran.txt").exists()


@pytest.mark.parametrize(
    ("test_row", "more", "wanted"),
    [
        (row(instruction="x", output="y", task="other"), ["--router", "task"], "other"),
        (
            row(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
            [],
            "chat template",
        ),
        (row(instruction="x", output="y", answer="true") + row(instruction="z", output="y"), [], "answer"),
    ],
)
def test_test_rows_that_cannot_be_scored_are_refused_before_training(
    test_row: str,
    more: list[str],
    wanted: str,
    tiny_base: Path,
    in_empty_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = row(instruction="a", output="b", task="one") + row(instruction="c", output="d", task="two")
    Path("data.jsonl").write_text(rows * 3, encoding="utf-8")
    Path("test.jsonl").write_text(test_row, encoding="utf-8")
    command = [
        "train",
        "--model",
        str(tiny_base),
        "--data",
        "data.jsonl",
        "--test",
        "test.jsonl",
        "--out",
        "run",
    ]
    assert main([*command, "--device", "cpu", *more]) == 2
    assert wanted in only_line(capsys)
    assert not Path("run").exists()


def test_task_names_are_text_and_not_markup(
    tiny_base: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.jsonl").write_text(row(instruction="a", output="b", task="[/red]y") * 3, encoding="utf-8")
    assert (
        main(["train", "--model", str(tiny_base), "--data", "data.jsonl", "--device", "cpu", "--dry-run"])
        == 0
    )
    assert "[/red]y" in capsys.readouterr().out


def test_a_damaged_checkpoint_and_a_changed_base_are_refused_on_resume(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (tmp_path / "data.jsonl").write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    command = ["train", "--model", "./base", "--data", "data.jsonl", "--epochs", "4", "--batch-size", "1"]
    assert main([*command, "--device", "cpu", "--save-steps", "2", "--out", "run"]) == 0
    state = json.loads(Path("run/state.json").read_text(encoding="utf-8"))
    Path("run/state.json").write_text(json.dumps({**state, "state": "failed"}), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the paths above were relative
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    whole = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(whole[:300])
    capsys.readouterr()
    assert main(["train", "--resume", "../run"]) == 2
    assert f"{checkpoint.name} is damaged" in capsys.readouterr().err
    (checkpoint / "optimizer.pt").write_bytes(whole)
    assert main(["train", "--resume", "../run"]) == 0
    state = json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "state.json").write_text(json.dumps({**state, "state": "failed"}), encoding="utf-8")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] = -weights["model.embed_tokens.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["train", "--resume", "../run"]) == 2
    assert "base of ../run has changed" in capsys.readouterr().err


def test_odd_surroundings_end_cleanly(small_run: Path, tmp_path: Path) -> None:
    def shell(line: str) -> subprocess.CompletedProcess[bytes]:
        command = f"set -o pipefail; {sys.executable} -m manylora.cli {line}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ADAPTER": str(small_run)}
        return subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=False,
            timeout=300,
        )

    closed = shell('predict --adapter "$ADAPTER" <&-')
    assert (closed.returncode, b"Traceback" in closed.stderr) == (2, False)
    left = shell('evaluate --adapter "$ADAPTER" --data ' + str(small_run.parent / "data.jsonl") + " | true")
    assert b"Traceback" not in left.stderr
    ascii_only = shell("--help | PYTHONIOENCODING=ascii cat")
    assert ascii_only.returncode == 0


def test_predict_names_the_broken_row(
    small_run: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text(row(instruction="Say hi") + "{broken\n", encoding="utf-8")
    capsys.readouterr()
    assert main(["predict", "--adapter", str(small_run), "--device", "cpu", "--file", "rows.jsonl"]) == 2
    captured = capsys.readouterr()
    assert re.search(r"rows\.jsonl:2 is not valid JSON", captured.err)
    answered = json.loads(captured.out)
    assert answered["instruction"] == "Say hi"
    assert isinstance(answered["prediction"], str)


def test_a_full_disk_ends_in_one_line_and_a_run_that_resumes(tiny_base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("needs permission to mount a small file system")
    try:
        rows = tmp_path / "data.jsonl"
        rows.write_text(GOOD, encoding="utf-8")
        command = ["train", "--model", tiny_base, "--data", rows, "--device", "cpu", "--out", small / "run"]
        done = subprocess.run(
            [sys.executable, "-m", "manylora.cli", *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "disk is full" in done.stderr
        assert "--resume" in done.stderr
        assert not (small / "run" / "adapter").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        assert main(["train", "--resume", str(small / "run")]) == 0
        assert (small / "run" / "adapter" / "adapter_model.safetensors").is_file()
    finally:
        subprocess.run(["umount", str(small)], check=True)
