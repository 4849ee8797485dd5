"""What the method says of an adapter's size, written apart from the code that makes it."""

from __future__ import annotations

from manylora.adapters import ManyLoraConfig


def parameters_per_layer(
    config: ManyLoraConfig, *, in_features: int, out_features: int, rank: int | None = None
) -> int:
    """Trainable parameters of one adapter in one (D, O) layer: nA·R·D + nB·R·O, plus N·D for a token router.

    nA = N where A is not shared, else 1; nB likewise.

    Args:
        config: the adapter's settings.
        in_features: D.
        out_features: O.
        rank: R of this layer where `rank_pattern` changes it; None: the config's.
    """
    r = config.r if rank is None else rank
    n = config.num_experts
    num_A, num_B = (1 if config.share == "A" else n), (1 if config.share == "B" else n)
    router = n * in_features if config.router == "token" and n > 1 else 0
    return num_A * r * in_features + num_B * r * out_features + router
