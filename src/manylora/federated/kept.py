"""What a state on disk must hold: compared with what the strategy demands before anything goes on from it.

A checksum says that a file is as it was written. It cannot say that what was written is what this run goes on from: a
state of another layout, or one that was written anew, would otherwise be filled in from the initial draw.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch

from manylora.federated.home import DamagedStateError
from manylora.federated.parts import PARTS, PLAIN, Shapes, State, split_name
from manylora.federated.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from manylora.federated.config import FederateConfig

RESIDUAL, MOMENTS, TRAINED = "residual/", "moments/", "trained/"
"""Prefixes under which these stand beside the private parts on disk."""

_AVERAGES = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a matrix in its shape, beside the number of its steps."""

Layout: TypeAlias = "Mapping[str, tuple[int, ...]]"
"""Name of every matrix to its shape."""


def private_layout(
    strategy: Strategy,
    config: FederateConfig,
    shapes: Shapes,
    *,
    rank: int,
    moments: Collection[str] | None = None,
) -> Layout:
    """Everything that a client of this rank keeps after a round.

    Args:
        strategy: of the run.
        config: resolved.
        shapes: of the layers.
        rank: K.
        moments: "layer.part" of the matrices that have moments; a layer that no row reached has none. Default: all
            private ones that are trained.
    """
    private = _layout(strategy.private, shapes, rank=rank, intermediate=config.r)
    due = dict(private)
    if config.wire != "fp32" and strategy.feedback:
        sent = _layout(strategy.up, shapes, rank=rank, intermediate=config.r)
        due |= {RESIDUAL + name: shape for name, shape in sent.items()}
    if config.personal == "trained":
        rest = _layout(strategy.parts - strategy.private, shapes, rank=rank, intermediate=config.r)
        due |= {TRAINED + name: shape for name, shape in rest.items()}
    if config.optimizer == "persist":
        for name, shape in private.items():
            if split_name(name)[1] in strategy.trains and (moments is None or name in moments):
                due |= {f"{MOMENTS}{name}/{key}": shape for key in _AVERAGES}
                due[f"{MOMENTS}{name}/step"] = (1,)
    return due


def shared_layout(strategy: Strategy, config: FederateConfig, shapes: Shapes) -> Layout:
    """Everything that the server keeps of what is shared; FLoRA's stacks stand elsewhere."""
    return _layout(strategy.down & PARTS.keys(), shapes, rank=config.largest_rank, intermediate=config.r)


def check_layout(state: State, due: Layout, *, source: object) -> None:
    """Refuse a state that is not of this layout, in float32.

    Raises:
        DamagedStateError: a matrix is missing, left over, or of another shape or type; names `source` and the first.
    """
    wrong = ""
    if missing := sorted(due.keys() - state.keys()):
        wrong = f"it lacks {len(missing)} of {len(due)} matrices, such as {missing[0]}"
    elif extra := sorted(state.keys() - due.keys()):
        wrong = f"it has {len(extra)} matrices too many, such as {extra[0]}"
    else:
        for name, value in state.items():
            if tuple(value.shape) != tuple(due[name]) or value.dtype != torch.float32:
                wrong = (
                    f"its {name} is {value.dtype} {tuple(value.shape)}, not torch.float32 {tuple(due[name])}"
                )
                break
    if wrong:
        raise DamagedStateError(f"{source} is damaged ({wrong}); put a copy of it back.")


def not_finite(state: State) -> str | None:
    """The first matrix that holds NaN or infinity."""
    return next((name for name in sorted(state) if not bool(torch.isfinite(state[name]).all())), None)


def with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """What stands under a prefix, by its name without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def with_moments(private: State) -> list[str]:
    """ "layer.part" of the matrices whose moments a private state holds."""
    return sorted({name.rpartition("/")[0] for name in with_prefix(private, MOMENTS)})


def broken_layer(stack: State, shapes: Shapes) -> str | None:
    """The first layer of which a stack does not hold a whole A (K, D) and B (O, K)."""
    for layer, (rows, columns) in shapes.items():
        a, b = stack.get(f"{layer}.A"), stack.get(f"{layer}.B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2:
            return layer
        if (b.shape[0], *a.shape) != (rows, b.shape[1], columns):
            return layer
    return None


def check_stack(stack: State, shapes: Shapes, *, source: object) -> None:
    """Refuse a stack that is not one of these layers.

    Raises:
        DamagedStateError: it is not whole, holds something else, or is not of float32 and finite.
    """
    broken = broken_layer(stack, shapes)
    if broken is None:
        names = {f"{layer}.{part}" for layer in shapes for part in PLAIN}
        odd = (name for name, value in stack.items() if name not in names or value.dtype != torch.float32)
        broken = next(odd, None) or not_finite(stack)
    if broken is not None:
        raise DamagedStateError(
            f"{source} is damaged (its {broken} is not that of a stack); put a copy of it back."
        )


def _layout(parts: Iterable[str], shapes: Shapes, *, rank: int, intermediate: int) -> Layout:
    return {
        f"{layer}.{part}": PARTS[part].shape(layer=shape, rank=rank, intermediate=intermediate)
        for layer, shape in shapes.items()
        for part in parts
    }
