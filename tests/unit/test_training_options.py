"""Options of the libraries below: each reaches the library, or is refused in one line before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from manylora.errors import ConfigError
from manylora.jobs.export import export
from manylora.jobs.progress import Progress
from manylora.jobs.settings import ExportConfig
from manylora.training import RunFolder, TrainConfig, Writing, build_model, finetune, prepare
from manylora.training.base_options import attention_options, quantisation_options
from manylora.training.heads import LANGUAGE
from manylora.training.trainer import training_arguments


def config(base: Path, data: Path, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "lora_dropout": 0.0, "device": "cpu", **more}
    return TrainConfig(model=str(base), data=str(data), learning_rate=0.01, **settings)


class StopAt(TrainerCallback):
    """Ends a training where Ctrl-C or a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise."""
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_what_was_asked_for(tiny_base: Path, small_data: Path, attention: Any) -> None:
    model = build_model(prepare(config(tiny_base, small_data, attention=attention)))
    assert model.get_base_model().config._attn_implementation == attention


def test_eager_attention_gives_the_same_and_is_planned_with_its_scores(
    tiny_base: Path, small_data: Path
) -> None:
    plans, outputs = {}, {}
    for attention in ("sdpa", "eager"):
        prepared = prepare(config(tiny_base, small_data, attention=attention))
        plans[attention] = prepared.plan.memory
        outputs[attention] = build_model(prepared).eval()(input_ids=torch.arange(20)[None]).logits
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], rtol=1e-4, atol=1e-4)
    assert plans["eager"].forward > plans["sdpa"].forward  # type: ignore[union-attr]


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_backward_pass_on_a_cpu_is_refused(
    tiny_base: Path, small_data: Path, attention: Any
) -> None:
    with pytest.raises(ConfigError, match=f"attention {attention} trains on a GPU alone; .* sdpa or eager"):
        prepare(config(tiny_base, small_data, attention=attention))


def test_attention_that_is_not_installed_or_not_in_the_model_is_refused() -> None:
    architecture = BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"attention sdpa is not there for some/bloom .*'bloom'.* eager"):
        attention_options("sdpa", LANGUAGE, architecture, model="some/bloom", device=gpu)
    assert attention_options("auto", LANGUAGE, architecture, model="some/bloom", device=gpu) == {}


def test_flash_attention_names_its_package(tiny_base: Path) -> None:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    from manylora.training import load_config

    with pytest.raises(ConfigError, match="pip install flash-attn"):
        attention_options(
            "flash_attention_2",
            LANGUAGE,
            load_config(str(tiny_base)),
            model=str(tiny_base),
            device=torch.device("cuda"),
        )


@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio", "tensorboard", "swanlab"])
def test_a_reporter_that_is_not_installed_is_refused_with_the_command(
    tiny_base: Path, small_data: Path, name: str
) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=f"report_to {name} is not set up here: pip install .*{name}"):
        prepare(config(tiny_base, small_data, report_to=f"none,{name}"))


def test_a_reporter_that_transformers_does_not_know_is_refused(tiny_base: Path, small_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_to 'wandbb' is unknown .* wandb, or none"):
        prepare(config(tiny_base, small_data, report_to=["wandbb"]))


def test_a_reporter_of_transformers_gets_the_logs(
    tiny_base: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the same table by which transformers finds wandb and the others."""
    seen: list[dict[str, float]] = []

    class Notebook(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notebook", Notebook)
    prepared = prepare(config(tiny_base, small_data, report_to="notebook", epochs=0.3))
    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0) as run:
        finetune(prepared, run)
    assert any("loss/swap" in logs for logs in seen)
    assert any("eval_mean_task_loss" in logs for logs in seen)


def test_nothing_is_reported_unless_it_is_named(
    tiny_base: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.is_kubeflow_available", lambda: True)
    prepared = prepare(config(tiny_base, small_data))
    arguments = training_arguments(
        prepared.config,
        RunFolder(tmp_path),
        steps=1,
        warmup_steps=0,
        steps_per_epoch=1,
        validate=False,
    )
    assert arguments.report_to == []


def test_tensorboard_writes_its_files(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="not installed (pip install 'manylora[tensorboard]')")
    prepared = prepare(config(tiny_base, small_data, report_to="tensorboard", epochs=0.2))
    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0) as run:
        finetune(prepared, run)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("optimizer", ["adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_trains_and_goes_on_after_a_kill_as_if_unbroken(
    tiny_base: Path, small_data: Path, tmp_path: Path, optimizer: str
) -> None:
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes", reason="not installed (pip install 'manylora[quantised]')")
    prepared = prepare(config(tiny_base, small_data, optimizer=optimizer, save_steps=3, r=64))
    trained = []
    for name in ("whole", "killed"):
        with RunFolder.create(str(tmp_path / name), config={}, seed=0) as run:
            if name == "killed":
                with pytest.raises(KeyboardInterrupt):
                    finetune(prepared, run, callbacks=[StopAt(5)])
            model = finetune(prepared, run)
        trained.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
        assert type(model).__name__.startswith("Peft")
    assert all(weight.isfinite().all() for weight in trained[0].values())
    assert any(weight.any() for name, weight in trained[0].items() if "lora_B" in name)
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("adamw", "optimizer 'adamw' is unknown to transformers; choose from adamw_torch, .*adamw_8bit"),
        ("galore_adamw", "optimizer 'galore_adamw' is for training whole models"),
        ("lomo", "optimizer 'lomo' is for training whole models"),
        (
            "schedule_free_adamw",
            "optimizer schedule_free_adamw needs another package: pip install schedulefree",
        ),
        ("stable_adamw", "optimizer stable_adamw needs another package: pip install torch-optimi"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(
    tiny_base: Path, small_data: Path, optimizer: str, said: str
) -> None:
    if optimizer.startswith("schedule") and find_spec("schedulefree"):
        pytest.skip("schedulefree is installed")
    if optimizer.startswith("stable") and find_spec("optimi"):
        pytest.skip("torch-optimi is installed")
    with pytest.raises(ConfigError, match=said):
        prepare(config(tiny_base, small_data, optimizer=optimizer))


def validations(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics that tell of a validation, without its times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {"step": row["step"], "loss": row["eval_mean_task_loss"]}
        for row in lines
        if "eval_mean_task_loss" in row
    ]


def test_a_training_stops_when_the_validation_loss_no_longer_improves(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """Killed anywhere, also after it stopped, it ends alike; the result is the best of the validated weights."""
    base = config(tiny_base, small_data, epochs=30, early_stopping=3, eval_steps=2, save_steps=3)
    prepared = prepare(dataclasses.replace(base, learning_rate=0.3))
    assert prepared.config.keep == "best"
    steps = prepared.plan.steps
    results, states = {}, {}
    for name, kills in (("whole", []), ("killed", [3, 7]), ("killed after it stopped", [None])):
        path = tmp_path / name
        with RunFolder.create(str(path), config={}, seed=0) as run:
            for kill in kills:
                with monkeypatched_end() if kill is None else nullcontext(), pytest.raises(KeyboardInterrupt):
                    finetune(prepared, run, callbacks=[] if kill is None else [StopAt(kill)])
            finetune(prepared, run)
            states[name] = run.state["stopped"]
        results[name] = load_file(path / "adapter" / "adapter_model.safetensors")
    found = validations(tmp_path / "whole")
    losses = [row["loss"] for row in found]
    best = losses.index(min(losses))
    assert len(losses) - 1 - best == 3
    assert found[-1]["step"] < steps
    assert f"stopped at step {found[-1]['step']} of {steps}" in states["whole"]
    assert f"step {found[best]['step']} ({min(losses):.4f})" in states["whole"]
    for name in ("killed", "killed after it stopped"):
        assert validations(tmp_path / name) == found
        assert states[name] == states["whole"]
        for key, weight in results["whole"].items():
            assert torch.equal(weight, results[name][key]), (name, key)


@contextmanager
def monkeypatched_end() -> Iterator[None]:
    """A kill after the last checkpoint, before the result is placed."""
    with pytest.MonkeyPatch.context() as patch:

        def kill(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("manylora.training.job._load_best", kill)
        yield


def test_early_stopping_needs_validation_rows(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"task": "t", "instruction": "a", "output": "b"}), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"early_stopping 2 needs validation rows; .*--validation"):
        prepare(config(tiny_base, tmp_path / "t.jsonl", early_stopping=2))


@pytest.fixture(scope="module")
def packable_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of which 4-bit blocks, of 64 numbers, divide every row."""
    folder = tmp_path_factory.mktemp("packable") / "base"
    shutil.copytree(tiny_base, folder)
    settings = LlamaConfig.from_pretrained(tiny_base)
    settings.hidden_size, settings.intermediate_size = 64, 128
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


quantised = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install 'manylora[quantised]'"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize(
    ("quantize", "layer"),
    [
        pytest.param("4bit", "Linear4bit", marks=quantised),
        pytest.param("8bit", "Linear8bitLt", marks=quantised),
    ],
)
def test_a_quantised_base_is_trained_on_gone_on_with_and_asked_again(
    packable_base: Path, small_data: Path, tmp_path: Path, quantize: Any, layer: str
) -> None:
    settings = config(
        packable_base, small_data, quantize=quantize, router="task", save_steps=3, target_modules="q_proj"
    )
    prepared = prepare(settings)
    trained = []
    for name in ("whole", "killed"):
        with RunFolder.create(str(tmp_path / name), config=prepared.config.to_dict(), seed=0) as run:
            if name == "killed":
                with pytest.raises(KeyboardInterrupt):
                    finetune(prepared, run, callbacks=[StopAt(5)])
            model = finetune(prepared, run)
        trained.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    for name, weight in trained[0].items():
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()
        assert torch.equal(weight, trained[1][name]), name
    attention = model.get_base_model().model.layers[0].self_attn
    assert type(attention.k_proj).__name__ == type(attention.q_proj.base_layer).__name__ == layer
    memory = prepared.plan.memory
    held = sum(p.nbytes for name, p in model.named_parameters() if "manylora" not in name)
    states = [
        m.weight.quant_state for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")
    ]
    held += sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)  # of 4 bit
    assert memory.base == pytest.approx(held, rel=0.05)  # type: ignore[union-attr]
    again, _kind, _ = Writing.load(str(tmp_path / "whole"), model=None, dtype="auto", device="cpu")
    again_attention = again.get_base_model().model.layers[0].self_attn
    assert type(again_attention.q_proj.base_layer).__name__ == layer
    ids, experts = torch.arange(20)[None], torch.tensor([1])
    with torch.no_grad():
        want = model.eval()(input_ids=ids, expert_ids=experts).logits
        assert torch.equal(again(input_ids=ids, expert_ids=experts).logits, want)


@pytest.mark.parametrize("merge", [False, True])
def test_a_quantised_run_is_exported_onto_the_base_as_it_is(
    packable_base: Path, small_data: Path, tmp_path: Path, merge: bool
) -> None:
    pytest.importorskip("bitsandbytes", reason="not installed (pip install 'manylora[quantised]')")
    prepared = prepare(config(packable_base, small_data, quantize="4bit", method="lora", epochs=0.3))
    with RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run:
        finetune(prepared, run)
    settings = ExportConfig(
        adapter=str(tmp_path / "run"), to=str(tmp_path / "out"), merge=merge, device="cpu"
    )
    export(settings, progress=Progress())
    if merge:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert plain.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    else:
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_quantising_needs_bitsandbytes_and_a_base_that_is_not_quantised(
    tiny_base: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: dict[str, Any] = {"model": "some/base", "device": torch.device("cpu"), "dtype": torch.float32}
    if find_spec("bitsandbytes"):
        done = LlamaConfig(quantization_config={"quant_method": "gptq"})
        with pytest.raises(ConfigError, match="some/base is quantised already; leave it out"):
            quantisation_options("4bit", done, **place)
    monkeypatch.setattr("manylora.training.base_options.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quantize 4bit needs .* pip install 'manylora\[quantised\]'"):
        prepare(config(tiny_base, small_data, quantize="4bit"))
