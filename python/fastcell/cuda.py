"""From tensors to the CUDA kernels and back: allocation, whole-sequence products, pointers.

A layer is three things: the input terms of all steps as one matrix product, the steps themselves
(``_core.CudaPlan``: one launch each, or one for all of them), and, backwards, the gradients of
inputs and weights as matrix products again. The functions are those of ``cpu.py``.

Nothing here waits for the device, so that a call can be captured in a graph: but for the lengths of
a PackedSequence, which live on the CPU.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _core
from .autocast import runs_without_autocast
from .cells import options_of, spec_of
from .cuda_layer import Layer, Reserve
from .cuda_time import Time
from .cuda_weights import biases_of, by_direction, by_unit, pack, parameters_of, round_tf32
from .plan import Config, Extras

__all__ = [
    "DTYPES", "architectures", "backward", "choose_engine", "forward", "new_reserve", "products_of",
]  # fmt: skip

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = True
ENGINES = ("step", "grid", "cluster")

# The compiled half. Tests put the emulated one in its place.
device_code: Any = _core

# Looks at a flag (each about half a microsecond) before a kernel gives up waiting for the others.
_PATIENCE = 1 << 26
_choice = threading.local()


def _wanted() -> str:
    return getattr(_choice, "engine", "")


@contextmanager
def choose_engine(engine: str | None) -> Iterator[None]:
    """Within this context, run layers on CUDA devices with that engine; None: chosen by shape.

    It holds for the calls of this thread; a backward pass chooses when it runs.

    Args:
        engine: ``"step"`` (one launch per step), ``"grid"`` (one launch for all steps, the hidden
            units over the whole device) or ``"cluster"`` (the same within thread-block clusters).

    Raises:
        ValueError: another name; in a call, a layer that the engine cannot hold.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)} or None, got {engine!r}")
    before, _choice.engine = _wanted(), engine or ""
    try:
        yield
    finally:
        _choice.engine = before


def architectures() -> list[str]:
    """Of GPUs, that this build has kernels for; empty where it was made without CUDA."""
    return list(device_code.cuda_architectures())


@functools.cache
def built() -> bool:
    """Whether this build has CUDA kernels."""
    return bool(_core.cuda_architectures())


def tf32_allowed() -> bool:
    """Whether torch may multiply float32 matrices in TF32."""
    # The newer of torch's two switches (2.9) follows the older one; asking that after the newer one
    # was set raises an error.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return bool(torch.backends.cuda.matmul.allow_tf32) if newer is None else newer == "tf32"


def products_of(dtype: torch.dtype, index: int) -> str:
    """What the products of a layer of this dtype multiply on a device.

    TF32 only where torch allows it and the device has it.
    """
    if dtype is torch.float32 and tf32_allowed() and _capability(index) >= 80:
        return "tf32"
    return str(dtype).removeprefix("torch.")


def _capability(index: int) -> int:
    return int(device_code.cuda_limits(index)["capability"])


def _layer_of(
    config: Config, dtype: torch.dtype, weights: Sequence[Tensor], steps: int, batch: int, rows: Any
) -> Layer:
    gates, apart, states, saved, parameters, recurrent, second = device_code.cuda_cell(
        spec_of(config.cell).name
    )
    own = parameters if recurrent else 0
    directions = 2 if config.bidirectional else 1
    each = len(weights) // (config.num_layers * directions)
    projected = each > 2 + 2 * config.bias + (own > 0)
    return Layer(
        config.cell, gates, apart, states, saved, parameters, recurrent, second, config.num_layers,
        directions, config.bias, int(weights[0].shape[0]) // gates, int(weights[1].shape[1]),
        projected, steps, batch, rows, dtype,
    )  # fmt: skip


def _layer_for(
    config: Config, x: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> Layer:
    if x.dim() == 3:
        steps, batch = x.shape[:2]
        if config.batch_first:
            steps, batch = batch, steps
        rows = steps * batch
    else:
        assert batch_sizes is not None
        steps, batch, rows = batch_sizes.shape[0], int(batch_sizes[0]), x.shape[0]
    return _layer_of(config, x.dtype, weights, steps, batch, rows)


def new_reserve(config: Config, input: Tensor, weights: Sequence[Tensor], rows: Any) -> Tensor:
    """Memory for what ``forward`` keeps of ``rows`` rows; sizes may be symbols."""
    layer = _layer_of(config, input.dtype, weights, 0, 0, rows)
    return torch.empty(Reserve(layer, None).bytes, dtype=torch.uint8, device=input.device)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with sums and result in ``dtype``, the inputs' own or float32."""
    if a.dtype is dtype:
        return a @ b
    if a.is_cuda:
        try:
            return torch.mm(a, b, out_dtype=dtype)
        except TypeError:  # torch before 2.8
            return (a @ b).to(dtype)
    return a.to(dtype) @ b.to(dtype)


def explain(
    config: Config,
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    steps: int,
    batch: int,
    device: torch.device,
    gradients: bool,
) -> tuple[str, str]:
    """(architecture of the device, how its blocks share a layer's steps, in words)."""
    index = device.index or 0
    layer = _layer_of(config, dtype, weights, steps, batch, steps * batch)
    architecture = f"sm_{_capability(index)}"
    texts = [
        _in_words(_plan(layer, index, backward)) for backward in (False, True)[: 1 + gradients]
    ]
    if gradients and texts[0] != texts[1]:
        return architecture, f"forward {texts[0]}; backward {texts[1]}"
    return architecture, texts[0]


def _in_words(plan: Any) -> str:
    share = f"blocks of {plan.rows} samples and {plan.units} units"
    if plan.place == "step":
        return f"one launch per step, {share}"
    where = "the device" if plan.place == "grid" else "each cluster"
    return f"one launch, {plan.unit_blocks} {share} over {where}, weights resident"


def _plan(layer: Layer, index: int, backward: bool) -> Any:
    return device_code.CudaPlan(
        index, spec_of(layer.cell).name, products_of(layer.dtype, index), backward, layer.steps,
        layer.batch, layer.hidden, layer.output, layer.directions, layer.two_products, _wanted(),
    )  # fmt: skip


# What kernels report: set where one gave up waiting. In memory that the host reads without waiting.
_reports: dict[torch.device, Tensor] = {}
_lock = threading.Lock()


def _report(device: torch.device) -> Tensor:
    with _lock:
        found = _reports.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = _reports[device] = torch.zeros(
                    1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
                )
            return found
    if int(found[0]):
        found.zero_()
        raise RuntimeError(
            f"an earlier call on {device} gave up: its thread blocks waited for each other in "
            "vain, and its results are NaN. fastcell.cuda.choose_engine('step') needs no such "
            "waiting"
        )
    return found


class _Sweep:
    """The time loop of one layer: plan, workspace, launch."""

    def __init__(
        self, layer: Layer, device: torch.device, weights: Sequence[Sequence[Tensor]],
        backward: bool,
    ) -> None:  # fmt: skip
        self.layer, self.device = layer, device
        self.products = products_of(layer.dtype, device.index or 0)
        self.plan = _plan(layer, device.index or 0, backward)
        plan, count = self.plan, layer.directions
        columns, rows = plan.unit_blocks * plan.units, plan.tiles * plan.rows
        self.weights: list[Tensor | None] = []
        self.projections: list[Tensor] = []
        for w_ih_hh in weights:
            if layer.recurrent:
                first, gates = w_ih_hh[1][: layer.first_rows], layer.gates - layer.second
                w_hh = first.view(gates, layer.hidden, layer.output)
                main = by_unit(first, gates) if backward else w_hh
                self.weights.append(pack(main, plan.width, columns, self.products))
            else:
                self.weights.append(None)
            if layer.two_products:
                w_hr = (
                    w_ih_hh[2 + 2 * layer.bias]
                    if layer.projected
                    else w_ih_hh[1][layer.first_rows :]
                )
                w_hr = w_hr.t() if backward else w_hr
                packed = pack(w_hr[None], plan.projected_width, columns, self.products)
                self.projections.append(packed)
        new: dict[str, Any] = {"device": device, "dtype": layer.dtype}
        self.exchange = torch.zeros((count, 2, rows, plan.stride), **new)
        self.exchange_projected = (
            torch.zeros((count, rows, plan.projected_stride), **new)
            if layer.two_products
            else None
        )
        self.flags = torch.zeros(
            count * plan.tiles * plan.unit_blocks, dtype=torch.int32, device=device
        )

    def run(
        self, time: Time, extras: Extras, index: int, sides: list[dict[str, Tensor | None]],
        y: Tensor, d_y: Tensor | None, keep: bool, finish: bool,
    ) -> None:  # fmt: skip
        """``sides``: per direction the tensors of csrc/cuda/sweep.h, Side, by name."""

        def pointer(t: Tensor | None) -> int:
            return 0 if t is None else t.data_ptr()

        pointers = []
        for d, side in enumerate(sides):
            side = side | {
                "weights": self.weights[d],
                "projection": self.projections[d] if self.projections else None,
                "exchange": self.exchange[d],
                "exchange_projected": None
                if self.exchange_projected is None
                else self.exchange_projected[d],
            }
            pointers.append([pointer(side.get(name)) for name in _SIDE])
        stream = 0
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
        self.plan.run(
            stream, pointers, self.flags.data_ptr(), pointer(time.offsets), pointer(time.lengths),
            pointer(extras.reset), pointer(extras.seed), tuple(options_of(self.layer.cell)),
            index * self.layer.directions, self.layer.gate_stride, y.data_ptr(), pointer(d_y), keep,
            finish, _report(self.device).data_ptr(), _PATIENCE, 0, self.layer.steps,
        )  # fmt: skip


_SIDE = (
    "weights", "projection", "gates", "parameters", "factors", "apart_bias", "carry_h", "carry_c",
    "exchange", "exchange_projected", "cells", "first_h", "first_c", "cell_output",
    "d_gates", "d_output",
)  # fmt: skip


def _rows_of(x: Tensor, config: Config, packed: bool) -> Tensor:
    """(rows, features), time-major; a copy only where rows are not evenly spaced."""
    if x.is_neg():
        x = x.resolve_neg()
    if packed:
        return x
    return (x.transpose(0, 1) if config.batch_first else x).reshape(-1, x.shape[-1])


@runs_without_autocast
def forward(
    config: Config,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    keep: bool,
    output: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Runs the stack: (output, final states, what the backward call needs or None).

    ``output``: where to write it. The arguments are taken as checked.
    """
    layer = _layer_for(config, x, weights, batch_sizes)
    extras = Extras(*[None if t is None else _dense(t) for t in extras])
    device = x.device
    weights = [_dense(w) for w in weights]
    packed = x.dim() == 2
    time = Time(layer, batch_sizes, device, packed)
    real, directions = layer.real, layer.directions
    count, batch = layer.layers * directions, layer.batch
    memory = reserve = None
    if keep:
        memory = new_reserve(config, x, weights, layer.rows)
        reserve = Reserve(layer, memory)
    sizes = (layer.output, layer.hidden)[: layer.states]
    if hx is None:
        carry = [torch.zeros((count, batch, n), dtype=real, device=device) for n in sizes]
    else:
        carry = [h.to(real, copy=True, memory_format=torch.contiguous_format) for h in hx]

    rows = _rows_of(x, config, packed)
    if layer.rows:
        for index in range(layer.layers):
            if index and extras.dropout is not None:
                rows = rows * extras.dropout[index - 1].reshape(rows.shape)
            own = by_direction(layer, index, weights)
            sweep = _Sweep(layer, device, own, backward=False)
            if reserve is None:
                y = rows.new_empty((layer.rows, directions * layer.output))
            else:
                y = reserve.outputs[index]
            sides: list[dict[str, Tensor | None]] = []
            for d, w in enumerate(own):
                at = index * directions + d
                bias, apart_bias = biases_of(layer, w)
                if reserve is None:
                    gates = rows.new_empty((layer.rows, layer.gate_stride), dtype=real)
                else:
                    gates = reserve.gates[at]
                _input_terms(rows, w[0], bias, gates[:, : w[0].shape[0]])
                h = carry[0][at]
                factors = None if extras.recurrent is None else extras.recurrent[at]
                operand = h if factors is None else h * factors
                if extras.reset is not None:
                    operand = operand.masked_fill(time.first_reset(layer, extras.reset, d == 1), 0)
                operand = round_tf32(operand) if sweep.products == "tf32" else operand
                sweep.exchange[d, 0, :batch, : layer.output] = operand
                sides.append(
                    {
                        "gates": gates,
                        "parameters": parameters_of(layer, w),
                        "factors": factors,
                        "apart_bias": apart_bias,
                        "carry_h": h,
                        "carry_c": carry[1][at] if layer.states > 1 else None,
                        "cells": None if reserve is None else reserve.cells[at],
                        "cell_output": None if reserve is None else reserve.cell_output[at],
                    }
                )
            sweep.run(time, extras, index, sides, y, None, keep, False)
            rows = y

    if layer.rows == 0:
        rows = rows.new_empty((0, directions * layer.output))
    result = _result(layer, config, rows, packed, keep, output)
    return result, [state.to(x.dtype) for state in carry], memory


def _dense(t: Tensor) -> Tensor:
    return (t.resolve_neg() if t.is_neg() else t).contiguous()


def _input_terms(rows: Tensor, w_ih: Tensor, bias: Tensor | None, to: Tensor) -> None:
    if rows.dtype is to.dtype:
        if bias is None:
            torch.mm(rows, w_ih.t(), out=to)
        else:
            torch.addmm(bias, rows, w_ih.t(), out=to)
        return
    product = _product(rows, w_ih.t(), to.dtype)
    if bias is None:
        to.copy_(product)
    else:
        torch.add(product, bias, out=to)


def _result(
    layer: Layer, config: Config, rows: Tensor, packed: bool, copy: bool, output: Tensor | None
) -> Tensor:
    """The output in the caller's layout, his own to change."""
    if output is not None:
        given = output.transpose(0, 1) if config.batch_first and not packed else output
        given.copy_(rows.view(given.shape))
        return output
    if copy:
        rows = rows.clone()
    if packed:
        return rows
    # Time-major memory, as torch.nn's; no view, which would refuse in-place changes.
    steps, batch, width = layer.steps, layer.batch, rows.shape[-1]
    sizes, strides = (steps, batch, width), (batch * width, width, 1)
    if config.batch_first:
        sizes, strides = (batch, steps, width), (width, batch * width, 1)
    result = torch.empty(0, dtype=rows.dtype, device=rows.device)
    return result.set_(rows.untyped_storage(), 0, sizes, strides)


@runs_without_autocast  # Autograd calls it in the autocast of whoever called backward().
def backward(
    config: Config,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    reserve: Tensor,
    needs: Sequence[bool],
    d_x: Tensor | None = None,
    add_to: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Gradients of [input, *hx, *weights]; None where ``needs`` says so.

    ``reserve`` is what ``forward`` kept for the other arguments; it serves once more after that.
    ``d_x``: where to write the input's gradient; ``add_to``: gradients of the weights, to be added
    to.
    """
    layer = _layer_for(config, x, weights, batch_sizes)
    extras = Extras(*[None if t is None else _dense(t) for t in extras])
    device, real, directions = x.device, layer.real, layer.directions
    packed = x.dim() == 2
    hx = () if hx is None else [_dense(h) for h in hx]
    weights = [_dense(w) for w in weights]
    wanted = iter(needs)
    need_x = next(wanted)
    need_hx = [next(wanted) for _ in hx]
    need_weights = [next(wanted) for _ in weights]
    d_weights: list[Tensor | None] = [None] * len(weights)
    count, batch = layer.layers * directions, layer.batch
    sizes = (layer.output, layer.hidden)[: layer.states]
    carry = [
        torch.zeros((count, batch, n), dtype=real, device=device)
        if g is None
        else g.to(real, copy=True, memory_format=torch.contiguous_format)
        for n, g in zip(sizes, grad_states, strict=False)
    ]
    d_rows: Tensor | None = None
    if layer.rows == 0:
        d_weights = [
            torch.zeros_like(w) if n else None for w, n in zip(weights, need_weights, strict=True)
        ]
    else:
        kept = Reserve(layer, reserve)
        time = Time(layer, batch_sizes, device, packed)
        d_rows = None if grad_output is None else _rows_of(grad_output, config, packed).contiguous()
        input_rows = time.existing(layer, _rows_of(x, config, packed))
        for index in reversed(range(layer.layers)):
            below = input_rows if index == 0 else kept.outputs[index - 1]
            if index and extras.dropout is not None:
                below = below * extras.dropout[index - 1].reshape(below.shape)
            d_rows = _layer_backward(
                layer, index, time, below, hx, weights, kept, carry, d_rows,
                need_weights, d_weights, index > 0 or need_x, extras,
            )  # fmt: skip
            if index and extras.dropout is not None and d_rows is not None:
                d_rows = d_rows * extras.dropout[index - 1].reshape(d_rows.shape)

    grads: list[Tensor | None] = [None]
    if need_x:
        grads[0] = _input_gradient(layer, config, x, d_rows, packed, d_x)
    grads += [g.to(x.dtype) if n else None for g, n in zip(carry, need_hx, strict=False)]
    if add_to is not None:
        for into, found in zip(add_to, d_weights, strict=True):
            if into is not None and found is not None:
                into.add_(found)
        d_weights = list(add_to)
    return grads + d_weights


def _layer_backward(
    layer: Layer,
    index: int,
    time: Time,
    below: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Reserve,
    carry: list[Tensor],
    d_y: Tensor | None,
    need_weights: Sequence[bool],
    d_weights: list[Tensor | None],
    need_input: bool,
    extras: Extras,
) -> Tensor | None:
    """One layer: fills in its part of ``d_weights``, and returns its input's gradient."""
    device, directions, gates = below.device, layer.directions, layer.gates
    hidden, output, each = layer.hidden, layer.output, layer.weights_each
    own = by_direction(layer, index, weights)
    sweep = _Sweep(layer, device, own, backward=True)
    sides: list[dict[str, Tensor | None]] = []
    for d in range(directions):
        at = index * directions + d
        first = [h[at] for h in hx]
        sides.append(
            {
                "gates": kept.gates[at],
                "parameters": parameters_of(layer, own[d]),
                "factors": None if extras.recurrent is None else extras.recurrent[at],
                "carry_h": carry[0][at],
                "carry_c": carry[1][at] if layer.states > 1 else None,
                "cells": kept.cells[at],
                "first_h": first[0] if first else None,
                "first_c": first[1].to(layer.real) if layer.states > 1 and first else None,
                "cell_output": kept.cell_output[at],
                "d_gates": below.new_empty(
                    (layer.rows, (gates + layer.apart + layer.parameters) * hidden)
                ),
                "d_output": below.new_empty((layer.rows, output)) if layer.projected else None,
            }
        )
    y = kept.outputs[index]
    assert d_y is None or d_y.dtype is layer.dtype  # kernels take its address
    sweep.run(time, extras, index, sides, y, d_y, True, True)

    d_input: Tensor | None = None
    for d, side in enumerate(sides):
        at = index * directions + d
        w, need = own[d], need_weights[at * each : (at + 1) * each]
        d_gates, d_output = side["d_gates"], side["d_output"]
        assert d_gates is not None
        d_in = d_gates[:, : gates * hidden]
        together = (gates - layer.apart) * hidden
        columns = (gates + layer.apart) * hidden
        found: list[Tensor | None] = [None] * each
        if need_input:
            d_input = d_in @ w[0] if d_input is None else torch.addmm(d_input, d_in, w[0])
        if need[0]:
            found[0] = d_in.t() @ below
        if need[1] and layer.recurrent:
            h = y[:, d * output : (d + 1) * output]
            first_h = hx[0][at] if hx else h.new_zeros((layer.batch, output))
            before = time.previous(layer, h, first_h, back=d == 1)
            if extras.reset is not None:
                before = before.masked_fill(extras.reset.reshape(-1, 1), 0)
            if extras.recurrent is not None:
                before = before * time.per_row(layer, extras.recurrent[at])
            if layer.apart:
                found[1] = torch.cat(
                    (
                        d_gates[:, :together].t() @ before,
                        d_gates[:, gates * hidden : columns].t() @ before,
                    )
                )
            elif layer.second:
                # What the second product took was saved behind the gates.
                took = kept.gates[at][:, gates * hidden : (gates + 1) * hidden]
                took = time.existing(layer, took).to(below.dtype)
                found[1] = torch.cat(
                    (
                        d_in[:, : layer.first_rows].t() @ before,
                        d_in[:, layer.first_rows :].t() @ took,
                    )
                )
            else:
                found[1] = d_in.t() @ before
        if (layer.bias and (need[2] or need[3])) or (
            layer.parameters and need[layer.parameters_at]
        ):
            total = d_gates.sum(0)
            if layer.bias:
                found[2] = total[: gates * hidden].clone()
                found[3] = torch.cat((total[:together], total[gates * hidden : columns]))
            if layer.parameters:
                found[layer.parameters_at] = total[columns:].view(layer.parameters, hidden)
        projection = 2 + 2 * layer.bias
        if layer.projected and need[projection]:
            cell_output = kept.cell_output[at]
            assert d_output is not None
            assert cell_output is not None
            found[projection] = d_output.t() @ time.existing(layer, cell_output)
        for k in range(each):
            if need[k]:
                d_weights[at * each + k] = found[k]
    return d_input


def _input_gradient(
    layer: Layer, config: Config, x: Tensor, d_rows: Tensor | None, packed: bool,
    into: Tensor | None,
) -> Tensor:  # fmt: skip
    if d_rows is None:
        grad = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    elif packed:
        grad = d_rows
    else:
        grad = d_rows.view(layer.steps, layer.batch, -1)
        grad = grad.transpose(0, 1) if config.batch_first else grad
    return grad if into is None else into.copy_(grad)
