"""Which layers get an adapter, in every model family, and what it starts with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from manylora.adapters import ManyLoraConfig, ManyLoraLinear
from manylora.errors import ConfigError, TargetModulesError
from model_families import FAMILIES, adapted, base, fill, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_every_family_trains_a_step_and_reloads(family: str, tmp_path: Path) -> None:
    model = adapted(family, filled=False, target_modules="all-linear", share="B", router="token")
    layers = [layer for layer in model.modules() if isinstance(layer, ManyLoraLinear)]
    per_block = {
        "llama": 7,
        "qwen2": 7,
        "mistral": 7,
        "gemma": 7,
        "phi": 6,
        "gpt2": 4,
        "gpt_neo": 6,
        "gpt_neox": 4,
    }
    assert len(layers) == 2 * per_block[family]
    assert model.peft_config["default"].fan_in_fan_out == (family == "gpt2")
    fill(model)
    before = model(input_ids=tokens(), labels=tokens()).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("manylora_experts" in name), name
    optimizer.step()
    after = model(input_ids=tokens(), labels=tokens()).loss
    assert after < before
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(family), tmp_path).eval()
    assert torch.equal(again(input_ids=tokens(), labels=tokens()).loss, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_of_every_family(family: str) -> None:
    model = adapted(family, target_modules=None)
    assert any(isinstance(layer, ManyLoraLinear) for layer in model.modules())


class Unknown(nn.Module):
    """A model PEFT knows nothing about."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def test_a_plain_module_can_be_adapted() -> None:
    torch.manual_seed(0)
    plain = Unknown()
    x = torch.randn(6, 4)
    before = plain(x)
    model = get_peft_model(plain, ManyLoraConfig(router="task", target_modules=["first", "second"]))
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(model(x, expert_ids=ids), before)


@pytest.mark.parametrize(
    ("targets", "shown"),
    [
        (["q_proj", "qproj", "x_proj"], ["'qproj', 'x_proj'", "'down_proj'", "'q_proj'"]),
        (["nothing"], ["'nothing'", "'v_proj'"]),
        (r".*\.nothing", ["nothing", "'v_proj'"]),
        (["embed_tokens"], ["embed_tokens", "Embedding", "'v_proj'"]),
        (["self_attn"], ["self_attn", "LlamaAttention"]),
        (["proj"], ["'proj'"]),
    ],
)
def test_targets_that_match_nothing(targets: list[str] | str, shown: list[str]) -> None:
    plain = base()
    names = [name for name, _ in plain.named_modules()]
    with pytest.raises(TargetModulesError) as caught:
        get_peft_model(plain, ManyLoraConfig(target_modules=targets))
    for part in shown:
        assert part in str(caught.value)
    assert [name for name, _ in plain.named_modules()] == names  # nothing was touched
    assert not plain._forward_pre_hooks


def test_other_settings_that_match_nothing() -> None:
    with pytest.raises(TargetModulesError, match="layers_to_transform 9"):
        adapted(layers_to_transform=[0, 9])
    with pytest.raises(TargetModulesError, match="exclude_modules"):
        adapted(exclude_modules=["q_proj", "v_proj"])
    with pytest.raises(ConfigError, match=r"modules_to_save 'head_of_lm' matches no module.*'lm_head'"):
        adapted(modules_to_save=["classifier", "head_of_lm"])
    with pytest.raises(ConfigError, match=r"rank_pattern key 'k_proj'.*'q_proj', 'v_proj'"):
        adapted(rank_pattern={"k_proj": 3})
    with pytest.raises(TargetModulesError, match=r"no default target_modules.*'first', 'second'"):
        get_peft_model(Unknown(), ManyLoraConfig())


def test_patterns_layers_and_regular_expressions() -> None:
    model = adapted(
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        rank_pattern={"q_proj": 5},
        alpha_pattern={r"layers\.1\.self_attn\.v_proj": 3},
        lora_alpha=8,
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ManyLoraLinear)}
    assert [name.split("layers.")[1] for name in layers] == ["1.self_attn.q_proj", "1.self_attn.v_proj"]
    q, v = (layer.bank("default") for layer in layers.values())
    assert (q.lora_A.shape, q.scaling) == ((15, 32), 8 / 5)
    assert (v.lora_A.shape, v.scaling) == ((6, 32), 3 / 2)
    model = adapted(target_modules=r".*layers\.0\..*(q|o)_proj", use_rslora=True, r=4, lora_alpha=8)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ManyLoraLinear)}
    assert [name.split("self_attn.")[1] for name in layers] == ["q_proj", "o_proj"]
    assert next(iter(layers.values())).bank("default").scaling == 8 / 2


def test_initial_values() -> None:
    model = adapted(filled=False, r=8, num_experts=3)
    bank = next(m for m in model.modules() if isinstance(m, ManyLoraLinear)).bank("default")
    first, second, third = bank.lora_A.split(8)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    bound = 1 / 32**0.5  # kaiming-uniform(a=√5) over fan-in D = 32
    for values in (bank.lora_A, bank.lora_router):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.8 * bound
    assert not bank.lora_B.any()


def test_bfloat16_base_trains_float32_adapters(tmp_path: Path) -> None:
    model = get_peft_model(base().bfloat16(), ManyLoraConfig(r=2, target_modules=["q_proj"]))
    fill(model)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
