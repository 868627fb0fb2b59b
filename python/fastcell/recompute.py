"""Training with O(sqrt(T)) memory: what a backward pass needs is computed again, part by part.

The sequence is cut into segments of about sqrt(T) steps. The forward pass keeps the states between
them and nothing else; the backward pass takes the segments from the last to the first, runs each
forward once more, this time keeping what it needs, and then backward (Chen et al., "Training deep
nets with sublinear memory cost", 2016). The price is a second forward pass.

A stack of one direction is cut as a whole. With two directions, of which one runs from the end, a
layer's two directions are cut apart, and layer by layer: the layers' outputs are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import transforms
from .cells import spec_of
from .cpu_time import row_offsets
from .double_backward import composite_backward
from .engines import engine_of
from .plan import Config, Extras

_EXTRAS = len(Extras._fields)
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

# Fewer rows (t, b) than this in a segment would make its matrix products slow.
_LEAST_ROWS = 1024


@dataclass(frozen=True)
class Dropout:
    """Masks between layers that are drawn twice: from a seed, segment by segment."""

    probability: float
    seed: int

    @staticmethod
    def draw(probability: float) -> Dropout | None:
        """With a seed from torch's generator; None for no dropout."""
        if probability <= 0:
            return None
        return Dropout(probability, int(torch.randint(1 << 62, ()).item()))

    def masks(self, shape: Sequence[int], like: Tensor, index: int) -> Tensor:
        """The factors of a segment."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.probability == 1:
            return like.new_zeros(shape, dtype=dtype)
        generator = torch.Generator(like.device).manual_seed((self.seed + index) % (1 << 63))
        keep = 1 - self.probability
        return like.new_empty(shape, dtype=dtype).bernoulli_(keep, generator=generator).div_(keep)


def sequence(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    dropout: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A layer stack as an engine's ``forward`` runs it, differentiable, with little kept.

    ``dropout``: probability of dropping an element between layers.

    Raises ValueError for a packed sequence in two directions.
    """
    if not config.bidirectional:
        drop = Dropout.draw(dropout if config.num_layers > 1 else 0)
        output, *states = RecomputedStack.apply(  # type: ignore[no-untyped-call]
            config, len(hx or ()), batch_sizes, drop, extras, input, *(hx or ()), *weights
        )
        return output, tuple(states)
    if batch_sizes is not None:
        raise ValueError(
            "recompute=True takes padded input where the layer is bidirectional, of full length, "
            "got a PackedSequence or lengths"
        )
    return _both_directions(config, input, hx, weights, extras, dropout)


def _both_directions(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    extras: Extras,
    dropout: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    one = config._replace(num_layers=1, bidirectional=False)
    axis = 1 if config.batch_first else 0
    each = len(weights) // (2 * config.num_layers)

    def direction(k: int, input: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        state = [h[k : k + 1] for h in hx or ()]
        own = Extras(
            recurrent=None if extras.recurrent is None else extras.recurrent[k : k + 1],
            reset=extras.reset.flip(0) if k % 2 and extras.reset is not None else extras.reset,
        )
        output, *final = RecomputedStack.apply(  # type: ignore[no-untyped-call]
            one, len(state), None, None, own, input, *state, *weights[k * each : (k + 1) * each]
        )
        return output, final

    finals: list[Sequence[Tensor]] = []
    for layer in range(config.num_layers):
        if layer > 0:
            input = torch.nn.functional.dropout(input, dropout)
        forward, final = direction(2 * layer, input)
        finals.append(final)
        backward, final = direction(2 * layer + 1, input.flip(axis))
        finals.append(final)
        input = torch.cat((forward, backward.flip(axis)), -1)
    return input, tuple([torch.cat(parts) for parts in zip(*finals, strict=True)])


@dataclass(frozen=True)
class _Segment:
    index: int
    alive: int  # samples at its first step
    rows: int
    x: slice  # of the input's first (packed: row) or time axis
    batch_sizes: Tensor | None


class _Segments:
    """How one call is cut."""

    def __init__(self, config: Config, input: Tensor, batch_sizes: Tensor | None) -> None:
        self.axis = 1 if config.batch_first and batch_sizes is None else 0
        if batch_sizes is None:
            self.steps, self.batch = input.shape[self.axis], input.shape[1 - self.axis]
        else:
            self.steps, self.batch = len(batch_sizes), int(batch_sizes[0])
        self.each = max(math.isqrt(self.steps), -(-_LEAST_ROWS // max(self.batch, 1)), 1)
        self.batch_sizes = batch_sizes
        self.offsets = None if batch_sizes is None else row_offsets(batch_sizes).tolist()

    def __len__(self) -> int:
        return -(-self.steps // self.each)

    def __iter__(self) -> Iterator[_Segment]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> _Segment:
        t0, t1 = index * self.each, min((index + 1) * self.each, self.steps)
        if self.batch_sizes is None or self.offsets is None:
            return _Segment(index, self.batch, (t1 - t0) * self.batch, slice(t0, t1), None)
        r0, r1 = self.offsets[t0], self.offsets[t1]
        sizes = self.batch_sizes[t0:t1]
        return _Segment(index, int(sizes[0]), r1 - r0, slice(r0, r1), sizes)

    def of(self, t: Tensor, segment: _Segment) -> Tensor:
        """The part of an input or output that belongs to a segment."""
        return t[segment.x] if self.axis == 0 else t[:, segment.x]


def _part(
    config: Config,
    dropout: Dropout | None,
    extras: Extras,
    segment: _Segment,
    like: Tensor,
    width: int,
) -> Extras:
    """The extras of a segment."""
    masks = None
    if dropout is not None:
        shape = (config.num_layers - 1, segment.rows, width)
        masks = dropout.masks(shape, like, segment.index)
    return Extras(
        masks,
        None if extras.recurrent is None else extras.recurrent[:, : segment.alive],
        None if extras.reset is None else extras.reset[segment.x],
    )


def _first(states: Sequence[Tensor], alive: int) -> list[Tensor]:
    return [s[:, :alive] for s in states]


class RecomputedStack(Function):
    """(input, *hx, *weights) -> (output, *final states), of one direction."""

    @staticmethod
    def forward(
        ctx: Any,
        config: Config,
        state_count: int,
        batch_sizes: Tensor | None,
        dropout: Dropout | None,
        extras: Extras,
        input: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        hx, weights = tensors[:state_count], tensors[state_count:]
        segments = _Segments(config, input, batch_sizes)
        width = weights[1].shape[1]
        shape = (*input.shape[:-1], width)
        if segments.axis == 1:  # time-major memory, as the kernels leave it
            steps, batch = segments.steps, segments.batch
            output = input.new_empty_strided((batch, steps, width), (width, batch * width, 1))
        else:
            output = input.new_empty(shape)
        states = [h.detach().clone() for h in hx]
        between: list[Tensor] = []
        reserve: Tensor | None = None
        for segment in segments:
            before = _first(states, segment.alive) if states else None
            if before is not None:
                between += [s.clone() for s in before]
            # The backward pass begins with the last one.
            _, after, reserve = engine_of(input).forward(
                config, segments.of(input, segment), before, weights, segment.batch_sizes,
                _part(config, dropout, extras, segment, input, width),
                segment.index == len(segments) - 1, segments.of(output, segment),
            )  # fmt: skip
            if states:
                for state, new in zip(states, after, strict=True):
                    state[:, : segment.alive] = new
            else:
                states = after
        ctx.config, ctx.state_count, ctx.dropout = config, state_count, dropout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, *extras, reserve, input, *tensors, *between)
        return output, *states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        config: Config = ctx.config
        batch_sizes, *tensors = ctx.saved_tensors
        extras, tensors = Extras(*tensors[:_EXTRAS]), tensors[_EXTRAS:]
        reserve, input, *tensors = tensors
        needs = ctx.needs_input_grad[5:]
        count = ctx.state_count
        weights_count = len(needs) - 1 - count
        hx, weights = tensors[:count], tensors[count : count + weights_count]
        between = tensors[count + weights_count :]
        segments = _Segments(config, input, batch_sizes)
        width = weights[1].shape[1]
        if (
            torch.is_grad_enabled()
            or transforms.transformed()
            or any([g is not None and _is_legacy_batched(g) for g in grads])
        ):
            parts = [_part(config, ctx.dropout, extras, s, input, width).dropout for s in segments]
            drawn = [p for p in parts if p is not None]
            found = composite_backward(
                config, grads, input, hx or None, weights, batch_sizes,
                extras._replace(dropout=torch.cat(drawn, 1) if drawn else None), needs,
            )  # fmt: skip
            return None, None, None, None, None, *found

        d_output, *d_finals = grads
        states = spec_of(config.cell).states
        d_states: list[Tensor | None] = [None if d is None else d.clone() for d in d_finals]
        d_input = torch.empty_like(input, memory_format=torch.contiguous_format)
        d_weights: list[Tensor | None] | None = None
        for index in reversed(range(len(segments))):
            segment = segments[index]
            x = segments.of(input, segment)
            # The first segment's state is zero where none was given: then nothing was kept of it.
            first = index == 0 and not hx
            at = (index if hx else index - 1) * states
            before = None if first else between[at : at + states]
            own = _part(config, ctx.dropout, extras, segment, input, width)
            if index < len(segments) - 1:
                _, _, reserve = engine_of(input).forward(
                    config, x, before, weights, segment.batch_sizes, own, keep=True
                )
            wanted = [needs[0], *[True] * (0 if first else states), *needs[1 + count :]]
            if index == 0 and hx:
                wanted[1 : 1 + states] = needs[1 : 1 + count]
            found = engine_of(input).backward(
                config,
                None if d_output is None else segments.of(d_output, segment),
                [None if d is None else d[:, : segment.alive] for d in d_states],
                x, before, weights, segment.batch_sizes, own, reserve, wanted,
                segments.of(d_input, segment), d_weights,
            )  # fmt: skip
            reserve = None
            d_before = found[1 : len(found) - weights_count]
            d_weights = found[len(found) - weights_count :]
            for i, d in enumerate(d_before):
                if d is None:
                    continue
                if d.shape[1] == segments.batch:
                    d_states[i] = d
                    continue
                whole = d_states[i]
                if whole is None:
                    whole = d.new_zeros((d.shape[0], segments.batch, d.shape[2]))
                    d_states[i] = whole
                whole[:, : segment.alive] = d
        d_hx = [
            d if need else None for d, need in zip(d_states, needs[1 : 1 + count], strict=False)
        ]
        d_input_or_none = d_input if needs[0] else None
        return None, None, None, None, None, d_input_or_none, *d_hx, *(d_weights or ())
