"""Which linear layers a forward pass over text goes through as y = W x: what only such a pass can tell.

A vision tower, or Mamba's `dt_proj`, whose weight is read without a call, never calls its adapters: they would not
train, and stop DDP. Names do not tell: so the base is built without memory, run once over tokens without data, and
watched.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features, check_target_module_exists
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from manylora.adapters.targets import check_expressions, is_linear
from manylora.errors import TargetModulesError

if TYPE_CHECKING:
    from manylora.adapters import ManyLoraConfig

_TOKENS = 8
NOT_CALLED = "a forward pass over text does not call it"


class LenientKernels(TorchDispatchMode):
    """Within fake tensors: an operator that refuses a type is asked for bfloat16's shapes instead.

    The rules that give shapes without data are stricter than the kernels: grouped_mm, of which mixtures of experts are
    made, computes in float32 on a CPU, but its rule knows bfloat16 alone.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation."""
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            floats = {leaf.dtype for leaf in tree_leaves(args) if _is_float(leaf)}
            if len(floats) != 1 or torch.bfloat16 in floats:
                raise
            (dtype,) = floats
            inputs = tree_map_only(
                Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, args
            )
            output = func(*inputs, **kwargs)
            return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, output)


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Run the block's operations on shapes alone; whatever fails there is not logged beside the error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), LenientKernels():
            yield
    finally:
        logger.disabled = before


def give_shapes(model: nn.Module) -> None:
    """Swap meta tensors for fake CPU ones, inside `without_data`: same shapes, but CPU kernels are chosen."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The linear layers of a base, and those of them that could carry no adapter."""

    layers: Sequence[str]
    """Full names."""
    unfit: Mapping[str, str]
    """Name to the reason; empty where a forward pass cannot be simulated, so that nothing is known."""


def reach_of(model: nn.Module) -> Reach:
    """Run a base once, without data, and watch its linear layers.

    Args:
        model: the base on torch's meta device; consumed.
    """
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    unfit = dict.fromkeys(layers, NOT_CALLED)

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            reason = _mismatch(module, inputs[0] if inputs else None, output)
            if reason is None:
                unfit.pop(name, None)
            elif name in unfit:
                unfit[name] = reason

        return note

    for name, module in layers.items():
        module.register_forward_hook(watch(name))
    ids = torch.zeros(1, _TOKENS, dtype=torch.long)
    try:
        with without_data(), torch.no_grad():
            give_shapes(model)
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # an operator whose result depends on data, or that has no rule for shapes
        unfit = {}
    return Reach(layers=tuple(layers), unfit=unfit)


def leave_out(adapter: ManyLoraConfig, reach: Reach) -> dict[str, str]:
    """Exclude from the adapter's targets the layers that cannot carry one; returns them with the reasons.

    Raises:
        TargetModulesError: a target means such layers alone.
    """
    targets = adapter.target_modules
    if targets is None or not reach.unfit:
        return {}
    check_expressions(adapter, reach.layers)
    everything = str(targets).lower() == "all-linear"
    meant = [name for name in reach.layers if everything or check_target_module_exists(adapter, name)]
    left = {name: reach.unfit[name] for name in meant if name in reach.unfit}
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        own = [name for name in meant if isinstance(targets, str) or f".{name}".endswith(f".{target}")]
        if own and all(name in left for name in own):
            more = f" and {len(own) - 1} more" if own[1:] else ""
            raise TargetModulesError(
                f"target_modules {target!r} means {own[0]!r}{more} alone, and {left[own[0]]}: it cannot carry an "
                "adapter. Leave it out of target_modules, or use 'all-linear'."
            )
    if left:
        adapter.exclude_modules = set(left)
    return left


def _mismatch(module: nn.Module, x: Any, y: Any) -> str | None:
    """Why the layer's output is not W x; None where it can be."""
    if not isinstance(y, Tensor):
        return f"its class {type(module).__name__} returns a {type(y).__name__}"
    inputs, outputs = _get_in_out_features(module)
    if not isinstance(x, Tensor) or x.shape[-1:] != (inputs,) or y.shape != (*x.shape[:-1], outputs):
        return f"its class {type(module).__name__} does not map {inputs} numbers to {outputs}"
    return None


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
