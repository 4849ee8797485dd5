"""What PEFT's users expect of a method, beyond causal language models and the main path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from manylora.adapters import ManyLoraConfig, ManyLoraLinear
from manylora.errors import ManyLoraError, NotMergeableError
from tiny_models import GREEDY, VOCAB, adapted, assert_same, checkpoint, fill, gradients, llama, t5, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([2, 0, 1])


def bart() -> nn.Module:
    torch.manual_seed(0)
    config = BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    return BartForConditionalGeneration(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB
    )
    return BertForSequenceClassification(config).eval()


def llama_classifier() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(llama().config).eval()


SEQ2SEQ = {"t5": (t5, ["q", "v", "wo"]), "bart": (bart, ["q_proj", "fc1"])}
CLASSIFIERS = {"llama": (llama_classifier, ["q_proj", "v_proj"]), "bert": (bert, ["query", "dense"])}


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("router", ["token", "task"])
def test_encoder_decoder_models(family: str, router: str, tmp_path: Path) -> None:
    make, targets = SEQ2SEQ[family]
    base = make().requires_grad_(False)  # with gradients to parameters, attention takes another path in T5
    plain = base(input_ids=tokens(), labels=tokens(3, 5)).logits
    model = get_peft_model(
        base,
        ManyLoraConfig(
            r=2, lora_dropout=0.0, router=router, target_modules=targets, task_type="SEQ_2_SEQ_LM"
        ),
    ).eval()
    inputs = {"input_ids": tokens(), "labels": tokens(3, 5), "expert_ids": IDS}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)  # identity at step 0
    fill(model)
    with torch.no_grad():
        together = model(**inputs).logits
    for row in range(3):
        part = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(model(**part).logits[0], together[row], rtol=1e-4, atol=1e-4)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)

    model.train()
    model(**inputs).loss.backward()
    want = gradients(model)
    assert all("manylora_experts" in name for name in want)
    checkpoint(model, reentrant=False)
    model(**inputs, use_cache=False).loss.backward()
    assert_same(gradients(model), want, rtol=1e-3, atol=1e-4)  # T5's are large: 2e-5 of their norm, as LoRA's
    model.eval()

    settings = {**GREEDY, "num_beams": 2, "num_return_sequences": 2}
    got = model.generate(input_ids=tokens(), expert_ids=IDS, **settings)
    rows = [
        model.generate(input_ids=tokens()[i : i + 1], expert_ids=IDS[i : i + 1], **settings) for i in range(3)
    ]
    assert torch.equal(got, torch.cat(rows))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(again(**inputs).logits, together)


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("router", ["token", "task"])
def test_sequence_classification(family: str, router: str, tmp_path: Path) -> None:
    make, targets = CLASSIFIERS[family]
    model = adapted(make(), router=router, target_modules=targets, task_type="SEQ_CLS")
    inputs = {"input_ids": tokens(), "expert_ids": IDS}
    labels = torch.tensor([0, 1, 1])
    head = "score" if family == "llama" else "classifier"
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "manylora" not in n}
    assert trained
    assert all(head in name for name in trained)  # PEFT trains the new head too
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(again(**inputs).logits, want)


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_lora_plus_gives_b_its_own_step_size(share: str) -> None:
    model = adapted(share=share)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rate[id(parameter)] == (16e-3 if name.endswith("lora_B") else 1e-3), name
    assert len(rate) == 3 * 14
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("router", ["token", "task", "uniform"])
def test_autocast_computes_near_float32_and_keeps_float32_gradients(router: str) -> None:
    model = adapted(router=router)
    with torch.no_grad():  # deltas of the size of a trained adapter's
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name:
                parameter.mul_(0.2)
    inputs = {"input_ids": tokens(), "labels": tokens(), "expert_ids": IDS}
    want = model(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**inputs)
    got.loss.backward()
    torch.testing.assert_close(got.loss, want.loss, rtol=0.05, atol=0.05)
    found = gradients(model)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    want.loss.backward()
    expected = gradients(model)
    one, other = (torch.cat([g.flatten() for g in every.values()]) for every in (found, expected))
    assert nn.functional.cosine_similarity(one, other, dim=0) > 0.97


@pytest.mark.parametrize("cast", [True, False])
def test_autocast_adapter_dtype(cast: bool) -> None:
    config = ManyLoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=cast)
    dtypes = {p.dtype for n, p in model.named_parameters() if "manylora_experts" in n}
    assert dtypes == {torch.float32 if cast else torch.bfloat16}
    fill(model)
    output = model(input_ids=tokens(), labels=tokens())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_exclude_and_all_linear() -> None:
    model = adapted(exclude_modules=["down_proj", "o_proj"])
    ends = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, ManyLoraLinear)}
    assert ends == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}  # and never the output head


def test_status_reports_the_adapters() -> None:
    model = adapted(router="task")
    model.add_adapter("second", ManyLoraConfig(r=2, target_modules=["q_proj"]))
    status = model.get_model_status()
    assert (status.adapter_model_type, status.active_adapters) == ("ManyLoraModel", ["default"])
    assert (status.available_adapters, status.num_adapter_layers) == (["default", "second"], 14)
    assert status.merged_adapters == []
    with model.route(1):
        model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_deleting_the_active_adapter_leaves_the_other() -> None:
    model = adapted()
    plain = llama()(tokens()).logits
    model.add_adapter("second", ManyLoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj"]))
    fill(model, seed=5)
    model.set_adapter("second")
    second = model(input_ids=tokens()).logits
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="second"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert not any(".default." in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(input_ids=tokens()).logits, second)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, plain)


def test_replacing_an_adapter_of_the_same_name() -> None:
    model = adapted()
    model.delete_adapter("default")
    model.add_adapter("default", ManyLoraConfig(r=5, num_experts=2, target_modules=["v_proj"]))
    model.set_adapter("default")
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("lora_A")}
    assert shapes == {(10, 32)}
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_disabling_a_merged_adapter_takes_it_out_again() -> None:
    model = adapted(router="uniform")
    want, plain = model(input_ids=tokens()).logits, llama()(tokens()).logits
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=tokens()).logits, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(input_ids=tokens()).logits, want, rtol=1e-4, atol=1e-4)


def test_safe_merge_refuses_broken_weights_and_changes_nothing() -> None:
    model = adapted(router="uniform", target_modules=["q_proj"])
    layer = next(m for m in model.modules() if isinstance(m, ManyLoraLinear))
    with torch.no_grad():
        layer.bank("default").lora_B[0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ManyLoraError, match="The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_two_adapters_of_which_one_cannot_changes_nothing() -> None:
    model = adapted(router="uniform")
    model.add_adapter("second", ManyLoraConfig(r=2, router="token", target_modules=["q_proj"]))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(NotMergeableError, match="router='token'"):
        model.merge_adapter(adapter_names=["default", "second"])
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "shape",
    [(0, 8), (3, 0), (1, 1)],
    ids=["no rows", "no tokens", "one token"],
)
@pytest.mark.parametrize("router", ["token", "task", "uniform"])
def test_empty_batches_of_a_module_adapted_by_hand(shape: tuple[int, int], router: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = get_peft_model(Two(), ManyLoraConfig(r=2, router=router, target_modules=["first", "second"]))
    x = torch.randn(*shape, 4, requires_grad=True)
    y = model(x, expert_ids=torch.ones(shape[0], dtype=torch.long))
    assert y.shape == (*shape, 3)
    y.sum().backward()
    assert x.grad is not None


def config_of(kind: str, targets: list[str]) -> PeftConfig:
    if kind == "lora":
        return LoraConfig(r=2, lora_dropout=0.5, target_modules=targets, init_lora_weights=False)
    return ManyLoraConfig(
        r=2, lora_dropout=0.5, target_modules=targets, init_weights=False, num_experts=1, router=None
    )


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"], ["q_proj", "v_proj"]])
def test_an_adapter_added_in_evaluation_mode_is_in_it(targets: list[str]) -> None:
    """Also on layers that had none: else its dropout would run, and two calls differ."""
    model = get_peft_model(llama(), config_of("ours", ["q_proj"])).eval()
    model.add_adapter("other", config_of("ours", targets))
    model.set_adapter("other")
    assert not [name for name, module in model.named_modules() if module.training]
    once, again = (model(input_ids=tokens()).logits for _ in range(2))
    assert torch.equal(once, again)
    model.train()
    once, again = (model(input_ids=tokens()).logits for _ in range(2))
    assert not torch.equal(once, again)


def test_an_adapter_added_in_training_mode_is_in_that() -> None:
    model = get_peft_model(llama().train(), config_of("ours", ["q_proj"]))
    model.add_adapter("other", config_of("ours", ["v_proj"]))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj"]])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_gradients_belong_to_the_adapters_that_have_them_with_plain_lora(
    second: bool, first: bool, targets: list[str], tmp_path: Path
) -> None:
    """Loaded, loaded beside another, added, and set active: the same adapters are trainable as with PEFT's LoRA."""

    def trainable(model: PeftModel) -> set[str]:
        names = ("default", "other", "added")
        return {
            name
            for name in names
            for key, parameter in model.named_parameters()
            if f".{name}" in key and parameter.requires_grad
        }

    found = {}
    for kind in ("lora", "ours"):
        for name, where in (("one", ["q_proj"]), ("two", targets)):
            get_peft_model(llama(), config_of(kind, where)).save_pretrained(tmp_path / kind / name)
        model = PeftModel.from_pretrained(llama(), tmp_path / kind / "one", is_trainable=first)
        seen = [trainable(model)]
        model.load_adapter(tmp_path / kind / "two", "other", is_trainable=second)
        seen.append(trainable(model))
        model.add_adapter("added", config_of(kind, targets))
        seen.append(trainable(model))
        for name in ("other", "added", "default"):
            model.set_adapter(name)
            seen.append(trainable(model))
        found[kind] = seen
    assert found["ours"] == found["lora"]
    assert found["ours"][-3:] == [
        {"other"},
        {"added"},
        {"default"},
    ]  # an optimizer made now holds the active one
