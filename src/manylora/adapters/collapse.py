"""What one layer's token routing is on average: the LoRA that stands for it, from the tokens it has seen.

The layer adds s · Σ_n g_n(x) B_n A_n x, and a LoRA cannot follow g. Two stand-ins: the *mean* gate, Σ_n E[g_n] B_n A_n,
and the *fit*, the LoRA of the same rank that is nearest to the layer on those tokens. Gate and input go together (a
router is a function of x), which the mean throws away and the fit keeps. With h the R (or N·R) numbers that meet B,
and M = E[h xᵀ] E[x xᵀ]⁻¹ their regression on x over the tokens,

    share B     h = Σ_n g_n A_n x    A' = M, B' = B
    none        h = (g_n A_n x)_n    A' = M, B' = B side by side: rank N·R
    share A     h = (g_n A x)_n      likewise, then the nearest of rank R (reduced-rank regression: the leading
                                     directions of what it puts out, E|B M x|², by a singular value decomposition)

which is the least of E|layer - LoRA|² for those ranks. The regression is drawn towards the mean gate (ridge), so that
directions which no token has shown stay where the mean puts them.

Shape letters: T tokens, D in, O out, R rank, N experts, H numbers that meet B (R with a shared B, else N·R).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from manylora.adapters.bank import Bank

How = Literal["fit", "mean"]
"""How a token router is collapsed."""

RIDGE = 1e-3
"""Weight of the mean gate in the fit, in units of the mean square of an input. Not tuned: the first value tried."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """One layer's fitted factors."""

    A: Tensor
    """(R', D)"""
    B: Tensor
    """(O, R')"""


class Collapse:
    """Sums over the tokens that one layer sees, and what they make of its routing.

    Args:
        bank: the layer's experts, with a token router.
        how: see the module.
    """

    def __init__(self, bank: Bank, how: How) -> None:
        self.bank, self.layout, self.how = bank, bank.layout, how
        # sums of many small numbers; some accelerators have no float64
        self.dtype = torch.float32 if bank.lora_A.device.type == "mps" else torch.float64
        self.A, self.B = (p.detach().to(self.dtype) for p in (bank.lora_A, bank.lora_B))
        self.tokens = 0
        self.gate_N: Tensor = self.A.new_zeros(bank.num_experts)
        self.cross_HD: Tensor | None = None
        self.square_DD: Tensor | None = None

    def memory(self) -> int:
        """Bytes of the largest sum."""
        return 0 if self.how == "mean" else self.A.shape[1] ** 2 * self.dtype.itemsize

    def add(self, x_TD: Tensor) -> None:
        """Count the layer's input at some tokens, (T, D)."""
        w_TN = self.bank.observed_weights(x_TD, None).to(self.dtype)
        self.tokens += x_TD.shape[0]
        self.gate_N += w_TN.sum(0)
        if self.how == "mean":
            return
        x_TD = x_TD.to(self.dtype)
        layout = self.layout
        u_TnR = (x_TD @ self.A.T).unflatten(-1, (layout.a_count, layout.rank))
        h_TH = layout.to_b(w_TN[..., None] * layout.to_experts(u_TnR, 1), 1).flatten(1)
        cross, square = h_TH.T @ x_TD, x_TD.T @ x_TD
        self.cross_HD = cross if self.cross_HD is None else self.cross_HD.add_(cross)
        self.square_DD = square if self.square_DD is None else self.square_DD.add_(square)

    def result(self) -> Tensor | Fitted:
        """The mean routing weights (N,), or the fitted factors."""
        mean_N = self.gate_N / max(1, self.tokens)
        if self.how == "mean":
            return mean_N.cpu()
        A, B = self._fitted(mean_N)
        return Fitted(A=A.cpu(), B=B.cpu())

    def _fitted(self, mean_N: Tensor) -> tuple[Tensor, Tensor]:
        """A' and B', drawn towards what the mean gate gives."""
        layout = self.layout
        A_nRD = self.A.unflatten(0, (layout.a_count, layout.rank))
        towards_HD = layout.to_b(mean_N[:, None, None] * layout.to_experts(A_nRD, 0), 0).flatten(0, 1)
        if self.cross_HD is None or self.square_DD is None or not self.square_DD.any():
            M_HD, root_DD = towards_HD, None  # the layer saw nothing
        else:
            size = self.square_DD.shape[0]
            ridge = RIDGE * self.square_DD.trace() / size
            eye = torch.eye(size, dtype=self.dtype, device=self.A.device)
            root_DD = torch.linalg.cholesky(self.square_DD + ridge * eye)
            M_HD = torch.cholesky_solve((self.cross_HD + ridge * towards_HD).T, root_DD).T
        if layout.a_count >= layout.b_count:
            return M_HD, self.B
        Q_OH, S_HH = torch.linalg.qr(self.B)
        seen = S_HH @ M_HD if root_DD is None else S_HH @ M_HD @ root_DD
        U_HR = torch.linalg.svd(seen, full_matrices=False).U[:, : layout.a_count * layout.rank]
        return U_HR.T @ S_HH @ M_HD, Q_OH @ U_HR
