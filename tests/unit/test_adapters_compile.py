"""torch.compile(fullgraph=True): forward and backward of every combination, and ids that change between calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tiny_models import adapted, assert_same, gradients, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TARGETS = ["q_proj", "down_proj"]


def compiled(model: nn.Module) -> nn.Module:
    """Traced with autograd's graph as well, without generating code: what can break is the tracing."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("share", "router"), list(itertools.product(("A", "B", "none"), ("token", "task", "uniform")))
)
def test_forward_and_backward_in_one_graph(share: str, router: str) -> None:
    model = adapted(llama(layers=1), share=share, router=router, target_modules=TARGETS).train()
    fast = compiled(model)
    for ids in ([2, 0, 1], [1, 1, 0]):
        inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
        if router == "task":
            inputs["expert_ids"] = torch.tensor(ids)
        want = model(**inputs)
        want.loss.backward()
        expected = gradients(model)
        got = fast(**inputs)
        got.loss.backward()
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
        assert_same(gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"router_top_k": 2, "router_temperature": 0.5}, {"load_balance_weight": 0.5}], ids=str
)
def test_router_options_in_one_graph(options: dict) -> None:
    model = adapted(llama(layers=1), target_modules=TARGETS, **options).train()
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    want = model(**inputs).loss
    want.backward()
    expected = gradients(model)
    got = compiled(model)(**inputs).loss
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert_same(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_a_graph_still_refuses_ids_out_of_range() -> None:
    model = adapted(llama(layers=1), router="task", target_modules=TARGETS)
    fast = compiled(model)
    with torch.no_grad():
        fast(input_ids=tokens(), expert_ids=torch.tensor([2, 0, 1]), use_cache=False)
        with pytest.raises(RuntimeError, match=r"expert_ids out of range.*0 to 2"):
            fast(input_ids=tokens(), expert_ids=torch.tensor([2, 3, 1]), use_cache=False)


def test_route_reaches_a_compiled_model() -> None:
    model = adapted(llama(layers=1), router="task", target_modules=TARGETS)
    fast = compiled(model)
    with torch.no_grad():
        for ids in ([2, 0, 1], [1, 1, 0]):
            with model.route(torch.tensor(ids)):
                got = fast(input_ids=tokens(), use_cache=False).logits
            want = model(input_ids=tokens(), expert_ids=torch.tensor(ids)).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
