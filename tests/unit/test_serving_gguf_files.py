"""What is written into a GGUF file, and what is refused because llama.cpp would read it otherwise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files: pip install gguf")

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import model_families
from gguf_models import adapted, base, tokenizer
from manylora.adapters import PlainLora, export_lora
from manylora.errors import ConfigError, ModelError
from manylora.serving.gguf import write_lora, write_model
from manylora.serving.gguf_types import packed, tensor_type
from manylora.training.gguf_vocabulary import vocabulary_of


def smollm2_types(quantisation: Any) -> Counter[str]:
    """The types of SmolLM2-135M's matrices: 30 layers, 576 wide, 1536 in between, tied."""
    shapes = {
        "attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576), "attn_output": (576, 576),
        "ffn_gate": (1536, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536),
    }  # fmt: skip
    names = {f"blk.{layer}.{name}.weight": shape for layer in range(30) for name, shape in shapes.items()}
    names["token_embd.weight"] = (49152, 576)
    return Counter(tensor_type(n, s, quantisation, layers=30, tied=True) for n, s in names.items())


def test_types_are_llama_quantizes() -> None:
    """Counts of the file that llama-quantize makes of this model (llama.cpp v0.5.0); its bytes were the same too."""
    assert smollm2_types("q4_k_m") == {"Q5_0": 166, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}
    assert smollm2_types("q8_0") == {"Q8_0": 211}


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("blk.0.attn_norm.weight", (256,), "F32"),
        ("blk.0.attn_q_norm.weight", (2, 256), "F32"),
        ("output.weight", (99, 256), "Q6_K"),
        ("token_embd.weight", (99, 256), "Q4_K"),
        ("blk.0.attn_v.weight", (64, 256), "Q6_K"),
        ("blk.1.attn_v.weight", (64, 256), "Q4_K"),
        ("blk.3.attn_v.weight", (64, 256), "Q6_K"),
        ("blk.1.ffn_up.weight", (64, 256), "Q4_K"),
        ("blk.1.ffn_up.weight", (64, 96), "Q5_0"),
        ("blk.1.ffn_up.weight", (64, 40), "F16"),
    ],
)
def test_the_type_of_each_tensor_of_a_model_of_eight_layers(
    name: str, shape: tuple[int, ...], kind: str
) -> None:
    assert tensor_type(name, shape, "q4_k_m", layers=8, tied=False) == kind


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_0", "Q8_0", "F16", "BF16", "F32"])
def test_what_is_packed_unpacks_to_about_the_same(kind: str) -> None:
    if kind.endswith("_K"):
        pytest.importorskip("xllamacpp", reason="llama.cpp packs these types: pip install xllamacpp")
    values = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)

    unpacked = gguf.dequantize(packed("w", values, kind), gguf.GGMLQuantizationType[kind])

    error = float(np.sqrt(np.mean((unpacked - values) ** 2)))
    assert error < {"Q4_K": 0.1, "Q6_K": 0.03, "Q5_0": 0.07, "Q8_0": 0.01}.get(kind, 0.005)
    assert (error == 0) == (kind == "F32")


def test_an_unknown_quantisation_is_refused(tmp_path: Path) -> None:
    model, tok = base("llama")
    with pytest.raises(
        ConfigError, match=r"'q3_k_s' is unknown\. Choose one of f32, bf16, f16, q8_0, q4_k_m"
    ):
        write_model(tmp_path / "base.gguf", model, tok, quantisation="q3_k_s")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_numbers_that_the_type_cannot_hold_are_refused_and_nothing_is_left(
    value: float, tmp_path: Path
) -> None:
    model, tok = base("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"'blk\.0\.ffn_up\.weight' has "):
        write_model(tmp_path / "base.gguf", model, tok, quantisation="f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["phi", "gpt2", "gpt_neox"])
def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written as GGUF; those can: llama, mistral, qwen2"):
        write_model(tmp_path / "base.gguf", model_families.base(family), tokenizer("gpt-2"))


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
        ("qwen2", {"head_dim": 32}, "head_dim=32"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping=None"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ],
)
def test_settings_that_llama_cpp_takes_otherwise_are_refused(
    kind: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model, tok = base(kind, **settings)
    with pytest.raises(ModelError, match=said):
        write_model(tmp_path / "base.gguf", model, tok)
    assert list(tmp_path.iterdir()) == []


def test_a_window_ends_the_context_where_the_file_has_no_word_for_it(tmp_path: Path) -> None:
    model, tok = base("mistral", sliding_window=99)
    write_model(tmp_path / "base.gguf", model, tok)
    assert gguf.GGUFReader(tmp_path / "base.gguf").fields["llama.context_length"].contents() == 99


# ---- LoRAs


def lora(**settings: Any) -> tuple[PlainLora, Any]:
    model, _ = base("llama")
    config = model.config
    ours = adapted(model, **settings)
    weights = dict(get_peft_model_state_dict(ours, save_embedding_layers=False))
    return export_lora(ours.peft_config["default"], weights, 0), config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.modules_to_save.append("lm_head"), r"modules_to_save=\['lm_head'\]"),
        (lambda c: setattr(c, "bias", "all"), "bias='all'"),
        (lambda c: setattr(c, "use_dora", True), "use_dora=True"),
    ],
)
def test_more_than_a_lora_is_refused(change: Callable[[LoraConfig], Any], said: str, tmp_path: Path) -> None:
    plain, config = lora()
    plain.config.modules_to_save = []
    change(plain.config)
    with pytest.raises(ModelError, match=said):
        write_lora(tmp_path / "lora.gguf", plain, config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.router"])
def test_a_lora_where_llama_cpp_applies_none_is_refused(module: str, tmp_path: Path) -> None:
    plain, config = lora()
    for leaf, shape in (("A", (4, 64)), ("B", (8, 4))):
        plain.weights[f"base_model.model.{module}.lora_{leaf}.weight"] = torch.zeros(shape)
    with pytest.raises(ModelError, match=module.replace(".", r"\.")):
        write_lora(tmp_path / "lora.gguf", plain, config)


def test_a_lora_of_embeddings_is_refused(tmp_path: Path) -> None:
    plain, config = lora()
    plain.weights["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 8)
    with pytest.raises(ModelError, match="lora_embedding_A"):
        write_lora(tmp_path / "lora.gguf", plain, config)


def test_the_file_names_its_base_and_holds_the_factors(tmp_path: Path) -> None:
    plain, config = lora(target_modules=["v_proj"])
    write_lora(tmp_path / "lora.gguf", plain, config, fingerprint="abc")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {
        key: reader.fields[key].contents() for key in ("adapter.lora.alpha", "manylora.base_fingerprint")
    }
    assert fields == {"adapter.lora.alpha": plain.config.lora_alpha, "manylora.base_fingerprint": "abc"}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert sorted(tensors) == [f"blk.{n}.attn_v.weight.lora_{leaf}" for n in (0, 1) for leaf in "ab"]
    wanted = plain.weights["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], wanted.numpy())


# ---- tokenizers


def changed(kind: str, change: Callable[[Any], Any]) -> PreTrainedTokenizerFast:
    """A copy of a tiny tokenizer with another part."""
    specials = {"bos_token": tokenizer(kind).bos_token, "eos_token": tokenizer(kind).eos_token}
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind).backend_tokenizer, **specials)
    change(found.backend_tokenizer)
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "Lowercase"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts text"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "cuts text"),
        (lambda t: setattr(t, "model", models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "Unigram"),
        (lambda t: setattr(t.model, "ignore_merges", True), "ignore_merges=True"),
        (lambda t: setattr(t.model, "dropout", 0.5), "dropout=0.5"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(change: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        vocabulary_of(changed("gpt-2", change), rows=400)


def test_merges_that_scores_cannot_say_are_refused() -> None:
    def drop_one(core: Any) -> None:
        parts = json.loads(core.to_str())["model"]
        merges = [tuple(pair) for pair in parts["merges"]][1:]
        core.model = models.BPE(vocab=parts["vocab"], merges=merges, byte_fallback=True)

    whole = changed("gemma-spm", lambda core: None)
    assert vocabulary_of(whole, rows=400).model == "llama"
    with pytest.raises(ModelError, match="but no merge from two to one"):
        vocabulary_of(changed("gemma-spm", drop_one), rows=400)


def test_tokens_without_a_row_are_left_out_and_told_of() -> None:
    tok = changed("gpt-2", lambda core: core.add_special_tokens(["<|pad|>"]))
    tok.pad_token = "<|pad|>"
    rows = len(tok) - 1

    found = vocabulary_of(tok, rows=rows)

    assert len(found.tokens) == rows
    assert "padding" not in found.specials
    assert any("'<|pad|>'" in note for note in found.notes)


def test_a_space_before_the_first_piece_alone_follows_the_prompts() -> None:
    tok = tokenizer("llama-spm")
    assert vocabulary_of(tok, rows=400, chat=False).space_first
    assert not vocabulary_of(tok, rows=400, chat=True).space_first


def test_further_end_tokens_end_answers_too() -> None:
    tok = tokenizer("qwen2")
    assert vocabulary_of(tok, rows=400, ends=[tok.eos_token_id, 0]).specials["eot"] == 0
    assert "eot" not in vocabulary_of(tok, rows=400, ends=[tok.eos_token_id]).specials
