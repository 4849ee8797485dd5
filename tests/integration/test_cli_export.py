"""`manylora export`: what it writes, what it refuses, and that nothing half-written is left."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import cli_process
from manylora.adapters import ManyLoraConfig, ManyLoraLinear, read_lora
from manylora.cli import main
from manylora.cli.subjects import load_subject
from manylora.data import Example, encode, load_examples
from manylora.evaluation import collapse_router, generate_answers

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TASKS = ["first_word", "last_word", "swap"]
LOGITS = 1e-5


def make_adapter(base: Path, folder: Path, *, factor: float = 0.5, **settings: Any) -> Path:
    """An adapter with random weights on the tiny base, saved as a training run saves it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = get_peft_model(model, ManyLoraConfig(task_type="CAUSAL_LM", init_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name:
                parameter.mul_(factor)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "task": {"router": "task", "task_names": TASKS},
        "token": {"router": "token", "factor": 5.0},
        "uniform": {"router": "uniform"},
        "single": {"num_experts": 1, "router": None},
        "head": {"router": "task", "modules_to_save": ["lm_head"]},
    }
    return {kind: make_adapter(tiny_base, root / kind, **settings) for kind, settings in kinds.items()}


@pytest.fixture(scope="module")
def own_answers(
    adapters: dict[str, Path], small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Rows whose reference answers are the token-routed adapter's own, so that it scores 100 on them."""
    subject = load_subject(str(adapters["token"]), model=None, dtype="float32", device="cpu")
    folder = tmp_path_factory.mktemp("own")
    for task, rows in load_examples(small_data / "test", split="test").items():
        answers = generate_answers(subject.model, subject.tokenizer, rows, max_new_tokens=64)
        lines = [
            json.dumps({"task": task, "instruction": row.instruction, "output": answer or "none"}) + "\n"
            for row, answer in zip(rows, answers, strict=True)
        ]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def logits_of(folder: Path, base: Path, **routing: Any) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    return logits(model, **routing)


def logits(model: torch.nn.Module, **routing: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 19).view(2, 8), **routing).logits


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


# ---- merged weights


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


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_merging_into_tied_embeddings_is_refused(
    tiny_base: Path, in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=True)
    model.config.tie_word_embeddings = True
    model.save_pretrained("tied")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained("tied")
    make_adapter(Path("tied"), Path("adapter"), router="uniform", target_modules=["lm_head", "q_proj"])
    assert main(["export", "adapter", "--to", "out", "--merge"]) == 2
    line = only_line(capsys)
    assert "lm_head" in line
    assert "without --merge" in line
    assert not Path("out").exists()


# ---- the token router


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
    gates = collapse_router(subject.model, subject.tokenizer, data, how="mean", max_length=256, batch_size=3)
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
            subject.tokenizer,
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


# ---- the way back


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
    subject = load_subject("one", model=None, dtype="float32", device="cpu")
    assert subject.experts == {task: index for index, task in enumerate(TASKS)}
    wanted = logits_of(adapters["task"], tiny_base, expert_ids=torch.tensor([2, 0]))
    found = logits(subject.model, expert_ids=torch.tensor([2, 0]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=LOGITS)


def test_names_can_be_given(adapters: dict[str, Path], in_empty_folder: Path) -> None:
    assert main(["export", str(adapters["single"]), "--to", "plain"]) == 0
    assert main(["export", "--from-loras", "b=plain,a=plain", "--to", "one"]) == 0
    values = json.loads(Path("one/adapter_config.json").read_text())
    assert (values["task_names"], values["num_experts"], values["share"]) == (["b", "a"], 2, "none")


# ---- bad input

CASES: dict[str, tuple[list[str], list[str]]] = {
    "no target": (["{task}"], ["--to is missing"]),
    "nothing to export": (["--to", "out"], ["manylora export runs/train-001 --to exported", "--from-loras"]),
    "both ways": (["{task}", "--from-loras", "x", "--to", "out"], ["either", "--from-loras"]),
    "missing run": (["runs/nothing", "--to", "out"], ["runs/nothing", "neither a run folder"]),
    "a plain LoRA": (["{plain}", "--to", "out"], ["LORA adapter", "needs no export"]),
    "unknown task": (
        ["{task}", "--to", "out", "--tasks", "swap,poems"],
        ["'poems'", "first_word, last_word, swap"],
    ),
    "tasks of one LoRA": (["{uniform}", "--to", "out", "--tasks", "swap"], ["--tasks swap", "every task"]),
    "existing folder": (["{task}", "--to", "{base}"], ["exists already", "--to"]),
    "token router without data": (["{token}", "--to", "out"], ["token router", "--data"]),
    "unknown task of the data": (
        ["{token}", "--to", "out", "--data", "{data}", "--tasks", "poems"],
        ["'poems'", "swap"],
    ),
    "missing data": (["{token}", "--to", "out", "--data", "nowhere"], ["nowhere", "does not exist"]),
    "no such base": (["{task}", "--to", "out", "--model", "./none"], ["./none"]),
    "negative loss": (["{token}", "--to", "out", "--max-loss", "-1"], ["max_loss is -1"]),
    "no rows": (["{token}", "--to", "out", "--limit", "0"], ["limit is 0"]),
    "no LoRA folder": (["--from-loras", "nowhere", "--to", "out"], ["nowhere", "adapter_config.json"]),
    "not a LoRA": (["--from-loras", "{task}", "--to", "out"], ["MANYLORA adapter, not a plain LoRA"]),
    "the same name": (["--from-loras", "{plain},{plain}", "--to", "out"], ["Two LoRAs", "one="]),
    "one name for several": (["--from-loras", "a={exported}", "--to", "out"], ["3 LoRAs"]),
    "unequal bases": (
        ["--from-loras", "{plain},{elsewhere}", "--to", "out"],
        ["base_model_name_or_path", "elsewhere"],
    ),
    "a misspelt option": (["{task}", "--to", "out", "--task", "swap"], ["--task", "--tasks"]),
}


@pytest.fixture(scope="module")
def words(adapters: dict[str, Path], tiny_base: Path, small_data: Path) -> dict[str, str]:
    root = adapters["task"].parent
    assert main(["export", str(adapters["single"]), "--to", str(root / "plain")]) == 0
    assert main(["export", str(adapters["task"]), "--to", str(root / "exported")]) == 0
    shutil.copytree(root / "plain", root / "other" / "elsewhere")
    path = root / "other" / "elsewhere" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "elsewhere/model"})
    )
    places = {"base": tiny_base, "data": small_data / "train", "elsewhere": path.parent, **adapters}
    return {
        **{name: str(root / name) for name in ("plain", "exported")},
        **{k: str(v) for k, v in places.items()},
    }


def only_line(capsys: pytest.CaptureFixture[str], *, last: bool = False) -> str:
    """The error line; `last`: after the progress lines of earlier work."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert last or len(lines) == 1, lines
    assert lines[-1].startswith("manylora: ")
    return lines[-1]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, words: dict[str, str], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, wanted = CASES[case]
    capsys.readouterr()
    assert main(["export", *(word.format(**words) for word in arguments)]) == 2
    line = only_line(capsys)
    for text in wanted:
        assert text in line
    assert not list(in_empty_folder.iterdir()), "something was written"


def test_a_folder_that_servers_refuse_says_so(
    adapters: dict[str, Path], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapters["head"]), "--to", "out"]) == 0
    assert "refuse these: it trains whole modules (lm_head)" in capsys.readouterr().out
    assert "do not serve it" in Path("out/expert-0/README.md").read_text()
    assert read_lora(Path("out/expert-0")).config.modules_to_save == ["lm_head"]


def test_a_killed_export_leaves_no_folder_and_the_next_one_works(
    adapters: dict[str, Path], in_empty_folder: Path
) -> None:
    process = cli_process(["export", adapters["task"], "--to", "out", "--merge"], in_empty_folder)
    partial = Path("out.partial")
    deadline = time.monotonic() + 300
    while not list(partial.glob("*/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert partial.exists()
    assert not Path("out").exists()
    assert main(["export", str(adapters["task"]), "--to", "out"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["out"]


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
