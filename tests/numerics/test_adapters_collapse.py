"""What stands for a token router: against least squares as the textbook has it, and against the layer itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.adapters import Collapse, ExpertBank, Fitted, ManyLoraConfig
from manylora.adapters.collapse import RIDGE

D, OUT, R, N, T = 12, 10, 2, 3, 400


def bank(share: str, *, sharpness: float = 3.0, **settings: Any) -> ExpertBank:
    torch.manual_seed(0)
    config = ManyLoraConfig(
        **settings, r=R, num_experts=N, share=share, router="token", lora_dropout=0.0, init_weights=False
    )
    made = ExpertBank(in_features=D, out_features=OUT, rank=R, alpha=4, config=config).double().eval()
    with torch.no_grad():
        made.lora_router.mul_(sharpness)
    return made


def inputs(seed: int = 1) -> Tensor:
    """Inputs whose coordinates go together, and around a mean, as hidden states do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.randn(T, D, generator=generator, dtype=torch.float64) @ mix + 1


def gates(made: ExpertBank, x_TD: Tensor) -> Tensor:
    return (x_TD @ made.lora_router.detach().T).softmax(-1)


def layer(made: ExpertBank, x_TD: Tensor) -> Tensor:
    with torch.no_grad():
        return made(x_TD, torch.zeros(len(x_TD), OUT, dtype=torch.float64), None)


def lora(made: ExpertBank, found: Tensor | Fitted, x_TD: Tensor) -> Tensor:
    """Output of the LoRA that `found` stands for, as a loop over experts."""
    if isinstance(found, Fitted):
        return made.scaling * x_TD @ found.A.T @ found.B.T
    total = torch.zeros(len(x_TD), OUT, dtype=torch.float64)
    for n in range(N):
        A, B = made.layout.expert_factors(made.lora_A.detach(), made.lora_B.detach(), n)
        total += found[n] * x_TD @ A.T @ B.T
    return made.scaling * total


def collapsed(made: ExpertBank, how: str, x_TD: Tensor) -> Tensor | Fitted:
    sums = Collapse(made, how)  # type: ignore[arg-type]
    for part in x_TD.split(61):
        sums.add(part)
    return sums.result()


def textbook(made: ExpertBank, x_TD: Tensor) -> Tensor:
    """The fitted weight (OUT, D): ridge regression as ordinary least squares on rows with √λ below them."""
    w_TN = gates(made, x_TD)
    m_N = w_TN.mean(0)
    whole = torch.zeros(OUT, D, dtype=torch.float64)
    root = (RIDGE * x_TD.square().sum() / D).sqrt()
    left = torch.cat([x_TD, root * torch.eye(D, dtype=torch.float64)])
    for n in range(N):
        A, B = made.layout.expert_factors(made.lora_A.detach(), made.lora_B.detach(), n)
        right = torch.cat([w_TN[:, n, None] * (x_TD @ A.T), root * m_N[n] * A.T])
        whole += B @ torch.linalg.lstsq(left, right).solution.T
    if made.layout.share == "A":  # the best of rank R on those rows
        _, _, V = torch.linalg.svd(left @ whole.T, full_matrices=False)
        whole = V[:R].T @ V[:R] @ whole
    return whole


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_the_fit_is_the_textbooks(share: str) -> None:
    made, x_TD = bank(share), inputs()
    found = collapsed(made, "fit", x_TD)
    assert isinstance(found, Fitted)
    torch.testing.assert_close(found.B @ found.A, textbook(made, x_TD), rtol=0, atol=1e-10)
    assert found.A.shape[0] == found.B.shape[1] == (N * R if share == "none" else R)
    if share != "A":
        assert torch.equal(found.B, made.lora_B.detach())


def test_the_mean_is_the_mean() -> None:
    made, x_TD = bank("B"), inputs()
    found = collapsed(made, "mean", x_TD)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, gates(made, x_TD).mean(0), rtol=0, atol=1e-12)


def test_the_mean_follows_the_routers_options() -> None:
    made, x_TD = bank("B", router_top_k=2, router_temperature=0.5), inputs()
    logits = x_TD @ made.lora_router.detach().T / 0.5
    logits.scatter_(1, logits.argmin(1, keepdim=True), -torch.inf)
    found = collapsed(made, "mean", x_TD)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, logits.softmax(-1).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_the_fit_is_nearer_to_the_layer_than_the_mean_also_on_new_tokens(share: str) -> None:
    made, x_TD, new_TD = bank(share), inputs(1), inputs(2)
    errors = {
        how: (lora(made, collapsed(made, how, x_TD), new_TD) - layer(made, new_TD)).square().mean().item()
        for how in ("fit", "mean")
    }
    # with a shared A the LoRA of rank R has little room: three B's of rank 2 behind one A of rank 2
    assert errors["fit"] < (1.0 if share == "A" else 0.9) * errors["mean"], errors


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_without_a_gate_that_moves_fit_and_mean_are_the_layer(share: str) -> None:
    made, x_TD = bank(share, sharpness=0.0), inputs()
    for how in ("fit", "mean"):
        found = lora(made, collapsed(made, how, x_TD), x_TD)
        torch.testing.assert_close(found, layer(made, x_TD), rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_few_tokens_and_none_stay_finite_and_near_the_mean(share: str) -> None:
    made, x_TD = bank(share), inputs()
    for count in (0, 1, 2):
        found = collapsed(made, "fit", x_TD[:count])
        assert isinstance(found, Fitted)
        assert torch.isfinite(found.A).all()
        assert torch.isfinite(found.B).all()
        if count:  # what it was fitted on comes out
            few = lora(made, found, x_TD)[:count]
            torch.testing.assert_close(few, layer(made, x_TD)[:count], rtol=0.02, atol=0.02)
