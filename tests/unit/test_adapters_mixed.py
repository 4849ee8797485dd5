"""Several adapters in one batch (`adapter_names`), and rows that hold several examples (packing)."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    LlamaForSequenceClassification,
)

from manylora.adapters import ManyLoraConfig
from manylora.errors import RoutingError
from tiny_models import GREEDY, adapted, assert_same, checkpoint, fill, gradients, llama, t5, tokens

NAMES = ["second", "__base__", "default", "second"]
IDS = torch.tensor([0, 1, 2, 1])


def two_adapters(base: nn.Module | None = None, **settings: object) -> PeftModel:
    """A task-routed adapter on all layers, and a token-routed one on two."""
    targets = settings.pop("second", ["q_proj", "v_proj"])
    model = adapted(base, router="task", **settings)
    second = ManyLoraConfig(r=3, share="A", lora_dropout=0.0, target_modules=targets, **settings)
    model.add_adapter("second", second)
    fill(model, seed=4)
    return model.eval()


def alone(model: PeftModel, name: str, **inputs: Tensor) -> Tensor:
    """Logits of a batch that uses one adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    logits = model(**inputs).logits
    model.set_adapter("default")
    return logits


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_each_row_uses_its_own_adapter(task_type: str | None) -> None:
    model = two_adapters(task_type=task_type)
    got = model(input_ids=tokens(4), expert_ids=IDS, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        part = slice(row, row + 1)
        want = alone(model, name, input_ids=tokens(4)[part], expert_ids=IDS[part])
        torch.testing.assert_close(got[part], want, rtol=1e-4, atol=1e-5)
    plain = alone(model, "__base__", input_ids=tokens(4))
    assert torch.equal(model(input_ids=tokens(4), adapter_names=["__base__"] * 4).logits, plain)
    with model.route(IDS):
        assert torch.equal(model(input_ids=tokens(4), adapter_names=NAMES).logits, got)
    everywhere = model(input_ids=tokens(4), expert_ids=IDS).logits  # nothing sticks
    torch.testing.assert_close(everywhere[2:3], got[2:3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(everywhere[:2], got[:2], atol=1e-3)


def test_as_pefts_lora_does() -> None:
    """One expert is LoRA, so mixed batches of both must agree."""
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    many = get_peft_model(llama(), ManyLoraConfig(num_experts=1, router=None, lora_alpha=4, **settings))
    many.add_adapter("second", ManyLoraConfig(num_experts=1, router=None, lora_alpha=4, **settings))
    fill(many)
    lora = get_peft_model(llama(), LoraConfig(lora_alpha=4, **settings))
    lora.add_adapter("second", LoraConfig(lora_alpha=4, **settings))
    with torch.no_grad():
        for name, parameter in many.named_parameters():
            layer, found, rest = name.partition(".manylora_experts.")
            if found:
                adapter, matrix = rest.split(".")
                lora.get_parameter(f"{layer}.{matrix}.{adapter}.weight").copy_(parameter)
    for settings in ({}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}):
        outputs = [
            model.eval().generate(input_ids=tokens(4), adapter_names=NAMES, **GREEDY, **settings)
            for model in (many, lora)
        ]
        assert torch.equal(*outputs)
    logits = [model(input_ids=tokens(4), adapter_names=NAMES).logits for model in (many, lora)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


def row_by_row(model: PeftModel, **settings: object) -> Tensor:
    """What `generate` makes of each of the four rows alone."""
    rows = [
        model.generate(
            input_ids=tokens(4)[i : i + 1],
            expert_ids=IDS[i : i + 1],
            adapter_names=NAMES[i : i + 1],
            **settings,
        )
        for i in range(4)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_equals_generation_row_by_row(settings: dict, task_type: str | None) -> None:
    model = two_adapters(task_type=task_type)
    settings = {**GREEDY, **settings}
    got = model.generate(input_ids=tokens(4), expert_ids=IDS, adapter_names=NAMES, **settings)
    assert torch.equal(got, row_by_row(model, **settings))


def test_encoder_decoder_with_beams() -> None:
    model = two_adapters(t5(), second=["q", "v"], task_type="SEQ_2_SEQ_LM")
    settings = {**GREEDY, "num_beams": 3}
    got = model.generate(input_ids=tokens(4), expert_ids=IDS, adapter_names=NAMES, **settings)
    assert torch.equal(got, row_by_row(model, **settings))


def test_sequence_classification_uses_each_adapters_own_head() -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(llama().config).eval()
    model = two_adapters(base, task_type="SEQ_CLS")
    heads = model.get_submodule("base_model.model.score").modules_to_save
    with torch.no_grad():
        for i, head in enumerate(heads.values()):
            head.weight.add_(i + 1.0)
    got = model(input_ids=tokens(4), expert_ids=IDS, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        part = slice(row, row + 1)
        want = alone(model, name, input_ids=tokens(4)[part], expert_ids=IDS[part])
        torch.testing.assert_close(got[part], want, rtol=1e-4, atol=1e-5)


def test_names_that_cannot_be_followed() -> None:
    model = two_adapters()
    call = {"input_ids": tokens(4), "expert_ids": IDS}
    with pytest.raises(RoutingError, match="'thrid'; this model has default, second and __base__"):
        model(**call, adapter_names=["default", "thrid", "second", "second"])
    with pytest.raises(RoutingError, match="3 adapter_names for 4 rows"):
        model(**call, adapter_names=NAMES[:3])
    with pytest.raises(RoutingError, match="3 adapter_names for 4 rows"):
        model.generate(**call, adapter_names=NAMES[:3], **GREEDY)
    with pytest.raises(RoutingError, match="'default' is no list"):
        model(**call, adapter_names="default")
    with pytest.raises(RoutingError, match="needs expert_ids"):
        model(input_ids=tokens(4), adapter_names=NAMES)
    with pytest.raises(RoutingError, match=r"model.eval\(\)"):
        model.train()(**call, adapter_names=NAMES)
    model.eval()
    with model.route(1):
        model.merge_adapter()
    with pytest.raises(RoutingError, match="default is merged"):
        model(**call, adapter_names=NAMES)
    model.unmerge_adapter()
    model(**call, adapter_names=NAMES)
    config = ManyLoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(RoutingError, match="adapted in place"):
        inject_adapter_in_model(config, llama())(input_ids=tokens(4), adapter_names=NAMES)


def test_threads_mix_on_their_own() -> None:
    model = two_adapters()
    batches = [[NAMES[(i + shift) % 4] for i in range(4)] for shift in range(3)]
    with torch.no_grad():
        want = [model(input_ids=tokens(4), expert_ids=IDS, adapter_names=names).logits for names in batches]
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                got = model(input_ids=tokens(4), expert_ids=IDS, adapter_names=batches[i]).logits
                if not torch.equal(got, want[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Packing


def packed() -> tuple[dict[str, Tensor], Tensor, list[Tensor], list[int]]:
    """Three examples in one row, as transformers' padding-free collator makes it, and their experts per token."""
    parts, experts = [tokens(1, n, seed=n)[0] for n in (5, 1, 7)], [2, 0, 1]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": p.tolist()} for p in parts])
    ids = torch.cat([torch.full_like(p, e) for p, e in zip(parts, experts, strict=True)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    return inputs, ids.unsqueeze(0), parts, experts


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_packed_rows_take_an_expert_per_token(share: str) -> None:
    model = adapted(router="task", share=share)
    inputs, ids, parts, experts = packed()
    got = model(**inputs, expert_ids=ids, use_cache=False).logits[0]
    want = [
        model(input_ids=p.unsqueeze(0), expert_ids=torch.tensor([e])).logits[0]
        for p, e in zip(parts, experts, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_ids_per_token_in_training(reentrant: bool | None) -> None:
    model = adapted(router="task").train()
    ids = torch.tensor([2, 0, 1])
    model(input_ids=tokens(), labels=tokens(), expert_ids=ids).loss.backward()
    want = gradients(model)
    if reentrant is not None:
        checkpoint(model, reentrant=reentrant)
    per_token = ids.unsqueeze(1).expand(3, 8)
    model(input_ids=tokens(), labels=tokens(), expert_ids=per_token, use_cache=False).loss.backward()
    assert_same(gradients(model), want)


def test_an_id_per_row_is_refused_where_a_row_is_packed() -> None:
    model = adapted(router="task")
    inputs, _, _, _ = packed()
    one = torch.tensor([1])
    with pytest.raises(RoutingError, match=r"several examples.*\(batch, tokens\)"):
        model(**inputs, expert_ids=one)
    with pytest.raises(RoutingError, match="several examples"), model.route([1]):
        model(**inputs)
    with pytest.raises(RoutingError, match="several examples"):
        model(**inputs, attention_mask=torch.ones(1, 13), expert_ids=one)
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    with pytest.raises(RoutingError, match="several examples"):
        model(input_ids=inputs["input_ids"], expert_ids=one, cu_seq_lens_q=bounds)
    with model.route(1):
        model(**inputs)  # one expert for all is what it says
    adapted(router="token")(**inputs, expert_ids=one)  # does not look at ids


def test_padded_positions_are_not_packing() -> None:
    model = adapted(router="task")
    padded = torch.cat((torch.zeros(3, 2, dtype=torch.long), tokens()), 1)
    mask = (padded != 0).long()
    for fill_value in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill_value)
        for side in (1, -1):  # padding on the left, padding on the right
            inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
            if side < 0:
                inputs = {name: value.roll(-2, 1) for name, value in inputs.items()}
            model(**inputs, expert_ids=torch.tensor([2, 0, 1]))


def test_ids_per_token_that_do_not_fit() -> None:
    model = adapted(router="task")
    with pytest.raises(RoutingError, match=r"\(3, 7\) do not fit an input of shape \(3, 8, 32\)"):
        model(input_ids=tokens(), expert_ids=torch.zeros(3, 7, dtype=torch.long))
    with pytest.raises(RoutingError, match="contain 3"):
        model(input_ids=tokens(), expert_ids=torch.full((3, 8), 3))
    with pytest.raises(RoutingError, match=r"\(3, 8\); generate takes one index per prompt"):
        model.generate(input_ids=tokens(), expert_ids=torch.zeros(3, 8, dtype=torch.long), **GREEDY)
    with pytest.raises(RoutingError, match=r"shape \(1, 3, 8\)"):
        model(input_ids=tokens(), expert_ids=torch.zeros(1, 3, 8, dtype=torch.long))


def test_ids_per_row_are_refused_on_packed_rows_of_several_adapters() -> None:
    model = two_adapters()
    inputs, _, _, _ = packed()
    inputs = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    with pytest.raises(RoutingError, match="several examples"):
        model(**inputs, expert_ids=IDS[:2], adapter_names=["default", "second"], use_cache=False)


@pytest.mark.parametrize("names", [3, "default", ["default", 1]])
def test_adapter_names_that_are_no_names_are_refused(names: object) -> None:
    with pytest.raises(RoutingError, match="is no list of names"):
        adapted()(input_ids=tokens(2), adapter_names=names)


def test_an_adapter_added_in_evaluation_mode_drops_nothing_out() -> None:
    model = adapted()
    model.add_adapter("second", ManyLoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    fill(model, seed=4)
    model.set_adapter("second")
    assert torch.equal(model(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    names = ["second"] * 3
    torch.testing.assert_close(
        model(input_ids=tokens(), adapter_names=names).logits, model(input_ids=tokens()).logits
    )
    bank = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").bank("second")
    model.train()
    assert bank.training
