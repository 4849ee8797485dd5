"""Exported LoRAs give what the adapter gives, in a process that has no manylora."""

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
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from exported_models import FAMILIES, TOKENS, adapted, base, logits, saved, settings_of
from formulas import parameters_per_layer
from manylora.adapters import (
    ManyLoraConfig,
    ManyLoraLinear,
    export_lora,
    import_loras,
    read_adapter,
    read_lora,
    write_folder,
)
from manylora.errors import ModelError, NotMergeableError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


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
