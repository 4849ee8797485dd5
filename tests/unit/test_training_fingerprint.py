"""The mark of a base: all weights, the same in every type, and who compares it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from federation import Listening, bench_for, federation, rows_of, settings
from manylora.cli import main
from manylora.data import EMBEDDED, PromptRecord
from manylora.errors import ModelError, RunError
from manylora.federated.wire import pack, unpack
from manylora.training import (
    RunFolder,
    TrainConfig,
    base_fingerprint,
    finetune,
    load_adapter,
    load_base,
    prepare,
    same_base,
)
from manylora.training.fingerprint import _packed_by_torch, differing_part, weakness
from tiny_models import bert, llama, t5

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


def merged(
    base: nn.Module, *, size: float, targets: tuple[str, ...] = ("q_proj",), seed: int = 0
) -> nn.Module:
    """A copy with a LoRA merged in whose change is `size` times the spread of the weights it changes."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=list(targets)))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_B"):
                B = module.lora_B["default"].weight.normal_()
                B.mul_(size * module.base_layer.weight.std() / module.get_delta_weight("default").std())
    return model.merge_and_unload()


@pytest.mark.parametrize("make", [llama, t5, bert], ids=["llama", "t5", "bert"])
def test_a_cast_changes_nothing(make: Any) -> None:
    model = make()
    mark = base_fingerprint(model)
    for dtype in DTYPES:
        assert base_fingerprint(copy.deepcopy(model).to(dtype)) == mark, dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_file_has_one_mark_however_it_is_loaded(dtype: str, tiny_base: Path) -> None:
    for name in (EMBEDDED, str(tiny_base)):
        one, other = (load_base(name, device="cpu", dtype=kind) for kind in ("float32", dtype))
        assert base_fingerprint(one) == base_fingerprint(other)


def test_every_weight_counts() -> None:
    """One weight of a tensor negated, and a tensor made a fifth larger: each is noticed, in every tensor."""
    model = llama()
    mark = base_fingerprint(model)
    for name, tensor in model.named_parameters():
        before = tensor.detach().clone()
        for change in (lambda t: t.view(-1)[-1:].neg_(), lambda t: t.mul_(1.2)):
            with torch.no_grad():
                change(tensor)
            assert not same_base(mark, base_fingerprint(model)), name
            with torch.no_grad():
                tensor.copy_(before)
    assert base_fingerprint(model) == mark


def test_what_one_tensor_gains_another_cannot_lose() -> None:
    """As where a norm's scale is moved into the layer behind it: no sign turns, and the sizes add up to the same."""
    model = llama()
    mark = base_fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        model.model.layers[0].mlp.down_proj.weight.div_(2)
    assert not same_base(mark, base_fingerprint(model))


def test_tensors_that_change_places_are_noticed() -> None:
    model = llama()
    mark = base_fingerprint(model)
    one, other = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    one.q_proj.weight, other.q_proj.weight = other.q_proj.weight, one.q_proj.weight
    assert not same_base(mark, base_fingerprint(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_lora_is_noticed_down_to_a_thousandth(dtype: torch.dtype) -> None:
    base = load_base(EMBEDDED, device="cpu").to(dtype)
    mark = base_fingerprint(base)
    for size in (0.1, 0.01, 0.001):
        other = base_fingerprint(merged(base, size=size))
        assert not same_base(mark, other), size
        assert "merged" in differing_part(mark, other)


def test_further_training_of_an_embedding_is_told_apart_from_a_merge() -> None:
    model = llama()
    mark = base_fingerprint(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[3].neg_()
    assert differing_part(mark, base_fingerprint(model)) == ""


def test_nan_has_no_sign_here() -> None:
    """A cast keeps no sign of NaN, and the processor's own NaN has its sign bit set."""
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, :2] = torch.tensor([float("nan"), 1e5])
        weight[1, 0] = torch.tensor(0x7FC00000 - 2**31, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert weight[1, 0].isnan()
    assert weight[1, 0].signbit()
    marks = {base_fingerprint(copy.deepcopy(model).to(dtype)) for dtype in (torch.float32, *DTYPES)}
    assert len(marks) == 1


def test_bits_are_packed_alike_wherever_they_are() -> None:
    import numpy as np

    for size in (1, 7, 8, 9, 1000):
        bits = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
        assert _packed_by_torch(bits) == np.packbits(bits.numpy()).tobytes()


def test_of_a_quantised_base_the_rest_is_compared(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="not installed (pip install 'manylora[quantised]')")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=61
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four)
    one, other = base_fingerprint(plain), base_fingerprint(quantised)
    assert other.endswith(":-")
    assert same_base(one, other)
    assert "quantised" in weakness(one, other)
    assert weakness(one, one) == ""
    with torch.no_grad():
        plain.model.norm.weight.mul_(2)
    assert not same_base(base_fingerprint(plain), other)


# ---- who compares it


def trained(base: Path, data: Path, out: Path, **more: Any) -> Path:
    values: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 0.01,
        "device": "cpu",
        "method": "lora",
    }
    prepared = prepare(TrainConfig(model=str(base), data=str(data), **values, **more))
    with RunFolder.create(str(out), config=prepared.config.to_dict(), seed=0) as run:
        finetune(prepared, run)
    return out


@pytest.fixture(scope="module")
def run(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_base, small_data, tmp_path_factory.mktemp("marked") / "run")


def save_changed(base: Path, folder: Path, size: float = 0.05) -> Path:
    """The base on disk, with a LoRA merged in."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    merged(load_base(str(base), device="cpu", dtype="float32"), size=size).save_pretrained(folder)
    return folder


def test_a_merged_model_is_not_taken_for_its_base(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = save_changed(tiny_base, tmp_path / "merged")
    load_adapter(load_base(str(tiny_base), device="cpu"), run)
    with pytest.raises(ModelError, match=r"was trained on another base model.*merged in"):
        load_adapter(load_base(str(other), device="cpu"), run)
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--merge", "--model", str(other)]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--merge"]) == 0


def test_an_adapter_of_an_earlier_version_loads_with_a_line(
    run: Path, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    base = load_base(str(tiny_base), device="cpu")
    path = folder / "adapter_config.json"
    old = base_fingerprint(base, like="0123456789abcdef")
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": old}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="manylora"):
        load_adapter(base, folder)
    (record,) = caplog.records
    assert "earlier version" in record.getMessage()
    assert "\n" not in record.getMessage()
    other = load_base(str(tiny_base), device="cpu")
    with torch.no_grad():
        other.get_input_embeddings().weight[3].neg_()
    with pytest.raises(ModelError, match="another base model"):
        load_adapter(other, folder)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's adapter as a plain LoRA."""
    out = tmp_path_factory.mktemp("exported") / "lora"
    assert main(["export", str(run), "--to", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def personal(tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client's folder."""
    folder = tmp_path_factory.mktemp("federated")
    rounds, _ = federation(settings(tiny_base, small_data, local_steps=1), rows_of(small_data), folder)
    rounds.run()
    rounds.score()
    return folder / "clients" / "cyd"


@pytest.mark.parametrize("which", ["exported", "personal"])
def test_a_plain_lora_of_ours_bears_the_mark_of_its_base(
    which: str, tiny_base: Path, tmp_path: Path, request: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lora = request.getfixturevalue(which)
    other = save_changed(tiny_base, tmp_path / "changed")
    with caplog.at_level(logging.WARNING, logger="manylora"):
        load_adapter(load_base(str(tiny_base), device="cpu"), lora)
        with pytest.raises(ModelError, match="was trained on another base model"):
            load_adapter(load_base(str(other), device="cpu"), lora)
    assert caplog.records == []
    out = str(tmp_path / "out")
    assert main(["export", str(lora), "--to", out, "--merge", "--model", str(other), "--device", "cpu"]) == 2
    assert not Path(out).exists()
    assert main(["export", str(lora), "--to", out]) == 2  # it is a plain LoRA
    assert main(["export", str(lora), "--to", out, "--merge", "--limit", "2"]) == 2
    assert main(["export", str(lora), "--to", out, "--merge", "--device", "cpu"]) == 0
    record = PromptRecord.read(Path(out))
    assert record is not None
    assert record.tasks
    assert record.base_fingerprint is None  # it is a base of its own
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = load_adapter(load_base(str(tiny_base), device="cpu"), lora)(ids).logits
        found = load_base(out, device="cpu").eval()(ids).logits
    torch.testing.assert_close(found, wanted)


def test_loras_of_several_bases_do_not_become_one_adapter(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = f"one={exported},two={exported}"
    both = ["export", "--from-loras", pair, "--form", "alpaca", "--to"]
    code = main([*both, str(tmp_path / "joined")])
    assert code == 0, capsys.readouterr().err
    joined = json.loads((tmp_path / "joined" / "adapter_config.json").read_text(encoding="utf-8"))
    record = PromptRecord.read(exported)
    assert record is not None
    assert joined["base_fingerprint"] == record.base_fingerprint
    for folder in (tmp_path / "x", tmp_path / "y"):
        shutil.copytree(exported, folder)
    record.with_mark("v2:" + "0" * 16 + "/1.00:-").write(tmp_path / "x")
    record.with_mark(None).write(tmp_path / "y")
    assert main(["export", "--from-loras", f"{exported},{tmp_path / 'x'}", "--to", str(tmp_path / "a")]) == 2
    assert "were trained on different bases" in capsys.readouterr().err
    assert main(["export", "--from-loras", f"{exported},{tmp_path / 'y'}", "--to", str(tmp_path / "b")]) == 0
    part = json.loads((tmp_path / "b" / "adapter_config.json").read_text(encoding="utf-8"))
    assert part["base_fingerprint"] is None


def test_that_nothing_is_compared_is_said_once(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base(str(tiny_base), device="cpu")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with caplog.at_level(logging.WARNING, logger="manylora"):
        for _ in range(2):
            load_adapter(load_base(str(tiny_base), device="cpu"), tmp_path / "lora")
    (record,) = caplog.records
    assert "bears no mark of its base" in record.getMessage()


class StopError(Exception):
    """What ends a run on the way."""


def interrupted(base: Path, data: Path, out: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise StopError

    config = TrainConfig(
        model=str(base), data=str(data), epochs=1, batch_size=8, learning_rate=0.01, device="cpu", method="lora",
        save_steps=2,
    )  # fmt: skip
    prepared = prepare(config)
    with (
        RunFolder.create(str(out), config=prepared.config.to_dict(), seed=0) as run,
        pytest.raises(StopError),
    ):
        finetune(prepared, run, callbacks=[Stop()])


def test_a_run_does_not_go_on_with_a_base_that_was_replaced(
    tiny_base: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_base, base)
    interrupted(base, small_data, run)
    save_changed(tiny_base, base)
    assert main(["train", "--resume", str(run)]) == 2
    assert "The base of" in capsys.readouterr().err
    shutil.copytree(tiny_base, base, dirs_exist_ok=True)
    assert main(["train", "--resume", str(run)]) == 0


def test_a_run_of_an_earlier_version_goes_on_with_a_line(
    tiny_base: Path, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    interrupted(tiny_base, small_data, run)
    folder = RunFolder.open(run)
    old = base_fingerprint(load_base(str(tiny_base), device="cpu"), like="old")
    folder.set_state("running", fingerprints={**folder.state["fingerprints"], "base": old})
    prepared = prepare(TrainConfig(**folder.read_config()))
    with caplog.at_level(logging.WARNING, logger="manylora"), folder:
        folder.lock()
        finetune(prepared, folder)
    assert [record.getMessage() for record in caplog.records if "earlier version" in record.getMessage()]
    folder.set_state("running", fingerprints={**folder.state["fingerprints"], "base": "0123456789abcdef"})
    with pytest.raises(RunError, match="The base of"):
        finetune(prepared, folder)


def test_a_client_with_a_merged_base_is_not_one_of_the_others(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    mark = base_fingerprint(merged(load_base(str(tiny_base), device="cpu", dtype="float32"), size=0.01))

    def other_base(name: str, number: int, answer: bytes) -> bytes:
        message = unpack(answer)
        fields = {**message.fields, "base": mark} if name == "cyd" else message.fields
        return pack(dataclasses.replace(message, fields=fields))

    told = Listening()
    config = settings(tiny_base, small_data, local_steps=1)
    rounds, _ = federation(config, rows_of(small_data), tmp_path, tamper=other_base)
    rounds.progress = told
    rounds.run()
    assert sorted(rounds.state.members) == ["ada", "bob"]
    assert "it has another base model" in told.refusals["cyd"]


def test_a_client_knows_its_base_by_a_mark_of_an_earlier_version(tiny_base: Path, small_data: Path) -> None:
    bench = bench_for(settings(tiny_base, small_data))
    old = base_fingerprint(load_base(str(tiny_base), device="cpu"), like="old")
    assert bench.is_on(old)
    assert bench.is_on(bench.fingerprint)
    assert not bench.is_on("0123456789abcdef")
    assert not bench.is_on("None")


@pytest.mark.parametrize("lost", [("base",), ("data",), ("data", "base")])
def test_a_run_without_a_fingerprint_says_that_nothing_is_compared(
    lost: tuple[str, ...], tiny_base: Path, small_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    interrupted(tiny_base, small_data, run)
    folder = RunFolder.open(run)
    kept = {name: mark for name, mark in folder.state["fingerprints"].items() if name not in lost}
    folder.set_state("running", fingerprints=kept)
    prepared = prepare(TrainConfig(**folder.read_config()))
    with caplog.at_level(logging.WARNING, logger="manylora"), folder:
        folder.lock()
        finetune(prepared, folder)
    (line,) = (r.getMessage() for r in caplog.records if "no fingerprint" in r.getMessage())
    assert f"no fingerprint of the {' and the '.join(lost)} it was begun with" in line


def test_linear_layers_of_another_architecture_are_not_called_a_merge() -> None:
    told = differing_part(
        "v2:0123456789abcdef/1.00:0123456789abcdef/1.00", "v2:0123456789abcdef/1.00:fedcba9876543210/1.00"
    )
    assert "the architecture is another one" in told
