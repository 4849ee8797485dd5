"""`manylora export` of a token router: what stands for it, measured on rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from exports import TASKS, only_line
from manylora.adapters import ManyLoraLinear, read_lora
from manylora.cli import main
from manylora.data import Example, encode, load_examples
from manylora.evaluation import collapse_router, generate_answers
from manylora.jobs.subject import load_subject

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def naive_gates(adapter: Path, base: Path, rows: list[Example]) -> dict[str, torch.Tensor]:
    """Mean softmax(W_g x) over the tokens of rows read one by one, in float64."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, ManyLoraLinear):
            layer.base_layer.register_forward_hook(
                lambda _, inputs, __, name=name: seen.setdefault(name, []).append(inputs[0][0].double())
            )
    for row in rows:
        with torch.no_grad():
            model(
                input_ids=torch.tensor([encode(row, tokenizer, max_length=256, context_length=512).input_ids])
            )
    routers = {
        name: layer.bank("default").lora_router.detach().double()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, ManyLoraLinear)
    }
    return {name: (torch.cat(x) @ routers[name].T).softmax(-1).mean(0) for name, x in seen.items()}


def test_mean_gates_against_rows_read_one_by_one(
    adapters: dict[str, Path], tiny_base: Path, small_data: Path
) -> None:
    data = load_examples(small_data / "train", split="train", limit=7)
    subject = load_subject(str(adapters["token"]), model=None, dtype="float32", device="cpu")
    gates = collapse_router(
        subject.model, subject.kind.tokenizer, data, how="mean", max_length=256, batch_size=3
    )
    assert list(gates) == list(data)
    for task, rows in data.items():
        wanted = naive_gates(adapters["token"], tiny_base, rows)
        assert gates[task].keys() == wanted.keys()
        for name, gate in gates[task].items():
            torch.testing.assert_close(gate, wanted[name], rtol=0, atol=1e-5)
            assert gate.sum().item() == pytest.approx(1)
    spread = torch.stack([gates["swap"][name] for name in gates["swap"]])
    assert spread.std(0).max() > 0.01  # gates differ between layers: the test would see a mix-up


def test_a_fit_in_several_passes_is_the_fit_in_one(adapters: dict[str, Path], small_data: Path) -> None:
    data = load_examples(small_data / "train", split="train", limit=3, tasks=["swap"])
    subject = load_subject(str(adapters["token"]), model=None, dtype="float32", device="cpu")
    readings: list[tuple[int, int]] = []
    one, several = (
        collapse_router(
            subject.model,
            subject.kind.tokenizer,
            data,
            how="fit",
            max_length=256,
            memory=memory,
            on_progress=lambda *done: readings.append(done),
        )["swap"]
        for memory in (2**30, 2 * 8 * 64**2)
    )
    assert readings[0] == (3, 3)
    assert readings[-1][0] == readings[-1][1] > 3
    assert list(one) == list(several)
    for name, fitted in one.items():
        torch.testing.assert_close(fitted.A, several[name].A, rtol=0, atol=1e-12)
    assert not any(layer._forward_pre_hooks for name, layer in subject.model.named_modules() if name in one)


def test_a_token_router_is_measured_and_refused_above_the_limit(
    adapters: dict[str, Path],
    tiny_base: Path,
    own_answers: Path,
    in_empty_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [
        "export",
        str(adapters["token"]),
        "--to",
        "out",
        "--data",
        str(own_answers),
        "--collapse",
        "mean",
    ]
    assert main(command) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    lost = float(re.search(r"lose ([\d.]+) points", line)[1])  # type: ignore[index]
    assert lost > 1
    for text in ("--max-loss 1", "nothing was written", "--router task", "--force"):
        assert text in line
    for task in TASKS:
        assert re.search(rf"{task}\W+100\.0", captured.out)  # the adapter gives its own answers
    assert not list(Path().iterdir())
    assert main([*command, "--max-loss", "100"]) == 0
    assert main([*command[:3], "forced", *command[4:], "--force", "--tasks", "swap"]) == 0
    assert sorted(path.name for path in Path("forced").iterdir()) == ["collapse.json", "swap"]
    report = json.loads(Path("out/collapse.json").read_text())
    assert report["loss"]["mean"] == pytest.approx(lost, abs=0.005)
    assert report["before"]["mean"] == pytest.approx(100)
    assert report["after"]["mean"] == pytest.approx(100 - report["loss"]["mean"])
    assert report["loss"]["tasks"]["swap"]["n"] == report["rows_measured"]["swap"] == 6
    # what was scored is what was written
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), "out/swap", is_trainable=False
    ).eval()
    rows = load_examples(own_answers, split="train")["swap"]
    answers = generate_answers(model, AutoTokenizer.from_pretrained(tiny_base), rows, max_new_tokens=64)
    exact = 100 * sum(answer == row.output for answer, row in zip(answers, rows, strict=True)) / 6
    swap = next(task for task in report["after"]["tasks"] if task["task"] == "swap")
    assert exact == pytest.approx(swap["metrics"]["exact_match"]["mean"])
    assert f"of this LoRA {swap['score']:.1f}" in Path("out/swap/README.md").read_text()


def test_a_run_is_measured_on_its_own_rows(
    tiny_base: Path, small_data: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--model", str(tiny_base), "--data", str(small_data / "train"), "--epochs", "1"]
    assert main([*train, "--r", "2", "--device", "cpu", "--out", "run"]) == 0
    assert main(["export", "run", "--to", "out", "--tasks", "swap,poems"]) == 2
    assert "'poems'" in only_line(capsys, last=True)
    assert not Path("out").exists()
    assert main(["export", "run", "--to", "out", "--tasks", "swap,last_word", "--force"]) == 0
    assert "scores on the run's validation rows" in capsys.readouterr().out
    report = json.loads(Path("out/collapse.json").read_text())
    assert report["collapse"] == "fit"
    # a tenth of 24 rows is held out
    assert report["rows_measured"] == {"swap": 22, "last_word": 22}
    assert {name: task["n"] for name, task in report["loss"]["tasks"].items()} == {"swap": 2, "last_word": 2}
    for task in ("swap", "last_word"):
        assert read_lora(Path("out", task)).rank == 2  # B is shared
        assert "nearest LoRA" in Path("out", task, "README.md").read_text()
