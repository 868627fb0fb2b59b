"""A stack's call with ``return_states=True``: every state of every step, beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .cells import spec_of
from .checks import check_tensors
from .stack import Refuse, Sequences, Stack, States, run_stack, takes_lengths


def run_all(
    layer: Stack,
    cell: str,
    input: Sequences,
    states: States | None,
    weights: Sequence[Tensor],
    refuse: Refuse,
    lengths: Tensor | None,
    reset: Sequences | None,
    normed: bool = False,
) -> tuple[Sequences, States, tuple[Tensor, ...]]:
    """Output, final states, and of each kind of state all: (L*D, T, B, .).

    The arguments are those of ``run_stack``; ``normed``: with layer normalisation.
    """
    directions = 2 if layer.bidirectional else 1

    def run(
        cell: str,
        input: Tensor,
        states: States | None,
        batch_sizes: Tensor | None,
        steps: int,
        reset: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor], States]:
        if normed:
            return ops.normed_states(
                cell, input, states, weights, batch_sizes, reset, bias=layer.bias,
                projected=layer.proj_size > 0, directions=directions,
                batch_first=layer.batch_first, every=True,
                dropout=layer.dropout if layer.training else 0.0,
            )  # fmt: skip
        check_tensors(
            input, states, weights, steps, spec_of(cell), layer.input_size, layer.hidden_size,
            layer.proj_size, layer.num_layers, directions, layer.bias,
        )  # fmt: skip
        return ops.all_states(
            cell, input, states, weights, batch_sizes, num_layers=layer.num_layers,
            bidirectional=layer.bidirectional, batch_first=layer.batch_first,
            dropout=layer.dropout, training=layer.training, bias=layer.bias,
            recurrent_dropout=layer.recurrent_dropout, reset=reset,
        )  # fmt: skip

    def launch(
        cell: str,
        input: Tensor,
        states: States | None,
        batch_sizes: Tensor | None,
        steps: int,
        reset: Tensor | None,
    ) -> tuple[Tensor, States]:
        outputs, cells, finals = run(cell, input, states, batch_sizes, steps, reset)
        if plain:
            aside.extend([kind for kind in (outputs, cells) if kind])
            return outputs[-1], finals
        # Whatever is done to the output's rows is done to all states.
        return torch.cat([*outputs, *cells], -1), finals

    plain = isinstance(input, Tensor) and input.dim() == 3
    if plain and isinstance(lengths, Tensor):
        plain = takes_lengths(layer, cast(Tensor, input), lengths, normed)
    aside: list[list[Tensor]] = []
    wide, finals = run_stack(
        layer, cell, input, states, weights, refuse, launch, lengths=lengths, reset=reset,
        rows_alone=normed,
    )  # fmt: skip
    if plain:
        return wide, finals, tuple([states_by_layer(kind, directions) for kind in aside])
    count = layer.num_layers * directions
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: len(finals)]

    def split(wide: Tensor) -> tuple[Tensor, list[Tensor]]:
        kinds = wide.split([count * n for n in sizes], -1)  # type: ignore[no-untyped-call]
        whole = [k.unflatten(-1, (count, n)) for k, n in zip(kinds, sizes, strict=True)]
        output = whole[0][..., -directions:, :].flatten(-2)
        return output, [k.movedim(-2, 0) for k in whole]

    if isinstance(wide, Tensor):
        output, all_states = split(wide)
        return output, finals, tuple(all_states)
    # Of a PackedSequence: its rows.
    data, batch_sizes, order, back = wide
    output, all_states = split(data)
    packed = PackedSequence(output, batch_sizes, order, back)
    return packed, finals, tuple(all_states)


def states_by_layer(states: list[Tensor], directions: int) -> Tensor:
    """Of each layer (T, B, D * n) -> (L*D, T, B, n)."""
    parts = []
    for s in states:
        apart = s.view(*s.shape[:2], directions, s.shape[2] // directions)
        parts.append(apart.movedim(2, 0))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
