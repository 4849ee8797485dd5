"""The layer against its float64 twin over drawn shapes, layouts, routings and options; and in low precision.

The twin is the formula: y = W0 x + s · Σ_n w_n · B_b(n) A_a(n) x, with full (O, D) products.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from manylora.adapters import ExpertBank, ManyLoraConfig, ManyLoraLinear
from manylora.adapters.routes import Routes
from manylora.adapters.routing import RoutingState

ALPHA = 3.0
TOLERANCE = 1e-10
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One drawn layer, its input and its routing."""

    share: str
    router: str
    n: int
    rank: int
    d: int
    o: int
    lead: tuple[int, ...]
    layout: str
    ids: str
    top_k: int | None
    temperature: float
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """2-D to 4-D inputs, down to no row and no token; contiguous, transposed, strided and expanded."""
    n = draw(st.integers(1, 4))
    router = draw(st.sampled_from(("token", "task", "uniform")))
    optional = router == "token" and n > 1
    return Case(
        share=draw(st.sampled_from(("A", "B", "none"))),
        router=router,
        n=n,
        rank=draw(st.integers(1, 3)),
        d=draw(st.integers(1, 6)),
        o=draw(st.integers(1, 6)),
        lead=tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))),
        layout=draw(st.sampled_from(("contiguous", "transposed", "strided", "expanded"))),
        ids=draw(st.sampled_from(("row", "token", "one"))),
        top_k=draw(st.none() | st.integers(1, n)) if optional else None,
        temperature=draw(st.sampled_from((1.0, 0.5, 2.0))) if optional else 1.0,
        seed=draw(st.integers(0, 1000)),
    )


def make_layer(case: Case) -> ManyLoraLinear:
    config = ManyLoraConfig(
        r=case.rank,
        num_experts=case.n,
        share=case.share,
        router=case.router,
        router_top_k=case.top_k,
        router_temperature=case.temperature,
        lora_dropout=0.0,
        init_weights=False,
    )
    layer = ManyLoraLinear(nn.Linear(case.d, case.o), RoutingState())
    layer.update_layer("default", rank=case.rank, alpha=ALPHA, config=config)
    return layer.double()


def make_input(case: Case) -> Tensor:
    """(*lead, D) in the drawn layout, a leaf that takes gradients."""
    shape = (*case.lead, case.d)
    if case.layout == "transposed":
        x = torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape) - 1, -1, -1))
    elif case.layout == "strided":
        x = torch.randn(*case.lead, 2 * case.d, dtype=torch.float64)[..., ::2]
    elif case.layout == "expanded":
        x = torch.randn(*case.lead[:-1], 1, case.d, dtype=torch.float64).expand(shape)
    else:
        x = torch.randn(shape, dtype=torch.float64)
    assert x.shape == shape
    return x.detach().requires_grad_()


def make_ids(case: Case) -> tuple[Routes, Tensor]:
    """The routes, and the expert of every token (*lead)."""
    rows = case.lead[0]
    if case.ids == "one":
        return Routes(case.n - 1), torch.full(case.lead, case.n - 1)
    if case.ids == "token" and len(case.lead) > 1:
        ids = torch.randint(0, case.n, case.lead[:2])
    else:
        ids = torch.randint(0, case.n, (rows,))
    return Routes(ids), ids.view(*ids.shape, *(1,) * (len(case.lead) - ids.dim())).expand(case.lead)


def twin_weights(x: Tensor, bank: ExpertBank, case: Case, experts_T: Tensor) -> Tensor:
    if case.n == 1:
        return torch.ones(*case.lead, 1, dtype=x.dtype)
    if case.router == "uniform":
        return torch.full((*case.lead, case.n), 1 / case.n, dtype=x.dtype)
    if case.router == "task":
        return nn.functional.one_hot(experts_T, case.n).to(x.dtype)
    exponentials = ((x @ bank.lora_router.T) / case.temperature).exp()
    if case.top_k is None:
        return exponentials / exponentials.sum(-1, keepdim=True)
    rank_of = exponentials.argsort(-1, descending=True).argsort(-1)
    kept = exponentials * (rank_of < case.top_k)
    return kept / (exponentials if case.top_k == 1 else kept).sum(-1, keepdim=True)


def twin(x: Tensor, layer: ManyLoraLinear, w: Tensor, *, share: str, rank: int, n: int) -> Tensor:
    bank = layer.bank("default")
    y = layer.base_layer(x)
    for i in range(n):
        a = bank.lora_A if share == "A" else bank.lora_A[i * rank : (i + 1) * rank]
        b = bank.lora_B if share == "B" else bank.lora_B[:, i * rank : (i + 1) * rank]
        y = y + ALPHA / rank * w[..., i, None] * (x @ (b @ a).T)
    return y


@EXAMPLES
@given(case=cases())
def test_outputs_and_all_gradients_equal_the_twin(case: Case) -> None:
    torch.manual_seed(case.seed)
    layer, x = make_layer(case), make_input(case)
    routes, experts_T = make_ids(case)
    upstream = torch.randn(*case.lead, case.o, dtype=torch.float64)
    params = dict(layer.manylora_experts.named_parameters())
    with layer.routing.routed(routes):
        y = layer(x)
    assert y.shape == (*case.lead, case.o)
    got = torch.autograd.grad(y, [x, *params.values()], upstream, materialize_grads=True)
    w = twin_weights(x, layer.bank("default"), case, experts_T)
    expected = twin(x, layer, w, share=case.share, rank=case.rank, n=case.n)
    want = torch.autograd.grad(expected, [x, *params.values()], upstream, materialize_grads=True)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    for name, one, other in zip(["x", *params], got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE, msg=f"gradient of {name}")


@EXAMPLES
@given(case=cases())
def test_rows_do_not_depend_on_their_neighbours(case: Case) -> None:
    """Each row alone gives what it gives in the batch; and the layer leaves its input as it was."""
    torch.manual_seed(case.seed)
    layer, x = make_layer(case), make_input(case).detach()
    routes, _ = make_ids(case)
    before = x.clone()
    with layer.routing.routed(routes):
        together = layer(x)
    assert torch.equal(x, before)
    for row in range(case.lead[0]):
        ids = routes.ids[row : row + 1] if routes.ids is not None else routes.expert
        with layer.routing.routed(Routes(ids)):
            alone = layer(x[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=TOLERANCE, atol=TOLERANCE)


# Low precision. D and O as in a small model, weights and inputs of the size they have there.

D, O, R, ROWS = 96, 80, 8, 64  # noqa: E741 -- the legend's letters
RELATIVE_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error of outputs and gradients in the Euclidean norm, against float64 on the same rounded numbers: about
one rounding of the result (2^-24, 2^-11, 2^-8) and the few before it."""


def low_precision_pair(dtype: torch.dtype, share: str, router: str, n: int, seed: int):
    """A layer in `dtype`, its float64 twin's numbers, an input and an upstream gradient."""
    torch.manual_seed(seed)
    config = ManyLoraConfig(
        r=R, num_experts=n, share=share, router=router, lora_dropout=0.0, init_weights=False
    )
    layer = ManyLoraLinear(nn.Linear(D, O), RoutingState())
    layer.update_layer("default", rank=R, alpha=2.0 * R, config=config)
    layer.to(dtype)
    wide = ManyLoraLinear(nn.Linear(D, O), RoutingState())
    wide.update_layer("default", rank=R, alpha=2.0 * R, config=config)
    wide.double().load_state_dict(layer.state_dict())
    x, upstream = torch.randn(ROWS, D).to(dtype), torch.randn(ROWS, O).to(dtype)
    return layer, wide, x, upstream


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def run(layer: nn.Module, x: Tensor, upstream: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *params], upstream)]


@pytest.mark.parametrize("dtype", list(RELATIVE_ERROR), ids=str)
@pytest.mark.parametrize(
    ("share", "router", "n"),
    list(itertools.product(("A", "B", "none"), ("token", "task", "uniform"), (1, 3))),
)
def test_low_precision_stays_within_its_tolerance(
    dtype: torch.dtype, share: str, router: str, n: int
) -> None:
    layer, wide, x, upstream = low_precision_pair(dtype, share, router, n, seed=0)
    ids = Routes([i % n for i in range(ROWS)])
    with layer.routing.routed(ids), wide.routing.routed(ids):
        got = run(layer, x, upstream, list(layer.manylora_experts.parameters()))
        want = run(wide, x.double(), upstream.double(), list(wide.manylora_experts.parameters()))
    assert got[0].dtype == dtype
    names = ["y", "x", *dict(layer.manylora_experts.named_parameters())]
    for name, one, other in zip(names, got, want, strict=True):
        assert error(one, other) < RELATIVE_ERROR[dtype], (name, error(one, other))


def equal_experts(layer: ManyLoraLinear) -> None:
    """Give all experts the first one's matrices: then any routing computes that one LoRA, as PEFT's does."""
    bank = layer.bank("default")
    with torch.no_grad():
        for a_RD in bank.lora_A.split(R):
            a_RD.copy_(bank.lora_A[:R])
        for b_OR in bank.lora_B.split(R, dim=1):
            b_OR.copy_(bank.lora_B[:, :R])


def peft_lora(layer: ManyLoraLinear) -> LoraLinear:
    """PEFT's LoRA layer with the first expert's matrices, all in the same dtypes."""
    bank = layer.bank("default")
    base = nn.Linear(D, O).to(layer.base_layer.weight.dtype)
    base.load_state_dict(layer.base_layer.state_dict())
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=0.0)
    lora = LoraLinear(base, "default", config, r=R, lora_alpha=2 * R)
    for matrix, values in ((lora.lora_A, bank.lora_A[:R]), (lora.lora_B, bank.lora_B[:, :R])):
        matrix.to(values.dtype)
        matrix["default"].weight.data.copy_(values)
    return lora


@pytest.mark.parametrize("adapter", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("share", "router"), list(itertools.product(("A", "B", "none"), ("token", "task", "uniform")))
)
def test_error_is_not_above_that_of_pefts_lora(
    dtype: torch.dtype, share: str, router: str, adapter: str
) -> None:
    """Outputs and the gradient of the input, mean of 20 seeds on the same inputs, with the adapter in float32 as
    PEFT keeps it or in the base's dtype. The margin of 2 % is for the draw.

    In the base's dtype our outputs are 5 to 15 % nearer to the truth (one addition instead of three roundings);
    the input's gradient is up to 9 % further off where it has more terms than LoRA's: the router's, or N·R.
    """
    ours, theirs = torch.zeros(2), torch.zeros(2)
    for seed in range(20):
        layer, wide, x, upstream = low_precision_pair(dtype, share, router, 3, seed)
        equal_experts(layer)
        equal_experts(wide)
        if adapter == "float32":
            layer.manylora_experts.float()
        want = run(peft_lora(wide), x.double(), upstream.double(), [])
        with layer.routing.routed(Routes([i % 3 for i in range(ROWS)])):
            got = run(layer, x, upstream, [])
        lora = run(peft_lora(layer), x, upstream, [])
        assert got[0].dtype == got[1].dtype == dtype
        ours += torch.tensor([error(one, other) for one, other in zip(got, want, strict=True)])
        theirs += torch.tensor([error(one, other) for one, other in zip(lora, want, strict=True)])
    ratio = ours / theirs
    more_terms = router == "token" or (share, router) == ("none", "uniform")
    assert ratio[0] <= 1.02, ratio
    assert ratio[1] <= (1.1 if more_terms and adapter == "same" else 1.02), ratio
