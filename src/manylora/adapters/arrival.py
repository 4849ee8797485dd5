"""Whether an adapter's weights arrive: each has its place in the model, each place gets its weight, all are numbers.

PEFT warns of weights that a file lacks, and drops those that have no place in the model without a word; either way the
base answers in the adapter's stead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft import set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn

from manylora.adapters.export import PREFIX
from manylora.errors import ModelError

_WRAPPED = "_fsdp_wrapped_module."
_MISMATCH = "size mismatch for"
"""How torch words it."""
_SOURCE: ContextVar[object] = ContextVar("source", default="The adapter")
"""What is being loaded, for the errors of checks that PEFT calls and cannot tell."""


@contextmanager
def loading(source: object, target: str = "this model") -> Iterator[None]:
    """Name what PEFT loads inside the block, for `check_places`.

    Raises:
        ModelError: for PEFT's `KeyError`, with which it asks for a weight of a module to save, and torch's error of
            many lines on unequal shapes.
    """
    token = _SOURCE.set(source)
    try:
        yield
    except KeyError as error:
        raise _unfit(source, target, missing=[str(error.args[0])]) from error
    except RuntimeError as error:
        if _MISMATCH not in str(error):
            raise
        line = next(line.strip() for line in str(error).splitlines() if _MISMATCH in line)
        raise ModelError(f"{source} does not fit {target} ({line.rstrip('.')}); {_REMEDY}") from error
    finally:
        _SOURCE.reset(token)


def source() -> object:
    """What is being loaded, as `loading` was told."""
    return _SOURCE.get()


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        weights: an adapter's, by name.
        source: what they are or where they come from, for the error.

    Raises:
        ModelError: naming the first such weight.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(
                f"{source} holds values that are not finite (NaN or infinity), first in {name!r}: its training "
                "diverged, or the file is damaged. Take an earlier checkpoint, or train again."
            )


def put_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: object,
    target: str = "this model",
    adapter: str = "default",
    low_cpu_mem_usage: bool = False,
) -> None:
    """PEFT's `set_peft_model_state_dict`, but whatever does not arrive is an error.

    Args:
        model: with an adapter of that name.
        weights: as PEFT saves them.
        source: what they are or where they come from, for the error.
        target: what the model is, for the error.
        adapter: its name.
        low_cpu_mem_usage: as PEFT's, for adapters on the meta device.

    Raises:
        ModelError: a weight is missing, left over, of another shape or not finite.
    """
    check_finite(weights, source)
    with loading(source, target):
        result = set_peft_model_state_dict(
            model, dict(weights), adapter_name=adapter, low_cpu_mem_usage=low_cpu_mem_usage
        )
    check_result(model, result, source=source, target=target, adapter=adapter)


def check_result(
    model: nn.Module,
    result: Any,
    *,
    source: object,
    target: str = "this model",
    adapter: str = "default",
) -> None:
    """Refuse what PEFT reports of a load: `missing_keys` of this adapter, and `unexpected_keys`.

    Raises:
        ModelError: there are some.
    """
    mark = str(PEFT_TYPE_TO_PREFIX_MAPPING.get(model.peft_config[adapter].peft_type, ""))  # type: ignore[union-attr, index]
    missing = [key for key in result.missing_keys if mark in key and f".{adapter}" in key]
    if missing or result.unexpected_keys:
        raise _unfit(source, target, missing=missing, left_over=result.unexpected_keys)


def check_places(places: Collection[str], model: nn.Module, given: Collection[str]) -> None:
    """Compare the keys that a model is about to be given with what it has.

    For the moment before weights are loaded: what PEFT makes of its result afterwards differs between its loaders.

    Args:
        places: keys that must be given.
        model: which receives them.
        given: keys as they are in the model.

    Raises:
        ModelError: one is missing, or there is no place for one.
    """
    modules = {name.replace(_WRAPPED, ""): module for name, module in model.named_modules()}
    sharded = any(_WRAPPED in name for name, _ in model.named_modules())

    def has(key: str) -> bool:
        owner, _, leaf = key.rpartition(".")
        # FSDP1 takes a module's parameters out of it and keeps them flat
        return owner in modules and (sharded or isinstance(getattr(modules[owner], leaf, None), Tensor))

    bare = {key if key.rpartition(".")[0] in modules else key.removeprefix(PREFIX) for key in given}
    missing = [key for key in places if key not in bare]
    left_over = [key for key in bare if key not in places and not has(key)]
    if missing or left_over:
        raise _unfit(_SOURCE.get(), "this model", missing=missing, left_over=sorted(left_over))


_REMEDY = "give the base model that it was trained on, or its files as they were saved."


def _unfit(
    source: object, target: str, *, missing: Collection[str] = (), left_over: Collection[str] = ()
) -> ModelError:
    """A file of another layout has both; its own name for a weight says more than the model's."""
    if left_over:
        what = f"{next(iter(left_over))!r} has no counterpart in the model ({_counted(left_over)} left over"
        what += f", {_counted(missing)} missing)" if missing else ")"
    else:
        what = f"{next(iter(missing))!r} has no counterpart among its weights ({_counted(missing)} missing)"
    return ModelError(f"{source} does not fit {target}: {what}; {_REMEDY}")


def _counted(keys: Collection[str]) -> str:
    return f"{len(keys)} weight{'' if len(keys) == 1 else 's'}"
