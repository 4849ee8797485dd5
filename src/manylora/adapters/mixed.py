"""Several adapters in one batch: PEFT's `adapter_names`, one name per row, for inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from manylora.adapters.layer import ManyLoraLinear
from manylora.adapters.routes import BASE
from manylora.adapters.routing import RoutingState
from manylora.errors import RoutingError


def check_adapter_names(model: nn.Module, names: Any) -> None:
    """Refuse names that cannot be followed.

    Raises:
        RoutingError: no list of names, unknown ones, a model in training mode, or merged adapters.
    """
    if (
        not isinstance(names, Sequence)
        or isinstance(names, str)
        or not all(isinstance(n, str) for n in names)
    ):
        raise RoutingError(f"adapter_names={names!r} is no list of names; give one per example.")
    layers = [module for module in model.modules() if isinstance(module, ManyLoraLinear)]
    known = {name for layer in layers for name in layer.manylora_experts}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise RoutingError(
            f"adapter_names contain {unknown[0]!r}; this model has {', '.join(sorted(known))} and {BASE} for none."
        )
    if model.training:
        raise RoutingError("adapter_names are for inference; call model.eval(), or train with set_adapter.")
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise RoutingError(
            f"adapter_names cannot be followed while {', '.join(merged)} is merged into the base weights; call "
            "model.unmerge_adapter() first."
        )


@contextmanager
def saved_modules_follow(model: nn.Module, state: RoutingState) -> Iterator[None]:
    """Have `modules_to_save` use each row's own copy inside the block; PEFT's wrapper takes the names as a keyword."""

    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        routes = state.current  # of this thread
        rows = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if routes is None or routes.adapters is None or rows is None:
            return None
        return args, {**kwargs, "adapter_names": routes.names_for(rows)}

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                stack.callback(module.register_forward_pre_hook(tell, with_kwargs=True).remove)
        yield
