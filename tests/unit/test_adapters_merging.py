"""Several adapters on one model, merging, and giving the base back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from manylora.adapters import ManyLoraConfig, ManyLoraLinear
from manylora.errors import NotMergeableError
from model_families import adapted, base, fill, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_several_adapters_on_one_model(tmp_path: Path) -> None:
    model = adapted(share="B", router="token")
    first = model(input_ids=tokens()).logits
    model.add_adapter(
        "second",
        ManyLoraConfig(r=3, lora_dropout=0.0, share="A", router="task", target_modules=["q_proj", "o_proj"]),
    )
    assert torch.equal(model(input_ids=tokens()).logits, first)  # not active yet
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".second." in n)
    fill(model, seed=5)
    first = model(input_ids=tokens()).logits
    model.set_adapter("second")
    assert all(p.requires_grad == (".second." in n) for n, p in model.named_parameters() if "manylora" in n)
    ids = torch.tensor([2, 0, 1])
    second = model(input_ids=tokens(), expert_ids=ids).logits
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    again = PeftModel.from_pretrained(base(), tmp_path / "second", adapter_name="second").eval()
    assert torch.equal(again(input_ids=tokens(), expert_ids=ids).logits, second)
    again.load_adapter(tmp_path, adapter_name="default")
    again.set_adapter("default")
    assert torch.equal(again(input_ids=tokens()).logits, first)
    model.base_model.set_adapter(["default", "second"])  # both at once add up
    both = model(input_ids=tokens(), expert_ids=ids).logits
    assert not torch.allclose(both, first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=tokens()).logits, first)


@pytest.mark.parametrize("share", ["A", "B", "none"])
@pytest.mark.parametrize(
    ("settings", "route"),
    [
        ({"num_experts": 1, "router": "token"}, None),
        ({"router": "uniform"}, None),
        ({"router": "task", "default_expert": 2}, None),
        ({"router": "task"}, 1),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge(share: str, settings: dict, route: int | None, family: str) -> None:
    model = adapted(family, target_modules="all-linear", share=share, **settings)
    plain = base(family)(tokens()).logits
    ids = None if route is None else torch.tensor([route] * 3)
    expected = model(input_ids=tokens(), expert_ids=ids).logits
    if route is None:
        model.merge_adapter(safe_merge=True)
    else:
        with model.route(route):
            model.merge_adapter()
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(
        model(input_ids=tokens(), expert_ids=ids).logits, expected, rtol=1e-4, atol=1e-4
    )
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=tokens()).logits, plain, rtol=1e-4, atol=1e-4)
    if route is None:
        merged = model.merge_and_unload()
    else:
        with model.route(route):
            merged = model.merge_and_unload()
    assert not any(isinstance(m, ManyLoraLinear) for m in merged.modules())
    assert not merged._forward_pre_hooks
    assert not merged._forward_hooks
    assert "generate" not in vars(merged)
    torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"router": "token"}, "router='token'"), ({"router": "task"}, "default_expert")],
)
def test_what_cannot_be_merged_says_why_and_changes_nothing(settings: dict, reason: str) -> None:
    model = adapted(**settings)
    ids = torch.tensor([0, 1, 2])
    before = model(input_ids=tokens(), expert_ids=ids).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotMergeableError, match=reason):
            merge()
    assert torch.equal(model(input_ids=tokens(), expert_ids=ids).logits, before)
    with model.route([0, 1, 1]), pytest.raises(NotMergeableError):
        model.merge_adapter()


def test_unload_gives_the_base_back() -> None:
    plain = base()(tokens()).logits
    unloaded = adapted().unload()
    assert torch.equal(unloaded(tokens()).logits, plain)
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base().named_modules()]
