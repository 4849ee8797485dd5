"""Whatever happened to a file of a run: the same result as before, or one line. Never a traceback, never another result.

Every file is deleted, emptied, halved, cut, bit-flipped, filled with garbage, and given values of wrong types; then
the run is resumed, evaluated, asked and exported.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from manylora.cli import main
from manylora.cli.scoring import score_run
from manylora.training import RunFolder, TrainConfig, finetune, prepare

SETTINGS = [
    "--device",
    "cpu",
    "--epochs",
    "1",
    "--batch-size",
    "4",
    "--save-steps",
    "2",
    "--max-new-tokens",
    "3",
]
WRONG = [None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x", "\ud800", [], [[]], {}, {"": None}, [1] * 3]


@dataclass(frozen=True)
class Damage:
    """What happened to a file."""

    name: str
    do: Callable[[Path, random.Random], None]
    to: str = ""
    """Endings of the files that it can happen to; all where empty."""


def _rewrite(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    return lambda path, dice: path.write_bytes(change(path.read_bytes(), dice)) and None  # type: ignore[func-returns-value]


def _flipped(raw: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(raw))
    return raw[:place] + bytes([raw[place] ^ (1 << dice.randrange(8))]) + raw[place + 1 :]


def _without_a_line(raw: bytes, dice: random.Random) -> bytes:
    lines = raw.splitlines(keepends=True)
    del lines[dice.randrange(len(lines))]
    return b"".join(lines)


def _wrong_value(path: Path, dice: random.Random) -> None:
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    whole = place = load(path.read_text(encoding="utf-8"))
    for _ in range(3):  # down to an object somewhere in the middle
        inner = [item for item in place.values() if isinstance(item, dict)]
        if not inner or dice.random() < 0.5:
            break
        place = dice.choice(inner)
    place[dice.choice([*place, "new"])] = dice.choice(WRONG)
    path.write_bytes(dump(whole).encode("utf-8", "surrogatepass"))


DAMAGES = [
    Damage("deleted", lambda path, _: path.unlink()),
    Damage("emptied", _rewrite(lambda raw, _: b"")),
    Damage("halved", _rewrite(lambda raw, _: raw[: len(raw) // 2])),
    Damage("cut", _rewrite(lambda raw, dice: raw[: -dice.randrange(1, 20)])),
    Damage("flipped", _rewrite(_flipped)),
    Damage("garbage", _rewrite(lambda raw, dice: dice.randbytes(200))),
    Damage("a folder", lambda path, _: None),  # type: ignore[func-returns-value]
    Damage("a line less", _rewrite(_without_a_line), ".yaml .json .jsonl"),
    Damage("a wrong value", _wrong_value, ".yaml .json"),
]
FILES = [
    "config.yaml",
    "state.json",
    "environment.json",
    "tasks.json",
    "scores.json",
    "metrics.jsonl",
    "predictions.jsonl",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "checkpoints/N/adapter_config.json",
    "checkpoints/N/adapter_model.safetensors",
    "checkpoints/N/complete.json",
    "checkpoints/N/losses.json",
    "checkpoints/N/optimizer.pt",
    "checkpoints/N/rng_state.pth",
    "checkpoints/N/scheduler.pt",
    "checkpoints/N/trainer_state.json",
]


@dataclass(frozen=True)
class Runs:
    """A run as it ended, and the same as it was killed between two checkpoints."""

    finished: Path
    killed: Path


class Kill(TrainerCallback):
    """Ends a training in the middle of a step's work."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    config = TrainConfig(
        model=str(tiny_base),
        data=str(small_data / "train"),
        test=str(small_data / "test"),
        limit=8,
        router="uniform",
        epochs=1,
        batch_size=4,
        learning_rate=0.05,
        save_steps=2,
        max_new_tokens=4,
        device="cpu",
    )
    for name in ("finished", "killed"):
        prepared = prepare(config)
        with RunFolder.create(str(folder / name), config=prepared.config.to_dict(), seed=0) as run:
            with contextlib.suppress(KeyboardInterrupt):
                model = finetune(prepared, run, callbacks=[Kill()] if name == "killed" else [])
            if name == "killed":
                run.set_state("failed", error="killed")
            else:
                score_run(prepared, run, model)
                run.set_state("finished")
    return Runs(finished=folder / "finished", killed=folder / "killed")


def verbs(run: Path, out: Path) -> dict[str, list[str]]:
    """What can be done with a run, by name."""
    return {
        "resume": ["train", "--resume", str(run)],
        "evaluate": ["evaluate", "--adapter", str(run), "--device", "cpu", "--out", str(out)],
        "predict": ["predict", "--adapter", str(run), "--device", "cpu", "--raw", "First of: red cat"],
        "export": ["export", str(run), "--to", str(out)],
    }


@contextlib.contextmanager
def workplace(run: Path, place: Path) -> Iterator[Path]:
    """A copy of a run under one and the same name, as the name is printed."""
    copy = place / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(place / "out", ignore_errors=True)
    shutil.copytree(run, copy)
    yield copy


def outcome(
    verb: str, run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, dict[str, bytes]]:
    """Exit code, error text, and what was found: printed scores and answers, or written weights."""
    capsys.readouterr()
    code = main(verbs(run, place / "out")[verb])
    told = capsys.readouterr()
    found: dict[str, bytes] = {}
    if code == 0 and verb == "resume":
        found = {"weights": (run / "adapter" / "adapter_model.safetensors").read_bytes()}
        found["scores"] = json.dumps(
            json.loads((run / "scores.json").read_text(encoding="utf-8"))["tasks"]
        ).encode()
    elif code == 0 and verb in ("export", "evaluate"):
        found = {p.name: p.read_bytes() for p in (place / "out").glob("*") if p.name != "README.md"}
    elif code == 0:
        found = {"printed": told.out.encode()}
    return code, told.err, found


@pytest.fixture(scope="module")
def expected(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, bytes]]:
    return {}


def check(
    runs: Runs,
    expected: dict[tuple[str, str], dict[str, bytes]],
    case: tuple[str, str, str, Damage, int],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Damage a file, use the run, compare; returns what is wrong, "" where nothing is."""
    which, verb, file, damage, seed = case
    run = getattr(runs, which)
    if (which, verb) not in expected:
        with workplace(run, place) as whole:
            code, err, found = outcome(verb, whole, place, capsys)
            assert code == 0, err
            expected[which, verb] = found
    with workplace(run, place) as copy:
        path = next(iter(copy.glob(file.replace("/N/", "/checkpoint-*/"))), None)
        if path is None:
            return ""
        damage.do(path, random.Random(f"{file} {damage.name} {seed}"))
        try:
            code, err, found = outcome(verb, copy, place, capsys)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    lines = [line for line in err.splitlines() if line.startswith("manylora: ")]
    if code == 2:
        return "" if len(lines) == 1 and "Traceback" not in err else f"not one line: {err}"
    if code != 0:
        return f"exit code {code}"
    return "" if found == expected[which, verb] else "another result"


def cases(count: int) -> list[tuple[str, str, str, Damage, int]]:
    found = []
    for file in FILES:
        for damage in DAMAGES:
            if damage.to and Path(file).suffix not in damage.to.split():
                continue
            for seed in range(
                count if damage.name in ("cut", "flipped", "a line less", "a wrong value") else 1
            ):
                found += [
                    ("finished", verb, file, damage, seed)
                    for verb in ("resume", "evaluate", "predict", "export")
                ]
                found.append(("killed", "resume", file, damage, seed))
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_gives_the_same_result_or_one_line(
    file: str,
    runs: Runs,
    expected: dict[tuple[str, str], dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path_factory.getbasetemp() / "damaged"
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    wanted = [case for case in cases(int(os.environ.get("FUZZ", "1"))) if case[2] == file]
    chosen = wanted if "FUZZ" in os.environ else random.Random(file).sample(wanted, 3)
    wrong = {}
    for case in chosen:
        problem = check(runs, expected, case, place, capsys)
        if problem:
            wrong[f"{case[0]} {case[1]} {case[3].name} {case[4]}"] = problem
    assert wrong == {}
