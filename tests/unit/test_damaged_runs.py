"""Whatever happened to a file of a run: the same result as before, or one line. No traceback, no other result.

Every file is deleted, emptied, halved, cut, bit-flipped, filled with garbage, and given values of wrong types; then
the run is resumed, evaluated, asked and exported. A few of these cases are drawn here; FUZZ=3 in the environment runs
all of them, with three draws of each damage that is drawn.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from manylora.cli import main
from manylora.files import remove
from manylora.jobs.progress import Progress
from manylora.jobs.session import Session
from manylora.jobs.train import train_prepared
from manylora.training import TrainConfig, finetune, prepare

VERBS = ("resume", "evaluate", "predict", "export")
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
    "adapter/manylora_prompts.json",
    "checkpoints/N/adapter_config.json",
    "checkpoints/N/adapter_model.safetensors",
    "checkpoints/N/complete.json",
    "checkpoints/N/losses.json",
    "checkpoints/N/optimizer.pt",
    "checkpoints/N/rng_state.pth",
    "checkpoints/N/scheduler.pt",
    "checkpoints/N/trainer_state.json",
]
WRONG = [None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x", "\ud800", [], [[]], {}, {"": None}, [1] * 3]


@dataclass(frozen=True)
class Damage:
    """What happened to a file."""

    name: str
    do: Callable[[Path, random.Random], object]
    to: str = ""
    """Endings of the files that it can happen to; all where empty."""
    drawn: bool = False
    """Whether it differs from draw to draw."""


def rewrite(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], object]:
    return lambda path, dice: path.write_bytes(change(path.read_bytes(), dice))


def flipped(raw: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(raw))
    return raw[:place] + bytes([raw[place] ^ (1 << dice.randrange(8))]) + raw[place + 1 :]


def without_a_line(raw: bytes, dice: random.Random) -> bytes:
    lines = raw.splitlines(keepends=True)
    del lines[dice.randrange(len(lines))]
    return b"".join(lines)


def put_wrong_value(path: Path, dice: random.Random) -> None:
    load, dump = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    whole = place = load(path.read_text(encoding="utf-8"))
    for _ in range(3):  # down to an object somewhere in the middle
        inner = [item for item in place.values() if isinstance(item, dict)]
        if not inner or dice.random() < 0.5:
            break
        place = dice.choice(inner)
    place[dice.choice([*place, "new"])] = dice.choice(WRONG)
    path.write_bytes(dump(whole).encode("utf-8", "surrogatepass"))


def put_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    Damage("deleted", lambda path, _: path.unlink()),
    Damage("emptied", rewrite(lambda raw, _: b"")),
    Damage("halved", rewrite(lambda raw, _: raw[: len(raw) // 2])),
    Damage("cut", rewrite(lambda raw, dice: raw[: -dice.randrange(1, 20)]), drawn=True),
    Damage("flipped", rewrite(flipped), drawn=True),
    Damage("garbage", rewrite(lambda raw, dice: dice.randbytes(200))),
    Damage("a folder", put_folder),
    Damage("a line less", rewrite(without_a_line), ".yaml .json .jsonl", drawn=True),
    Damage("a wrong value", put_wrong_value, ".yaml .json", drawn=True),
]


@dataclass(frozen=True)
class Case:
    run: str
    verb: str
    damage: Damage
    draw: int

    def __str__(self) -> str:
        return f"{self.run} {self.verb} {self.damage.name} {self.draw}"


def cases(file: str, draws: int) -> list[Case]:
    return [
        Case(f"{age}{run}", verb, damage, draw)
        for damage in DAMAGES
        if not damage.to or Path(file).suffix in damage.to.split()
        for draw in range(draws if damage.drawn else 1)
        for age in ("", "old ")
        for run, verb in (*(("finished", verb) for verb in VERBS), ("killed", "resume"))
    ]


class Kill(TrainerCallback):
    """Ends a training in the middle of a step's work."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run that ended and the same killed between two checkpoints; and the two as earlier versions wrote
    them, without checksums, so that damage may go unnoticed."""
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
        settings = prepared.config.to_dict()
        with Session.begin(folder / name, config=settings, progress=Progress()) as session:
            if name == "killed":
                with contextlib.suppress(KeyboardInterrupt):
                    finetune(prepared, session.folder, callbacks=[Kill()])
                session.folder.set_state("failed", error="killed")
            else:
                train_prepared(prepared, session, progress=Progress())
        shutil.copytree(folder / name, folder / f"old {name}")
        for path in (folder / f"old {name}").rglob("*.json"):
            if path.name in ("state.json", "complete.json"):
                values = json.loads(path.read_text(encoding="utf-8"))
                del values["files"]
                path.write_text(json.dumps(values), encoding="utf-8")
    return folder


def use(verb: str, run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, bytes]]:
    """Exit code, error text, and what was found: scores and answers, or written weights."""
    out = run.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = {
        "resume": ["train", "--resume", run],
        "evaluate": ["evaluate", "--adapter", run, "--device", "cpu", "--out", out],
        "predict": ["predict", "--adapter", run, "--device", "cpu", "--raw", "First of: red cat"],
        "export": ["export", run, "--to", out],
    }[verb]
    capsys.readouterr()
    code = main(list(map(str, words)))
    told = capsys.readouterr()
    found: dict[str, bytes] = {}
    if code == 0 and verb == "resume":
        for path in (run / "adapter" / "adapter_model.safetensors", run / "predictions.jsonl"):
            found[path.name] = path.read_bytes() if path.is_file() else b""
    elif code == 0 and verb in ("export", "evaluate"):
        found = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "README.md"}
    elif code == 0:
        found["answer"] = told.out.encode()
    return code, told.err, found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], dict[str, bytes]]:
    """What the whole runs give, filled as it is asked for."""
    return {}


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_gives_the_same_result_or_one_line(
    file: str,
    runs: Path,
    expected: dict[tuple[str, str], dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = (
        tmp_path_factory.getbasetemp() / "damaged"
    )  # one place for all, as its name stands in what is printed
    every = cases(file, int(os.environ.get("FUZZ", "1")))
    chosen = every if "FUZZ" in os.environ else random.Random(file).sample(every, 1)

    def used(case: Case, *, damaged: bool) -> tuple[int, str, dict[str, bytes]]:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(runs / case.run, place / "run")
        path = next(iter((place / "run").glob(file.replace("/N/", "/checkpoint-*/"))), None)
        if damaged and path is not None:
            case.damage.do(path, random.Random(f"{file} {case}"))
        return use(case.verb, place / "run", capsys)

    wrong = {}
    for case in chosen:
        if (case.run, case.verb) not in expected:
            code, err, expected[case.run, case.verb] = used(case, damaged=False)
            assert code == 0, err
        try:
            code, err, found = used(case, damaged=True)
        except Exception as error:
            wrong[str(case)] = f"{type(error).__name__}: {error}"
            continue
        lines = [line for line in err.splitlines() if line.startswith("manylora: ")]
        if code == 2 and len(lines) != 1:
            wrong[str(case)] = f"not one line: {err}"
        elif code == 0 and found != expected[case.run, case.verb] and "old" not in case.run:
            wrong[str(case)] = "another result"
        elif code not in (0, 2):
            wrong[str(case)] = f"exit code {code}"
    assert wrong == {}


def test_the_older_checkpoint_is_taken_where_the_newest_is_damaged(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "killed", run)
    newer = run / "checkpoints" / "checkpoint-3"
    shutil.copytree(run / "checkpoints" / "checkpoint-2", newer)
    (newer / "optimizer.pt").write_bytes(b"")
    code, err, found = use("resume", run, capsys)
    assert code == 0, err
    assert (
        "checkpoint-3 is damaged (optimizer.pt is not what the run wrote); the run goes on from checkpoint-2"
        in err
    )
    assert not newer.exists()
    assert found == use("resume", runs / "finished", capsys)[2]


@pytest.mark.parametrize(
    ("name", "to"),
    [
        (".lock", "file"),
        ("state.json.partial", "file"),
        ("metrics.jsonl", "file"),
        ("report.html.partial", "file"),
        ("figures", "folder"),
        ("checkpoints/checkpoint-9", "folder"),
        ("adapter.partial", "folder"),
    ],
)
@pytest.mark.parametrize("which", ["finished", "killed"])
def test_a_stranger_s_run_cannot_make_resume_write_elsewhere(
    which: str, name: str, to: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(runs / which, run)
    mine.mkdir()
    (mine / "file").write_text("precious", encoding="utf-8")
    before = sorted(mine.rglob("*"))
    remove(run / name)
    (run / name).symlink_to(mine / "file" if to == "file" else mine)
    code, err, _ = use("resume", run, capsys)
    assert code == 2
    assert f"{name} is a link that leads out of its folder" in err
    assert sorted(mine.rglob("*")) == before
    assert (mine / "file").read_text(encoding="utf-8") == "precious"


def test_a_finished_run_whose_adapter_is_gone_makes_it_again(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "finished", run)
    shutil.rmtree(run / "adapter")
    code, err, _ = use("predict", run, capsys)
    assert code == 2
    assert f"manylora train --resume {run}" in err
    assert use("resume", run, capsys)[2] == use("resume", runs / "finished", capsys)[2]
    assert use("predict", run, capsys)[0] == 0


def test_settings_that_were_changed_are_refused_until_their_note_is_removed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "killed", run)
    path = run / "config.yaml"
    path.write_text(
        path.read_text(encoding="utf-8").replace("lora_alpha: 16.0", "lora_alpha: 32.0"), encoding="utf-8"
    )
    code, err, _ = use("resume", run, capsys)
    assert code == 2
    assert 'remove its line under "files" in' in err
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    del state["files"]["config.yaml"]
    (run / "state.json").write_text(json.dumps(state), encoding="utf-8")
    assert use("resume", run, capsys)[0] == 0


@pytest.mark.parametrize("verb", ["evaluate", "predict", "export"])
@pytest.mark.parametrize("state", [None, "{", "files"])
def test_without_the_run_s_notes_no_adapter_is_used(
    verb: str, state: str | None, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "finished", run)
    known = json.loads((run / "state.json").read_text(encoding="utf-8"))
    if state is None:
        (run / "state.json").unlink()
    else:
        text = state if state == "{" else json.dumps({**known, "files": []})
        (run / "state.json").write_text(text, encoding="utf-8")
    code, err, _ = use(verb, run, capsys)
    assert code == 2
    (line,) = err.splitlines()
    assert "state.json is missing or broken" in line
    shutil.copytree(run / "adapter", tmp_path / "alone")
    assert main(["predict", "--adapter", str(tmp_path / "alone"), "--device", "cpu", "--raw", "hi"]) == 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "complete.json"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_checkpoint_that_was_changed_is_not_used(
    name: str, moved: bool, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "finished", run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    if moved:
        checkpoint = checkpoint.rename(tmp_path / "moved")
    ask = ["predict", "--adapter", str(checkpoint), "--device", "cpu", "--raw", "--max-new-tokens", "2", "hi"]
    assert main(ask) == 0
    raw = (checkpoint / name).read_bytes()
    cut = name == "complete.json"  # of which a bit may belong to a file that nobody reads here
    (checkpoint / name).write_bytes(raw[:-20] + (b"" if cut else bytes([raw[-20] ^ 1]) + raw[-19:]))
    capsys.readouterr()
    assert main(ask) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "complete.json" in line
