"""Every combination of the layer against a float64 twin: a sum over experts of full products."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manylora.adapters import ExpertBank, ManyLoraConfig, ManyLoraLinear, ops
from manylora.adapters.dropout import draw_drops, with_zeros
from manylora.adapters.routing import Routes, RoutingState
from manylora.errors import RoutingError

# T tokens, B examples, D in, O out, R rank, N experts
B, T, D, O, R = 4, 5, 6, 7, 2  # noqa: E741 -- the legend's letters
SHARES = ("A", "B", "none")
ROUTERS = ("token", "task", "uniform")
TOLERANCE = 1e-10


def make_layer(kind: str, bias: bool, **settings: object) -> ManyLoraLinear:
    base: nn.Module = nn.Linear(D, O, bias=bias) if kind == "linear" else Conv1D(O, D)
    config = ManyLoraConfig(r=R, lora_alpha=3, target_modules=["x"], init_weights=False, **settings)
    layer = ManyLoraLinear(base, RoutingState())
    layer.update_layer("default", rank=R, alpha=3, config=config)
    layer.double()
    if kind == "conv1d":
        nn.init.normal_(base.bias)
        if not bias:
            nn.init.zeros_(base.bias)
    return layer


def twin_weights(x: Tensor, router: str, n: int, bank: ExpertBank, ids: list[int]) -> Tensor:
    if n == 1:
        return torch.ones(*x.shape[:-1], 1, dtype=x.dtype)
    if router == "token":
        return torch.softmax(x @ bank.lora_router.T, dim=-1)
    if router == "task":
        rows = torch.eye(n, dtype=x.dtype)[ids]
        return rows.view(len(ids), *(1,) * (x.dim() - 2), n).expand(*x.shape[:-1], n)
    return torch.full((*x.shape[:-1], n), 1 / n, dtype=x.dtype)


def twin(x: Tensor, layer: ManyLoraLinear, w: Tensor, share: str, n: int) -> Tensor:
    """The two lines: y = W0 x + s · Σ_n w_n · B_b(n) A_a(n) x, with full (O, D) products."""
    bank = layer.bank("default")
    a = [bank.lora_A if share == "A" else bank.lora_A[i * R : (i + 1) * R] for i in range(n)]
    b = [bank.lora_B if share == "B" else bank.lora_B[:, i * R : (i + 1) * R] for i in range(n)]
    deltas = sum(w[..., i, None] * (x @ (b[i] @ a[i]).T) for i in range(n))
    return layer.base_layer(x) + 3 / R * deltas


def parameters(layer: ManyLoraLinear) -> dict[str, Tensor]:
    return dict(layer.manylora_experts.named_parameters())


@pytest.mark.parametrize("computation", ["fused", "stacked", "reference"])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
@pytest.mark.parametrize(
    ("share", "router", "n", "shape"),
    list(itertools.product(SHARES, ROUTERS, (1, 3), ((B, T, D), (B, D), (B, 2, T, D)))),
)
def test_outputs_and_all_gradients_equal_the_twin(
    share: str, router: str, n: int, shape: tuple[int, ...], kind: str, bias: bool, computation: str
) -> None:
    torch.manual_seed(0)
    layer = make_layer(kind, bias, num_experts=n, share=share, router=router, lora_dropout=0.0)
    ids = [i % n for i in range(B)]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*shape[:-1], O, dtype=torch.float64)
    params = parameters(layer)

    with layer.routing.routed(Routes(torch.tensor(ids))), ops.computed_by(computation):
        y = layer(x)
    gradients = torch.autograd.grad(y, [x, *params.values()], upstream)

    w = twin_weights(x, router, n, layer.bank("default"), ids)
    expected = twin(x, layer, w, share, n)
    expected_gradients = torch.autograd.grad(expected, [x, *params.values()], upstream)

    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    for name, got, want in zip(["x", *params], gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE, msg=f"gradient of {name}")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_for_all_rows_equals_its_id_on_every_row(share: str, expert: int) -> None:
    torch.manual_seed(0)
    layer = make_layer("linear", True, num_experts=3, share=share, router="task", lora_dropout=0.0)
    x = torch.randn(B, T, D, dtype=torch.float64)
    with layer.routing.routed(Routes(expert)):
        one = layer(x)
    with layer.routing.routed(Routes([expert] * B)):
        each = layer(x)
    torch.testing.assert_close(one, each, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("router", ["task", "uniform"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merged_weight_gives_the_unmerged_output_and_unmerging_the_old_weight(
    share: str, router: str, kind: str
) -> None:
    torch.manual_seed(0)
    layer = make_layer(kind, True, num_experts=3, share=share, router=router, lora_dropout=0.0)
    x = torch.randn(B, T, D, dtype=torch.float64)
    before = layer.base_layer.weight.detach().clone()
    with layer.routing.routed(Routes(1)):
        expected = layer(x)
        layer.merge(safe_merge=True)
        merged = layer(x)
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(layer.base_layer(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=TOLERANCE, atol=TOLERANCE)
    assert not layer.merged


def test_merged_expert_refuses_ids_of_another() -> None:
    layer = make_layer("linear", True, num_experts=3, router="task")
    x = torch.randn(B, T, D, dtype=torch.float64)
    with layer.routing.routed(Routes(1)):
        layer.merge()
    with (
        layer.routing.routed(Routes([1, 1, 2, 1])),
        pytest.raises(RoutingError, match="merged with expert 1"),
    ):
        layer(x)


@pytest.mark.parametrize("computation", ["fused", "reference"])
@pytest.mark.parametrize("share", SHARES)
def test_dropout_uses_one_mask_for_all_experts_and_none_for_the_router(share: str, computation: str) -> None:
    torch.manual_seed(0)
    layer = make_layer("linear", True, num_experts=3, share=share, router="token", lora_dropout=0.5)
    layer.train()
    x = torch.randn(B, T, D, dtype=torch.float64)
    torch.manual_seed(7)
    with ops.computed_by(computation):
        y = layer(x)
    torch.manual_seed(7)
    dropped = 2 * with_zeros(x, draw_drops(x, 0.5))
    bank = layer.bank("default")
    w = torch.softmax(x @ bank.lora_router.T, dim=-1)
    expected = twin(dropped, layer, w, share, 3) - layer.base_layer(dropped) + layer.base_layer(x)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    layer.eval()
    torch.testing.assert_close(layer(x), twin(x, layer, w, share, 3), rtol=TOLERANCE, atol=TOLERANCE)


def test_router_softmax_runs_in_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, D).bfloat16()
    router = torch.randn(3, D).bfloat16().requires_grad_()
    upstream = torch.randn(64, 3).bfloat16()
    weights = ops.routing_weights(nn.functional.linear(x, router))
    expected = torch.softmax(nn.functional.linear(x, router).float(), dim=-1).bfloat16()
    narrow = torch.softmax(nn.functional.linear(x, router), dim=-1)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, expected)
    got, want, worse = (torch.autograd.grad(w, router, upstream)[0] for w in (weights, expected, narrow))
    assert torch.equal(got, want)
    assert not torch.equal(got, worse)  # its backward would read weights rounded to bfloat16


def test_low_precision_base_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    base = nn.Linear(D, O).bfloat16()
    layer = ManyLoraLinear(base, RoutingState())
    layer.update_layer(
        "default", rank=R, alpha=3, config=ManyLoraConfig(r=R, init_weights=False, lora_dropout=0.0)
    )
    assert layer.bank("default").lora_A.dtype == torch.bfloat16
    layer.manylora_experts.float()  # as PEFT's autocast_adapter_dtype leaves it
    x = torch.randn(B, T, D).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    w = torch.softmax(x.float() @ layer.bank("default").lora_router.T, dim=-1)
    bank = layer.bank("default")
    delta = sum(
        w[..., i, None] * (x.float() @ (bank.lora_B @ bank.lora_A[i * R : (i + 1) * R]).T) for i in range(3)
    )
    expected = base(x).float() + 1.5 * delta
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, T, D), (B, 0, D), (1, 1, D), (D,)])
def test_empty_and_single_inputs(shape: tuple[int, ...]) -> None:
    layer = make_layer("linear", True, num_experts=3, router="token", lora_dropout=0.0)
    y = layer(torch.randn(shape, dtype=torch.float64))
    assert y.shape == (*shape[:-1], O)
    assert torch.isfinite(y).all()


def test_non_contiguous_input() -> None:
    torch.manual_seed(0)
    layer = make_layer("linear", True, num_experts=3, router="token", lora_dropout=0.0)
    x = torch.randn(T, B, D, dtype=torch.float64).transpose(0, 1)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=TOLERANCE, atol=TOLERANCE)
