"""An adapter counts as loaded only where all of its weights arrived: every way to lose one, every way to load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from exports import make_adapter, only_line
from manylora.adapters import ManyLoraConfig, put_weights
from manylora.analysis import load_source
from manylora.cli import main
from manylora.errors import ModelError, RunError
from manylora.training import (
    RunFolder,
    TrainConfig,
    find_snapshots,
    finetune,
    load_adapter,
    load_base,
    prepare,
)
from tiny_models import adapted, fill, llama

Weights = dict[str, Tensor]
WEIGHTS = "adapter_model.safetensors"


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key.replace(old, new): value for key, value in weights.items()}


def with_more(key: str) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, key: torch.zeros(2, 32)}


FAULTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a layer is missing": (without("layers.1."), "layers.1."),
    "a matrix is missing": (without("layers.0.self_attn.q_proj.manylora_experts.lora_B"), "lora_B"),
    "the routers are missing": (without("lora_router"), "lora_router"),
    "the first half is missing": (without("layers.0."), "layers.0."),
    "nothing is there": (lambda weights: {}, "lora_A"),
    "another layout": (renamed("model.model.layers", "model.model.language_model.layers"), "language_model"),
    "a layer too many": (
        with_more("base_model.model.model.layers.7.self_attn.q_proj.manylora_experts.lora_A"), "layers.7"
    ),
    "a kind of matrix too many": (
        with_more("base_model.model.model.layers.0.self_attn.q_proj.manylora_experts.lora_C"), "lora_C"
    ),
    "a module that is not adapted": (
        with_more("base_model.model.model.layers.0.mlp.up_proj.manylora_experts.lora_A"), "up_proj"
    ),
    "names that nobody knows": (with_more("lora_A"), "'lora_A'"),
}  # fmt: skip


def change(folder: Path, fault: Callable[[Weights], Weights]) -> Path:
    path = folder / WEIGHTS
    save_file(fault(load_file(path)), path, metadata={"format": "pt"})
    return folder


def saved(folder: Path, **settings: Any) -> Path:
    adapted(target_modules=["q_proj", "v_proj"], **settings).save_pretrained(
        folder, save_embedding_layers=False
    )
    return folder


@pytest.mark.parametrize(("fault", "named"), FAULTS.values(), ids=FAULTS)
def test_peft_cannot_load_what_does_not_fit(
    fault: Callable[[Weights], Weights], named: str, tmp_path: Path
) -> None:
    folder = change(saved(tmp_path / "x"), fault)
    with pytest.raises(ModelError, match="has no counterpart") as raised:
        PeftModel.from_pretrained(llama(), folder)
    assert named in str(raised.value)
    model = adapted(target_modules=["q_proj", "v_proj"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match="has no counterpart"):
        model.load_adapter(folder, "other")
    with pytest.raises(ModelError, match="has no counterpart"):
        put_weights(model, load_file(folder / WEIGHTS), source="this file")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_what_fits_still_loads(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x")
    again = PeftModel.from_pretrained(llama(), folder)
    again.load_adapter(folder, "other")
    put_weights(again, load_file(folder / WEIGHTS), source="this file", adapter="other")
    weights = load_file(folder / WEIGHTS)
    for name, value in again.named_parameters():
        for adapter in ("default", "other"):
            if f".{adapter}." in name:
                assert torch.equal(value, weights[name.replace(f".{adapter}.", ".")])


@pytest.mark.parametrize("bias", ["manylora_only", "all"])
def test_biases_that_were_trained_are_waited_for(bias: str, tmp_path: Path) -> None:
    from model_families import base

    model = get_peft_model(base("qwen2"), ManyLoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    fill(model)
    model.save_pretrained(tmp_path / "x", save_embedding_layers=False)
    assert PeftModel.from_pretrained(base("qwen2"), tmp_path / "x")
    change(tmp_path / "x", without("layers.0.self_attn.q_proj.base_layer.bias"))
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.base_layer\.bias' has no"):
        PeftModel.from_pretrained(base("qwen2"), tmp_path / "x")


def test_a_module_that_was_trained_is_waited_for(tiny_base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_base, tmp_path / "x", modules_to_save=["lm_head"])
    load_adapter(load_base(str(tiny_base), device="cpu"), folder)
    change(folder, without("lm_head"))
    with pytest.raises(ModelError, match=r"lm_head.*has no counterpart"):
        load_adapter(load_base(str(tiny_base), device="cpu"), folder)


def test_another_shape_is_one_line(tmp_path: Path) -> None:
    folder = change(saved(tmp_path / "x"), lambda weights: {k: v[:, :-1].clone() for k, v in weights.items()})
    with pytest.raises(ModelError, match=r"does not fit this model \(size mismatch for") as raised:
        put_weights(adapted(target_modules=["q_proj", "v_proj"]), load_file(folder / WEIGHTS), source="x")
    assert "\n" not in str(raised.value)


# ---- plain LoRAs, which PEFT's own method loads


def lora(base: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


LORA_FAULTS = {
    "a layer is missing": (without("layers.1."), "layers.1."),
    "a matrix is missing": (without("layers.0.self_attn.q_proj.lora_B"), "lora_B"),
    "another layout": (renamed("model.model.layers", "model.model.language_model.layers"), "language_model"),
    "a layer too many": (
        with_more("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"),
        "layers.7",
    ),
}


@pytest.mark.parametrize(("fault", "named"), LORA_FAULTS.values(), ids=LORA_FAULTS)
def test_a_plain_lora_that_does_not_fit_is_refused(
    fault: Callable[[Weights], Weights], named: str, tiny_base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = lora(tiny_base, tmp_path / "x")
    load_adapter(load_base(str(tiny_base), device="cpu"), folder)
    change(folder, fault)
    with pytest.raises(ModelError) as raised:
        load_adapter(load_base(str(tiny_base), device="cpu"), folder)
    assert named in str(raised.value)
    assert str(folder) in str(raised.value)
    assert main(["export", "--from-loras", f"pets={folder}", "--to", str(tmp_path / "one")]) == 2
    assert not (tmp_path / "one").exists()
    line = only_line(capsys)
    assert "has no counterpart" in line or "is damaged" in line
    with pytest.raises(ModelError):
        load_source(folder)


# ---- verbs


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--adapter", "{x}", "--data", "{data}"],
        ["predict", "--adapter", "{x}", "--task", "swap", "hello"],
        ["export", "{x}", "--to", "{out}"],
        ["export", "{x}", "--to", "{out}", "--merge"],
        ["analyze", "{x}", "--out", "{out}"],
    ],
    ids=lambda command: " ".join(command[::5]),
)
@pytest.mark.parametrize("fault", ["a layer is missing", "another layout"])
def test_every_verb_refuses_half_an_adapter(
    fault: str, command: list[str], adapters: dict[str, Path], small_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "half"
    shutil.copytree(adapters["task"], folder)
    change(folder, FAULTS[fault][0])
    places = {"x": folder, "data": small_data / "test", "out": tmp_path / "out"}
    assert main([word.format(**places) for word in command]) == 2
    line = only_line(capsys)
    assert FAULTS[fault][1] in line
    assert "has no counterpart" in line
    assert str(folder) in line
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_base_is_elsewhere_is_still_read(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a base that this machine does not have nothing is known, and nothing is asked of the network."""
    folder = tmp_path / "x"
    shutil.copytree(adapters["task"], folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "else/where"}))
    assert len(load_source(folder).layers) == 6
    assert main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    assert "not checked: whether the files are whole" in capsys.readouterr().out
    change(folder, without("layers.1."))
    assert len(load_source(folder).layers) == 3


def test_the_best_checkpoint_is_loaded_whole_or_not_at_all(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    class Damage(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for path in Path(args.output_dir).glob("checkpoint-*"):
                change(path, without("layers.1."))

    config = TrainConfig(
        model=str(tiny_base), data=str(small_data), epochs=1, batch_size=16, learning_rate=0.01, device="cpu",
        method="lora", keep="best",
    )  # fmt: skip
    prepared = prepare(config)
    with RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run:
        with pytest.raises(RunError, match=r"checkpoint-\d+, which holds the best weights, is damaged"):
            finetune(prepared, run, callbacks=[Damage()])
        assert not (run.path / "adapter").exists()


def test_a_snapshot_holds_the_layers_of_its_adapter(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        model=str(tiny_base), data=str(small_data), epochs=1, batch_size=16, learning_rate=0.01, device="cpu",
        method="lora", keep_adapters=1,
    )  # fmt: skip
    prepared = prepare(config)
    with RunFolder.create(str(tmp_path / "run"), config=prepared.config.to_dict(), seed=0) as run:
        finetune(prepared, run)
    step, path = next(iter(find_snapshots(tmp_path / "run").items()))
    source = load_source(tmp_path / "run")
    assert source.snapshot(step).keys() == source.layers.keys()
    save_file(without("layers.1.")(load_file(path)), path)
    with pytest.raises(ModelError, match="do not hold the same layers"):
        load_source(tmp_path / "run").snapshot(step)


# ---- what is not a number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--adapter", "{x}", "--data", "{data}"],
        ["predict", "--adapter", "{x}", "--task", "swap", "hello"],
        ["export", "{x}", "--to", "{out}"],
        ["export", "{x}", "--to", "{out}", "--merge"],
        ["analyze", "{x}", "--out", "{out}"],
        ["export", "--from-loras", "a={lora}", "--to", "{out}"],
    ],
    ids=lambda command: " ".join(command[::5]),
)
def test_every_verb_refuses_an_adapter_that_is_not_finite(
    value: float, command: list[str], adapters: dict[str, Path], tiny_base: Path, small_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def spoil(weights: Weights) -> Weights:
        next(iter(weights.values()))[0, 0] = value
        return weights

    folder = tmp_path / "x"
    shutil.copytree(adapters["task"], folder)
    places = {"x": change(folder, spoil), "data": small_data / "test", "out": tmp_path / "out",
              "lora": change(lora(tiny_base, tmp_path / "lora"), spoil)}  # fmt: skip
    assert main([word.format(**places) for word in command]) == 2
    line = only_line(capsys)
    assert "not finite" in line
    assert "layers.0." in line
    assert not (tmp_path / "out").exists()


def test_peft_cannot_load_what_is_not_finite(tmp_path: Path) -> None:
    folder = saved(tmp_path / "x")
    path = folder / WEIGHTS
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        PeftModel.from_pretrained(llama(), folder)
