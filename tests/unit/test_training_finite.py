"""The first number that is not finite ends a run: what it names, what it leaves, and what goes on afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback

from broken_bases import MARK, marked_rows, spoil
from exports import only_line
from federation import bench_for, rows_of, settings
from manylora.cli import main
from manylora.data import load_examples
from manylora.errors import ModelError, NonFiniteError
from manylora.evaluation import generate_answers, stream_answer
from manylora.federated.client import Client
from manylora.federated.faults import Fault
from manylora.federated.wire import Message, pack, unpack
from manylora.training import (
    RunFolder,
    TrainConfig,
    build_model,
    finetune,
    load_base,
    load_tokenizer,
    prepare,
)
from manylora.training.finite import PATIENCE, FiniteGuard
from manylora.training.runs import json_text
from tiny_models import bert


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base with NaN where the mark is read, and the same without."""
    folder = tmp_path_factory.mktemp("bases")
    return {"nan": spoil(tiny_base, folder / "nan"), "mended": spoil(tiny_base, folder / "mended", 0.0)}


def config(base: Path, data: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 2, "batch_size": 4, "learning_rate": 0.01, "device": "cpu", "method": "lora", "save_steps": 1, **more,
    }  # fmt: skip
    return TrainConfig(model=str(base), data=str(data), **values)


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    fixed = {"model": base, "data": data, "out": out, "epochs": 2, "batch-size": 4, "learning-rate": 0.01,
             "device": "cpu", "method": "lora", "save-steps": 1}  # fmt: skip
    return ["train", *(str(word) for name, value in fixed.items() for word in (f"--{name}", value)), *more]


def strict(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("micro", [[], ["--micro-batch-size", "2"]], ids=["whole", "micro-batches"])
def test_a_weight_that_is_not_finite_ends_the_run_at_the_first_row_that_reads_it(
    micro: list[str], bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = marked_rows(tmp_path / "data", "colours", marked=5)
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(bases["nan"], base)
    prepared = prepare(config(base, data))
    (place,) = (n for n, row in enumerate(prepared.train[0].rows) if row.origin.endswith(":6"))
    step = 1 + prepared.order.index(place) // 4
    assert step > 1
    assert main(command(base, data, run, *micro)) == 2
    line = only_line(capsys, last=True)
    for words in (
        f"At step {step} the loss of task 'colours'",
        "colours.jsonl:6)",
        "'model.embed_tokens.weight'",
    ):
        assert words in line
    state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    assert (state["state"], state["error"]) == ("failed", line.removeprefix("manylora: "))
    (kept,) = (run / "checkpoints").iterdir()
    assert kept.name == f"checkpoint-{step - 1}"
    assert all(value.isfinite().all() for value in load_file(kept / "adapter_model.safetensors").values())
    assert not (run / "adapter").exists()
    assert all("loss" not in row or row["step"] < step for row in strict(run / "metrics.jsonl"))
    assert main(["train", "--resume", str(run)]) == 2  # nothing has changed
    shutil.copytree(bases["mended"], base, dirs_exist_ok=True)
    assert main(["train", "--resume", str(run)]) == 0
    assert strict(run / "metrics.jsonl")[-1]["step"] == prepared.plan.steps


def test_a_weight_that_no_row_reads_is_no_fault(bases: dict[str, Path], tmp_path: Path) -> None:
    data = marked_rows(tmp_path / "data", "colours", marked=None)
    assert main(command(bases["nan"], data, tmp_path / "run")) == 0


def test_a_validation_loss_that_is_not_finite_ends_the_run(bases: dict[str, Path], tmp_path: Path) -> None:
    data = marked_rows(tmp_path / "data", "colours", marked=None)
    held = marked_rows(tmp_path / "held", "colours", marked=2, count=4)
    prepared = prepare(config(bases["nan"], data, validation=str(held)))
    with RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run:
        with pytest.raises(NonFiniteError, match=r"validation loss of task 'colours' \(.*colours.jsonl:3\)"):
            finetune(prepared, run)
        assert run.newest_checkpoint() == run.checkpoint(prepared.steps_per_epoch - 1)


def poisoned(prepared: Any, call: int) -> Any:
    """The run's model, one of whose gradients is not finite at the `call`-th backward pass."""
    model = build_model(prepared)
    calls = []

    def spoil_gradient(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("inf") if len(calls) == call else gradient

    next(p for p in model.parameters() if p.requires_grad).register_hook(spoil_gradient)
    return model


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_ends_the_run(
    clip: float, tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    prepared = prepare(config(tiny_base, small_data, max_grad_norm=clip, epochs=1))
    with RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run:
        with pytest.raises(NonFiniteError, match=r"At step 3 the gradient of task .*jsonl:\d+.*was not made"):
            finetune(prepared, run, model=poisoned(prepared, 3))
        assert run.newest_checkpoint() == run.checkpoint(2)
        finetune(prepared, run, model=build_model(prepared))
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_classifier_is_guarded_alike(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(tmp_path / "encoder")
    model = bert(vocab=len(tokenizer), length=128).bert
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[tokenizer(MARK, add_special_tokens=False).input_ids] = float(
            "nan"
        )
    model.save_pretrained(tmp_path / "encoder")
    data = marked_rows(tmp_path / "data", "colours", marked=5)
    prepared = prepare(config(tmp_path / "encoder", data, task_type="SEQ_CLS", target_modules=["query"]))
    with (
        RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run,
        pytest.raises(NonFiniteError, match=r"the loss of task 'colours' \(.*colours.jsonl:6\)"),
    ):
        finetune(prepared, run)


def test_a_client_is_guarded_alike(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    bench = bench_for(settings(tiny_base, small_data))
    client = Client("ada", rows_of(small_data)["ada"], home=tmp_path, bench=bench)
    fields = {"settings": bench.config.for_clients(), "rank": 4, "version": 0}
    bench.load(_start(bench), rank=4)
    shared = {name: value for name, value in bench.state().items() if name.endswith(".B")}
    order = pack(Message(kind="train", client="ada", round=1, fields=fields, tensors=shared))
    assert unpack(client.handle(order)).kind == "trained"
    weight = bench.layers["model.layers.0.self_attn.q_proj"].get_base_weight()
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        answer = unpack(client.handle(order))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert answer.kind == "failed"
    assert answer.fields["code"] == Fault.NOT_FINITE


def _start(bench: Any) -> dict[str, torch.Tensor]:
    from manylora.federated.parts import initial_state

    return initial_state(
        bench.strategy.parts, bench.shapes, rank=4, largest_rank=4, intermediate=4, seed=0, who="ada"
    )


# ---- the guard by itself


def guard(model: torch.nn.Module, scaler: Any = None) -> FiniteGuard:
    accelerator = SimpleNamespace(num_processes=1, scaler=scaler)
    return FiniteGuard(model, accelerator, task_names=["a"], origin=str, autocast=False)  # type: ignore[arg-type]


def look(one: FiniteGuard, *, loss: float, gradient: float) -> None:
    one.on_step_begin(None, None, None)
    for parameter in one.model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    value = torch.tensor(loss)
    batch = {"task": torch.tensor([0]), "row": torch.tensor([7])}
    one.note(value, value.reshape(1), torch.tensor([0]), batch)
    one.on_pre_optimizer_step(None, SimpleNamespace(global_step=4), None)


def test_a_loss_scaler_may_skip_steps_but_not_for_ever() -> None:
    one = guard(torch.nn.Linear(2, 2), torch.amp.GradScaler("cpu", enabled=True))
    for _ in range(2):
        for _ in range(PATIENCE):
            look(one, loss=1.0, gradient=float("inf"))
        look(one, loss=1.0, gradient=1.0)  # a smaller scale has helped
    for _ in range(PATIENCE):
        look(one, loss=1.0, gradient=float("inf"))
    with pytest.raises(NonFiniteError, match=r"the gradient of task 'a' \(7\)"):
        look(one, loss=1.0, gradient=float("inf"))
    with pytest.raises(NonFiniteError, match="--dtype bfloat16"):  # a scaler cannot mend a loss
        look(one, loss=float("inf"), gradient=1.0)


def test_a_guard_forgets_the_step_before() -> None:
    one = guard(torch.nn.Linear(2, 2))
    with pytest.raises(NonFiniteError, match=r"At step 5 the loss of task 'a' \(7\)"):
        look(one, loss=float("nan"), gradient=1.0)
    look(one, loss=1.0, gradient=1.0)


def test_bfloat16_on_a_cpu_is_told_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    one = guard(torch.nn.Linear(2, 2).bfloat16())
    with pytest.raises(NonFiniteError, match=r"--dtype float32.*ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"):
        look(one, loss=float("nan"), gradient=1.0)


def test_an_adapter_that_is_not_finite_is_not_written(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    class Spoil(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == state.max_steps:  # nothing later would notice
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("inf")

    prepared = prepare(config(tiny_base, small_data, epochs=1))
    with RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run:
        with pytest.raises(ModelError, match="trained adapter holds values that are not finite"):
            finetune(prepared, run, callbacks=[Spoil()])
        assert run.newest_checkpoint() == run.checkpoint(prepared.plan.steps - 1)
        assert not (run.path / "adapter").exists()


def test_json_has_no_nan() -> None:
    value = {"a": float("nan"), "b": [1.5, float("inf"), (float("-inf"), "x")], "c": None}
    assert json_text(value) == '{"a": null, "b": [1.5, null, [null, "x"]], "c": null}'


# ---- answers and measurements


def test_answers_of_nan_are_no_answers(bases: dict[str, Path], tmp_path: Path) -> None:
    data = marked_rows(tmp_path / "test", "colours", marked=2, count=4)
    examples = load_examples(data)["colours"]
    model, tokenizer = load_base(str(bases["nan"]), device="cpu"), load_tokenizer(str(bases["nan"]))
    asked: dict[str, Any] = {"max_new_tokens": 3}
    assert len(generate_answers(model, tokenizer, examples[:2], **asked)) == 2
    with pytest.raises(NonFiniteError, match=r"output for .*colours.jsonl:3 is not a number.*embed_tokens"):
        generate_answers(model, tokenizer, examples, **asked)
    assert "".join(stream_answer(model, tokenizer, examples[0], **asked)) is not None
    with pytest.raises(NonFiniteError, match=r"colours.jsonl:3"):
        "".join(stream_answer(model, tokenizer, examples[2], **asked))


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--model", "{nan}", "--data", "{data}", "--device", "cpu"],
        ["evaluate", "--adapter", "{x}", "--model", "{nan}", "--data", "{data}", "--device", "cpu"],
        ["predict", "--adapter", "{x}", "--model", "{nan}", "--device", "cpu", "Ω"],
        ["export", "{token}", "--to", "{out}", "--model", "{nan}", "--data", "{data}", "--device", "cpu"],
        ["analyze", "{x}", "--model", "{nan}", "--data", "{data}", "--device", "cpu", "--out", "{out}"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_verbs_end_where_the_output_is_nan(
    words: list[str], bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    marked_rows(tmp_path / "train", "colours", marked=None)
    marked_rows(tmp_path / "train", "shades", marked=None)
    assert main(command(bases["mended"], tmp_path / "train", tmp_path / "x", "--epochs", "0.2")) == 0
    data = marked_rows(
        marked_rows(tmp_path / "test", "colours", marked=2, count=4), "shades", marked=None, count=4
    )
    capsys.readouterr()
    places = {"nan": bases["nan"], "data": data, "x": tmp_path / "x", "out": tmp_path / "out",
              "token": adapters["token"]}  # fmt: skip
    assert main([word.format(**places) for word in words]) == 2
    line = only_line(capsys, last=True)
    assert "is not a number (NaN)" in line
    assert "'model.embed_tokens.weight'" in line


@pytest.mark.parametrize("kind", ["train", "federate"])
def test_no_page_is_drawn_of_an_adapter_that_is_not_finite(
    kind: str, tiny_base: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from manylora.report import write_report

    run = tmp_path / "run"
    if kind == "train":
        assert main(command(tiny_base, small_data, run)) == 0
        path = run / "adapter" / "adapter_model.safetensors"
    else:
        words = ["--data", small_data, "--model", tiny_base, "--rounds", "1", "--out", run, "--device", "cpu"]
        assert main(["federate", *map(str, words)]) == 0
        path = next(run.glob("clients/*/adapter/adapter_model.safetensors"))
    assert write_report(run).is_file()
    weights = load_file(path)
    name = next(iter(weights))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        changed = {key: value.to(dtype, copy=True) for key, value in weights.items()}
        save_file(changed, path)
        assert write_report(run).is_file()
        changed[name][-1, -1] = float("nan")
        save_file(changed, path)
        with pytest.raises(ModelError, match="not finite") as raised:
            write_report(run)
        assert repr(name) in str(raised.value)
        assert str(path) in str(raised.value)
