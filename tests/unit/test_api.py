"""The Python interface: real runs on the tiny base, and what it returns is what the command line writes and prints."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manylora
from manylora.cli import main
from manylora.errors import ConfigError, RunError
from manylora.jobs.run import FederatedRun, Run


@pytest.fixture(scope="module")
def settings(tiny_base: Path, small_data: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_base),
        "data": str(small_data / "train"),
        "test": str(small_data / "test"),
        "router": "task",
        "epochs": 1,
        "learning_rate": 0.01,
        "max_new_tokens": 4,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return manylora.train(**settings, out=tmp_path_factory.mktemp("api") / "run", progress=False)


def test_a_run_tells_what_its_folder_holds(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    saved = json.loads((run.path / "scores.json").read_text(encoding="utf-8"))
    assert run.finished
    assert run.scores.mean == saved["mean"]
    assert {task["task"]: task["score"] for task in saved["tasks"]} == run.scores.by_task()
    assert run.scores["swap"].score == run.scores.by_task()["swap"]
    with pytest.raises(KeyError, match="was not scored"):
        run.scores["unknown"]
    assert (run.adapter / "adapter_config.json").is_file()
    assert run.report is not None
    assert run.report.is_file()
    assert run.config.router == "task"
    assert repr(run) == f"Run({str(run.path)!r}, finished, mean {run.scores.mean:.1f})"
    assert "swap" in run._repr_html_()
    again = manylora.open_run(run.path)
    assert isinstance(again, Run)
    assert again.scores == run.scores
    assert again.config == run.config
    assert main(["train", "--resume", str(run.path)]) == 0
    printed = capsys.readouterr().out
    for task in run.scores.tasks:
        assert f"{task.score:.2f}" in next(line for line in printed.splitlines() if task.task in line)


def test_the_command_line_trains_the_same(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    for name in ("adapter/adapter_model.safetensors", "scores.json", "predictions.jsonl", "tasks.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run.path / name).read_bytes(), name


def test_a_run_goes_on_or_is_read(run: Run, settings: dict[str, Any], tmp_path: Path) -> None:
    before = (run.path / "state.json").read_bytes()
    assert manylora.train(**settings, out=run.path, resume=True, progress=False).scores == run.scores
    assert manylora.train(resume=run, progress=False, report=False).scores == run.scores
    assert (run.path / "state.json").read_bytes() == before
    with pytest.raises(RunError, match="other settings"):
        manylora.train(**{**settings, "r": 4}, out=run.path, resume=True, progress=False)
    with pytest.raises(RunError, match="exists already"):
        manylora.train(**settings, out=run.path, progress=False)
    with pytest.raises(ConfigError, match="leave out data, r"):
        manylora.train(resume=run, r=4, data="embedded", progress=False)
    with pytest.raises(RunError, match="not a run folder"):
        manylora.open_run(tmp_path)


def test_evaluate_predict_and_export_equal_the_command_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = manylora.evaluate(run, out=tmp_path / "python", progress=False, device="cpu")
    assert scores.by_task() == run.scores.by_task()
    assert main(["evaluate", "--adapter", str(run), "--out", str(tmp_path / "cli"), "--device", "cpu"]) == 0
    for name in ("scores.json", "predictions.jsonl"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()

    capsys.readouterr()
    prompts = ["First of: red cat", "Last of: dog up down"]
    answers = manylora.predict(run, prompts, task="swap", device="cpu", progress=False)
    assert [answer.expert for answer in answers] == [run.scores.tasks.index(run.scores["swap"])] * 2
    assert capsys.readouterr() == ("", "")
    for prompt, answer in zip(prompts, answers, strict=True):
        assert main(["predict", "--adapter", str(run), "--task", "swap", "--device", "cpu", prompt]) == 0
        assert capsys.readouterr().out.rstrip("\n") == str(answer)

    exported = manylora.export(run, to=tmp_path / "loras", progress=False)
    assert set(exported.folders) == set(run.scores.by_task())
    assert main(["export", str(run), "--to", str(tmp_path / "again")]) == 0
    for task, folder in exported.folders.items():
        name = "adapter_model.safetensors"
        assert (folder / name).read_bytes() == (tmp_path / "again" / task / name).read_bytes()
    with pytest.raises(ConfigError, match="leave out --limit"):
        manylora.export(run, to=tmp_path / "none", limit=3, progress=False)


def test_analyze_and_federate(
    run: Run, settings: dict[str, Any], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = manylora.analyze([run], measure="none", out="looked", progress=False)
    assert found.to_dict() == json.loads(Path("looked/analysis.json").read_text(encoding="utf-8"))
    assert repr(found) == f"Analysis({found.sources[0].name})"
    assert found._repr_html_().count("<table") == 2  # the adapter, and how alike its experts are
    shared = {name: settings[name] for name in ("model", "data", "test", "learning_rate", "device")}
    federated = manylora.federate(
        **shared, rounds=1, local_epochs=1, reference="none", out="f", progress=False, report=False
    )
    assert capsys.readouterr() == ("", "")
    again = manylora.open_run("f")
    assert isinstance(again, FederatedRun)
    assert again.scores.keys() == federated.scores.keys() == {"first_word", "last_word", "swap"}
    assert repr(again) == f"FederatedRun('f', finished, 3 clients, mean {again.mean:.1f})"
    assert "first_word" in again._repr_html_()
    assert manylora.federate(resume="f", progress=False).scores == again.scores


def test_nothing_is_shown_where_no_progress_is_wanted(
    settings: dict[str, Any], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manylora.train(**settings, tasks=["swap"], progress=False)
    assert capsys.readouterr() == ("", "")
    manylora.train(**settings, tasks=["swap"])
    assert "run folder: runs/train-002" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"learning_rat": 1.0}, "no setting 'learning_rat'; did you mean learning_rate"),
        ({"r": 0}, "r is 0; give a value above 0"),
        ({"r": "many"}, "r is 'many', not a whole number"),
    ],
)
def test_a_bad_setting_is_a_typed_error(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        manylora.train(**bad)


def test_a_configuration_and_settings_go_together(settings: dict[str, Any]) -> None:
    config = manylora.TrainConfig(**settings)
    with pytest.raises(ConfigError, match="learning_rate is -1"):
        manylora.train(config, learning_rate=-1.0)


def test_a_configuration_checks_its_types() -> None:
    with pytest.raises(ConfigError, match="r is '8', not a whole number"):
        manylora.TrainConfig(r="8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="robust is 'x', not one of"):
        manylora.FederateConfig(robust="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="learning_rate is nan; give a finite number"):
        manylora.TrainConfig(learning_rate=math.nan)


def test_what_does_not_go_together_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="of type TrainConfig, not FederateConfig"):
        manylora.federate(manylora.TrainConfig(), progress=False)  # type: ignore[arg-type]
    for about_a_run in ({"from_round": 1}, {"reset_client": "a"}):
        with pytest.raises(ConfigError, match="name it with resume"):
            manylora.federate(**about_a_run, progress=False)  # type: ignore[arg-type]
    for prompts in (None, [1], {"a": "b"}):
        with pytest.raises(ConfigError, match="prompts is"):
            manylora.predict(run, prompts, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"a prompt holds.*udc80"):
        manylora.predict(run, "x\udc80", progress=False)


def test_the_base_is_scored_on_the_same_rows(settings: dict[str, Any], in_empty_folder: Path) -> None:
    run = manylora.train(**settings, tasks=["swap"], score_base=True, out="run", progress=False)
    bare = manylora.evaluate(
        None,
        model=settings["model"],
        data=settings["test"],
        tasks=["swap"],
        max_new_tokens=4,
        device="cpu",
        progress=False,
    )
    assert run.gains["swap"].before == bare["swap"].score
    assert run.notes[0].startswith("Of 6 test rows the model answered")
    assert manylora.open_run("run").gains == run.gains  # type: ignore[union-attr]
    assert "before" in run._repr_html_()


def test_every_verb_takes_a_configuration(run: Run, tmp_path: Path) -> None:
    scores = manylora.evaluate(run, manylora.EvaluateConfig(device="cpu", limit=2), limit=3, progress=False)
    assert {task.n for task in scores.tasks} == {3}
    assert (
        manylora.evaluate(None, manylora.EvaluateConfig(adapter=str(run), limit=3), progress=False) == scores
    )
    (answer,) = manylora.predict(
        run, "Last of: dog up", manylora.PredictConfig(adapter=str(run), task="swap"), progress=False
    )
    assert answer.expert == run.scores.tasks.index(run.scores["swap"])
    config = manylora.ExportConfig(adapter=str(run), to=str(tmp_path / "loras"), tasks="swap")
    assert list(manylora.export(None, config, progress=False).folders) == ["swap"]
    other = manylora.ExportConfig(adapter=str(run), to=str(tmp_path / "x"), limit=3)
    with pytest.raises(ConfigError, match="leave out --limit"):
        manylora.export(config=other, progress=False)
    looked = manylora.AnalyzeConfig(adapters=str(run), measure="none", out=str(tmp_path / "looked"))
    assert manylora.analyze(config=looked, report=False, progress=False).sources
    with pytest.raises(ConfigError, match="cannot be read"):
        manylora.compare(config=manylora.CompareConfig(study=str(tmp_path / "none.yaml")), progress=False)
    with pytest.raises(ConfigError, match="name its folder with out"):
        manylora.train(resume=True, progress=False)


def test_a_verb_leaves_the_user_s_warnings_alone(run: Run) -> None:
    before = list(warnings.filters)
    manylora.predict(run, "Last of: dog up", task="swap", device="cpu", progress=False)
    assert warnings.filters == before


def test_a_configuration_may_leave_the_place_to_the_call(run: Run, tmp_path: Path) -> None:
    (answer,) = manylora.predict(
        run, "Last of: dog up", manylora.PredictConfig(task="swap", max_new_tokens=3), progress=False
    )
    assert answer.expert is not None
    exported = manylora.export(
        run, manylora.ExportConfig(tasks="swap"), to=tmp_path / "loras", progress=False
    )
    assert list(exported.folders) == ["swap"]
    looked = manylora.AnalyzeConfig(measure="none", out=str(tmp_path / "looked"))
    assert manylora.analyze(run, looked, report=False, progress=False).sources
    for verb, missing in (
        (lambda: manylora.export(run, manylora.ExportConfig(), progress=False), "--to is missing"),
        (lambda: manylora.analyze(progress=False), "nothing to analyze"),
        (lambda: manylora.evaluate(5, progress=False), "5 is neither a path nor a run"),  # type: ignore[arg-type]
        (lambda: manylora.analyze([5], progress=False), "5 is neither a path nor a run"),  # type: ignore[list-item]
        (lambda: manylora.train(resume=5, progress=False), "5 is neither a path nor a run"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=missing):
            verb()


def test_values_of_python_s_are_taken_as_a_file_would_hold_them(settings: dict[str, Any]) -> None:
    config = manylora.TrainConfig(data=Path("d") / "train", tasks=("a", "b"), r=np.int64(4))  # type: ignore[arg-type]
    assert (config.data, config.tasks, config.r) == (str(Path("d") / "train"), ["a", "b"], 4)
    assert type(config.r) is int
    assert manylora.FederateConfig(ranks=(2, 4)).ranks == [2, 4]  # type: ignore[arg-type]
