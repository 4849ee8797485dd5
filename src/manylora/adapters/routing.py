"""How expert ids travel from a call of the model to its layers.

`expert_ids` enter as a keyword of the base model's forward or generate, or through `route`. Hooks on the base
model keep them in a state with one stack per thread, so that threads, nested calls and failed calls do not
see each other's. The state is a plain object, no module and no buffer: PEFT saves all that a layer holds, and
ids are not weights.

Gradient checkpointing runs a layer's forward again during backward, when the model's own forward is over (and
on CUDA in another thread). Therefore the checkpointing function of every transformers layer is wrapped: the
rerun sees the ids of the forward it belongs to, even when another forward came in between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from manylora.errors import RoutingError

KEYWORD = "expert_ids"
_ATTRIBUTE = "_manylora_routing"
_CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"

ExpertIds = Tensor | Sequence[int] | int
"""One expert index per example, or one integer for all examples."""

_Kind = Literal["around", "call", "rerun"]


class Routes:
    """The ids of one forward call: one per example, one for all, or none given.

    Args:
        ids: what the caller gave; None: nothing.

    Raises:
        RoutingError: the ids are not integers, or not one per example in one dimension.
    """

    __slots__ = ("_checked", "expert", "ids_B", "prompts")

    def __init__(self, ids: ExpertIds | None = None) -> None:
        self.prompts: int | None = None
        self.expert: int | None = None
        self.ids_B: Tensor | None = None
        self._checked: set[int] = set()
        if ids is None:
            return
        if isinstance(ids, int) and not isinstance(ids, bool):
            self.expert = ids
        else:
            self.ids_B = _as_ids(ids)

    @property
    def given(self) -> bool:
        """Whether the caller gave any ids."""
        return self.expert is not None or self.ids_B is not None

    def for_generation(self, prompts: int | None) -> Routes:
        """The same ids inside a generation, whose batches hold each prompt once or several times in a row.

        Args:
            prompts: number of prompts; None: not known, taken to be the number of ids.
        """
        copy = Routes()
        copy.expert, copy.ids_B = self.expert, self.ids_B
        if self.ids_B is not None:
            copy.prompts = self.ids_B.shape[0] if prompts is None else prompts
        return copy

    def check(self, num_experts: int) -> None:
        """Raise RoutingError unless every id is one of `num_experts` experts; reads the values only once."""
        if num_experts in self._checked:
            return
        if self.expert is not None:
            low = high = self.expert
        elif self.ids_B is None or self.ids_B.numel() == 0 or not _has_values(self.ids_B):
            return
        else:
            # Reading the values makes a GPU wait, hence once per call of the model and not once per layer.
            low, high = (int(bound) for bound in torch.aminmax(self.ids_B))
        if low < 0 or high >= num_experts:
            bad = low if low < 0 else high
            raise RoutingError(f"expert_ids contain {bad}; the adapter's experts are 0 to {num_experts - 1}.")
        self._checked.add(num_experts)

    def single(self) -> int | None:
        """The one expert that all ids name, None if they name several or none."""
        if self.ids_B is not None and self.ids_B.numel() > 0:
            low, high = (int(bound) for bound in torch.aminmax(self.ids_B))
            return low if low == high else None
        return self.expert

    def weights(self, x: Tensor, num_experts: int) -> Tensor:
        """One-hot routing weights for an input (B, …, D): (B, 1, …, N), in x's dtype and on its device.

        Raises:
            RoutingError: the number of ids is not the number of rows.
        """
        assert self.ids_B is not None
        ids_B, rows = self.ids_B.to(x.device), x.shape[0]
        count = ids_B.shape[0]
        if count and count == self.prompts and rows % count == 0:
            # transformers repeats every prompt in place, once per beam or returned sequence
            ids_B = ids_B.repeat_interleave(rows // count)
        elif self.prompts is not None or count != rows:
            expected = rows if self.prompts in (None, count) else self.prompts
            raise RoutingError(
                f"{count} expert_ids for {expected} rows (input shape {tuple(x.shape)}); give one per example "
                "and do not pack or flatten examples into one row under the task router."
            )
        experts_N = torch.arange(num_experts, device=x.device)
        shape = (rows, *(1,) * (x.dim() - 2), num_experts)
        return (ids_B.unsqueeze(-1) == experts_N).to(x.dtype).view(shape)


def _has_values(tensor: Tensor) -> bool:
    """False for tensors that only stand for a shape, as in a run that estimates memory."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _as_ids(ids: ExpertIds) -> Tensor:
    try:
        ids_B = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RoutingError(f"expert_ids={ids!r} are no integers; give one index per example.") from error
    if ids_B.numel() == 0 and not isinstance(ids, Tensor):
        ids_B = ids_B.long()
    if ids_B.dtype == torch.bool or ids_B.is_floating_point() or ids_B.is_complex():
        raise RoutingError(f"expert_ids have dtype {ids_B.dtype}; give integers, one index per example.")
    if ids_B.dim() != 1:
        raise RoutingError(
            f"expert_ids have shape {tuple(ids_B.shape)}; give one index per example: (batch,)."
        )
    return ids_B


class RoutingState:
    """The routes of the running calls of one base model, one stack per thread.

    Copies and unpickled states start empty: what is running belongs to the original.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[RoutingState], tuple[()]]:
        return RoutingState, ()

    @property
    def current(self) -> Routes | None:
        """The innermost routes of this thread; None outside any call, and where a rerun has lost its own.

        A layer that runs during backward belongs to an earlier forward; what `route` says around the backward
        need not be what that forward used.
        """
        stack = self._stack()
        if not stack:
            return None
        routes, kind = stack[-1]
        return None if kind == "around" and in_backward() else routes

    @property
    def ambient(self) -> Routes:
        """What a call without ids of its own uses: the innermost `route` or generation, else nothing.

        Other calls do not count: one that was interrupted from the keyboard may have left its entry behind.
        """
        return next((routes for routes, kind in reversed(self._stack()) if kind == "around"), Routes())

    def enter_call(self, routes: Routes) -> None:
        """A forward of the model begins."""
        self._stack().append((routes, "call"))

    def leave_call(self) -> None:
        """The forward is over. Does nothing where none began: another's hook may fail before ours has run."""
        stack = self._stack()
        if stack and stack[-1][1] == "call":
            stack.pop()

    @contextmanager
    def routed(self, routes: Routes, kind: Literal["around", "rerun"] = "around") -> Iterator[None]:
        """Use `routes` inside the block, in this thread: around calls, or in a layer's checkpointed forward."""
        stack = self._stack()
        depth = len(stack)
        stack.append((routes, kind))
        try:
            yield
        finally:
            del stack[depth:]  # also what an interrupted forward inside left behind

    def _stack(self) -> list[tuple[Routes, _Kind]]:
        stack: list[tuple[Routes, _Kind]] | None = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack


def in_backward() -> bool:
    """Whether this thread is inside a backward pass (where only a checkpoint's rerun calls a layer)."""
    if torch.compiler.is_compiling():  # what is traced is a forward
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def install(model: nn.Module) -> RoutingState:
    """Make `model` take `expert_ids` in forward and generate; returns its state (the same one every time)."""
    state = getattr(model, _ATTRIBUTE, None)
    if isinstance(state, RoutingState):
        return state
    state = RoutingState()
    setattr(model, _ATTRIBUTE, state)
    model.register_forward_pre_hook(_Enter(state, model), prepend=True, with_kwargs=True)
    model.register_forward_hook(_Leave(state), always_call=True)
    if callable(getattr(model, "generate", None)):
        # transformers' generate refuses keywords it does not know before any forward runs
        setattr(model, "generate", _Generate(model, state))  # noqa: B010 -- no declared attribute
    return state


def uninstall(model: nn.Module) -> None:
    """Undo `install`: the model is again what it was."""
    if not isinstance(getattr(model, _ATTRIBUTE, None), RoutingState):
        return
    delattr(model, _ATTRIBUTE)
    generate = vars(model).get("generate")
    if isinstance(generate, _Generate):
        del model.generate
        if generate.replaced is not None:
            setattr(model, "generate", generate.replaced)  # noqa: B010 -- no declared attribute
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Enter):
            hook.unwrap()
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, _Leave):
            del model._forward_hooks[key]
            model._forward_hooks_always_called.pop(key, None)


# The hooks and wrappers are objects of named classes, not closures: a model can be pickled and deep-copied.


class _Enter:
    """Forward pre-hook of the base model: takes the keyword out and opens the call's routes."""

    def __init__(self, state: RoutingState, model: nn.Module) -> None:
        self.state = state
        self.checkpointing = [
            module for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.pop(KEYWORD, None)
        # Entered before the ids are looked at: `_Leave` runs even when they are bad, and must find this call.
        self.state.enter_call(self.state.ambient)
        if ids is not None:
            routes = Routes(ids)
            self.state.leave_call()
            self.state.enter_call(routes)
        for layer in self.checkpointing:
            # The trainer sets the function when training starts, and may set it anew: looked at every time.
            function = vars(layer).get(_CHECKPOINT_FUNCTION)
            if function is not None and not isinstance(function, _Checkpoint):
                setattr(layer, _CHECKPOINT_FUNCTION, _Checkpoint(function, self.state))
        return args, kwargs

    def unwrap(self) -> None:
        """Give the layers their own checkpointing function back."""
        for layer in self.checkpointing:
            function = vars(layer).get(_CHECKPOINT_FUNCTION)
            if isinstance(function, _Checkpoint):
                setattr(layer, _CHECKPOINT_FUNCTION, function.function)


class _Leave:
    """Forward hook of the base model, called after failures too: closes the call's routes."""

    def __init__(self, state: RoutingState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.state.leave_call()


class _Generate:
    """Stands in for the model's `generate`: takes `expert_ids`, one per prompt, however many beams."""

    def __init__(self, model: nn.Module, state: RoutingState) -> None:
        self.model = model
        self.state = state
        self.replaced: Callable[..., Any] | None = vars(model).get("generate")

    def __call__(self, *args: Any, expert_ids: ExpertIds | None = None, **kwargs: Any) -> Any:
        routes = self.state.ambient if expert_ids is None else Routes(expert_ids)
        with self.state.routed(routes.for_generation(_prompts(args, kwargs))):
            if self.replaced is not None:
                return self.replaced(*args, **kwargs)
            return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[attr-defined]


def _prompts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Number of prompts in a call of generate, from whichever input it has."""
    inputs = [
        *args[:1],
        *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "input_features")),
    ]
    return next((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim() > 0), None)


class _Checkpoint:
    """Stands in for a layer's checkpointing function: binds the running forward's routes to the rerun."""

    def __init__(self, function: Callable[..., Any], state: RoutingState) -> None:
        self.function = function
        self.state = state

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = _Bound(forward, self.state, self.state.current or Routes())
        return self.function(bound, *args, **kwargs)


class _Bound:
    """A layer's forward together with the routes of the call it belongs to."""

    def __init__(self, forward: Callable[..., Any], state: RoutingState, routes: Routes) -> None:
        self.forward = forward
        self.state = state
        self.routes = routes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.state.routed(self.routes, "rerun"):
            return self.forward(*args, **kwargs)
