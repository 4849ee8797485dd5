"""Options of the libraries below: each reaches the library, or is refused in one line before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig

from manylora.errors import ConfigError
from manylora.training import TrainConfig, build_model, prepare
from manylora.training.base_options import attention_options
from manylora.training.heads import LANGUAGE


def config(base: Path, data: Path, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "lora_dropout": 0.0, "device": "cpu", **more}
    return TrainConfig(model=str(base), data=str(data), learning_rate=0.01, **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_what_was_asked_for(tiny_base: Path, small_data: Path, attention: Any) -> None:
    model = build_model(prepare(config(tiny_base, small_data, attention=attention)))
    assert model.get_base_model().config._attn_implementation == attention


def test_eager_attention_gives_the_same_and_is_planned_with_its_scores(
    tiny_base: Path, small_data: Path
) -> None:
    plans, outputs = {}, {}
    for attention in ("sdpa", "eager"):
        prepared = prepare(config(tiny_base, small_data, attention=attention))
        plans[attention] = prepared.plan.memory
        outputs[attention] = build_model(prepared).eval()(input_ids=torch.arange(20)[None]).logits
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], rtol=1e-4, atol=1e-4)
    assert plans["eager"].forward > plans["sdpa"].forward  # type: ignore[union-attr]


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_backward_pass_on_a_cpu_is_refused(
    tiny_base: Path, small_data: Path, attention: Any
) -> None:
    with pytest.raises(ConfigError, match=f"attention {attention} trains on a GPU alone; .* sdpa or eager"):
        prepare(config(tiny_base, small_data, attention=attention))


def test_attention_that_is_not_installed_or_not_in_the_model_is_refused() -> None:
    architecture = BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"attention sdpa is not there for some/bloom .*'bloom'.* eager"):
        attention_options("sdpa", LANGUAGE, architecture, model="some/bloom", device=gpu)
    assert attention_options("auto", LANGUAGE, architecture, model="some/bloom", device=gpu) == {}


def test_flash_attention_names_its_package(tiny_base: Path) -> None:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    from manylora.training import load_config

    with pytest.raises(ConfigError, match="pip install flash-attn"):
        attention_options(
            "flash_attention_2",
            LANGUAGE,
            load_config(str(tiny_base)),
            model=str(tiny_base),
            device=torch.device("cuda"),
        )
