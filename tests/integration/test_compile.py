"""A whole model's training step compiles into one graph, and the model generates afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from manylora.adapters import ManyLoraConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

SIZE = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    initializer_range=0.3,
    pad_token_id=0,
)


def model(router: str) -> Any:
    set_seed(0)
    config = ManyLoraConfig(
        r=4, router=router, lora_dropout=0.0, target_modules="all-linear", init_weights=False
    )
    return get_peft_model(LlamaForCausalLM(SIZE), config)


def step(run: Any, parameters: list[torch.Tensor], **inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = run(**inputs, use_cache=False).loss
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach(), list(gradients)


@pytest.mark.parametrize(("router", "ids"), [("token", None), ("task", [0, 2, 1])], ids=["token", "task"])
def test_a_training_step_is_one_graph(router: str, ids: list[int] | None) -> None:
    adapted = model(router).train()
    tokens = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    routing = {} if ids is None else {"expert_ids": torch.tensor(ids)}
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    loss, gradients = step(adapted, parameters, input_ids=tokens, labels=tokens, **routing)
    expected = adapted.eval().generate(input_ids=tokens, max_new_tokens=3, do_sample=False, **routing)
    torch._dynamo.reset()
    compiled = torch.compile(adapted.train(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got_loss, got = step(compiled, parameters, input_ids=tokens, labels=tokens, **routing)
        torch.testing.assert_close(got_loss, loss, rtol=0, atol=1e-5)
        for value, reference in zip(got, gradients, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)
    if ids is not None:  # the graph does not keep the ids it was made with
        other, _ = step(
            compiled, parameters, input_ids=tokens, labels=tokens, expert_ids=torch.tensor([1, 1, 0])
        )
        eager, _ = step(
            adapted, parameters, input_ids=tokens, labels=tokens, expert_ids=torch.tensor([1, 1, 0])
        )
        torch.testing.assert_close(other, eager, rtol=0, atol=1e-5)
        assert abs(float(other - loss)) > 1e-3
        with pytest.raises(RuntimeError, match="experts are 0 to 2"):
            step(compiled, parameters, input_ids=tokens, labels=tokens, expert_ids=torch.tensor([1, 3, 0]))
    adapted.eval()
    assert torch.equal(
        adapted.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, **routing), expected
    )
