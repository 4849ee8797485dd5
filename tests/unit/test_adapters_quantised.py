"""Quantised bases on CPU: bitsandbytes 8 and 4 bit, torchao int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from manylora.adapters import ManyLoraLinear
from manylora.errors import RoutingError
from tiny_models import GREEDY, VOCAB, adapted, assert_same, gradients, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
KINDS = ["bnb8", "bnb4", "torchao"]
Load = Callable[[], nn.Module]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama on disk; 4-bit blocks hold 64 numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(params=KINDS)
def load(request: pytest.FixtureRequest, folder: Path) -> Load:
    """Loads the base quantised."""
    if request.param == "torchao":
        pytest.importorskip("torchao", reason="not installed (pip install 'manylora[torchao]')")
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes", reason="not installed (pip install 'manylora[quantised]')")
        settings = (
            BitsAndBytesConfig(load_in_8bit=True)
            if request.param == "bnb8"
            else BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
        )
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )


IDS = torch.tensor([2, 0, 1])


def test_trains_saves_reloads_and_generates(load: Load, tmp_path: Path) -> None:
    model = adapted(load(), router="task")
    assert sum(isinstance(m, ManyLoraLinear) for m in model.modules()) == 14
    model.train()
    model(input_ids=tokens(), labels=tokens(), expert_ids=IDS).loss.backward()
    found = gradients(model)
    assert len(found) == 28
    assert all("manylora_experts" in n and g.isfinite().all() and g.any() for n, g in found.items())
    model.eval()
    want = model(input_ids=tokens(), expert_ids=IDS).logits
    with model.disable_adapter():
        plain = model(input_ids=tokens()).logits
    assert not torch.allclose(want, plain, atol=1e-2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert torch.equal(again(input_ids=tokens(), expert_ids=IDS).logits, want)
    settings = {"input_ids": tokens(), "expert_ids": IDS, **GREEDY}
    assert torch.equal(again.generate(**settings), model.generate(**settings))
    mixed = model(input_ids=tokens(), expert_ids=IDS, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[0], want[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(mixed[1], plain[1], rtol=0.02, atol=0.02)


def test_training_after_an_evaluation_has_the_same_gradients(load: Load) -> None:
    """bitsandbytes lays 4-bit weights out for inference in evaluation, and then drops gradients."""
    results = []
    for evaluated in (False, True):
        base = load()
        if evaluated:
            base.eval()(input_ids=tokens())
        model = adapted(base, router="token")
        if evaluated:
            with torch.no_grad():
                model(input_ids=tokens())
        model.train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        results.append(gradients(model))
    assert_same(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_merging_adds_the_delta_up_to_quantising_anew(load: Load) -> None:
    model = adapted(load(), router="task")
    layers = [m for m in model.modules() if isinstance(m, ManyLoraLinear)]
    with model.route(1):
        wanted = [layer.get_base_weight().float() + layer.get_delta_weight("default") for layer in layers]
        befores = [layer.get_base_weight().float() for layer in layers]
        model.merge_adapter()
    coarse = 0.12 if layers[0].quantization_backend.backend_name == "bnb 4bit" else 0.02
    for layer, want, before in zip(layers, wanted, befores, strict=True):
        assert (want - before).norm() > 2 * coarse * want.norm()  # the delta is larger than the noise
        assert (layer.get_base_weight().float() - want).norm() < coarse * want.norm()
    with pytest.raises(RoutingError, match="merged with expert 1"):
        model(input_ids=tokens(), expert_ids=IDS)
    model.unmerge_adapter()
    for layer, want, before in zip(layers, wanted, befores, strict=True):
        assert (layer.get_base_weight().float() - before).norm() < 2 * coarse * want.norm()
