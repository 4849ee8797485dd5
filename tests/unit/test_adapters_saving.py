"""What is saved is what is loaded: files, cards, fresh processes, pickles."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
)

from formulas import parameters_per_layer
from manylora.adapters import ManyLoraConfig, ManyLoraLinear
from manylora.errors import TargetModulesError
from model_families import adapted, base, fill, keys, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


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


@pytest.mark.parametrize(
    ("task_type", "loader"),
    [
        (None, "AutoPeftModelForCausalLM"),
        ("CAUSAL_LM", "AutoPeftModelForCausalLM"),
        ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
        ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
        ("TOKEN_CLS", "AutoPeftModelForTokenClassification"),
        ("QUESTION_ANS", "AutoPeftModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction"),
    ],
)
def test_model_card_names_the_loader_that_takes_the_adapter(
    task_type: str | None, loader: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("# A card\n")
    ManyLoraConfig(task_type=task_type, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    assert f"model = {loader}.from_pretrained" in (tmp_path / "README.md").read_text()
    if task_type is not None:  # what PEFT's loaders compare
        peft_class = getattr(peft, loader)._target_peft_class
        assert peft_class is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type]


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


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(TargetModulesError, match=r"'q_proj', 'v_proj'.*'c_attn'"):
        PeftModel.from_pretrained(base("gpt2"), tmp_path)


def test_a_pickled_model_computes_the_same() -> None:
    model = adapted(router="task")
    ids = torch.tensor([2, 0, 1])
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(
        again(input_ids=tokens(), expert_ids=ids).logits, model(input_ids=tokens(), expert_ids=ids).logits
    )
