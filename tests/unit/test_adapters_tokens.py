"""`trainable_token_indices`: some embedding rows are trained and saved beside the adapter, as with LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from manylora.adapters import ManyLoraConfig

ROWS = [3, 7]


def base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def config(**settings: object) -> ManyLoraConfig:
    options = {"r": 4, "lora_dropout": 0.0, "init_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return ManyLoraConfig(**{**options, "trainable_token_indices": ROWS, **settings})


def test_only_the_named_rows_train_and_they_are_saved(tmp_path: Path) -> None:
    ids = torch.tensor([[3, 7, 9, 11]])
    model = get_peft_model(base(), config())
    before = model.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = (model.get_input_embeddings().weight - before).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == ROWS
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_merge(dtype: torch.dtype) -> None:
    ids = torch.tensor([[3, 7, 9, 11]])
    model = get_peft_model(base(dtype), config(router="uniform"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_adapter" in name and parameter.requires_grad:
                parameter.add_(0.25)
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert not any("token_adapter" in name for name, _ in merged.named_modules())
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=tolerance, atol=tolerance)
