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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _core
from .autocast import without_autocast
from .cells import options_of, spec_of
from .plan import Config, Extras

__all__ = [
    "DTYPES", "architectures", "backward", "choose_engine", "forward", "new_reserve", "products_of",
]  # fmt: skip

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = True
ENGINES = ("step", "grid", "cluster")

# The compiled half. Tests put the emulated one in its place.
device_code: Any = _core

_CHUNK_BYTES = 64
_GROUP = 8
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


@dataclass(frozen=True)
class _Layer:
    """Sizes of a call, those of one layer and direction in particular."""

    cell: str
    gates: int
    apart: int
    states: int
    saved: int
    parameters: int
    recurrent: bool
    second: int
    layers: int
    directions: int
    bias: bool
    hidden: int
    output: int
    projected: bool
    steps: int
    batch: int
    rows: int
    dtype: torch.dtype

    @property
    def real(self) -> torch.dtype:
        """The dtype of sums and of what is saved."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def gate_stride(self) -> int:
        """Of the buffer that holds the input terms first and what is saved after."""
        return max(self.gates, self.saved) * self.hidden

    @property
    def weights_each(self) -> int:
        return 2 + 2 * self.bias + self.projected + (self.parameters > 0 and self.recurrent)

    @property
    def first_rows(self) -> int:
        """Of ``weight_hh``: of the gates whose recurrent product takes h itself."""
        return (self.gates - self.second) * self.hidden

    @property
    def two_products(self) -> bool:
        """Whether a step has a second product: a projection, or some gates' own."""
        return self.projected or self.second > 0

    @property
    def parameters_at(self) -> int:
        """Where the cell's own vectors are among the weights of a layer and direction."""
        return -1 if self.recurrent else 1


class Reserve:
    """What a forward call keeps, as views of one buffer; without one it only measures."""

    def __init__(self, layer: _Layer, memory: Tensor | None) -> None:
        self.bytes = 0
        count = layer.layers * layer.directions
        rows, real, hidden = layer.rows, layer.real, layer.hidden

        def take(width: int, dtype: torch.dtype) -> Any:
            begin, size = self.bytes, rows * width * dtype.itemsize
            self.bytes += -(-size // 256) * 256
            if memory is None:
                return None
            return memory[begin : begin + size].view(dtype).view(rows, width)

        self.gates = [take(layer.gate_stride, real) for _ in range(count)]
        self.cells = [take(hidden, real) if layer.states > 1 else None for _ in range(count)]
        self.cell_output = [
            take(hidden, layer.dtype) if layer.projected else None for _ in range(count)
        ]
        width = layer.directions * layer.output
        self.outputs = [take(width, layer.dtype) for _ in range(layer.layers)]


def _layer_of(
    config: Config, dtype: torch.dtype, weights: Sequence[Tensor], steps: int, batch: int, rows: Any
) -> _Layer:
    gates, apart, states, saved, parameters, recurrent, second = device_code.cuda_cell(
        spec_of(config.cell).name
    )
    own = parameters if recurrent else 0
    directions = 2 if config.bidirectional else 1
    each = len(weights) // (config.num_layers * directions)
    projected = each > 2 + 2 * config.bias + (own > 0)
    return _Layer(
        config.cell, gates, apart, states, saved, parameters, recurrent, second, config.num_layers,
        directions, config.bias, int(weights[0].shape[0]) // gates, int(weights[1].shape[1]),
        projected, steps, batch, rows, dtype,
    )  # fmt: skip


def _layer_for(
    config: Config, x: Tensor, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> _Layer:
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


class _Time:
    """Which rows there are: of a PackedSequence, where its steps begin and how long samples are.

    ``batch_sizes``: of packed input, or of padded input the lengths of its samples.
    """

    def __init__(
        self, layer: _Layer, batch_sizes: Tensor | None, device: torch.device, packed: bool
    ) -> None:
        self.offsets = self.lengths = self.batch_sizes = None
        if batch_sizes is not None and not packed:
            self.lengths = batch_sizes
        elif batch_sizes is not None:
            self.batch_sizes = batch_sizes
            offsets = batch_sizes.new_zeros(layer.steps + 1)
            torch.cumsum(batch_sizes, 0, out=offsets[1:])
            lengths = layer.steps - torch.searchsorted(
                batch_sizes.flip(0), torch.arange(layer.batch, device="cpu"), right=True
            )
            self.offsets = offsets.to(device, non_blocking=True)
            self.lengths = lengths.to(device, non_blocking=True)

    def existing(self, layer: _Layer, rows: Tensor) -> Tensor:
        """``rows`` with zeros where a sample has ended, whatever stood there."""
        if self.lengths is None or self.batch_sizes is not None:
            return rows
        alive = torch.arange(layer.steps, device=rows.device)[:, None] < self.lengths
        return rows.where(alive.view(layer.rows, 1), 0)

    def first_reset(self, layer: _Layer, reset: Tensor, back: bool) -> Tensor:
        """(B, 1): whether the first step to run, of the samples that have it, begins with zeros."""
        if self.batch_sizes is None:
            return reset[-1 if back else 0][:, None]
        count = int(self.batch_sizes[-1 if back else 0])
        rows = reset[-count:] if back else reset[:count]
        return torch.nn.functional.pad(rows, (0, layer.batch - count))[:, None]

    def per_row(self, layer: _Layer, of_samples: Tensor) -> Tensor:
        """(B, n) -> (rows, n)."""
        if self.batch_sizes is None:
            return of_samples.repeat(layer.steps, 1)
        assert self.offsets is not None
        rows = torch.arange(layer.rows, device=of_samples.device)
        return of_samples[
            rows - self.offsets[torch.searchsorted(self.offsets, rows, right=True) - 1]
        ]

    def previous(self, layer: _Layer, states: Tensor, first: Tensor, back: bool) -> Tensor:
        """For each row of ``states`` (rows, P) the one a step before; ``first`` (B, P) to begin."""
        if self.batch_sizes is None:
            batch = layer.batch
            if not back:
                return torch.cat((first, states[: layer.rows - batch]))
            if self.lengths is None:
                return torch.cat((states[batch:], first))
            begins = torch.arange(1, layer.steps + 1, device=states.device)[:, None] >= self.lengths
            after = torch.cat((states[batch:], first)).view(layer.steps, batch, -1)
            return after.where(~begins[:, :, None], first).view(layer.rows, -1)
        assert self.offsets is not None
        assert self.lengths is not None
        rows = torch.arange(layer.rows, device=states.device)
        step = torch.searchsorted(self.offsets, rows, right=True) - 1
        sample = rows - self.offsets[step]
        if back:
            begins = step + 1 == self.lengths[sample]
            row = self.offsets[(step + 1).clamp(max=layer.steps)] + sample
        else:
            begins = step == 0
            row = self.offsets[(step - 1).clamp(min=0)] + sample
        return torch.cat((states, first))[torch.where(begins, layer.rows + sample, row)]


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


def pack(weight: Tensor, width: int, columns: int, products: str) -> Tensor:
    """(groups, units, k) as the kernels read it: [units / 8][k chunk][group][8][64 bytes].

    ``width`` and ``columns``: k and units with their padding.
    """
    groups, units, k = weight.shape
    chunk = _CHUNK_BYTES // weight.element_size()
    weight = torch.nn.functional.pad(weight, (0, width - k, 0, columns - units))
    if products == "tf32":
        weight = round_tf32(weight)
    return (
        weight.view(groups, columns // _GROUP, _GROUP, width // chunk, chunk)
        .permute(1, 3, 0, 2, 4)
        .contiguous()
    )


def round_tf32(x: Tensor) -> Tensor:
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


def _by_unit(weight: Tensor, gates: int) -> Tensor:
    """(gates * H, P) -> (1, P, k): k runs over blocks of 8 units, in them gates, in them units."""
    hidden, output = weight.shape[0] // gates, weight.shape[1]
    padded = -(-hidden // _GROUP) * _GROUP
    blocks = torch.nn.functional.pad(
        weight.view(gates, hidden, output), (0, 0, 0, padded - hidden)
    ).view(gates, padded // _GROUP, _GROUP, output)
    return blocks.permute(3, 1, 0, 2).reshape(1, output, gates * padded)


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


def _plan(layer: _Layer, index: int, backward: bool) -> Any:
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
        self, layer: _Layer, device: torch.device, weights: Sequence[Sequence[Tensor]],
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
                main = _by_unit(first, gates) if backward else w_hh
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
        self.exchange = torch.zeros((count, 2, rows, plan.width), **new)
        self.exchange_projected = (
            torch.zeros((count, rows, plan.projected_width), **new) if layer.two_products else None
        )
        self.flags = torch.zeros(
            count * plan.tiles * plan.unit_blocks, dtype=torch.int32, device=device
        )

    def run(
        self, time: _Time, extras: Extras, index: int, sides: list[dict[str, Tensor | None]],
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
        self.plan.run(
            stream_of(self.device), pointers, self.flags.data_ptr(), pointer(time.offsets),
            pointer(time.lengths), pointer(extras.reset), pointer(extras.seed),
            tuple(options_of(self.layer.cell)), index * self.layer.directions,
            self.layer.gate_stride, y.data_ptr(), pointer(d_y), keep, finish,
            _report(self.device).data_ptr(), _PATIENCE,
        )  # fmt: skip


_SIDE = (
    "weights", "projection", "gates", "parameters", "factors", "apart_bias", "carry_h", "carry_c",
    "exchange", "exchange_projected", "cells", "first_h", "first_c", "cell_output",
    "d_gates", "d_output",
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


def _biases(layer: _Layer, w: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """(what is added to the input terms, what to the recurrent terms that stay apart)."""
    if not layer.bias:
        return None, None
    b_ih, b_hh = w[2].to(layer.real), w[3].to(layer.real)
    if layer.apart == 0:
        return b_ih + b_hh, None
    together = (layer.gates - layer.apart) * layer.hidden
    return torch.cat((b_ih[:together] + b_hh[:together], b_ih[together:])), b_hh[together:].clone()


def _parameters(layer: _Layer, w: Sequence[Tensor]) -> Tensor | None:
    """The cell's own vectors, in the dtype of its maths."""
    return w[layer.parameters_at].to(layer.real) if layer.parameters else None


def _by_direction(layer: _Layer, index: int, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The weights of layer ``index``, direction by direction."""
    each = layer.weights_each
    at = index * layer.directions
    return [weights[(at + d) * each : (at + d + 1) * each] for d in range(layer.directions)]


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
    with without_autocast(x):
        return _forward(config, x, hx, weights, batch_sizes, extras, keep, output)


def _forward(
    config: Config,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    keep: bool,
    output: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    layer = _layer_for(config, x, weights, batch_sizes)
    extras = Extras(*[None if t is None else _dense(t) for t in extras])
    device = x.device
    weights = [_dense(w) for w in weights]
    packed = x.dim() == 2
    time = _Time(layer, batch_sizes, device, packed)
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
            own = _by_direction(layer, index, weights)
            sweep = _Sweep(layer, device, own, backward=False)
            if reserve is None:
                y = rows.new_empty((layer.rows, directions * layer.output))
            else:
                y = reserve.outputs[index]
            sides: list[dict[str, Tensor | None]] = []
            for d, w in enumerate(own):
                at = index * directions + d
                bias, apart_bias = _biases(layer, w)
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
                        "parameters": _parameters(layer, w),
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
    terms = product(rows, w_ih.t(), to.dtype)
    if bias is None:
        to.copy_(terms)
    else:
        torch.add(terms, bias, out=to)


def _result(
    layer: _Layer, config: Config, rows: Tensor, packed: bool, copy: bool, output: Tensor | None
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
    # Autograd runs this in the autocast of whoever called backward().
    with without_autocast(x):
        return _backward(
            config, grad_output, grad_states, x, hx, weights, batch_sizes, extras, reserve, needs,
            d_x, add_to,
        )  # fmt: skip


def _backward(
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
    d_x: Tensor | None,
    add_to: Sequence[Tensor | None] | None,
) -> list[Tensor | None]:
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
        time = _Time(layer, batch_sizes, device, packed)
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
    layer: _Layer,
    index: int,
    time: _Time,
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
    own = _by_direction(layer, index, weights)
    sweep = _Sweep(layer, device, own, backward=True)
    sides: list[dict[str, Tensor | None]] = []
    for d in range(directions):
        at = index * directions + d
        first = [h[at] for h in hx]
        sides.append(
            {
                "gates": kept.gates[at],
                "parameters": _parameters(layer, own[d]),
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
    layer: _Layer, config: Config, x: Tensor, d_rows: Tensor | None, packed: bool,
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
