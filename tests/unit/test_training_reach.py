"""Adapters go where a forward pass over text goes, the plan says where not, and no base makes the plan crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import get_peft_model
from transformers import AutoTokenizer

from manylora.adapters import ManyLoraConfig, ManyLoraLinear
from manylora.cli import main
from manylora.errors import TargetModulesError
from manylora.evaluation.generation import context_of
from manylora.training import TrainConfig, build_model, load_adapter, load_base, plan_lines, prepare
from tiny_models import fill

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def mixtral(vocab: int) -> T.PreTrainedModel:
    return T.MixtralForCausalLM(
        T.MixtralConfig(**SMALL, vocab_size=vocab, num_local_experts=4, num_experts_per_tok=2)
    )


def llama4(vocab: int) -> T.PreTrainedModel:
    options = {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 16, "num_experts_per_tok": 1}
    return T.Llama4ForCausalLM(
        T.Llama4TextConfig(**SMALL, vocab_size=vocab, attention_chunk_size=64, **options)
    )


def mamba(vocab: int) -> T.PreTrainedModel:
    ids = {key: SMALL[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return T.MambaForCausalLM(
        T.MambaConfig(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, state_size=8, **ids)
    )


def with_vision(vocab: int) -> T.PreTrainedModel:
    text = {**SMALL, "vocab_size": vocab, "head_dim": 16, "sliding_window": 64}
    config = T.Gemma3Config(text_config=text, mm_tokens_per_image=4, vision_config=VISION)
    return T.Gemma3ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random base of a family, made when it is first asked for."""
    makers = {"mixtral": mixtral, "llama4": llama4, "mamba": mamba, "vision": with_vision}
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    folder = tmp_path_factory.mktemp("families")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            makers[name](len(tokenizer)).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name

    return get


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("birds") / "birds.jsonl"
    rows = [json.dumps({"instruction": f"Bird {number}", "output": "wren"}) for number in range(4)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def config(base: Path, data: Path, **more: Any) -> TrainConfig:
    return TrainConfig(model=str(base), data=str(data), epochs=1, r=2, device="cpu", **more)


def lines(prepared: Any) -> dict[str, str]:
    return dict(plan_lines(prepared.plan, prepared.config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mixture_of_experts_is_planned_in_every_type(
    dtype: Any, bases: Callable[[str], Path], birds: Path
) -> None:
    prepared = prepare(config(bases("mixtral"), birds, dtype=dtype))
    memory = prepared.plan.memory
    assert not isinstance(memory, str)
    assert memory.forward > 0
    told = lines(prepared)
    assert "experts.gate_up_proj" in told["no adapter"]
    assert "% of the base" in told["no adapter"]
    assert "left out" not in told


def test_a_step_that_cannot_be_simulated_leaves_the_memory_unknown_and_the_plan_whole(
    bases: Callable[[str], Path], birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this implementation asks which experts got tokens, and no shape tells
    monkeypatch.setattr(
        T.MixtralConfig,
        "_experts_implementation",
        property(lambda self: "eager", lambda *_: None),
        raising=False,
    )
    prepared = prepare(config(bases("mixtral"), birds))
    assert isinstance(prepared.plan.memory, str)
    assert "not known" in lines(prepared)["memory"]
    assert prepared.plan.modules["q_proj"] == 2


@pytest.mark.parametrize(
    ("family", "out", "reason"),
    [
        ("llama4", {"router": 2}, "Llama4Router returns a tuple"),
        ("mamba", {"dt_proj": 2}, "does not call it"),
        ("vision", {"fc1": 1, "fc2": 1, "out_proj": 1}, "does not call it"),
    ],
)
def test_layers_that_text_does_not_reach_are_left_out_and_named(
    family: str, out: dict[str, int], reason: str, bases: Callable[[str], Path], birds: Path, tmp_path: Path
) -> None:
    prepared = prepare(config(bases(family), birds))
    for name in out:
        assert name not in prepared.plan.modules
    assert reason in lines(prepared)["left out"]
    model = build_model(prepared).train()
    adapted = {name for name, module in model.named_modules() if isinstance(module, ManyLoraLinear)}
    assert len(adapted) == sum(prepared.plan.modules.values())
    assert not any("vision" in name for name in adapted)
    ids = torch.arange(5, 13)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # what DDP would wait for
    fill(model)
    wanted = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load_base(str(bases(family)), device="cpu"), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, wanted)


@pytest.mark.parametrize(
    ("family", "target"), [("mamba", "dt_proj"), ("llama4", "router"), ("vision", "fc1")]
)
@pytest.mark.parametrize("expression", [False, True])
def test_a_target_that_means_such_layers_alone_is_refused(
    family: str, target: str, expression: bool, bases: Callable[[str], Path], birds: Path
) -> None:
    targets = rf".*\.{target}" if expression else [target]
    with pytest.raises(TargetModulesError, match=rf"{target}.*cannot carry an adapter"):
        prepare(config(bases(family), birds, target_modules=targets))


def test_a_name_that_also_means_other_layers_keeps_those(bases: Callable[[str], Path], birds: Path) -> None:
    prepared = prepare(config(bases("vision"), birds, target_modules=["q_proj", "v_proj"]))
    assert prepared.plan.modules == {"q_proj": 2, "v_proj": 2}
    assert "vision_tower" in lines(prepared)["left out"]


def test_all_linear_in_python_leaves_out_what_only_derives_from_linear(bases: Callable[[str], Path]) -> None:
    base = load_base(str(bases("llama4")), device="cpu")
    model = get_peft_model(base, ManyLoraConfig(r=2, target_modules="all-linear"))
    assert not any("router" in name for name, m in model.named_modules() if isinstance(m, ManyLoraLinear))
    model(input_ids=torch.arange(5, 13)[None])
    named = get_peft_model(
        load_base(str(bases("llama4")), device="cpu"), ManyLoraConfig(r=2, target_modules=["router"])
    )
    with pytest.raises(TargetModulesError, match="Llama4Router returns a tuple"):
        named(input_ids=torch.arange(5, 13)[None])


def test_the_text_part_tells_the_context(bases: Callable[[str], Path]) -> None:
    assert context_of(T.AutoConfig.from_pretrained(bases("vision"))) == 1024
    assert context_of(T.AutoConfig.from_pretrained(bases("mamba"))) is None


@pytest.mark.parametrize("targets", [[], ["--target-modules", "q_proj,v_proj"]])
def test_llama_4_trains_from_the_command_line(
    targets: list[str], bases: Callable[[str], Path], birds: Path, in_empty_folder: Path
) -> None:
    base = in_empty_folder / "base"
    shutil.copytree(bases("llama4"), base)
    words = ["train", "--model", str(base), "--data", str(birds), "--dtype", "bfloat16", "--epochs", "1"]
    assert main([*words, "--device", "cpu", "--out", "run", *targets]) == 0
