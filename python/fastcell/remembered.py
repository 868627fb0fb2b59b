"""Calls that come again: the same layer or cell, weights and sizes.

A step of one sample takes the kernels a few microseconds, and checking it in Python longer. A
module that is called so twice in a row remembers the call (``_core.remembered_call``); the next one
is compared with it in C++: attributes, weights (objects, memory, versions, fingerprint), sizes,
dtype. With gradients, it leaves a node in torch's graph whose backward call is in C++, too. Weights
whose numbers have changed (as ``packing`` tells) are packed again; whatever else differs goes the
ordinary way, where it is refused or run.

It needs torch 2.10, whose DLPack exchange API shows a tensor's memory in a few nanoseconds. Without
it, or with one of another major version, every call goes the ordinary way.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

from . import _core, packing
from .autograd import gradients_of
from .cpu import DTYPES, scratch
from .plan import NO_EXTRAS, Config, plan_for

# Asked once, here: nothing that depends on torch's version may fail after a call.
_EXCHANGE_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)
if not _core.has_exchange_api(_EXCHANGE_API):
    _EXCHANGE_API = None
# From there on the kernels take longer than the checks.
_MOST_ROWS = 512
_MOST_ELEMENTS = 1 << 16  # of the output, whose like is kept
_MOST_PATIENCE = 256

# These return nothing true in a plain call, and the level of forward mode and the packed weights of
# all layers are what they were.
_QUIET = (
    torch._C._is_any_autocast_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
    # Under hooks on what a graph saves, a call that is made twice has to save the same both times
    # (torch.utils.checkpoint), so both go the ordinary way.
    functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, True),
)
_SURROUNDINGS = (
    [(vars(packing), "generation"), (vars(forward_ad), "_current_level")],
    _QUIET,
    torch.get_num_threads,
    torch.is_grad_enabled,
)

# (the module's __dict__, input, states or None) -> results, or None.
_Call = Callable[[dict[str, Any], Any, Any], Any]


_all: weakref.WeakSet[Remembered] = weakref.WeakSet()


def forget_all() -> None:
    """Let go of every weight, of which a memory holds weak references."""
    for one in list(_all):
        one.call = no_call


def no_call(module: dict[str, Any], input: Any, states: Any) -> None:
    """Before there is one."""


class Call(NamedTuple):
    """A call of a module on plain tensors.

    Attributes:
        config: the part of it that is no tensor.
        single_step: input and states are (B, .), of a cell; else (T, B, .) or as ``config`` says.
        weights: in the order in which they are packed.
        names: theirs, in the module.
        none: names of parameters that must be None.
        attributes: of the module, whatever decides how it is run beside the weights.
        differentiable: whether a call with gradients would take the same way.
    """

    config: Config
    single_step: bool
    weights: Sequence[Tensor]
    names: Sequence[str]
    none: Sequence[str]
    attributes: tuple[str, ...]
    differentiable: bool = True


class Remembered:
    """A module's memory of its last call.

    Attributes:
        call: returns what the module would, or None where this is not that call. A layer's output
            and a sequence of final states, or a cell's states.
    """

    __slots__ = ("__weakref__", "_last", "_patience", "_seen", "_served", "call")

    def __init__(self) -> None:
        _all.add(self)
        # Another thread may put another in its place at any time.
        self.call: _Call = no_call
        self._last: Any = None
        # Calls alike before one is remembered: more each time that it then served none.
        self._patience, self._seen, self._served = 2, 0, [True]

    def note(self, module: torch.nn.Module, input: Any, call: Call) -> None:
        """Remember a call that has just run, if it is short and the one before was like it."""
        self.call = no_call
        weights, config = call.weights, call.config
        if (
            _EXCHANGE_API is None
            or type(input) is not Tensor
            or forward_ad._current_level >= 0
            or any([function() for function in _QUIET])
            or input.dim() != (2 if call.single_step else 3)
            or input.dtype not in DTYPES
            or input.dtype is not weights[0].dtype
            or not input.is_cpu
            or input.stride()[-1] != 1
        ):
            return
        if call.single_step:
            steps, batch = 1, input.shape[0]
        else:
            steps, batch, _ = input.shape
            if config.batch_first:
                steps, batch = batch, steps
        threads = torch.get_num_threads()
        # Calls from several threads in turn are not alike: a call's workspace is its thread's own.
        like = (input.shape, input.dtype, threads, get_ident())
        if not 0 < steps * batch <= _MOST_ROWS:
            return
        self._seen = self._seen + 1 if like == self._last else 1
        self._last = like
        if self._seen < self._patience:
            return
        rows = input.unsqueeze(0) if call.single_step else input
        packed = packing.packed_for(config, rows, weights)
        parameters = module._parameters
        if packed is None or any(
            [type(w) is not Parameter or parameters.get(n) is not w
             for n, w in zip(call.names, weights, strict=True)]
        ):  # fmt: skip
            return
        stack, stacked, width, sizes = plan_for(config, rows, weights)
        if steps * batch * width > _MOST_ELEMENTS:
            return
        if call.single_step:
            shapes = [((batch, n), (n, 1)) for n in sizes]
        else:
            output = (batch, steps, width), (width, batch * width, 1)
            if not config.batch_first:
                output = (steps, batch, width), (batch * width, width, 1)
            states = [((stacked, batch, n), (batch * n, n, 1)) for n in sizes]
            shapes = [output, *states]  # type: ignore[list-item]
        own = vars(module)
        attributes = {n: own[n] for n in call.attributes if n in own}
        absent = [n for n in call.attributes if n not in own]
        self._patience = 2 if self._served else min(2 * self._patience, _MOST_PATIENCE)
        self._seen, self._served = 0, []
        # (empty_like is the quickest way to a tensor that torch has. A reserve needs no memory to
        # be made like it.)
        templates = [input.new_empty_strided(*shape) for shape in shapes]
        reserve = input.new_empty(1).expand(steps * batch * stack.reserve_row_elements)
        python = (
            torch.empty_like, scratch, functools.partial(_pack, config, call.single_step, threads),
            _apply if call.differentiable else None,
            functools.partial(_backward, config, call.single_step, len(weights)),
        )  # fmt: skip
        made = _core.remembered_call(
            stack, _EXCHANGE_API, attributes, absent,
            list(zip(call.names, weights, strict=True)), call.none, steps, batch,
            config.batch_first, call.single_step, threads, _SURROUNDINGS, python, packed,
            templates, reserve, self._served,
        )  # fmt: skip
        self.call = cast(_Call, made)


def _pack(
    config: Config, single_step: bool, threads: int, input: Tensor, weights: Sequence[Tensor]
) -> Tensor:
    rows = input.unsqueeze(0) if single_step else input
    return packing.packed_weights(config, rows, weights, threads)[1]


class RememberedStack(Function):
    """A call's place in torch's graph: (input, *states, *weights) -> results."""

    @staticmethod
    def forward(ctx: Any, run: Any, made: Any, *tensors: Tensor) -> Any:
        # The call has been made: `run` is its backward call, `made` what it has left.
        reserve, results = made
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(reserve, *tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return ctx.run(ctx.saved_tensors, grads, ctx.needs_input_grad)


_apply = super(Function, RememberedStack).apply


def _backward(
    config: Config,
    single_step: bool,
    weight_count: int,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The backward call where it is not one for kernels alone, a second derivative, for example."""
    reserve, input, *rest = saved
    count = len(rest) - weight_count
    states, weights = rest[:count], rest[count:]
    if single_step:
        # As a layer's call of one step.
        input = input.unsqueeze(0)
        states = [state.unsqueeze(0) for state in states]
        grads = [None, *[None if grad is None else grad.unsqueeze(0) for grad in grads]]
    found = gradients_of(
        config, grads, input, states or None, weights, None, NO_EXTRAS, None, reserve, needs[2:]
    )
    if single_step:
        found = [
            grad.squeeze(0) if grad is not None and i <= count else grad
            for i, grad in enumerate(found)
        ]
    return None, None, *found
