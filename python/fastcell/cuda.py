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
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from . import _core
from . import cuda_wavefront as wavefront
from .autocast import runs_without_autocast
from .cells import options_of, spec_of
from .cuda_layer import Layer, Reserve
from .cuda_time import Time
from .cuda_wavefront import Wavefront, choose_wavefront
from .cuda_weights import biases_of, by_direction, by_unit, pack, parameters_of, round_tf32
from .plan import Config, Extras

__all__ = [
    "DTYPES", "architectures", "backward", "choose_engine", "choose_wavefront", "forward",
    "new_reserve", "products_of", "with_cells",
]  # fmt: skip

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ENGINES = ("step", "grid", "cluster")

# The compiled half. Tests put the emulated one in its place.
device_code: Any = _core

# Looks at a flag (each about half a microsecond) before a kernel gives up waiting for the others.
_PATIENCE = 1 << 26
_wanted = ""


@contextmanager
def choose_engine(engine: str | None) -> Iterator[None]:
    """Within this context, run layers on CUDA devices with that engine; None: chosen by shape.

    It holds for the whole process; a backward pass, which runs in a thread of torch's, chooses when
    it runs.

    Args:
        engine: ``"step"`` (one launch per step), ``"grid"`` (one launch for all steps, the hidden
            units over the whole device) or ``"cluster"`` (the same within thread-block clusters).

    Raises:
        ValueError: another name; in a call, a layer that the engine cannot hold.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)} or None, got {engine!r}")
    global _wanted
    before, _wanted = _wanted, engine or ""
    try:
        yield
    finally:
        _wanted = before


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


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
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
    packed: bool,
) -> tuple[str, str]:
    """(architecture of the device, how its blocks share a layer's steps, in words)."""
    index = device.index or 0
    layer = _layer_of(config, dtype, weights, steps, batch, steps * batch)
    architecture = f"sm_{_capability(index)}"
    texts = [
        _in_words(layer, _schedule(layer, index, backward, packed))
        for backward in (False, True)[: 1 + gradients]
    ]
    if gradients and texts[0] != texts[1]:
        return architecture, f"forward {texts[0]}; backward {texts[1]}"
    return architecture, texts[0]


def _in_words(layer: Layer, schedule: Any) -> str:
    if isinstance(schedule, Wavefront):
        alone = _in_words(layer, schedule.plan)
        return (
            f"{alone}; {schedule.at_once} of {layer.layers} layers at a time, each "
            f"{schedule.chunk} steps behind the one before"
        )
    plan = schedule
    share = f"blocks of {plan.rows} samples and {plan.units} units"
    if plan.place == "step":
        return f"one launch per step, {share}"
    where = "the device" if plan.place == "grid" else "each cluster"
    return f"one launch, {plan.unit_blocks} {share} over {where}, weights resident"


def _plan(layer: Layer, index: int, backward: bool, wanted: str) -> Any:
    return device_code.CudaPlan(
        index, spec_of(layer.cell).name, products_of(layer.dtype, index), backward, layer.steps,
        layer.batch, layer.hidden, layer.output, layer.directions, layer.two_products, wanted,
    )  # fmt: skip


def _schedule(layer: Layer, index: int, backward: bool, packed: bool) -> Any:
    """How a stack runs: the plan of its layers, one after another, or a Wavefront."""
    plan = _plan(layer, index, backward, _wanted)
    if layer.layers == 1 or layer.directions == 2 or packed:
        return plan
    beside = _plans_beside(layer, index, backward)
    return wavefront.choose(plan, beside, layer.layers, layer.steps) or plan


def _plans_beside(layer: Layer, index: int, backward: bool) -> Iterator[Any]:
    for place in wavefront.PLACES:
        if _wanted in ("", place):
            with suppress(ValueError):  # no such kernel, or it does not fit
                yield _plan(layer, index, backward, place)


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
        self, layer: Layer, device: torch.device, weights: Sequence[Sequence[Tensor]], plan: Any,
        backward: bool,
    ) -> None:  # fmt: skip
        self.layer, self.device, self.plan = layer, device, plan
        self.products = products_of(layer.dtype, device.index or 0)
        count = layer.directions
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
            torch.zeros((count, rows, plan.projected_stride), **new) if layer.two_products else None
        )
        self.flags = torch.zeros(
            count * plan.tiles * plan.unit_blocks, dtype=torch.int32, device=device
        )

    def run(
        self, time: Time, extras: Extras, index: int, sides: list[dict[str, Tensor | None]],
        y: Tensor, d_y: Tensor | None, keep: bool, finish: bool, begin: int, end: int,
        first_row: int,
    ) -> None:  # fmt: skip
        """Some steps, as the pass counts them.

        ``sides``: per direction the tensors of csrc/cuda/sweep.h, Side, by name, of which ``gates``
        begins with row ``first_row``.
        """

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
            before = first_row * self.layer.gate_stride * self.layer.real.itemsize
            pointers[-1][_SIDE.index("gates")] -= before
        self.plan.run(
            stream_of(self.device), pointers, self.flags.data_ptr(), pointer(time.offsets),
            pointer(time.lengths), pointer(extras.reset), pointer(extras.seed),
            tuple(options_of(self.layer.cell)),
            index * self.layer.directions, self.layer.gate_stride, y.data_ptr(), pointer(d_y), keep,
            finish, _report(self.device).data_ptr(), _PATIENCE, begin, end,
        )  # fmt: skip


_SIDE = (
    "weights", "projection", "gates", "parameters", "factors", "apart_bias", "carry_h", "carry_c",
    "exchange", "exchange_projected", "cells", "first_h", "first_c", "cell_output",
    "d_gates", "d_output", "d_cells",
)  # fmt: skip


def stream_of(device: torch.device) -> int:
    """The address of torch's current stream on a device; 0 where the engine is emulated."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


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
    extras = _readable(layer, extras)
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
        schedule = _schedule(layer, device.index or 0, False, packed)

        def layer_pass(index: int) -> _Forward:
            return _Forward(
                layer, index, time, extras, rows, weights, carry, reserve, schedule
            )  # fmt: skip

        if isinstance(schedule, Wavefront):
            passes = [layer_pass(index) for index in range(layer.layers)]
            inputs = [rows, *[one.y for one in passes]]
            wavefront.run(
                device, schedule, layer.layers, layer.steps,
                lambda index, begin, end: passes[index].run(inputs[index], begin, end),
            )  # fmt: skip
            rows = inputs[-1]
        else:
            for index in range(layer.layers):
                one = layer_pass(index)
                one.run(rows, 0, layer.steps)
                rows = one.y
                del one  # its memory may serve the next

    if layer.rows == 0:
        rows = rows.new_empty((0, directions * layer.output))
    result = _result(layer, config, rows, packed, keep, output)
    return result, [state.to(x.dtype) for state in carry], memory


class _Forward:
    """One layer's forward pass; all that it needs but its input is there once it is made."""

    def __init__(
        self, layer: Layer, index: int, time: Time, extras: Extras, like: Tensor,
        weights: Sequence[Tensor], carry: list[Tensor], reserve: Reserve | None, schedule: Any,
    ) -> None:  # fmt: skip
        self.layer, self.index, self.time, self.extras = layer, index, time, extras
        self.keep = reserve is not None
        self.own = by_direction(layer, index, weights)
        plan, most = schedule, layer.rows
        if isinstance(schedule, Wavefront):
            plan, most = schedule.plan, schedule.chunk * layer.batch
        directions, batch = layer.directions, layer.batch
        self.sweep = sweep = _Sweep(layer, like.device, self.own, plan, backward=False)
        if reserve is None:
            self.y = like.new_empty((layer.rows, directions * layer.output))
        else:
            self.y = reserve.outputs[index]
        self.sides: list[dict[str, Tensor | None]] = []
        self.biases = []
        for d, w in enumerate(self.own):
            at = index * directions + d
            bias, apart_bias = biases_of(layer, w)
            self.biases.append(bias)
            if reserve is None:
                gates = like.new_empty((most, layer.gate_stride), dtype=layer.real)
            else:
                gates = reserve.gates[at]
            h = carry[0][at]
            factors = None if extras.recurrent is None else extras.recurrent[at]
            operand = h if factors is None else h * factors
            if extras.reset is not None:
                operand = operand.masked_fill(time.first_reset(layer, extras.reset, d == 1), 0)
            operand = round_tf32(operand) if sweep.products == "tf32" else operand
            sweep.exchange[d, 0, :batch, : layer.output] = operand
            self.sides.append(
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

    def run(self, below: Tensor, begin: int, end: int) -> None:
        """Some steps; ``below``: the output of the layer below, or the input."""
        layer, index = self.layer, self.index
        part = _rows_of_steps(layer, begin, end, False)
        rows = below[part]
        if index and self.extras.dropout is not None:
            rows = _times(rows, self.extras.dropout[index - 1].reshape(below.shape)[part])
        first_row = 0 if self.keep else part.start
        for side, w, bias in zip(self.sides, self.own, self.biases, strict=True):
            gates = side["gates"]
            assert gates is not None
            to = gates[part.start - first_row : part.stop - first_row, : w[0].shape[0]]
            _input_terms(rows, w[0], bias, to)
        self.sweep.run(
            self.time, self.extras, index, self.sides, self.y, None, self.keep, False, begin, end,
            first_row,
        )  # fmt: skip


def _rows_of_steps(layer: Layer, begin: int, end: int, back: bool) -> slice:
    """Which rows a pass runs in some steps, counted as it processes them; ``back``: backwards."""
    if end - begin == layer.steps:
        return slice(0, layer.rows)
    if back:
        begin, end = layer.steps - end, layer.steps - begin
    return slice(begin * layer.batch, end * layer.batch)


def _readable(layer: Layer, extras: Extras) -> Extras:
    """Dense ones, factors in the dtype of sums."""
    found = [None if t is None else _dense(t) for t in extras]
    factors = [None if t is None else t.to(layer.real) for t in found[:2]]
    return Extras(*factors, *found[2:])


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """Rounded once, to the dtype of ``rows``."""
    return torch.mul(rows, factors, out=torch.empty_like(rows))


def _dense(t: Tensor) -> Tensor:
    return (t.resolve_neg() if t.is_neg() else t).contiguous()


def _input_terms(rows: Tensor, w_ih: Tensor, bias: Tensor | None, to: Tensor) -> None:
    if rows.dtype is to.dtype:
        if bias is None:
            torch.mm(rows, w_ih.t(), out=to)
        else:
            torch.addmm(bias, rows, w_ih.t(), out=to)
        return
    terms = product(rows, w_ih.t(), to.dtype)
    if bias is None:
        to.copy_(terms)
    else:
        torch.add(terms, bias, out=to)


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
    d_cells: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of [input, *hx, *weights]; None where ``needs`` says so.

    ``reserve`` is what ``forward`` kept for the other arguments; it serves once more after that.
    ``d_x``: where to write the input's gradient; ``add_to``: gradients of the weights, to be added
    to; ``d_cells``: that of ``cells``.
    """
    layer = _layer_for(config, x, weights, batch_sizes)
    extras = _readable(layer, extras)
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
        cell_rows = None
        if d_cells is not None:
            cell_rows = _rows_of(d_cells, config, packed).to(real).contiguous()
        input_rows = time.existing(layer, _rows_of(x, config, packed))
        schedule = _schedule(layer, device.index or 0, True, packed)

        def layer_pass(index: int) -> _Backward:
            return _Backward(
                layer, index, time, extras, weights, hx, kept, carry, index > 0 or need_x,
                x.shape[-1], schedule, cell_rows,
            )  # fmt: skip

        def finish(one: _Backward) -> None:
            below = input_rows if one.index == 0 else kept.outputs[one.index - 1]
            one.weight_gradients(below, hx, need_weights, d_weights)

        if isinstance(schedule, Wavefront):
            passes = [layer_pass(index) for index in reversed(range(layer.layers))]
            given = [d_rows, *[one.d_input for one in passes]]
            wavefront.run(
                device, schedule, layer.layers, layer.steps,
                lambda at, begin, end: passes[at].run(given[at], begin, end),
            )  # fmt: skip
            d_rows = given[-1]
            for one in passes:
                finish(one)
        else:
            for index in reversed(range(layer.layers)):
                one = layer_pass(index)
                one.run(d_rows, 0, layer.steps)
                finish(one)
                d_rows = one.d_input
                del one

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


class _Backward:
    """One layer's backward pass; all that it needs but d_y is there once it is made."""

    def __init__(
        self, layer: Layer, index: int, time: Time, extras: Extras, weights: Sequence[Tensor],
        hx: Sequence[Tensor], kept: Reserve, carry: list[Tensor], need_input: bool, features: int,
        schedule: Any, d_cells: Tensor | None,
    ) -> None:  # fmt: skip
        self.layer, self.index, self.time, self.extras = layer, index, time, extras
        self.kept, self.y = kept, kept.outputs[index]
        self.own = by_direction(layer, index, weights)
        new = self.y.new_empty
        gates, hidden, output = layer.gates, layer.hidden, layer.output
        plan = schedule.plan if isinstance(schedule, Wavefront) else schedule
        self.sweep = _Sweep(layer, self.y.device, self.own, plan, backward=True)
        width = features if index == 0 else layer.directions * output
        self.d_input = new((layer.rows, width)) if need_input else None
        self.sides: list[dict[str, Tensor | None]] = []
        for d in range(layer.directions):
            at = index * layer.directions + d
            first = [h[at] for h in hx]
            self.sides.append(
                {
                    "gates": kept.gates[at],
                    "parameters": parameters_of(layer, self.own[d]),
                    "factors": None if extras.recurrent is None else extras.recurrent[at],
                    "carry_h": carry[0][at],
                    "carry_c": carry[1][at] if layer.states > 1 else None,
                    "cells": kept.cells[at],
                    "first_h": first[0] if first else None,
                    "first_c": first[1].to(layer.real) if layer.states > 1 and first else None,
                    "cell_output": kept.cell_output[at],
                    "d_gates": new((layer.rows, (gates + layer.apart + layer.parameters) * hidden)),
                    "d_output": new((layer.rows, output)) if layer.projected else None,
                    "d_cells": None if d_cells is None else d_cells[:, d * hidden :],
                }
            )

    def run(self, d_y: Tensor | None, begin: int, end: int) -> None:
        """Some steps; ``d_y``: the output's gradient, as the layer above has left it, or None."""
        layer, index = self.layer, self.index
        assert d_y is None or d_y.dtype is layer.dtype  # kernels take its address
        self.sweep.run(
            self.time, self.extras, index, self.sides, self.y, d_y, True, True, begin, end, 0
        )
        if self.d_input is None:
            return
        part = _rows_of_steps(layer, begin, end, True)
        d_input = self.d_input[part]
        for d, side in enumerate(self.sides):
            d_gates = side["d_gates"]
            assert d_gates is not None
            d_in = d_gates[part, : layer.gates * layer.hidden]
            if d == 0:
                torch.mm(d_in, self.own[d][0], out=d_input)
            else:
                d_input.addmm_(d_in, self.own[d][0])
        if index and self.extras.dropout is not None:
            d_input.mul_(self.extras.dropout[index - 1].reshape(self.d_input.shape)[part])

    def weight_gradients(
        self, below: Tensor, hx: Sequence[Tensor], need_weights: Sequence[bool],
        d_weights: list[Tensor | None],
    ) -> None:  # fmt: skip
        """Fills in the layer's part of ``d_weights``; ``below``: as the forward pass took it."""
        layer, index, time, extras, kept = (
            self.layer, self.index, self.time, self.extras, self.kept
        )  # fmt: skip
        gates, hidden, output = layer.gates, layer.hidden, layer.output
        each = layer.weights_each
        if index and extras.dropout is not None:
            below = _times(below, extras.dropout[index - 1].reshape(below.shape))
        for d, side in enumerate(self.sides):
            at = index * layer.directions + d
            need = need_weights[at * each : (at + 1) * each]
            d_gates, d_output = side["d_gates"], side["d_output"]
            assert d_gates is not None
            d_in = d_gates[:, : gates * hidden]
            together = (gates - layer.apart) * hidden
            columns = (gates + layer.apart) * hidden
            found: list[Tensor | None] = [None] * each
            if need[0]:
                found[0] = d_in.t() @ below
            if need[1] and layer.recurrent:
                h = self.y[:, d * output : (d + 1) * output]
                first_h = hx[0][at] if hx else h.new_zeros((layer.batch, output))
                before = time.previous(layer, h, first_h, back=d == 1)
                if extras.reset is not None:
                    before = before.masked_fill(extras.reset.reshape(-1, 1), 0)
                if extras.recurrent is not None:
                    before = _times(before, time.per_row(layer, extras.recurrent[at]))
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


def with_cells(
    config: Config,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    keep: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor]:
    """``forward`` of one layer, and c of all steps, in the input's layout."""
    output, states, reserve = forward(config, x, hx, weights, batch_sizes, extras, True)
    assert reserve is not None
    cells = _kept_cells(config, x, weights, batch_sizes, reserve)
    return output, states, reserve if keep else None, cells


def _kept_cells(
    config: Config,
    x: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reserve: Tensor,
) -> Tensor:
    """Of one layer: c of all steps, in the input's layout, from what ``forward`` kept.

    In the dtype of its sums; zero where a sample has ended.
    """
    layer = _layer_for(config, x, weights, batch_sizes)
    packed = x.dim() == 2
    rows = torch.cat([c for c in Reserve(layer, reserve).cells if c is not None], 1)
    if packed:
        return rows
    rows = Time(layer, batch_sizes, x.device, packed).existing(layer, rows)
    steps = rows.view(layer.steps, layer.batch, -1)
    return steps.transpose(0, 1).contiguous() if config.batch_first else steps


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
