"""The fused computation: gradients by finite differences, its dropout mask, what it keeps, when it writes in place."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manylora.adapters import ManyLoraConfig, ManyLoraLinear, ops
from manylora.adapters.dropout import draw_drops, dropped_out, product_with_zeros, with_zeros
from manylora.adapters.routing import Routes, RoutingState

# T tokens, B examples, D in, O out, R rank, N experts
B, T, D, O, R = 2, 3, 5, 4, 2  # noqa: E741 -- the legend's letters
SHARES = ("A", "B", "none")
ROUTERS = ("token", "task", "uniform")


def make_layer(
    *, dtype: torch.dtype = torch.float64, bias: bool = False, **settings: object
) -> ManyLoraLinear:
    torch.manual_seed(0)
    settings = {"num_experts": 3, "lora_dropout": 0.0, **settings}
    layer = ManyLoraLinear(nn.Linear(D, O, bias=bias).requires_grad_(False), RoutingState())
    config = ManyLoraConfig(r=R, target_modules=["x"], init_weights=False, **settings)
    layer.update_layer("default", rank=R, alpha=3, config=config)
    return layer.to(dtype)


def parameters(layer: ManyLoraLinear) -> list[Tensor]:
    return list(layer.manylora_experts.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("share", "router", "n"), list(itertools.product(SHARES, ROUTERS, (1, 3))))
def test_gradients_equal_finite_differences(share: str, router: str, n: int, dropout: float) -> None:
    layer = make_layer(share=share, router=router, num_experts=n, lora_dropout=dropout)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    ids = Routes([0, n - 1])

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask every time
        with layer.routing.routed(ids):
            return layer(x)

    assert torch.autograd.gradcheck(run, (x, *parameters(layer)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("share", "router", "n"), list(itertools.product(SHARES, ROUTERS, (1, 8))))
def test_fused_equals_the_reference_loop_under_the_same_seed(
    share: str, router: str, n: int, dropout: float, dtype: torch.dtype
) -> None:
    layer = make_layer(share=share, router=router, num_experts=n, lora_dropout=dropout, dtype=dtype)
    x = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    upstream = torch.randn(B, T, O, dtype=dtype)
    results = []
    for computation in ("fused", "reference"):
        torch.manual_seed(1)
        with layer.routing.routed(Routes([0, n - 1])), ops.computed_by(computation):
            y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, *parameters(layer)], upstream)])
    tolerance = 1e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_the_loop(dtype: torch.dtype) -> None:
    x = torch.randn(64, T, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    upstream = torch.randn(64, T, O, generator=torch.Generator().manual_seed(3)).to(dtype)
    errors = {"fused": 0.0, "reference": 0.0}
    for share in SHARES:
        layer = make_layer(share=share, dtype=dtype)
        exact = make_layer(share=share)
        exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
        wide = x.double().requires_grad_()
        y = exact(wide)
        want = [y, *torch.autograd.grad(y, [wide, *parameters(exact)], upstream.double())]
        for computation in errors:
            narrow = x.clone().requires_grad_()
            with ops.computed_by(computation):
                y = layer(narrow)
            got = [y, *torch.autograd.grad(y, [narrow, *parameters(layer)], upstream)]
            errors[computation] += sum(
                float((a.detach().double() - b.detach()).norm() / b.detach().norm())
                for a, b in zip(got, want, strict=True)
            )
    assert errors["fused"] <= 1.05 * errors["reference"]


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.95])
def test_the_mask_is_bernoulli_element_by_element(p: float) -> None:
    torch.manual_seed(0)
    draws, size = 2000, 400
    x = torch.ones(size, dtype=torch.float64)
    masks = torch.stack([with_zeros(x, draw_drops(x, p)) for _ in range(draws)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    zeros = 1 - masks
    total = draws * size
    # five standard deviations of the mean of `count` Bernoulli draws
    bound = lambda count: 5 * math.sqrt(p * (1 - p) / count)  # noqa: E731
    assert abs(float(zeros.mean()) - p) < bound(total)
    assert float((zeros.mean(0) - p).abs().max()) < bound(draws) + 1 / draws  # each element
    for lag in (1, 2, 7):  # neighbours know nothing of each other
        together = float((zeros[:, lag:] * zeros[:, :-lag]).mean())
        assert abs(together - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / total) * 2 + bound(total) * 2 * p
    per_draw = zeros.sum(1)
    spread = float(per_draw.var()) / (size * p * (1 - p))
    assert spread == pytest.approx(1, abs=6 * math.sqrt((2 + 1 / (size * p * (1 - p))) / draws))


def test_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, dtype=torch.float64)
    draws = 4000
    mean = torch.stack([dropped_out(x, draw_drops(x, 0.2), 0.2) for _ in range(draws)]).mean(0)
    deviation = x.abs() * math.sqrt(0.2 / 0.8 / draws)
    assert bool(((mean - x).abs() < 5 * deviation).all())


@pytest.mark.parametrize("shape", [(0, D), (1, 1), (3, D), (2, 3, D)])
def test_the_three_ways_to_apply_a_mask_agree(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    places = draw_drops(x, 0.3)
    torch.testing.assert_close(with_zeros(x, places) / 0.7, dropped_out(x, places, 0.3))
    if x.dim() == 2:
        product = product_with_zeros(x, torch.eye(shape[1], dtype=x.dtype), places)
        torch.testing.assert_close(product, with_zeros(x, places))


def test_the_places_do_not_depend_on_strides() -> None:
    torch.manual_seed(0)
    x = torch.randn(D, 7).t()
    places = draw_drops(x, 0.3)
    assert torch.equal(with_zeros(x, places), with_zeros(x.contiguous(), places))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("router", ["token", "uniform"])
def test_checkpointing_recomputes_with_the_same_mask(router: str, reentrant: bool) -> None:
    layer = make_layer(lora_dropout=0.5, router=router)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        for parameter in parameters(layer):
            parameter.grad = None
        torch.rand(5)  # the generator moves on between forward and recompute
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in parameters(layer))])
        x.grad = None
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_backward_keeps_no_copy_of_the_input(dropout: float) -> None:
    n, tokens, width = 3, 64, 256
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    layer = ManyLoraLinear(base, RoutingState())
    layer.update_layer(
        "default", rank=R, alpha=3, config=ManyLoraConfig(r=R, num_experts=n, lora_dropout=dropout)
    )
    x = torch.randn(tokens, width, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert x.untyped_storage().data_ptr() in kept  # by reference
    rest = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at != x.untyped_storage().data_ptr())
    narrow = (
        tokens * 4 * (n * R + n + 2 * n + R)
    )  # projections and logits, weights in both orders, weighted sum
    places = 4 * math.ceil(x.numel() * dropout * 1.2 + 16)
    assert rest <= narrow + (places if dropout else 0)


def test_writes_into_the_base_output_only_where_it_owns_it() -> None:
    x = torch.randn(B, T, D, dtype=torch.float64)
    seen: list[Tensor] = []

    def taken(layer: ManyLoraLinear) -> bool:
        """Whether the layer's output is the very memory that its base layer returned."""
        forward = type(layer.base_layer).forward

        class Watched(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(forward(self, x))
                return seen[-1]

        y = layer(x)
        watched = layer.base_layer
        watched.__class__ = Watched
        layer._owns_output = lambda: owned  # type: ignore[method-assign]  # of the class it was before
        got = layer(x)
        torch.testing.assert_close(got, y)
        return got.data_ptr() == seen[-1].data_ptr()

    layer = make_layer()
    owned = layer._owns_output()
    assert owned
    assert taken(layer)

    layer = make_layer(bias=True)  # a biased layer returns a view of what it computed
    owned = layer._owns_output()
    assert not taken(layer)

    layer = make_layer()
    outputs: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    layer(x)
    torch.testing.assert_close(outputs[0], x @ layer.base_layer.weight.T)  # what the hook saw is left alone


def test_two_active_adapters_add_up() -> None:
    layer = make_layer()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    layer.update_layer(
        "other", rank=R, alpha=3, config=ManyLoraConfig(r=R, init_weights=False, lora_dropout=0.0)
    )
    layer.double()
    parts, gradients = [], []
    for names in (["default"], ["other"], ["default", "other"]):
        layer.set_adapter(names)
        y = layer(x)
        gradients.append(torch.autograd.grad(y.sum(), x)[0])
        parts.append(y.detach())
    base = layer.base_layer(x)
    torch.testing.assert_close(parts[2], parts[0] + parts[1] - base)
    base_gradient = torch.autograd.grad(base.sum(), x)[0]
    torch.testing.assert_close(gradients[2], gradients[0] + gradients[1] - base_gradient)


def test_a_second_derivative_is_refused() -> None:
    layer = make_layer()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with ops.computed_by("stacked"):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()  # plain operations can


def test_function_transforms_work() -> None:
    layer = make_layer()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    got = torch.func.grad(lambda x: layer(x).sum())(x.detach())
    torch.testing.assert_close(got, torch.autograd.grad(layer(x).sum(), x)[0])
    each = torch.func.vmap(layer)(x.detach())
    torch.testing.assert_close(each, layer(x.detach()))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_autocast_computes_in_its_dtype(dropout: float) -> None:
    layer = make_layer(dtype=torch.float32, lora_dropout=dropout)
    x = torch.randn(B, T, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.manual_seed(1)
    torch.testing.assert_close(y.float(), layer(x), rtol=3e-2, atol=3e-2)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (x, *parameters(layer)))


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_router", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    layer = make_layer(lora_dropout=0.3)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **dict(layer.bank("default").named_parameters())}
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    full = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    leaves[frozen].requires_grad_(False)
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, full[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS)
def test_compiles_without_a_graph_break(router: str) -> None:
    layer = make_layer(router=router, default_expert=1 if router == "task" else None)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (compiled, layer):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters(layer)])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_dropout_compiles_too() -> None:
    layer = make_layer(lora_dropout=0.5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(64, T, D, dtype=torch.float64)
    dropped = [(compiled(x) - layer.base_layer(x)).detach() for _ in range(200)]
    layer.eval()
    want = (layer(x) - layer.base_layer(x)).detach()
    assert not torch.equal(dropped[0], dropped[1])
    mean = torch.stack(dropped).mean(0)
    assert float((mean - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("frozen", [("lora_A",), ("lora_router",), ("lora_A", "lora_router"), ("lora_B",)])
def test_frozen_parameters_leave_the_other_gradients_alone(frozen: tuple[str, ...], dropout: float) -> None:
    found = []
    for names in ((), frozen):
        layer = make_layer(lora_dropout=dropout)
        bank = layer.bank("default")
        for name in names:
            getattr(bank, name).requires_grad_(False)
        x = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        x.requires_grad_()
        torch.manual_seed(6)  # the same mask
        layer(x).square().sum().backward()
        found.append({"x": x.grad, **{name: p.grad for name, p in bank.named_parameters()}})
    whole, part = found
    for name, gradient in whole.items():
        assert gradient is not None
        if name in frozen:
            assert part[name] is None
        else:
            torch.testing.assert_close(part[name], gradient, rtol=0, atol=1e-12)
