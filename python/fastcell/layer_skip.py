"""A layer's call with ``skip``: what ``skip.py`` does to a stack, between checks and layouts.

Three ways: all phases of a stack at once; with the link beside, on a CPU, kernels of cells with a
delay; else, and where two directions have resets, layer by layer and direction by direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import cpu, ops
from .cells import spec_of, with_delay
from .checks import autocast_enabled, check_batch_sizes, check_tensors
from .engines import ENGINES
from .layer_states import run_all, states_by_layer
from .ragged import checked_lengths
from .skip import Found, clear_gone, joined, run_beside, run_delayed, turned
from .stack import (
    Sequences,
    Sizes,
    Stack,
    States,
    checked_reset,
    refuse_dropout,
    refuse_sizes,
    refuse_states,
    run_stack,
)


class Skipping(Stack, Protocol):
    """What a call reads of a layer."""

    skip: int
    skip_beside: bool

    @property
    def recurrent_dropout(self) -> float: ...


@dataclass
class SkippingSizes(Sizes):
    """A :class:`Skipping` of its own."""

    recurrent_dropout: float
    skip: int
    skip_beside: bool


# (Dynamo does not know what a dataclass's fields are.)
_SIZES = [field.name for field in fields(Sizes)]


@dataclass
class _Call:
    """What there is beside the input and the states; time first, with a batch."""

    cell: str
    d: int
    directions: int
    sizes: Sizes
    weights: list[Tensor]
    lengths: Tensor | None
    reset: Tensor | None
    every: bool  # whether all states are wanted


def run_skipping(
    layer: Skipping,
    cell: str,
    input: Sequences,
    states: States | None,
    lengths: Tensor | None,
    reset: Sequences | None,
    weights: list[Tensor],
    every: list[Tensor] | None = None,
) -> tuple[Sequences, States]:
    """A call with ``skip``: the states of h are those of the ``skip`` steps before.

    ``every``: to be filled with all states of each kind, (L*D, T, B, .).
    """
    if isinstance(input, PackedSequence):
        return _run_packed(layer, cell, input, states, lengths, reset, weights, every)
    if input.dim() not in (2, 3):
        raise ValueError(f"Expected input to be 2D or 3D, got {input.dim()}D")
    batched = input.dim() == 3
    if lengths is not None and not batched:
        raise ValueError("lengths go with a padded batch of 3 dimensions, got 2-D input")
    # Time first, with a batch.
    turn = batched and layer.batch_first

    def timed(t: Tensor) -> Tensor:
        return t.transpose(0, 1) if turn else t if batched else t.unsqueeze(1)

    x = timed(input)
    steps, batch, _ = x.shape
    if lengths is not None:
        lengths = checked_lengths(lengths, batch, steps, x.device)
        if not lengths.is_cpu:
            lengths = lengths.clamp(0, steps)
    anew = None if reset is None else timed(checked_reset(reset, input, False))
    sizes = Sizes(*[getattr(layer, name) for name in _SIZES])
    sizes.batch_first = False
    _refuse(layer, cell, x, states, weights)
    call = _Call(
        cell, layer.skip, 2 if layer.bidirectional else 1, sizes, weights, lengths, anew,
        every is not None,
    )  # fmt: skip
    if layer.training and layer.recurrent_dropout > 0:
        # For all blocks, and all phases, the same ones.
        shape = (layer.num_layers * call.directions, batch, layer.proj_size or layer.hidden_size)
        sizes.recurrent_dropout = ops.recurrent_factors(x, shape, layer.recurrent_dropout)
    native = layer.skip_beside and ENGINES.get(x.device.type) is cpu and not layer.recompute
    if native:
        output, finals, kinds = _by_kernels(call, x, states)
    elif layer.skip_beside or (layer.bidirectional and (reset is not None or layer.recompute)):
        # (Phases have resets of their own in either direction, and lengths, of which recomputation
        # knows in one.)
        output, finals, kinds = _one_by_one(call, layer.skip_beside, x, states)
    else:
        output, finals, kinds = _by_phases(call, sizes, call.directions, x, states, weights)
    if anew is not None:
        several = 1 if layer.skip_beside else len(finals)
        cleared = clear_gone(finals[:several], anew, layer.skip, lengths, call.directions)
        finals = (*cleared, *finals[several:])
    if every is not None:
        every += [s.transpose(1, 2) if turn else s if batched else s[:, :, 0] for s in kinds]
    return output.transpose(0, 1) if turn else output if batched else output[:, 0], finals


def _refuse(
    layer: Skipping, cell: str, x: Tensor, states: States | None, weights: Sequence[Tensor]
) -> None:
    """Raise an error that names a wrong dtype, size or weight of the links beside, if any."""
    first = weights[0]
    if isinstance(first, Tensor) and x.dtype != first.dtype and not autocast_enabled():
        raise ValueError(f"input is {x.dtype}, but the weights are {first.dtype}")
    if x.shape[-1] != layer.input_size:
        raise RuntimeError(f"Expected input with {layer.input_size} features, got {x.shape[-1]}")
    batch = x.shape[1]
    rows = (layer.skip * batch, batch if layer.skip_beside else layer.skip * batch)
    refuse_states(layer, states or (), rows)
    refuse_dropout(layer)
    if not layer.skip_beside:
        return
    each = len(weights) // (layer.num_layers * (2 if layer.bidirectional else 1))
    rows_of = spec_of(cell).gates * layer.hidden_size
    expected = (rows_of, layer.proj_size or layer.hidden_size)
    for w in weights[each - 1 :: each]:
        if not isinstance(w, Tensor):
            raise TypeError(f"weight_skip must be a Tensor, got {type(w).__name__}")
        if w.shape != expected or w.dtype is not first.dtype or w.device != first.device:
            raise RuntimeError(
                f"weight_skip must be {first.dtype} of size {expected} on {first.device}, got "
                f"{w.dtype} of size {tuple(w.shape)} on {w.device}"
            )


def _run_packed(
    layer: Skipping,
    cell: str,
    input: PackedSequence,
    states: States | None,
    lengths: Tensor | None,
    reset: Sequences | None,
    weights: list[Tensor],
    every: list[Tensor] | None,
) -> tuple[PackedSequence, States]:
    """A call on a PackedSequence: as a padded batch with lengths."""
    if lengths is not None:
        raise ValueError("lengths go with a padded batch of 3 dimensions, got a PackedSequence")
    data, batch_sizes, order, back = input
    if data.dim() != 2:
        raise RuntimeError(f"packed input must have 2 dimensions, got {data.dim()}")
    check_batch_sizes(batch_sizes, data.shape[0])
    x, ends = pad_packed_sequence(input)
    anew = None
    if reset is not None:
        rows = reset.data if isinstance(reset, PackedSequence) else reset
        rows = checked_reset(rows, data, False)
        anew, _ = pad_packed_sequence(PackedSequence(rows, batch_sizes, order, back))
    if layer.batch_first:  # of which packed rows know nothing
        layer = SkippingSizes(*[getattr(layer, field.name) for field in fields(SkippingSizes)])
        layer.batch_first = False
    output, finals = run_skipping(layer, cell, x, states, ends, anew, weights, every)
    assert isinstance(output, Tensor)
    alive = torch.arange(x.shape[1], device=batch_sizes.device) < batch_sizes[:, None]
    step, rank = [index.to(x.device) for index in alive.nonzero(as_tuple=True)]
    sample = rank if order is None else order[rank]
    if every is not None:
        every[:] = [s[:, step, sample] for s in every]
    return PackedSequence(output[step, sample], batch_sizes, order, back), finals


def _run(
    call: _Call,
    sizes: Sizes,
    weights: Sequence[Tensor],
    input: Tensor,
    states: States | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> Found:
    """Some of the call's layers without a delay."""

    def refuse(input: Tensor, states: States | None, _: Tensor | None) -> None:
        refuse_sizes(sizes, input, states or (), None)

    arguments = (sizes, call.cell, input, states, weights, refuse)
    if call.every:
        output, finals, every = run_all(*arguments, lengths, reset)
        return cast(Tensor, output), finals, every
    output, finals = run_stack(*arguments, lengths=lengths, reset=reset)
    return cast(Tensor, output), finals, ()


def _by_phases(
    call: _Call,
    sizes: Sizes,
    directions: int,
    input: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
) -> Found:
    if isinstance(sizes.recurrent_dropout, Tensor):
        sizes = replace(sizes, recurrent_dropout=sizes.recurrent_dropout.repeat(1, call.d, 1))
    return run_delayed(
        call.d, directions, input, states, call.lengths, call.reset,
        lambda *own: _run(call, sizes, weights, *own),
    )  # fmt: skip


def _by_kernels(call: _Call, input: Tensor, states: States | None) -> Found:
    """By the kernels of cells with a delay."""
    sizes, directions = call.sizes, call.directions
    each = len(call.weights) // (sizes.num_layers * directions)
    own = [w for i, w in enumerate(call.weights) if i % each < each - 1]
    spec = spec_of(call.cell)
    check_tensors(
        input, states, own, input.shape[0], spec, sizes.input_size, sizes.hidden_size,
        sizes.proj_size, sizes.num_layers, directions, sizes.bias,
    )  # fmt: skip
    lengths = call.lengths
    if lengths is not None:
        # (A copy: the backward call reads them again, whatever the caller has done.)
        lengths = lengths.clone(memory_format=torch.contiguous_format)
    options: dict[str, Any] = {
        name: getattr(sizes, name)
        for name in ("num_layers", "bidirectional", "bias", "batch_first", "dropout", "training",
                     "recurrent_dropout")
    }  # fmt: skip
    arguments = (with_delay(call.cell, call.d), input, states, call.weights, lengths)
    if not call.every:
        output, finals = ops.sequence(*arguments, reset=call.reset, **options)
        return output, finals, ()
    outputs, cells, finals = ops.all_states(*arguments, reset=call.reset, **options)
    kinds = [states_by_layer(kind, directions) for kind in (outputs, cells) if kind]
    return outputs[-1], finals, kinds


def _one_by_one(call: _Call, beside: bool, input: Tensor, states: States | None) -> Found:
    """Layer by layer and direction by direction; a reverse one with time turned round."""
    d, directions, sizes = call.d, call.directions, call.sizes
    batch, count = input.shape[1], sizes.num_layers * directions
    each, lengths = len(call.weights) // count, call.lengths
    one = replace(sizes, num_layers=1, bidirectional=False, dropout=0.0)
    found: list[Found] = []
    for k in range(count):
        if k % directions == 0 and k:
            input = joined([output for output, *_ in found[-directions:]], -1)
            input = torch.nn.functional.dropout(input, sizes.dropout, sizes.training)
        one.input_size = input.shape[-1]
        if isinstance(sizes.recurrent_dropout, Tensor):
            one.recurrent_dropout = sizes.recurrent_dropout[k : k + 1]
        back = k % directions == 1

        def turn(t: Tensor, back: bool = back) -> Tensor:
            return turned(t, lengths) if back else t

        def in_order(states: States, back: bool = back) -> States:
            """Those of d steps the other way round."""
            several = (1 if beside else len(states)) if back else 0
            flipped = [
                s.reshape(1, d, batch, s.shape[2]).flip(1).flatten(1, 2) for s in states[:several]
            ]
            return (*flipped, *states[several:])

        own = call.weights[k * each : (k + 1) * each]
        before = None if states is None else in_order(tuple([s[k : k + 1] for s in states]))
        part = replace(call, reset=None if call.reset is None else turn(call.reset))
        if beside:
            output, finals, kinds = _beside(part, one, turn(input), before, own)
        else:
            output, finals, kinds = _by_phases(part, one, 1, turn(input), before, own)
        kinds = [turn(kind[0])[None] for kind in kinds]
        found.append((turn(output), in_order(finals), kinds))
    outputs, finals, every = zip(*found, strict=True)
    return (
        joined(outputs[-directions:], -1),
        tuple([torch.cat(parts) for parts in zip(*finals, strict=True)]),
        [torch.cat(kinds) for kinds in zip(*every, strict=True)],
    )


def _beside(
    call: _Call, sizes: Sizes, input: Tensor, states: States | None, weights: Sequence[Tensor]
) -> Found:
    """One layer of one direction with the link beside, block by block."""
    *own, w_skip = weights
    own[0] = joined((own[0], w_skip), 1)
    sizes = replace(sizes, input_size=own[0].shape[1])
    d, batch = call.d, input.shape[1]
    if states is None:
        past = input.new_zeros((d, batch, w_skip.shape[1]))
    else:
        past = states[0].reshape(d, batch, w_skip.shape[1])
        states = (past[-1:], *states[1:])
    return run_beside(
        d, input, states, call.lengths, call.reset, past,
        lambda *part: _run(call, sizes, own, *part),
    )  # fmt: skip
