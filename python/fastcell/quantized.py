"""Recurrent layers for inference whose weights are stored in 8 or 16 bits.

:func:`quantize` makes them of the layers of a trained model. int8: every row of a weight matrix has
a scale of its own, its largest magnitude over 127; what the matrices are multiplied with (each row
of the input and of the state) is quantized in the same way when it comes ("dynamic" quantization).
bfloat16: both are rounded to that. Sums, states and the cells' maths are float32 in either case.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Module

from . import cpu, operator_checks, operators
from .cells import CELL_OF_MODE, CELLS, cell_of
from .convert import survey
from .plan import NO_EXTRAS, Config
from .stack import Sequences, States, refuse_sizes, run_stack, two_states

__all__ = ["QuantizedCell", "QuantizedLayer", "quantize"]

_M = TypeVar("_M", bound=Module)

_PRODUCTS = {torch.int8: "int8", torch.bfloat16: "bfloat16"}
_MOST_FEATURES = 100_000
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def quantize(model: _M, dtype: torch.dtype = torch.int8, *, inplace: bool = False) -> _M | Module:
    """A copy of ``model`` for inference whose recurrent layers store their weights small.

        small = fastcell.quantize(model, torch.int8)        # or torch.bfloat16
        with torch.no_grad():
            output = small(input)

    Every RNN, LSTM, GRU and cell, torch.nn's or fastcell's, becomes a :class:`QuantizedLayer` or
    :class:`QuantizedCell`, without its hooks; all other modules are copied as they are. What cannot
    be quantized (subclasses, other devices) is left as it is and named in one ``UserWarning``.

    Args:
        model: any module, also a recurrent layer itself; it is not changed.
        dtype: of the stored weights: ``torch.int8`` (a quarter of float32's memory) or
            ``torch.bfloat16`` (half).
        inplace: replace the layers inside ``model`` instead of copying it. A layer that is
            ``model`` itself cannot be replaced inside of itself: the result is a new module.

    Returns:
        the copy.

    Raises:
        TypeError: ``model`` is no torch.nn.Module.
        ValueError: another dtype, or weights that are not finite, not floating-point or not on the
            CPU.
    """
    if dtype not in _PRODUCTS:
        raise ValueError(f"dtype must be torch.int8 or torch.bfloat16, got {dtype}")
    findings = survey(model)
    left = [f for f in findings if f.state == "left"]
    if left:
        lines = "".join([f"\n  {f}" for f in left])
        warnings.warn(f"fastcell.quantize left {len(left)} module(s) alone:{lines}", stacklevel=2)
    small = {id(f.module): _quantized(f.name, f.module, dtype) for f in findings if f not in left}
    if id(model) in small:
        return small[id(model)]
    if not inplace:
        # The layers are not copied, but replaced on the way: everything that refers to one of them
        # gets its quantized form.
        return copy.deepcopy(model, cast(Any, small))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in small:
                setattr(parent, name, small[id(child)])
    return model


def _quantized(name: str, module: Module, dtype: torch.dtype) -> Module:
    kind = QuantizedLayer if isinstance(module, torch.nn.RNNBase) else QuantizedCell
    try:
        return kind(cast(Any, module), dtype).train(module.training)
    except ValueError as error:
        raise ValueError(f"{name or 'the model itself'}: {error}") from None


def _scales(weight: Tensor) -> Tensor:
    """What 1 of an integer weight stands for, per row of the matrix."""
    scale = weight.abs().amax(1) / 127 if weight.shape[1] else weight.new_zeros(weight.shape[0])
    return torch.where(scale > 0, scale, 1.0)


class _Quantized(Module):
    """What layers and cells have in common: the weights as buffers, and how they are made."""

    dtype: torch.dtype

    @property
    def products(self) -> str:
        """What the kernels multiply, as in ``fastcell.plan.Config``."""
        return _PRODUCTS[self.dtype]

    def _store(self, dtype: torch.dtype, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        """Keep weights, of one layer and direction, under these names; matrices small."""
        self._groups: list[list[str]]
        stored, scales = [], []
        for name, given in zip(names, weights, strict=True):
            weight = given.detach()
            if not weight.is_cpu or not weight.is_floating_point():
                raise ValueError(
                    f"{name} must be floating-point on the CPU, got {weight.dtype} on "
                    f"{weight.device}"
                )
            weight = weight.float()
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{name} holds NaN or infinite values")
            if weight.dim() == 2 and dtype is torch.int8 and weight.shape[1] > _MOST_FEATURES:
                raise ValueError(
                    f"{name} has {weight.shape[1]} columns: sums of 32 bits hold the products of "
                    f"{_MOST_FEATURES} at most"
                )
            if weight.dim() == 2 and dtype is torch.int8:
                scale = _scales(weight)
                weight = (weight / scale[:, None]).round().to(torch.int8)
                scales.append(name.replace("weight", "scale"))
                self.register_buffer(scales[-1], scale)
            elif weight.dim() == 2:
                weight = weight.to(dtype)
            else:
                weight = weight.clone()
            stored.append(name)
            self.register_buffer(name, weight)
        self._groups.append(stored + scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # To other devices, but not to other dtypes, as model.half() has it.
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype is t.dtype else t.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def weights(self) -> list[Tensor]:
        """The stored tensors in the kernels' order.

        Per layer and direction: matrices and biases as in torch, then scales.
        """
        buffers = self._buffers
        return [cast(Tensor, buffers[name]) for group in self._groups for name in group]

    def _refuse_gradients(self, input: Tensor, states: States | None) -> None:
        if torch.is_grad_enabled() and any(
            [t.requires_grad for t in (input, *(() if states is None else states))]
        ):
            raise RuntimeError(
                "a quantized layer has no gradient: call it under torch.no_grad(), or with "
                "detached input and states"
            )

    def _run(
        self,
        config: Config,
        input: Tensor,
        states: States | None,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, States]:
        if input.dtype not in _INPUTS or not (input.is_cpu or input.is_meta):
            raise ValueError(
                f"a quantized layer takes float32, bfloat16 or float16 on the CPU, got "
                f"{input.dtype} on {input.device}"
            )
        self._refuse_gradients(input, states)
        weights = self.weights()
        if input.is_cpu:
            operator_checks.check_stored_small(self.products, weights)
        if not torch.compiler.is_compiling() and operators.is_plain(input):
            output, final, _ = cpu.forward(
                config, input, states, weights, batch_sizes, NO_EXTRAS, keep=False
            )
            return output, tuple(final)
        # The operator takes float32 alone.
        hx = [] if states is None else [s.float() for s in states]
        output, final, _ = torch.ops.fastcell.sequence_forward(
            input.float(), hx, weights, batch_sizes, *NO_EXTRAS, *config, False
        )
        return output.to(input.dtype), tuple([s.to(input.dtype) for s in final])


class QuantizedLayer(_Quantized):
    """An RNN, LSTM or GRU for inference, its weight matrices stored in int8 or bfloat16.

    Called as the layer that it was made of: all forms of input (batched, unbatched, packed), states
    and results are the same; input and results are float32, bfloat16 or float16. Dropout between
    layers is not applied, and there is no gradient.

    Args:
        layer: torch.nn's or fastcell's layer, on the CPU; its weights are copied.
        dtype: of the stored matrices, ``torch.int8`` or ``torch.bfloat16``.

    Attributes:
        weight_ih_l0, weight_hh_l0, ... (weight_hr_l0): the matrices, in ``dtype``.
        scale_ih_l0, ...: int8 only: what 1 stands for, per row of the matrix, float32.
        bias_ih_l0, ...: float32.

    Raises:
        ValueError: another dtype, or weights that are not finite, not floating-point or not on the
            CPU; in a call, input of another dtype or device.
        RuntimeError: in a call, a gradient is asked for; else as the layer.
    """

    def __init__(self, layer: torch.nn.RNNBase, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        if dtype not in _PRODUCTS:
            raise ValueError(f"dtype must be torch.int8 or torch.bfloat16, got {dtype}")
        self.mode = layer.mode
        self.input_size = layer.input_size
        self.hidden_size = layer.hidden_size
        self.proj_size = layer.proj_size
        self.num_layers = layer.num_layers
        self.bias = layer.bias
        self.batch_first = layer.batch_first
        self.dropout = 0.0
        self.bidirectional = layer.bidirectional
        self.recompute = False
        self.recurrent_dropout = 0.0
        self.dtype = dtype
        self._cell = cell_of(layer)
        if self._cell not in CELL_OF_MODE.values():
            raise ValueError(f"layers with cells of {self._cell} cannot be quantized")
        if getattr(layer, "skip", 1) > 1 or getattr(layer, "layer_norm", False):
            raise ValueError("layers with delays (skip) or layer_norm cannot be quantized")
        self._groups = []
        # By name: a parametrization computes its weights when asked.
        for names in layer._all_weights:
            self._store(dtype, names, [getattr(layer, name) for name in names])

    def forward(self, input: Sequences, hx: Any = None) -> tuple[Sequences, Any]:
        states: States | None = None
        if hx is not None:
            states = two_states(hx) if self._cell == "lstm" else (hx,)
        output, final = run_stack(self, self._cell, input, states, (), self._refuse, self._launch)
        return output, final if self._cell == "lstm" else final[0]

    def _refuse(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        refuse_sizes(self, input, states or (), batch_sizes)

    def _launch(
        self,
        cell: str,
        input: Tensor,
        states: States | None,
        batch_sizes: Tensor | None,
        steps: int,
        reset: Tensor | None,
    ) -> tuple[Tensor, States]:
        assert reset is None, "forward() takes none"
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        for state in states or ():
            if state.dtype != input.dtype or state.device != input.device:
                raise RuntimeError(
                    f"input is {input.dtype} on {input.device}, but a state is {state.dtype} on "
                    f"{state.device}"
                )
        return self._run(self.config(), input, states, batch_sizes)

    def config(self) -> Config:
        """The layer as the kernels are told of it."""
        return Config(
            self._cell, self.num_layers, self.bidirectional, self.bias, self.batch_first,
            self.products,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{self.mode}, {self.input_size}, {self.hidden_size}"
        for name, default in (
            ("proj_size", 0), ("num_layers", 1), ("bias", True), ("batch_first", False),
            ("bidirectional", False),
        ):  # fmt: skip
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, dtype={self.dtype}"


class QuantizedCell(_Quantized):
    """An RNNCell, LSTMCell or GRUCell for inference, its matrices stored in int8 or bfloat16.

    Called as the cell that it was made of. Arguments, attributes (without ``_l0``) and errors as
    for :class:`QuantizedLayer`.
    """

    def __init__(self, cell: torch.nn.RNNCellBase, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        if dtype not in _PRODUCTS:
            raise ValueError(f"dtype must be torch.int8 or torch.bfloat16, got {dtype}")
        if getattr(cell, "_cell", None):
            raise ValueError(f"cells of {cell._cell} cannot be quantized")
        if isinstance(cell, torch.nn.RNNCell) or hasattr(cell, "nonlinearity"):
            self._cell = f"rnn_{cell.nonlinearity}"
        else:
            gates = cell.weight_ih.shape[0] // max(cell.weight_hh.shape[1], 1)
            self._cell = "lstm" if gates == CELLS["lstm"].gates else "gru"
        self.input_size = cell.input_size
        self.hidden_size = cell.hidden_size
        self.dtype = dtype
        self._groups = []
        found = {n: getattr(cell, n) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        biases = [b for b in (found["bias_ih"], found["bias_hh"]) if b is not None]
        self.bias = bool(biases)
        if self.bias:  # torch lets one of the two be missing
            for name in ("bias_ih", "bias_hh"):
                found[name] = torch.zeros_like(biases[0]) if found[name] is None else found[name]
        else:
            del found["bias_ih"], found["bias_hh"]
        self._store(dtype, list(found), list(found.values()))

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        states: States | None = None
        if hx is not None:
            states = two_states(hx) if self._cell == "lstm" else (hx,)
        rank = input.dim()
        if rank not in (1, 2) or any(s.dim() != rank for s in states or ()):
            ranks = [rank, *(s.dim() for s in states or ())]
            raise ValueError(f"input and states must all have 1 or 2 dimensions, got {ranks}")
        batch = (1,) if rank == 1 else tuple(input.shape[:1])
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"Expected input with {self.input_size} features, "
                               f"got {input.shape[-1]}")  # fmt: skip
        for state in states or ():
            if (*batch, *state.shape[-1:]) != (*batch, self.hidden_size) or (
                rank == 2 and state.shape[:1] != input.shape[:1]
            ):
                raise RuntimeError(
                    f"Expected states of size {[*input.shape[:-1], self.hidden_size]}, got "
                    f"{list(state.shape)}"
                )
            if state.dtype != input.dtype:
                raise RuntimeError(f"input is {input.dtype}, but a state is {state.dtype}")

        def step(t: Tensor) -> Tensor:
            return t.unsqueeze(0) if rank == 2 else t[None, None]

        given = None if states is None else tuple([step(s) for s in states])
        _, final = self._run(self.config(), step(input), given, None)
        result = tuple([s.reshape(*input.shape[:-1], self.hidden_size) for s in final])
        return result if self._cell == "lstm" else result[0]

    def config(self) -> Config:
        """The cell as the kernels are told of it."""
        return Config(self._cell, 1, False, self.bias, False, self.products)

    def extra_repr(self) -> str:
        return f"{self._cell}, {self.input_size}, {self.hidden_size}, dtype={self.dtype}"
