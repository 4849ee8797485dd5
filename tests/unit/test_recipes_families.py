"""The four tiny bases: built alike, of one size, and pretrained by a loop that goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes.base.pretrain import Pretraining, Settings, Stage, optimizers, train
from recipes.families.build import FAMILIES, build
from recipes.families.pretrain import SETTINGS, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from manylora.assets import embedded_base_path

TINY = Settings(hidden=32, layers=2, heads=4, mlp=48, length=96)
STAGES = (
    Stage(name="first", steps=2, batch=2, lr=6e-3, warmup=1, decay_from=1, phases=((0, "easy"),)),
    Stage(name="second", steps=1, batch=2, lr=4e-3, warmup=1, decay_from=0, phases=((0, "recall"),)),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(embedded_base_path())


def test_the_families_are_of_one_size(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {name: sum(p.numel() for p in build(name, SETTINGS, tokenizer).parameters()) for name in FAMILIES}
    assert max(sizes.values()) < 1.2 * min(sizes.values()), sizes
    assert max(sizes.values()) < 2e6  # smaller than the embedded base


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_layer_starts_as_a_copier(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Attending to one token with every head makes that token more likely: W_o W_v is a positive multiple of identity.

    Where heads share values it is positive semidefinite, with the shared values' rank.
    """
    model = build(family, TINY, tokenizer)
    again = build(family, TINY, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    if family == "gpt2":
        attention = model.transformer.h[0].attn
        value, out = attention.c_attn.weight[:, -TINY.hidden :].T, attention.c_proj.weight.T
    else:
        attention = model.model.layers[0].self_attn
        groups = attention.num_key_value_groups
        value = attention.v_proj.weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, 0)
        value, out = value.flatten(0, 1), attention.o_proj.weight
    product = out @ value
    torch.testing.assert_close(product, product.T, atol=1e-6, rtol=0)
    eigenvalues = torch.linalg.eigvalsh(product)
    shared = 1 if family in ("llama", "gpt2") else 2
    assert (eigenvalues > 0.1).sum() == TINY.hidden // shared
    assert eigenvalues.min() > -1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_optimizer(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(family, TINY, tokenizer)
    muon, adamw = ([p for group in o.param_groups for p in group["params"]] for o in optimizers(model, 1e-3))
    assert {id(p) for p in model.parameters()} == {id(p) for p in (*muon, *adamw)}
    assert len(muon) + len(adamw) == len(list(model.parameters()))
    assert not {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)} & set(
        map(id, muon)
    )
    assert len(muon) == TINY.layers * (4 if family == "gpt2" else 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretraining_that_was_stopped_ends_as_an_unbroken_one(family: str, tmp_path: Path) -> None:
    def pretraining(name: str) -> Pretraining:
        settings = replace(recipe(family, STAGES), held_out_rows=2)
        return Pretraining(tmp_path / name, tmp_path / f"{name}-state", TINY, settings)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = pretraining("whole")
        before = [p.detach().clone() for p in whole.model.parameters()]
        assert train(whole, compiled=False, snapshot_minutes=9)
        assert not train(pretraining("parts"), compiled=False, snapshot_minutes=9, minutes=0)
        (tmp_path / "parts-state" / "state.tmp").write_bytes(b"what a kill left")
        parts = pretraining("parts")  # from the disk, in the middle of a stage
        assert (parts.stage, parts.step) == (0, 1)
        assert train(parts, compiled=False, snapshot_minutes=9)
    finally:
        torch.set_num_threads(threads)
    assert not all(torch.equal(a, b) for a, b in zip(before, whole.model.parameters(), strict=True))
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert parts.history["curve"][-1][:2] == ["second", 1]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "parts").eos_token_id == model.config.eos_token_id
    state = dict(parts.model.named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(value, state[name].to(torch.bfloat16).float()), name
    assert family in (tmp_path / "parts" / "README.md").read_text(encoding="utf-8")
