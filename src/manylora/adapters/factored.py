"""One expert whose two matrices are products, so that clients of unequal ranks train the same effective LoRA.

y' = y + s · (B0 + B2 B1) (M A) x       (2509.25414, section 4.3)

Shape letters: D in, O out, R the common intermediate rank, K the client's own rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manylora.adapters.bank import ExpertBank
from manylora.adapters.ops import Layout
from manylora.errors import ConfigError


class FactoredBank(ExpertBank):
    """An `ExpertBank` of one expert and rank R, whose A is M A_k and whose B is B0 + B2 B1.

    A_k (K, D), M (R, K), B1 (K, R) and B2 (O, K) are trained, B0 (O, R) is frozen: a buffer, so that no
    optimizer and no `requires_grad_` reaches it. All that is inherited reads the products.

    Args:
        like: the bank of one expert that this one stands in for; gives D, O, R, scaling and dropout.
        own_rank: K.

    Raises:
        ConfigError: `like` has several experts, or the rank is below 1.
    """

    def __init__(self, like: ExpertBank, *, own_rank: int) -> None:
        nn.Module.__init__(self)
        if like.num_experts != 1:
            raise ConfigError(f"A factored bank has one expert, not {like.num_experts}; set num_experts=1.")
        if own_rank < 1:
            raise ConfigError(f"rank {own_rank} is no rank; give a positive integer.")
        rank = like.layout.rank
        self.layout = Layout(num_experts=1, rank=rank, share="B")
        self.router, self.top_k, self.temperature, self.load_balance_weight = None, None, 1.0, 0.0
        self.takes_ids = like.takes_ids
        self.default_expert = like.default_expert
        self.dropout = like.dropout
        self.scaling = like.scaling
        weight = like.lora_B
        in_features, out_features = like.lora_A.shape[1], weight.shape[0]
        self.A = nn.Parameter(weight.new_empty(own_rank, in_features))
        self.M = nn.Parameter(weight.new_empty(rank, own_rank))
        self.B1 = nn.Parameter(weight.new_empty(own_rank, rank))
        self.B2 = nn.Parameter(weight.new_zeros(out_features, own_rank))
        self.B0: Tensor
        self.register_buffer("B0", weight.new_zeros(out_features, rank))
        self.reset_parameters()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of what a saved bank consists of."""
        return ("A", "M", "B1", "B2", "B0")

    def reset_parameters(self, *, identity: bool = True) -> None:
        """A, M and B1 kaiming-uniform(a=√5); B2 zero, or drawn too; B0 zero (method.md)."""
        with torch.no_grad():
            for matrix in (self.A, self.M, self.B1, *(() if identity else (self.B2,))):
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            if identity:
                nn.init.zeros_(self.B2)
            nn.init.zeros_(self.B0)

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """M A, (R, D)."""
        return self.M @ self.A

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """B0 + B2 B1, (O, R)."""
        return self.B0 + self.B2 @ self.B1

    @property
    def weight(self) -> Tensor:
        """The client's A: a parameter, as code that asks for a layer's weight expects."""
        return self.A
