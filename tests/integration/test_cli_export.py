"""`manylora export`: what it writes, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exports import LOGITS, TASKS, logits, logits_of, make_adapter
from manylora.adapters import read_lora
from manylora.cli import main
from manylora.jobs.subject import load_writer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_task_router_becomes_one_folder_per_task(
    adapters: dict[str, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "exported"
    assert main(["export", str(adapters["task"]), "--to", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == TASKS
    assert not out.with_name("exported.partial").exists()
    for expert, task in enumerate(TASKS):
        files = sorted(path.name for path in (out / task).iterdir())
        assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        values = json.loads((out / task / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == str(tiny_base)
        wanted = logits_of(adapters["task"], tiny_base, expert_ids=torch.tensor([expert] * 2))
        torch.testing.assert_close(logits_of(out / task, tiny_base), wanted, rtol=0, atol=LOGITS)
        card = (out / task / "README.md").read_text()
        assert "rank 2" in card
        assert f"--max-lora-rank 8 --lora-modules {task}=" in card
        assert f"{task}={out / task}" in printed
    assert f"vllm serve {tiny_base} --enable-lora --max-lora-rank 8 --lora-modules" in printed


def test_chosen_tasks_alone(adapters: dict[str, Path], in_empty_folder: Path) -> None:
    command = ["export", "--adapter", str(adapters["task"]), "--to", "out", "--tasks", "swap,last_word"]
    assert main(command) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["last_word", "swap"]


@pytest.mark.parametrize("kind", ["uniform", "single"])
def test_one_lora_goes_into_the_folder_itself(
    kind: str, adapters: dict[str, Path], tiny_base: Path, in_empty_folder: Path
) -> None:
    assert main(["export", str(adapters[kind]), "--to", "out"]) == 0
    wanted = logits_of(adapters[kind], tiny_base)
    torch.testing.assert_close(logits_of(Path("out"), tiny_base), wanted, rtol=0, atol=LOGITS)


def test_the_same_export_twice_gives_the_same_bytes(adapters: dict[str, Path], in_empty_folder: Path) -> None:
    for out in ("one", "two"):
        assert main(["export", str(adapters["task"]), "--to", out]) == 0
    for path in Path("one").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (Path("two") / path.relative_to("one")).read_bytes(), path


def test_the_embedded_base_is_named_by_its_place(in_empty_folder: Path) -> None:
    from manylora.assets import embedded_base_path

    make_adapter(embedded_base_path(), Path("adapter"), router="uniform")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "embedded"})
    )
    assert main(["export", "adapter", "--to", "out"]) == 0
    place = json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(place) == embedded_base_path()
    assert Path(place).is_absolute()


@pytest.mark.parametrize("kind", ["task", "single", "head"])
def test_merged_weights_load_with_transformers_alone(
    kind: str, adapters: dict[str, Path], tiny_base: Path, in_empty_folder: Path
) -> None:
    tasks = {"task": ["--tasks", "swap"], "head": ["--tasks", "expert-2"]}.get(kind, [])
    assert main(["export", str(adapters[kind]), "--to", "out", "--merge", *tasks]) == 0
    folder = Path("out", *tasks[1:])
    assert not (folder / "adapter_config.json").exists()
    routing = {"expert_ids": torch.tensor([2, 2])} if tasks else {}
    wanted = logits_of(adapters[kind], tiny_base, **routing)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=5e-5)
    assert (wanted - logits(AutoModelForCausalLM.from_pretrained(tiny_base))).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(folder)("red cat").input_ids == (
        AutoTokenizer.from_pretrained(tiny_base)("red cat").input_ids
    )


def embeddings_base(tiny_base: Path, *, tied: bool) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=tied)
    model.config.tie_word_embeddings = tied
    model.save_pretrained("base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained("base")
    return Path("base").absolute()


EMBEDDINGS = {
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "input embedding in full": {"modules_to_save": ["embed_tokens"]},
    "token rows": {"trainable_token_indices": [5, 9]},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_changed_embeddings_are_merged(
    kind: str, tied: bool, tiny_base: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = embeddings_base(tiny_base, tied=tied)
    make_adapter(base, Path("adapter"), router="uniform", embeddings_by=0.3, **EMBEDDINGS[kind])
    capsys.readouterr()
    assert main(["export", "adapter", "--to", "lora"]) == 0
    if kind != "LoRA on the head":  # which is a plain LoRA
        assert "--merge" in capsys.readouterr().out
    assert main(["export", "adapter", "--to", "out", "--merge"]) == 0
    wanted = logits_of(Path("adapter"), base)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained("out").eval()), wanted, rtol=0, atol=5e-5
    )
    assert (wanted - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01


def test_loras_become_one_adapter_and_come_out_again(
    adapters: dict[str, Path], tiny_base: Path, in_empty_folder: Path
) -> None:
    assert main(["export", str(adapters["task"]), "--to", "loras"]) == 0
    assert main(["export", "--from-loras", "loras", "--to", "one"]) == 0
    assert main(["export", "one", "--to", "again"]) == 0
    for task in TASKS:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert Path("loras", task, file).read_bytes() == Path("again", task, file).read_bytes()
    card = Path("one/README.md").read_text()
    assert "import manylora" in card
    assert "| 2 | swap |" in card
    subject = load_writer("one", model=None, dtype="float32", device="cpu")
    assert subject.kind.experts == {task: index for index, task in enumerate(TASKS)}
    wanted = logits_of(adapters["task"], tiny_base, expert_ids=torch.tensor([2, 0]))
    found = logits(subject.model, expert_ids=torch.tensor([2, 0]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=LOGITS)


def test_names_can_be_given(adapters: dict[str, Path], in_empty_folder: Path) -> None:
    assert main(["export", str(adapters["single"]), "--to", "plain"]) == 0
    assert main(["export", "--from-loras", "b=plain,a=plain", "--to", "one"]) == 0
    values = json.loads(Path("one/adapter_config.json").read_text())
    assert (values["task_names"], values["num_experts"], values["share"]) == (["b", "a"], 2, "none")


def test_a_folder_that_servers_refuse_says_so(
    adapters: dict[str, Path], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapters["head"]), "--to", "out"]) == 0
    assert "refuse these: it trains whole modules (lm_head)" in capsys.readouterr().out
    assert "do not serve it" in Path("out/expert-0/README.md").read_text()
    assert read_lora(Path("out/expert-0")).config.modules_to_save == ["lm_head"]


def test_help_is_for_a_newcomer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    for word in (
        "manylora export runs/train-001 --to exported",
        "vLLM",
        "--max-loss",
        "--from-loras",
        "approximation",
    ):
        assert word in text
