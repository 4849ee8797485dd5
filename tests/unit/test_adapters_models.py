"""The method inside PEFT: injection, saving, loading, several adapters, merging, model families."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

from manylora.adapters import ManyLoraConfig, ManyLoraLinear, parameters_per_layer
from manylora.errors import ConfigError, NotMergeableError, TargetModulesError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOCAB = 61
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SMALL = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCAB,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**SMALL),
    "gpt2": GPT2Config(**GPT2_SMALL),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL, hidden_dropout=0.0, attention_dropout=0.0),
}


def base(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


def tokens(rows: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def adapted(
    family: str = "llama", *, filled: bool = True, adapter_name: str = "default", **settings
) -> PeftModel:
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(base(family), ManyLoraConfig(**settings), adapter_name=adapter_name).eval()
    if filled:
        fill(model)
    return model


def fill(model: nn.Module, seed: int = 2) -> None:
    """Random values in every adapter parameter, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    ("share", "router", "n"),
    list(itertools.product(("A", "B", "none"), ("token", "task", "uniform"), (1, 3))),
)
def test_identity_disable_save_load_generate(
    share: str, router: str, n: int, task_type: str | None, tmp_path: Path
) -> None:
    plain = base()(tokens()).logits
    model = adapted(filled=False, share=share, router=router, num_experts=n, task_type=task_type)
    ids = torch.tensor([0, n - 1, 0])
    assert torch.equal(model(input_ids=tokens(), expert_ids=ids).logits, plain)  # identity at step 0
    fill(model)
    logits = model(input_ids=tokens(), expert_ids=ids).logits
    assert not torch.allclose(logits, plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens(), expert_ids=ids).logits, plain)

    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    a_count, b_count = (1 if share == "A" else n), (1 if share == "B" else n)
    prefix = "base_model.model.model.layers.1.self_attn.v_proj.manylora_experts."
    expected = {prefix + "lora_A": (a_count * 2, 32), prefix + "lora_B": (16, b_count * 2)}
    if router == "token" and n > 1:
        expected[prefix + "lora_router"] = (n, 32)
    saved = keys(tmp_path)
    assert {key: shape for key, shape in saved.items() if key.startswith(prefix)} == expected
    assert len(saved) == 4 * len(expected)

    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(input_ids=tokens(), expert_ids=ids).logits, logits)
    settings = {"max_new_tokens": 3, "do_sample": False}
    one = model.generate(input_ids=tokens(), expert_ids=ids, **settings)
    two = again.generate(input_ids=tokens(), expert_ids=ids, **settings)
    assert torch.equal(one, two)


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_file_size_and_parameter_count_follow_the_formula(share: str, tmp_path: Path) -> None:
    model = adapted(share=share, target_modules="all-linear", rank_pattern={"down_proj": 5})
    config = model.peft_config["default"]
    count = sum(
        parameters_per_layer(
            config,
            in_features=layer.in_features,
            out_features=layer.out_features,
            rank=5 if name.endswith("down_proj") else None,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, ManyLoraLinear)
    )
    assert model.get_nb_trainable_parameters()[0] == count
    model.save_pretrained(tmp_path)
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) == header + 4 * count  # a shared matrix is stored once


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = adapted()
    for part in ("one", "two"):
        model.save_pretrained(tmp_path / part)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_model_card_says_how_to_load(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import manylora  # registers") == 1


def test_a_fresh_process_loads_the_adapter(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(plain, ManyLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    fill(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(model.peft_config["default"]))
    torch.save(model(input_ids=tokens()).logits, tmp_path / "logits.pt")
    script = """
import pickle, sys, torch
import manylora
from pathlib import Path
from peft import AutoPeftModelForCausalLM
folder = Path(sys.argv[1])
config = pickle.loads((folder / "config.pickle").read_bytes())
model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
tokens = torch.randint(3, 61, (3, 8), generator=torch.Generator().manual_seed(1))
torch.set_num_threads(int(sys.argv[2]))  # another number of threads adds up in another order
same = torch.equal(model(input_ids=tokens).logits, torch.load(folder / "logits.pt"))
print(config.peft_type.value, type(model.peft_config["default"]).__name__, same)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.stdout.split() == ["MANYLORA", "ManyLoraConfig", "True"], done.stderr


def test_auto_peft_model(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(plain, ManyLoraConfig(r=2, router="task", task_type="CAUSAL_LM"))
    fill(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.tensor([2, 0, 1])
    assert torch.equal(
        again(input_ids=tokens(), expert_ids=ids).logits, model(input_ids=tokens(), expert_ids=ids).logits
    )


def test_low_cpu_mem_usage(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


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


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", 0), ("manylora_only", 4), ("lora_only", 4), ("all", 6)],
)
def test_bias_and_modules_to_save(bias: str, trained: int, tmp_path: Path) -> None:
    model = adapted("qwen2", bias=bias, modules_to_save=["lm_head"])  # biases on q, k and v
    biases = [p for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad]
    assert len(biases) == trained
    with torch.no_grad():
        for parameter in biases:
            parameter.add_(0.5)
        head = model.get_submodule("base_model.model.lm_head").modules_to_save["default"]
        head.weight.add_(0.1)
    assert head.weight.requires_grad
    logits = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("qwen2"), tmp_path).eval()
    assert torch.equal(again(input_ids=tokens()).logits, logits)


def test_several_adapters_on_one_model(tmp_path: Path) -> None:
    model = adapted(share="B", router="token")
    first = model(input_ids=tokens()).logits
    model.add_adapter(
        "second",
        ManyLoraConfig(r=3, lora_dropout=0.0, share="A", router="task", target_modules=["q_proj", "o_proj"]),
    )
    assert torch.equal(model(input_ids=tokens()).logits, first)  # not active yet
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".second." in n)
    fill(model, seed=5)
    first = model(input_ids=tokens()).logits
    model.set_adapter("second")
    assert all(p.requires_grad == (".second." in n) for n, p in model.named_parameters() if "manylora" in n)
    ids = torch.tensor([2, 0, 1])
    second = model(input_ids=tokens(), expert_ids=ids).logits
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    again = PeftModel.from_pretrained(base(), tmp_path / "second", adapter_name="second").eval()
    assert torch.equal(again(input_ids=tokens(), expert_ids=ids).logits, second)
    again.load_adapter(tmp_path, adapter_name="default")
    again.set_adapter("default")
    assert torch.equal(again(input_ids=tokens()).logits, first)
    model.base_model.set_adapter(["default", "second"])  # both at once add up
    both = model(input_ids=tokens(), expert_ids=ids).logits
    assert not torch.allclose(both, first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=tokens()).logits, first)


@pytest.mark.parametrize("share", ["A", "B", "none"])
@pytest.mark.parametrize(
    ("settings", "route"),
    [
        ({"num_experts": 1, "router": "token"}, None),
        ({"router": "uniform"}, None),
        ({"router": "task", "default_expert": 2}, None),
        ({"router": "task"}, 1),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge(share: str, settings: dict, route: int | None, family: str) -> None:
    model = adapted(family, target_modules="all-linear", share=share, **settings)
    plain = base(family)(tokens()).logits
    ids = None if route is None else torch.tensor([route] * 3)
    expected = model(input_ids=tokens(), expert_ids=ids).logits
    if route is None:
        model.merge_adapter(safe_merge=True)
    else:
        with model.route(route):
            model.merge_adapter()
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(
        model(input_ids=tokens(), expert_ids=ids).logits, expected, rtol=1e-4, atol=1e-4
    )
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=tokens()).logits, plain, rtol=1e-4, atol=1e-4)
    if route is None:
        merged = model.merge_and_unload()
    else:
        with model.route(route):
            merged = model.merge_and_unload()
    assert not any(isinstance(m, ManyLoraLinear) for m in merged.modules())
    assert not merged._forward_pre_hooks
    assert not merged._forward_hooks
    assert "generate" not in vars(merged)
    torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"router": "token"}, "router='token'"), ({"router": "task"}, "default_expert")],
)
def test_what_cannot_be_merged_says_why_and_changes_nothing(settings: dict, reason: str) -> None:
    model = adapted(**settings)
    ids = torch.tensor([0, 1, 2])
    before = model(input_ids=tokens(), expert_ids=ids).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotMergeableError, match=reason):
            merge()
    assert torch.equal(model(input_ids=tokens(), expert_ids=ids).logits, before)
    with model.route([0, 1, 1]), pytest.raises(NotMergeableError):
        model.merge_adapter()


def test_unload_gives_the_base_back() -> None:
    plain = base()(tokens()).logits
    unloaded = adapted().unload()
    assert torch.equal(unloaded(tokens()).logits, plain)
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base().named_modules()]


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(TargetModulesError, match=r"'q_proj', 'v_proj'.*'c_attn'"):
        PeftModel.from_pretrained(base("gpt2"), tmp_path)


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


def test_a_pickled_model_computes_the_same() -> None:
    model = adapted(router="task")
    ids = torch.tensor([2, 0, 1])
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(
        again(input_ids=tokens(), expert_ids=ids).logits, model(input_ids=tokens(), expert_ids=ids).logits
    )
