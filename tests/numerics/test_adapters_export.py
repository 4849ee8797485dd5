"""Exported LoRAs give what the adapter gives, in a process that has no manylora, and imports are the way back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from manylora.adapters import (
    ManyLoraConfig,
    ManyLoraLinear,
    PlainLora,
    export_lora,
    import_loras,
    parameters_per_layer,
    read_adapter,
    read_lora,
    write_folder,
)
from manylora.errors import ConfigError, ModelError, NotMergeableError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOCAB = 61
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),  # has biases on q, k and v
    "gpt2": GPT2Config(  # keeps its weights as (D, O)
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
TOKENS = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(1))

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (family, settings); by default 3 experts of rank 2 on q_proj and v_proj
    "task-A": ("llama", {"share": "A", "router": "task"}),
    "task-B": ("llama", {"share": "B", "router": "task"}),
    "task-none": ("llama", {"share": "none", "router": "task"}),
    "uniform-A": ("llama", {"share": "A", "router": "uniform"}),
    "uniform-B": ("llama", {"share": "B", "router": "uniform"}),
    "uniform-none": ("llama", {"share": "none", "router": "uniform"}),
    "one expert": ("llama", {"num_experts": 1, "router": None}),
    "one expert, token": ("llama", {"num_experts": 1, "router": "token", "share": "A"}),
    "rslora": ("llama", {"router": "task", "use_rslora": True, "r": 3, "lora_alpha": 5}),
    "patterns": (
        "llama",
        {
            "router": "task",
            "share": "none",
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 1},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "patterns, uniform, rslora": (
        "llama",
        {"router": "uniform", "share": "none", "use_rslora": True, "rank_pattern": {"layers.0.*q_proj": 4}},
    ),
    "expression": ("llama", {"router": "task", "target_modules": r".*layers\.1\..*(up|o)_proj"}),
    "some layers": ("llama", {"router": "task", "layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    "biases and head": ("qwen2", {"router": "task", "bias": "manylora_only", "modules_to_save": ["lm_head"]}),
    "all biases": ("qwen2", {"router": "uniform", "bias": "all"}),
    "conv1d": ("gpt2", {"router": "task", "target_modules": ["c_attn", "c_proj"]}),
}


def base(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


def adapted(family: str = "llama", **settings: Any) -> PeftModel:
    settings = {
        "r": 2, "lora_dropout": 0.0, "share": "B", "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        **settings,
    }  # fmt: skip
    model = get_peft_model(base(family), ManyLoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name or parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(model: PeftModel, folder: Path) -> tuple[ManyLoraConfig, dict[str, Tensor]]:
    model.save_pretrained(folder, save_embedding_layers=False)
    return read_adapter(folder)


def logits(model: nn.Module, **routing: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, **routing).logits


def banks(model: PeftModel) -> dict[str, Any]:
    return {
        name: layer.bank("default")
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, ManyLoraLinear)
    }


OUTSIDE = """
import json, pathlib, sys, warnings
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
root = pathlib.Path(sys.argv[1])
found, complaints = {}, []
tokens = torch.tensor(json.loads((root / "tokens.json").read_text()))
for folder in sorted((root / "loras").glob("*/*")):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = json.loads((folder / "adapter_config.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    complaints += [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    found[f"{folder.parent.name}/{folder.name}"] = model(input_ids=tokens).logits.detach().clone()
for folder in sorted((root / "merged").glob("*")):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found[f"merged/{folder.name}"] = model(input_ids=tokens).logits.detach().clone()
assert "manylora" not in sys.modules, "this process must not know manylora"
assert not complaints, complaints
save_file(found, root / "found.safetensors")
print(len(found), "without manylora")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor], Path]:
    """Logits of the adapters here, logits of their exported folders in a process without manylora, the folders."""
    root = tmp_path_factory.mktemp("exported")
    (root / "tokens.json").write_text(json.dumps(TOKENS.tolist()))
    for family in FAMILIES:
        base(family).save_pretrained(root / "bases" / family)
    wanted: dict[str, Tensor] = {}
    for case, (family, settings) in CASES.items():
        model = adapted(family, **settings)
        config, weights = saved(model, root / "adapters" / case)
        config.base_model_name_or_path = str(root / "bases" / family)
        by_task = config.router == "task"
        for choice in range(config.num_experts) if by_task else ["all"]:
            routing = {"expert_ids": torch.full((3,), choice)} if by_task else {}
            wanted[f"{case}/{choice}"] = logits(model, **routing)
            lora = export_lora(config, weights, choice)
            write_folder(root / "loras" / case / str(choice), lora.config, lora.weights, card="card")
    for case in ("task-B/1", "uniform-none/all", "one expert/all", "biases and head/2", "conv1d/0"):
        lora = read_lora(root / "loras" / case)
        folder = root / "merged" / case.replace("/", "-")
        from manylora.training.merge import merged

        merged(str(lora.config.base_model_name_or_path), lora).save_pretrained(folder)
        wanted[f"merged/{folder.name}"] = wanted[case]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(root)],
        capture_output=True,
        text=True,
        env={**env, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"{len(wanted)} without manylora"
    return wanted, load_file(root / "found.safetensors"), root


@pytest.mark.parametrize("case", [*CASES, "merged"])
def test_plain_peft_without_manylora_gives_the_adapters_logits(
    case: str, exported: tuple[dict[str, Tensor], dict[str, Tensor], Path]
) -> None:
    wanted, found, _ = exported
    names = [name for name in wanted if name.startswith(f"{case}/")]
    assert names
    tolerance = 5e-5 if case == "merged" else 1e-5  # adding the delta to the weight rounds the sum
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=tolerance)
    family = CASES[case][0] if case in CASES else "llama"
    assert (wanted[names[0]] - logits(base(family))).abs().max() > 0.01  # the adapter does something


@pytest.mark.parametrize("case", CASES)
def test_a_reader_of_r_and_alpha_alone_gets_the_same_deltas(
    case: str, exported: tuple[dict[str, Tensor], dict[str, Tensor], Path]
) -> None:
    """vLLM and SGLang scale all layers by lora_alpha / r and take a layer's rank from its tensors."""
    family, settings = CASES[case]
    wanted = banks(adapted(family, **settings))
    for folder in sorted((exported[2] / "loras" / case).iterdir()):
        values = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        assert values["peft_type"] == "LORA"
        assert isinstance(values["target_modules"], list)
        assert not values["use_rslora"]
        choice = int(folder.name) if folder.name.isdigit() else "all"
        for module, bank in wanted.items():
            A, B = (weights[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
            assert A.shape[0] == B.shape[1] <= values["r"]
            torch.testing.assert_close(
                B @ A * (values["lora_alpha"] / values["r"]), bank.delta(choice), rtol=1e-5, atol=1e-6
            )
        experts = {key for key in weights if ".lora_" in key}
        assert len(experts) == 2 * len(wanted)
        if not settings.get("rank_pattern") and choice != "all":
            assert values["r"] == settings.get("r", 2)  # sharing never raises a task's rank


def test_a_task_of_a_shared_adapter_keeps_rank_and_weights_to_the_bit(tmp_path: Path) -> None:
    config, weights = saved(adapted(router="task", share="B"), tmp_path)
    lora = export_lora(config, weights, 1)
    key = "model.layers.0.self_attn.q_proj"
    A, B = (weights[f"base_model.model.{key}.manylora_experts.lora_{part}"] for part in "AB")
    assert torch.equal(lora.weights[f"base_model.model.{key}.lora_A.weight"], A[2:4])
    assert torch.equal(lora.weights[f"base_model.model.{key}.lora_B.weight"], B)
    assert (lora.rank, lora.config.lora_alpha) == (2, 16)
    assert not lora.config.rank_pattern
    assert not lora.config.alpha_pattern


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_so(dtype: torch.dtype, tmp_path: Path) -> None:
    config, weights = saved(adapted(router="task", share="none"), tmp_path)
    lora = export_lora(config, {key: value.to(dtype) for key, value in weights.items()}, 0)
    assert {value.dtype for value in lora.weights.values()} == {dtype}


# ---- the token router


def test_a_token_router_needs_gates(tmp_path: Path) -> None:
    config, weights = saved(adapted(router="token"), tmp_path)
    with pytest.raises(NotMergeableError, match="weighs the experts anew"):
        export_lora(config, weights, "all")
    with pytest.raises(NotMergeableError):
        export_lora(config, weights, 0)
    with pytest.raises(ModelError, match="no routing weights"):
        export_lora(config, weights, {})


@pytest.mark.parametrize("share", ["A", "B", "none"])
@pytest.mark.parametrize("at", ["equal", "one expert"])
def test_collapse_is_exact_where_the_gates_are_constant(share: str, at: str, tmp_path: Path) -> None:
    model = adapted(router="token", share=share)
    with torch.no_grad():
        for bank in banks(model).values():
            bank.lora_router.zero_()
    gate = torch.full((3,), 1 / 3) if at == "equal" else torch.tensor([0.0, 1.0, 0.0])
    config, weights = saved(model, tmp_path)
    lora = export_lora(config, weights, dict.fromkeys(banks(model), gate))
    assert lora.rank == (6 if share == "none" else 2)
    wanted = logits(model)
    if at == "one expert":
        task = get_peft_model(
            base(), ManyLoraConfig(**{**settings_of(config), "router": "task", "default_expert": 1})
        ).eval()
        set_peft_model_state_dict(task, {k: v for k, v in weights.items() if "router" not in k})
        wanted = logits(task)
    plain = get_peft_model(base(), lora.config).eval()
    set_peft_model_state_dict(plain, lora.weights)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-5, atol=1e-5)


def settings_of(config: ManyLoraConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "lora_dropout", "share", "num_experts", "target_modules", "task_type")
    return {name: getattr(config, name) for name in names}


# ---- the way back


def plain(name: str, seed: int, **settings: Any) -> PlainLora:
    settings = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        **settings,
    }
    model = get_peft_model(base(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key.replace(".default", ""): 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in model.state_dict().items()
        if "lora_" in key
    }
    return PlainLora(config=model.peft_config["default"], weights=weights)


UNEQUAL: dict[str, dict[str, Any]] = {
    "small": {"r": 1, "lora_alpha": 3},
    "large": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "mixed": {"r": 2, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 1}},
}


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_imported_loras_give_what_each_gave(kind: str) -> None:
    settings = UNEQUAL if kind == "unequal" else {key: {} for key in ("one", "two")}
    loras = {name: plain(name, seed, **own) for seed, (name, own) in enumerate(settings.items())}
    config, weights = import_loras(loras)
    assert (config.share, config.router, config.task_names) == ("none", "task", list(loras))
    together = get_peft_model(base(), config).eval()
    result = set_peft_model_state_dict(together, weights)
    assert not [key for key in result.missing_keys if "manylora" in key]
    assert not result.unexpected_keys
    for index, lora in enumerate(loras.values()):
        alone = get_peft_model(base(), lora.config).eval()
        set_peft_model_state_dict(alone, lora.weights)
        found = logits(together, expert_ids=torch.full((3,), index))
        torch.testing.assert_close(found, logits(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["task-A", "task-B", "task-none", "rslora", "patterns", "biases and head", "conv1d"]
)
def test_export_import_export_is_exact(
    case: str, exported: tuple[dict[str, Tensor], dict[str, Tensor], Path], tmp_path: Path
) -> None:
    loras = {path.name: read_lora(path) for path in sorted((exported[2] / "loras" / case).iterdir())}
    config, weights = import_loras(loras)
    write_folder(tmp_path / "adapter", config, weights, card="card")
    again_config, again_weights = read_adapter(tmp_path / "adapter")
    for index, (name, lora) in enumerate(loras.items()):
        again = export_lora(again_config, again_weights, index)
        write_folder(tmp_path / name, again.config, again.weights, card="card")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            there = exported[2] / "loras" / case / name / file
            assert (tmp_path / name / file).read_bytes() == there.read_bytes(), file
        assert lora.weights.keys() == again.weights.keys()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other layers": ({"target_modules": ["q_proj"]}, "v_proj.* is adapted by one alone"),
    "other kind": ({"task_type": "SEQ_CLS"}, "task_type"),
    "other base": ({"base_model_name_or_path": "elsewhere"}, "base_model_name_or_path"),
    "dora": ({"use_dora": True}, "use_dora"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_loras_that_cannot_share_an_adapter_are_refused(case: str) -> None:
    changed, message = REFUSED[case]
    one, other = plain("one", 0), plain("two", 1)
    for setting, value in changed.items():
        setattr(other.config, setting, value)
    if case == "other layers":
        other = plain("two", 1, **changed)
    with pytest.raises(ModelError, match=message):
        import_loras({"one": one, "two": other})


def test_other_trained_weights_must_be_the_same(tmp_path: Path) -> None:
    config, weights = saved(adapted("qwen2", router="task", modules_to_save=["lm_head"]), tmp_path)
    one, two = (export_lora(config, weights, n) for n in range(2))
    import_loras({"one": one, "two": two})
    two.weights["base_model.model.lm_head.weight"] = two.weights["base_model.model.lm_head.weight"] + 1
    with pytest.raises(ModelError, match=r"lm_head\.weight.*in common"):
        import_loras({"one": one, "two": two})


def test_no_lora_no_expert_and_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LoRA"):
        import_loras({})
    with pytest.raises(ModelError, match="no linear layer"):
        import_loras({"one": plain("one", 0, target_modules=["embed_tokens", "q_proj"])})
    config, weights = saved(adapted(router="task"), tmp_path)
    with pytest.raises(ConfigError, match="Expert 3"):
        export_lora(config, weights, 3)


# ---- damaged files, sizes, merging


def test_weights_that_do_not_fit_the_settings_are_refused(tmp_path: Path) -> None:
    config, weights = saved(adapted(router="task"), tmp_path / "adapter")
    key = next(key for key in weights if key.endswith("lora_B"))

    def refuse(changed: Mapping[str, Tensor], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            export_lora(config, changed, 0)

    refuse({**weights, key: weights[key][:, :1]}, "do not belong together")
    refuse({other: value for other, value in weights.items() if other != key}, "incomplete")
    refuse({**weights, key.replace("lora_B", "lora_magnitude"): weights[key]}, "no counterpart")
    refuse({}, "no expert")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="broken"):
        read_adapter(tmp_path / "adapter")
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="MANYLORA adapter, not a plain LoRA"):
        read_lora(tmp_path / "adapter")


@pytest.mark.parametrize("share", ["A", "B", "none"])
@pytest.mark.parametrize("router", ["token", "task"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_parameters_times_dtype_and_a_header(
    share: str, router: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A shared matrix is stored once: bytes = parameters x dtype + header."""
    model = adapted(share=share, router=router).to(dtype)
    config, _ = saved(model, tmp_path)
    layers = [layer for layer in model.modules() if isinstance(layer, ManyLoraLinear)]
    parameters = sum(
        parameters_per_layer(config, in_features=layer.in_features, out_features=layer.out_features)
        for layer in layers
    )
    raw = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = struct.unpack("<Q", raw[:8])[0]
    assert len(raw) == 8 + header + parameters * dtype.itemsize
    trainable = sum(p.numel() for n, p in model.named_parameters() if "manylora_experts" in n)
    assert trainable == parameters


def test_merged_weights_are_rounded_once(
    exported: tuple[dict[str, Tensor], dict[str, Tensor], Path], tmp_path: Path
) -> None:
    lora = read_lora(exported[2] / "loras" / "task-B" / "1")
    from manylora.training.merge import merged

    model = merged(str(exported[2] / "bases" / "llama"), lora, dtype="bfloat16")
    name = "model.layers.1.self_attn.q_proj"
    A, B = (lora.weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    before = base().get_submodule(name).weight.to(torch.bfloat16)
    exact = (before.float() + B @ A * (lora.config.lora_alpha / lora.config.r)).to(torch.bfloat16)
    assert torch.equal(model.get_submodule(name).weight, exact)
