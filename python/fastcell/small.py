"""Small calls that come again: the same layer, weights and sizes, and no gradient.

A step of one sample takes the kernels a few microseconds, and checking it in Python several times
that. A layer that is called so twice in a row remembers the call (``_core.small_call``); the next
one is compared with it in C++: attributes, weights (objects, versions, memory, fingerprint), sizes,
dtype. Whatever differs goes the ordinary way, where it is refused or run.

It needs torch 2.10, whose DLPack exchange API shows a tensor's memory in a few nanoseconds. Without
it, or with one of another major version, every call goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _core, packing
from .cpu import DTYPES, scratch
from .plan import Config, plan_for

# Asked once, here: a call that is to be remembered has run already, and must not fail for this.
_EXCHANGE_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)
if not _core.has_exchange_api(_EXCHANGE_API):
    _EXCHANGE_API = None
_MOST_ROWS = 64  # from there on the kernels take longer than the checks
# What decides how a layer is run, beside its weights.
_ATTRIBUTES = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
    "bidirectional", "proj_size", "training", "skip", "skip_beside", "layer_norm", "zoneout",
    "recurrent_dropout", "weight_dropout", "_cell",
)  # fmt: skip


_MOST_PATIENCE = 256

# A plain call without gradient: these return nothing true, and the level of forward mode and the
# packed weights of all layers are what they were.
_QUIET = (
    torch.is_grad_enabled,
    torch._C._is_any_autocast_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)
_UNCHANGED = ((vars(packing), "generation"), (vars(forward_ad), "_current_level"))

# (the layer's __dict__, input, states or None) -> output and final states, or None.
_Call = Callable[[dict[str, Any], Tensor, tuple[Tensor, ...] | None], Any]


def no_call(module: dict[str, Any], input: Any, states: Any) -> None:
    """Before there is one."""


class Small:
    """A layer's memory of its last small call.

    Attributes:
        call: returns output and final states, or None where this is not that call.
    """

    __slots__ = ("_last", "_patience", "_seen", "_served", "call")

    def __init__(self) -> None:
        # Another thread may put another in its place at any time.
        self.call: _Call = no_call
        self._last: Any = None
        # Calls alike before one is remembered: more each time that it then served none.
        self._patience, self._seen, self._served = 2, 0, [True]

    def note(
        self,
        layer: torch.nn.RNNBase,
        cell: str,
        input: Any,
        weights: Sequence[Tensor],
    ) -> None:
        """Remember a call that has just run, if it is small and the one before was like it."""
        self.call = no_call
        if (
            _EXCHANGE_API is None
            or type(input) is not Tensor
            or forward_ad._current_level >= 0
            or any([function() for function in _QUIET])
            or input.dim() != 3
            or input.dtype not in DTYPES
            or input.dtype is not weights[0].dtype
            or not input.is_cpu
            or input.stride()[-1] != 1
            or (layer.dropout > 0 and layer.training and layer.num_layers > 1)
        ):
            return
        first, second, _ = input.shape
        steps, batch = (second, first) if layer.batch_first else (first, second)
        threads = torch.get_num_threads()
        # Calls from several threads in turn are not alike: a call's workspace is its thread's own.
        like = (input.shape, input.dtype, threads, get_ident())
        if not 0 < steps * batch <= _MOST_ROWS:
            return
        self._seen = self._seen + 1 if like == self._last else 1
        self._last = like
        if self._seen < self._patience:
            return
        config = Config(cell, layer.num_layers, layer.bidirectional, layer.bias, layer.batch_first)
        packed = packing.packed_for(config, input, weights)
        names = layer._flat_weights_names
        parameters = layer._parameters
        if packed is None or any(
            [type(w) is not Parameter or parameters.get(n) is not w
             for n, w in zip(names, weights, strict=True)]
        ):  # fmt: skip
            return
        stack, stacked, width, sizes = plan_for(config, input, weights)
        size = stack.forward_workspace(
            steps, batch, steps * batch, False, False, False, False, threads
        )
        pointer, memory = scratch(size)
        output = (batch, steps, width), (width, batch * width, 1)
        if not layer.batch_first:
            output = (steps, batch, width), (batch * width, width, 1)
        shapes = [
            output, *[((stacked, batch, n), (batch * n, n, 1)) for n in sizes],
        ]  # fmt: skip
        attributes = {n: layer.__dict__[n] for n in _ATTRIBUTES if n in layer.__dict__}
        absent = [n for n in _ATTRIBUTES if n not in attributes]
        self._patience = 2 if self._served else min(2 * self._patience, _MOST_PATIENCE)
        self._seen, self._served = 0, []
        # (empty_like is the quickest way to a tensor that torch has.)
        templates = [input.new_empty_strided(*shape) for shape in shapes]
        made = _core.small_call(
            stack, _EXCHANGE_API, attributes, absent, list(zip(names, weights, strict=True)),
            packed, memory, pointer, packed.data_ptr(), steps, batch, layer.batch_first, threads,
            templates, torch.empty_like, _UNCHANGED, _QUIET, torch.get_num_threads, self._served,
        )  # fmt: skip
        self.call = cast(_Call, made)
