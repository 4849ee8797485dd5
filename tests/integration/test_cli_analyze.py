"""`manylora analyze` as a user runs it, on tiny adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from manylora.cli import main
from processes import cli_process, killed_process
from tiny_models import llama

PAIR = {
    "matrix", "layer", "module", "left", "right", "same_task", "same_init", "mean_cosine", "mean_squared",
    "baseline_cosine", "baseline_squared",
}  # fmt: skip
CHANGE = {
    "source", "matrix", "layer", "module", "from_step", "to_step", "similarity", "magnitude", "direction",
}  # fmt: skip


def plain_lora(folder: Path, seed: int, rank: int = 2) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    model.peft_config["default"].base_model_name_or_path = "nowhere/x"
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that shares B and one that shares A, both with kept weights."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("alora", "hydralora"):
        words = [
            "train", "--model", tiny_base, "--data", small_data / "train", "--epochs", 1, "--batch-size", 8,
            "--learning-rate", 0.01, "--device", "cpu", "--method", method, "--keep-adapters", 1,
            "--out", folder / method,
        ]  # fmt: skip
        assert main([str(word) for word in words]) == 0
    return folder


def analysis(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    return found


def test_plain_loras_are_compared_without_their_base(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        plain_lora(tmp_path / name, seed)
    process = cli_process(
        ["analyze", "one", "two", "three", "--label", "one=sums,0", "--label", "two/=stories,0",
         "--label", "three=sums,1", "--out", "out"],
        tmp_path,
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    for words in ("other task, same init", "same task, other init", "other task, other init", "random σ"):
        assert words in out
    found = analysis(tmp_path / "out")
    assert (found["kind"], found["gradients"], found["gates"]) == ("analyze", None, [])
    assert [
        (source["name"], source["format"], source["tasks"], source["seed"]) for source in found["sources"]
    ] == [("one", "lora", ["sums"], 0), ("two", "lora", ["stories"], 0), ("three", "lora", ["sums"], 1)]
    assert len(found["similarity"]) == 3 * 4 * 2
    for pair in found["similarity"]:
        assert pair.keys() >= PAIR
        assert 0 <= pair["mean_squared"] <= pair["mean_cosine"] <= 1
    labels = {
        (pair["left"], pair["right"]): (pair["same_task"], pair["same_init"]) for pair in found["similarity"]
    }
    assert labels == {("one", "two"): (False, True), ("one", "three"): (True, False),
                      ("two", "three"): (False, False)}  # fmt: skip
    assert (tmp_path / "out" / "environment.json").is_file()
    assert json.loads((tmp_path / "out" / "state.json").read_text())["state"] == "finished"


def test_runs_are_measured_on_their_own_rows(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["analyze", runs / "alora", runs / "hydralora", "--limit", 6, "--device", "cpu", "--out", out]
    assert main([str(word) for word in words]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # titles are wrapped
    found = analysis(out)
    assert [source["tasks"] for source in found["sources"]] == [["first_word", "last_word", "swap"]] * 2
    shared = {one["source"]: (one["shared"], one["rows"]["swap"]) for one in found["gradients"]["sources"]}
    assert shared == {"alora": ("B", 6), "hydralora": ("A", 6)}
    assert found["gradients"]["shared"] == "B"
    assert len(found["gradients"]["norms"]) == 2 * 3 * 14
    assert len(found["gradients"]["conflict"]) == 2 * 3 * 14
    assert all(-1 <= pair["cosine"] <= 1 for pair in found["gradients"]["conflict"])
    assert {gate["task"] for gate in found["gates"]} == {"first_word", "last_word", "swap"}
    assert len(found["gates_over_tasks"]) == 2 * 14
    assert all(sum(gate["weights"]) == pytest.approx(1) for gate in found["gates"])
    spans = {(c["source"], c["matrix"], c["from_step"], c["to_step"]) for c in found["change"]}
    assert spans == {
        (name, *span) for name in ("alora", "hydralora") for span in (("A", 0, 2), ("A", 0, 9), ("A", 2, 9),
                                                                      ("B", 2, 9))
    }  # fmt: skip
    assert all(change.keys() >= CHANGE for change in found["change"])
    inside = {(p["left"], p["right"]) for p in found["similarity"] if p["one_adapter"] and p["matrix"] == "A"}
    assert ("alora/expert-0", "alora/expert-1") in inside
    for text in (
        "experts of one adapter",
        "cosine between tasks' gradients on B",
        "halves' cosine",
        "gates",
    ):
        assert text in printed


def test_a_kept_step_can_be_measured_instead_of_the_last(runs: Path, tmp_path: Path) -> None:
    for name, more in (("end", []), ("early", ["--step", "2"])):
        words = ["analyze", runs / "alora", "--limit", 4, "--measure", "gradients", "--device", "cpu", *more]
        assert main([str(word) for word in (*words, "--out", tmp_path / name)]) == 0
    end, early = (
        [norm["norm"] for norm in analysis(tmp_path / name)["gradients"]["norms"]]
        for name in ("end", "early")
    )
    assert len(end) == len(early)
    assert end != pytest.approx(early)
    assert analysis(tmp_path / "end")["gates"] == []


def test_what_cannot_be_measured_is_a_note_unless_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(plain_lora(tmp_path / "one", 0))
    assert main(["analyze", path, "--out", str(tmp_path / "out")]) == 0
    notes = analysis(tmp_path / "out")["notes"]
    assert len(notes) == 3
    assert "gradients and gates were not measured" in notes[2]
    assert notes[2] in " ".join(capsys.readouterr().out.split())
    assert main(["analyze", path, "--measure", "gradients", "--out", str(tmp_path / "other")]) == 2
    assert "--data" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], ["nothing to analyze"]),
        (["nowhere"], ["nowhere", "neither a run folder nor a PEFT adapter folder"]),
        (["one", "wide"], ["inputs", "only adapters of one base"]),
        (["one", "one"], ["give each once"]),
        (["one", "--label", "one"], ["--label one", "PATH=TASK,SEED"]),
        (["one", "--label", "one=sums,x"], ["--label one=sums,x"]),
        (["one", "--label", "two=sums,1"], ["two", "names none of the adapters"]),
        (["one", "--step", "3"], ["--data"]),
        (["one", "--out", "one"], ["one exists already"]),
        (["one", "--figures"], ["leave the folders out"]),
        (["--figures", "--tasks", "review_verdict"], ["two tasks"]),
        (["--figures", "--seeds", "1"], ["two or more different seeds"]),
        (["--figures", "--seeds", "0,x"], ["0,x", "no numbers"]),
        (["--figures", "--data", "rows"], ["--tasks a,b"]),
        (["--figures", "--tasks", "review_verdict,no_such"], ["no_such"]),
        (["one", "--limit", "0"], ["limit is 0"]),
        (["pickled"], ["pickled weights are not read"]),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], wanted: list[str], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_lora(Path("one"), 0)
    torch.manual_seed(0)
    wide = llama()
    wide.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 48)
    get_peft_model(wide, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        "wide", save_embedding_layers=False
    )
    plain_lora(Path("pickled"), 0)
    Path("pickled/adapter_model.safetensors").rename("pickled/adapter_model.bin")
    capsys.readouterr()
    before = set(in_empty_folder.rglob("*"))
    assert main(["analyze", *words]) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1, err
    for text in wanted:
        assert text in err
    assert set(in_empty_folder.rglob("*")) == before, "something was written"


def test_figures_go_on_after_a_kill(
    tiny_base: Path, small_data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "analyze", "--figures", "--model", str(tiny_base), "--data", str(small_data), "--tasks", "swap,last_word",
        "--epochs", "2", "--learning-rate", "0.01", "--r", "4", "--device", "cpu", "--out", "figures",
    ]  # fmt: skip
    first, second = (in_empty_folder / "figures" / "runs" / f"swap-seed-{seed}" for seed in (0, 1))
    killed_process(words, in_empty_folder, before="swap-seed-1/config.yaml")
    weights = (first / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert main(words) == 0
    assert "run 1/4: swap, seed 0 (finished before)" in capsys.readouterr().err
    assert (first / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == weights
    found = analysis(Path("figures"))
    labels = {(p["left"], p["right"]): (p["same_task"], p["same_init"]) for p in found["similarity"]}
    assert sorted(labels.values()) == [(False, False)] * 2 + [(False, True)] * 2 + [(True, False)] * 2
    same_seed = [p["mean_cosine"] for p in found["similarity"] if p["same_init"] and p["matrix"] == "A"]
    other = [p["mean_cosine"] for p in found["similarity"] if not p["same_init"] and p["matrix"] == "A"]
    assert min(same_seed) > max(other), "A is alike where the seed is the same"
    assert {(c["matrix"], c["from_step"]) for c in found["change"]} == {("A", 0), ("A", 2), ("B", 2)}
    scores = [json.loads((run / "scores.json").read_text())["mean"] for run in (first, second)]
    assert [source["score"] for source in found["sources"][:2]] == scores
    before = (in_empty_folder / "figures" / "analysis.json").read_bytes()
    assert main(words) == 0
    assert (in_empty_folder / "figures" / "analysis.json").read_bytes() == before
    capsys.readouterr()
    assert main([*words, "--limit", "7"]) == 0  # not what the runs depend on
    assert main([*words, "--r", "2"]) == 2
    assert "figures with another --r (4)" in capsys.readouterr().err
