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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from manylora.adapters.balance import LoadBalance, add_to_loss
from manylora.adapters.routes import CallFacts, ExpertIds, Routes
from manylora.errors import RoutingError

KEYWORD = "expert_ids"
NAMES = "adapter_names"
_ATTRIBUTE = "_manylora_routing"
_CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"

_Kind = Literal["around", "call", "rerun"]


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

    def leave_call(self) -> Routes | None:
        """The forward is over. None where none began: another's hook may fail before ours has run."""
        stack = self._stack()
        return stack.pop()[0] if stack and stack[-1][1] == "call" else None

    @property
    def collector(self) -> LoadBalance | None:
        """Who asked, in this thread, for what the load-balance loss needs."""
        return getattr(self._local, "collector", None)

    @contextmanager
    def collecting(self, collector: LoadBalance) -> Iterator[None]:
        """Give the routers' calls inside the block, in this thread, to `collector`."""
        before = self.collector
        self._local.collector = collector
        try:
            yield
        finally:
            self._local.collector = before

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
        self.one_sequence = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
        self.next_token = self.one_sequence and loss is ForCausalLMLoss

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.pop(KEYWORD, None)
        ambient = self.state.ambient
        # Entered before the ids are looked at: `_Leave` runs even when they are bad, and must find this call.
        self.state.enter_call(ambient)
        if kwargs.get(NAMES) is not None:
            raise RoutingError(
                f"{NAMES}={kwargs[NAMES]!r}: a model adapted in place cannot mix adapters in a batch; call the "
                "PeftModel that get_peft_model or PeftModel.from_pretrained returns."
            )
        routes = ambient if ids is None else Routes(ids).with_adapters(ambient.adapters)
        call = CallFacts.of(kwargs, one_sequence=self.one_sequence, next_token=self.next_token)
        if module.training and torch.is_grad_enabled():
            call.gates = []
        self.state.leave_call()
        self.state.enter_call(routes.during(call))
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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        routes = self.state.leave_call()
        call = None if routes is None else routes.call
        if call is None or not call.gates:
            return None
        gates, call.gates = call.gates, None  # a checkpoint's rerun must not count a second time
        if output is None:
            return None  # the forward has failed
        collector = self.state.collector
        if collector is None:
            return add_to_loss(output, LoadBalance(gates), call)
        collector.calls.extend(gates)
        return None


class _Generate:
    """Stands in for the model's `generate`: takes `expert_ids`, one per prompt, however many beams."""

    def __init__(self, model: nn.Module, state: RoutingState) -> None:
        self.model = model
        self.state = state
        self.replaced: Callable[..., Any] | None = vars(model).get("generate")

    def __call__(self, *args: Any, expert_ids: ExpertIds | None = None, **kwargs: Any) -> Any:
        routes = self.state.ambient
        if expert_ids is not None:
            routes = Routes(expert_ids).with_adapters(routes.adapters)
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
