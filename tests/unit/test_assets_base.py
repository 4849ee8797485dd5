"""The embedded base model: what it is, how large it is, and that plain transformers load it without a warning."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.assets import embedded_base_path

BASE = embedded_base_path()


def test_folder_holds_a_complete_model_of_at_most_ten_megabytes() -> None:
    names = {path.name for path in BASE.iterdir()}
    wanted = (
        "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json README.md"
    )
    assert set(wanted.split()) <= names
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 10_000_000


def test_weights_are_bfloat16_and_about_four_million() -> None:
    with safe_open(BASE / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) <= 4_000_000


def test_loads_without_warnings_and_is_a_llama() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    for holder in (model.config, model.generation_config, tokenizer):
        assert holder.bos_token_id is not None
        assert len({holder.bos_token_id, holder.eos_token_id, holder.pad_token_id}) == 3
    assert tokenizer.is_fast


@pytest.mark.parametrize(
    "text", ["Mara sold a kettle.", "  two\n\n spaces\t", "Füße 日本 🙂 ∑", "### Response:\n", "\x00\x7f"]
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]


def test_prompt_and_answer_can_be_tokenised_apart() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    head, tail = "### Instruction:\nSay who.\n\n### Response:\n", "Mara Okafor"
    apart = tokenizer(head).input_ids + tokenizer(tail, add_special_tokens=False).input_ids
    assert tokenizer.decode(apart, skip_special_tokens=True) == head + tail


def test_predicts_generated_text_far_better_than_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of held-out exercises in their own form; the card's figures come from more of them."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    tokens = pytest.importorskip(
        "recipes.base.tokens", reason="the recipes lie beside the package in a checkout"
    )
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = tokens.packed(tokenizer, seed="held-out-test", rows=8, length=192, context_weight=0.5)
    mask = tokens.attention_mask(rows)
    with torch.no_grad():
        best = model(input_ids=rows.ids, attention_mask=mask, position_ids=rows.position).logits.argmax(-1)
    right = best[:, :-1] == rows.ids[:, 1:]
    assert right[rows.weights[:, 1:] == 1].float().mean() > 0.6


def test_chat_template_marks_the_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "== user\nHi\n== assistant\n"


def test_card_reports_data_steps_and_perplexity() -> None:
    card = Path(BASE / "README.md").read_text(encoding="utf-8")
    for word in ("Perplexity", "steps", "--seed", "recipes/base/corpus.py"):
        assert word in card
