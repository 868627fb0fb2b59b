"""Small calls that come again: the same layer, weights and sizes, and no gradient.

A step of one sample takes the kernels a few microseconds, and checking it in Python several times
that. A layer that is called so twice in a row remembers the call (``_core.SmallCall``); the next
one is compared with it in C++: attributes, weights (objects, versions, memory, fingerprint), sizes,
dtype. Whatever differs goes the ordinary way, where it is refused or run.

It needs torch 2.10, whose DLPack exchange API shows a tensor's memory in a few nanoseconds. Without
it, or with one of another major version, every call goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _core, packing, transforms
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
    "bidirectional", "proj_size", "training",
)  # fmt: skip

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_empty_like = torch.empty_like
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


_MOST_PATIENCE = 256


def _eager(input: Any) -> bool:
    """Whether this is a plain call without gradient, of a plain tensor."""
    return not (
        type(input) is not Tensor
        or torch.is_grad_enabled()
        or _is_any_autocast_enabled()
        or _dispatch_modes()
        or _function_modes()
        or transforms.transformed()
        or _tracing() is not None
    )


class Small:
    """A layer's memory of its last small call."""

    __slots__ = ("_call", "_last", "_patience", "_seen", "_served")

    def __init__(self) -> None:
        # (the call, tensors like its results, generation of the packed weights). One object:
        # another thread may put another in its place at any time.
        self._call: tuple[Any, Any, int] | None = None
        self._last: Any = None
        # Calls alike before one is remembered: more each time that it then served none.
        self._patience, self._seen, self._served = 2, 0, True

    def run(
        self, layer: torch.nn.RNNBase, input: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, list[Tensor]] | None:
        """Output and final states, or None where this is not that call."""
        call = self._call
        if call is None:
            return None
        bound, templates, generation = call
        if generation != packing.generation or not _eager(input):
            return None
        h0 = c0 = None
        if states is not None:
            h0 = states[0]
            if type(h0) is not Tensor:
                return None
            if len(states) > 1:
                c0 = states[1]
                if type(c0) is not Tensor:
                    return None
        output, *finals = [_empty_like(t) for t in templates]
        h, c = finals if len(finals) == 2 else (finals[0], None)
        if bound.run(layer.__dict__, input, h0, c0, output, h, c, torch.get_num_threads()):
            self._served = True
            return output, finals
        return None

    def note(
        self,
        layer: torch.nn.RNNBase,
        cell: str,
        input: Any,
        weights: Sequence[Tensor],
    ) -> None:
        """Remember a call that has just run, if it is small and the one before was like it."""
        self._call = None
        if (
            _EXCHANGE_API is None
            or not _eager(input)
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
        generation = packing.generation
        attributes = {n: layer.__dict__[n] for n in _ATTRIBUTES if n in layer.__dict__}
        bound = _core.SmallCall(
            stack, _EXCHANGE_API, attributes, list(zip(names, weights, strict=True)), packed,
            memory, pointer, packed.data_ptr(), steps, batch, layer.batch_first, threads,
        )  # fmt: skip
        self._patience = 2 if self._served else min(2 * self._patience, _MOST_PATIENCE)
        self._seen, self._served = 0, False
        # (empty_like is the quickest way to a tensor that torch has.)
        templates = [input.new_empty_strided(*shape) for shape in shapes]
        self._call = bound, templates, generation
