"""The output layer runs where an answer is predicted, and rows of like length share a pass: the same sums, sooner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from manylora.adapters import ManyLoraConfig
from manylora.training.batches import longest_first, rows_of_a_pass
from manylora.training.losses import AnswerLoss
from model_families import FAMILIES


def batch(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and labels of four rows padded on the right, one of which has no answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (4, 12), generator=generator)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row, (prompt, end) in enumerate([(5, 12), (3, 9), (7, 8), (6, 6)]):
        mask[row, end:] = 0
        labels[row, prompt:end] = ids[row, prompt:end]
    return ids, mask, labels


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrowed_head_gives_the_losses_and_gradients_of_all_positions(family: str) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_config(FAMILIES[family]).double(),
        ManyLoraConfig(r=2, num_experts=2, target_modules="all-linear", init_weights=False, lora_dropout=0.0),
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    ids, mask, labels = batch(model.config.vocab_size)
    task = torch.zeros(4, dtype=torch.long)
    seen: list[torch.Size] = []
    head = model.get_output_embeddings()
    loss = AnswerLoss()

    def losses(*, narrow: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        model.zero_grad()
        if narrow:
            with loss.narrow_head(model, labels):
                watch = head.register_forward_pre_hook(lambda _, hidden: seen.append(hidden[0].shape))
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                watch.remove()
        else:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found, rows = loss(logits, labels, task)
        found.sum().backward()
        return found, rows, [p.grad for p in model.parameters() if p.grad is not None]

    whole, part = losses(narrow=False), losses(narrow=True)
    assert seen == [(7 + 6 + 1, model.config.get_text_config().hidden_size)]
    assert part[1].tolist() == [0] * 7 + [1] * 6 + [2] == whole[1].tolist()
    torch.testing.assert_close(part[0], whole[0], rtol=1e-12, atol=1e-12)
    assert len(part[2]) == len(whole[2]) > 0
    for one, other in zip(part[2], whole[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logits.shape[:2] == ids.shape, "the head is whole again"
    own = [
        cross_entropy(logits[row, place - 1], labels[row, place])
        for row, place in (labels != -100).nonzero().tolist()
    ]
    torch.testing.assert_close(part[0], torch.stack(own))


def test_a_head_that_is_adapted_runs_whole() -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_config(FAMILIES["llama"]),
        LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
    )
    ids, mask, labels = batch(model.config.vocab_size)
    assert type(model.get_output_embeddings()) is not nn.Linear
    with AnswerLoss().narrow_head(model, labels):
        assert model(input_ids=ids, attention_mask=mask).logits.shape[:2] == ids.shape


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.sampled_from([1, 2, 8, 12]))
def test_rows_of_a_step_stay_together_longest_first(lengths: list[int], step: int) -> None:
    order = list(reversed(range(len(lengths))))
    found = longest_first(order, lengths, step=step)
    for start in range(0, len(order), step):
        part = found[start : start + step]
        assert sorted(part) == sorted(order[start : start + step])
        assert [lengths[row] for row in part] == sorted((lengths[row] for row in part), reverse=True)


def test_how_many_rows_share_a_pass_follows_from_their_lengths_and_the_price_of_a_pass() -> None:
    alike, unlike = [50] * 16, [200, 100, 50, 25] * 4

    def rows(lengths: list[int], overhead: float) -> int:
        return rows_of_a_pass(longest_first(range(16), lengths, step=16), lengths, step=16, overhead=overhead)

    assert rows(alike, overhead=1) == 16, "nothing to save"
    assert rows(unlike, overhead=1) == 4, "four of each length"
    assert rows(unlike, overhead=400) == 8, "padding of 8 × 150 tokens saved, at 400"
    assert rows(unlike, overhead=1e6) == 16
