"""Adapters on the tiny base, and what the tests of `manylora export` read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from manylora.adapters import ManyLoraConfig

TASKS = ["first_word", "last_word", "swap"]


LOGITS = 1e-5


def make_adapter(
    base: Path, folder: Path, *, factor: float = 0.5, embeddings_by: float = 0.0, **settings: Any
) -> Path:
    """An adapter with random weights on the tiny base, saved as a training run saves it; its embeddings have moved."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = get_peft_model(model, ManyLoraConfig(task_type="CAUSAL_LM", init_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name:
                parameter.mul_(factor)
            elif parameter.requires_grad:
                parameter.add_(embeddings_by)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits_of(folder: Path, base: Path, **routing: Any) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    return logits(model, **routing)


def logits(model: torch.nn.Module, **routing: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 19).view(2, 8), **routing).logits


def only_line(capsys: pytest.CaptureFixture[str], *, last: bool = False) -> str:
    """The error line; `last`: after the progress lines of earlier work."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert last or len(lines) == 1, lines
    assert lines[-1].startswith("manylora: ")
    return lines[-1]
