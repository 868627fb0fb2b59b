"""A layer's call with ``skip``: what ``skip.py`` does to a stack, between checks and layouts."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import cpu, ops
from .cells import spec_of, with_delay
from .checks import check_tensors
from .engines import ENGINES
from .functional import Sequences, Sizes, States, checked_reset, refuse_sizes, run_stack
from .layer_states import run_all
from .ragged import checked_lengths
from .skip import gone, run_beside, run_delayed

if TYPE_CHECKING:
    from .layer import Layer

# (Dynamo does not know what a dataclass's fields are.)
_SIZES = [field.name for field in fields(Sizes)]


def run_skipping(
    layer: Layer,
    cell: str,
    input: Sequences,
    states: States | None,
    lengths: Tensor | None,
    reset: Sequences | None,
    weights: list[Tensor],
    every: list[Tensor] | None = None,
) -> tuple[Tensor, States]:
    """A call with ``skip``: the states of h are those of the ``skip`` steps before.

    ``every``: to be filled with all states of each kind, (L*D, T, B, .).
    """
    if not isinstance(input, Tensor) or not isinstance(reset, Tensor | None):
        raise ValueError("skip goes with padded input, and lengths: got a PackedSequence")
    if reset is not None and layer.bidirectional:
        raise ValueError("with skip, reset goes with one direction")
    if input.dim() not in (2, 3):
        raise ValueError(f"Expected input to be 2D or 3D, got {input.dim()}D")
    sizes = Sizes(*[getattr(layer, name) for name in _SIZES])
    sizes.batch_first = False
    batched = input.dim() == 3
    # Time first, with a batch.
    turned = batched and layer.batch_first

    def timed(t: Tensor) -> Tensor:
        return t.transpose(0, 1) if turned else t if batched else t.unsqueeze(1)

    def run(
        input: Tensor, states: States | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, States]:
        def refuse(input: Tensor, states: States | None, _: Tensor | None) -> None:
            refuse_sizes(sizes, input, states or (), None)

        if every is None:
            found: Any = run_stack(
                sizes, cell, input, states, weights, refuse, lengths=lengths, reset=reset
            )
        else:
            *found, by_phase = run_all(sizes, cell, input, states, weights, refuse, lengths, reset)
            every.extend(by_phase)
        return cast(tuple[Tensor, States], found)

    if layer.skip_beside and every is not None:
        raise ValueError("return_states does not go with skip_beside")
    if layer.skip_beside:
        if lengths is not None:
            raise ValueError("lengths do not go with skip_beside")
        rows = None if reset is None else timed(checked_reset(reset, input, False))
        output, states = _run_beside(layer, cell, timed(input), states, rows, weights, sizes)
        return output.transpose(0, 1) if turned else output if batched else output[:, 0], states
    if lengths is not None:
        steps, batch = timed(input).shape[:2]
        lengths = checked_lengths(lengths, batch, steps)
    output, states = run_delayed(
        layer.skip, 2 if layer.bidirectional else 1, timed(input), states, lengths,
        None if reset is None else timed(checked_reset(reset, input, False)), run,
    )  # fmt: skip
    if every is not None:
        steps, batch = timed(input).shape[:2]
        in_time = [s.reshape(s.shape[0], -1, batch, s.shape[-1])[:, :steps] for s in every]
        every[:] = [s.transpose(1, 2) if turned else s if batched else s[:, :, 0] for s in in_time]
    return output.transpose(0, 1) if turned else output if batched else output[:, 0], states


def _run_delayed(
    layer: Layer,
    cell: str,
    input: Tensor,
    states: States | None,
    reset: Tensor | None,
    weights: list[Tensor],
) -> tuple[Tensor, States]:
    """By the kernels of cells with a delay; ``states`` as ``skip.py`` has them."""
    d, directions = layer.skip, 2 if layer.bidirectional else 1
    steps, batch, features = input.shape
    if features != layer.input_size:
        raise RuntimeError(f"Expected input with {layer.input_size} features, got {features}")
    each = len(weights) // (layer.num_layers * directions)
    own = [w for i, w in enumerate(weights) if i % each < each - 1]
    spec = spec_of(cell)
    check_tensors(
        input, states, own, steps, spec, layer.input_size, layer.hidden_size, layer.proj_size,
        layer.num_layers, directions, layer.bias,
    )  # fmt: skip
    expected = (spec.gates * layer.hidden_size, layer.output_size())
    for w in weights[each - 1 :: each]:
        if not isinstance(w, Tensor):
            raise TypeError(f"weight_skip must be a Tensor, got {type(w).__name__}")
        if w.shape != expected or w.dtype is not own[0].dtype or w.device != own[0].device:
            raise RuntimeError(
                f"weight_skip must be {own[0].dtype} of size {expected} on {own[0].device}, got "
                f"{w.dtype} of size {tuple(w.shape)} on {w.device}"
            )
    output, (h, *rest) = ops.sequence(
        with_delay(cell, d), input, states, weights, None, num_layers=layer.num_layers,
        bidirectional=layer.bidirectional, bias=layer.bias, batch_first=False,
        dropout=layer.dropout, training=layer.training,
        recurrent_dropout=layer.recurrent_dropout, reset=reset,
    )  # fmt: skip
    if reset is not None:
        h = h.masked_fill(gone(reset, d, torch.full((batch,), steps, device=reset.device)), 0)
    return output, (h, *rest)


def _run_beside(
    layer: Layer,
    cell: str,
    input: Tensor,
    states: States | None,
    reset: Tensor | None,
    weights: list[Tensor],
    sizes: Sizes,
) -> tuple[Tensor, States]:
    """The same with h_{t-1} besides: by kernels of their own on a CPU, elsewhere block by block,
    layer by layer, direction by direction.
    """
    d, directions, output = layer.skip, 2 if layer.bidirectional else 1, layer.output_size()
    count, each = layer.num_layers * directions, len(weights) // (layer.num_layers * directions)
    batch = input.shape[1]
    shapes = [(count, d * batch, output), (count, batch, layer.hidden_size)]
    for name, state, shape in zip(("h_0", "c_0"), states or (), shapes, strict=False):
        if tuple(state.shape) != shape:
            raise RuntimeError(f"Expected {name} of size {shape}, got {tuple(state.shape)}")
    if ENGINES.get(input.device.type) is cpu and not sizes.recompute:
        return _run_delayed(layer, cell, input, states, reset, weights)
    one = replace(sizes, num_layers=1, bidirectional=False, dropout=0.0)
    pasts, finals = [], []
    outputs: list[Tensor] = []
    for k in range(count):
        if k % directions == 0:
            if k:
                input = torch.cat(outputs, -1)
                input = torch.nn.functional.dropout(input, layer.dropout, layer.training)
            outputs = []
        *own, w_skip = weights[k * each : (k + 1) * each]
        own[0] = torch.cat((own[0], w_skip), 1)
        one.input_size = own[0].shape[1]
        past = input.new_zeros(shapes[0][1:]) if states is None else states[0][k]
        past = past.view(d, batch, output)
        before = None
        if states is not None:
            before = (past[-1][None], *[s[k : k + 1] for s in states[1:]])

        def run(
            input: Tensor, states: States | None, _: Tensor | None, reset: Tensor | None,
            own: list[Tensor] = own,
        ) -> tuple[Tensor, States]:  # fmt: skip
            def refuse(input: Tensor, states: States | None, _: Tensor | None) -> None:
                refuse_sizes(one, input, states or (), None)

            found = run_stack(one, cell, input, states, own, refuse, reset=reset)
            return cast(tuple[Tensor, States], found)

        # A reverse direction is the same with time turned round: its states nearest first.
        back = k % directions == 1
        rows = input.flip(0) if back else input
        anew = reset.flip(0) if back and reset is not None else reset
        past = past.flip(0) if back else past
        if back and before is not None:
            before = (past[-1][None], *before[1:])
        found, past, final = run_beside(d, rows, past, before, anew, run)
        outputs.append(found.flip(0) if back else found)
        past = past.flip(0) if back else past
        pasts.append(past.reshape(d * batch, output))
        finals.append(final[1:])
    rest = [torch.cat(parts) for parts in zip(*finals, strict=True)]
    return torch.cat(outputs, -1), (torch.stack(pasts), *rest)
