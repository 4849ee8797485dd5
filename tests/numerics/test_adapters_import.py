"""Several plain LoRAs become one adapter that gives what each gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from exported_models import adapted, base, logits, saved
from manylora.adapters import (
    PlainLora,
    export_lora,
    import_loras,
)
from manylora.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other layers": ({"target_modules": ["q_proj"]}, "v_proj.* is adapted by one alone"),
    "other kind": ({"task_type": "SEQ_CLS"}, "task_type"),
    "other base": ({"base_model_name_or_path": "elsewhere"}, "base_model_name_or_path"),
    "dora": ({"use_dora": True}, "use_dora"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "alpha 0": ({"lora_alpha": 0}, "two has lora_alpha=0"),
    "alpha 0 of a layer": ({"alpha_pattern": {"q_proj": 0}}, "two has lora_alpha=0"),
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
