"""Layers and directions: the whole network, forward and backward.

Layer k + 1 reads the outputs of layer k, those of both directions side by side (Schuster and
Paliwal, "Bidirectional recurrent neural networks", 1997), multiplied by a dropout mask where one is
given (Zaremba et al., arXiv:1409.2329, 2014: between layers, never from step to step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from . import sequence
from .cells import CELLS, Array, Options, Weights
from .checks import (
    check_dropout_masks,
    check_grads,
    check_holds,
    check_input,
    check_lengths,
    check_options,
    check_recurrent_masks,
    check_reset,
    check_skip,
    check_states,
    check_weights,
)
from .packing import Packing


class Tape(NamedTuple):
    """What ``backward`` needs of a forward pass. It refers to the arrays given to ``forward``:
    leave those unchanged until then."""

    sequences: list[sequence.SequenceTape]  # (L * D), layer by layer
    packing: Packing
    masks: list[Array]  # packed, one per gap between layers; empty: no dropout
    output_shape: tuple[int, ...]
    state_shapes: list[tuple[int, ...]]
    directions: int


class Result(NamedTuple):
    """What ``forward`` returns."""

    output: Array  # (T, B, D*P)
    states: list[Array]  # final h (L*D, B, P), for LSTM also c (L*D, B, H)
    tape: Tape | None


class Gradients(NamedTuple):
    """What ``backward`` returns: each gradient shaped as what it belongs to."""

    input: Array
    states: list[Array]
    weights: list[Array]


def forward(
    cell: str,
    x: ArrayLike,
    states: Sequence[ArrayLike] | None,
    weights: Sequence[ArrayLike],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    lengths: ArrayLike | None = None,
    dropout_masks: ArrayLike | None = None,
    options: Options | None = None,
    reset: ArrayLike | None = None,
    recurrent_masks: ArrayLike | None = None,
    holds: Sequence[ArrayLike | None] | None = None,
    skip: int = 1,
    skip_beside: bool = False,
    save: bool = True,
) -> Result:
    """Run a stack of recurrent layers over a batch of sequences.

    With T steps, B samples, L layers, D directions (1 or 2), input size I, hidden size H and output
    size P (= H, or proj_size), all arrays in one floating dtype, in which all is computed:

    Args:
        cell: a name in CELLS.
        x: (T, B, I).
        states: initial h (L*D, B, P) and, of an LSTM, c (L*D, B, H). None: zeros.
        weights: per layer, per direction: weight_ih (G*H, I or D*P), weight_hh (G*H, P), with
            ``bias`` also bias_ih and bias_hh (G*H,), with projection also weight_hr (P, H), then
            what the cell has besides. These are torch's shapes, order and gate order:
            ``module._flat_weights`` fits.
        lengths: (B,) integers in 0 .. T, in any order. Outputs past a sample's length are zero, its
            final state is that after its own last step, and the reverse direction begins there:
            as with torch's PackedSequence, which knows no length 0 (here: the state is unchanged).
        dropout_masks: (L-1, T, B, D*P), multiplied onto the outputs between layers; already scaled.
        options: of the cell, if it is one that has them.
        reset: (T, B) bools: where the states are zero before a step, as in a new sequence.
        recurrent_masks: (L*D, B, P), multiplied onto h wherever it is multiplied by weight_hh, at
            every step of a sample the same; already scaled.
        holds: of each state (L*D, T, B, H): the part of it that a step leaves as it was; zeros and
            ones where it was drawn. None, or None for one of them: the options' zoneout.
        skip: the delay d of the recurrent links, which makes the states, given and returned, those
            of d steps, oldest first (of the reverse direction nearest first): (L*D, d*B, .).
        skip_beside: the delayed link of h is beside that of length one, and has weights of its own,
            weight_skip (G*H, P), the last of each layer and direction; c is of one step then.
        save: False keeps nothing for ``backward``: the tape is None.

    Raises:
        ValueError: a shape, size or name is wrong. TypeError: a dtype is.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    kind = check_options(CELLS[cell], options)
    directions = 2 if bidirectional else 1
    x = check_input(x)
    check_skip(skip, skip_beside)
    sizes, weights_of = check_weights(kind, weights, x, num_layers, directions, bias, skip_beside)
    steps, batch, _ = x.shape
    several = [skip, 1 if skip_beside else skip]  # steps of which there is each state
    initial = check_states(kind, states, x, len(weights_of), batch, sizes, several)
    packing = Packing.of(steps, batch, check_lengths(lengths, steps, batch))
    output_shape = (steps, batch, directions * sizes.output)
    padded_masks = check_dropout_masks(dropout_masks, x, (num_layers - 1, *output_shape))
    anew = check_reset(reset, steps, batch)
    count = len(weights_of)
    of_samples = check_recurrent_masks(recurrent_masks, kind, x, (count, batch, sizes.output))
    padded_holds = check_holds(holds, kind, x, (count, steps, batch), sizes)

    new_rows = None if anew is None else packing.pack(anew[:, :, None])[:, 0]
    if of_samples is not None:
        of_samples = packing.sort(of_samples)
    masks = [packing.pack(mask) for mask in padded_masks]
    shapes = [state.shape for state in initial]
    before = [_by_step(state, batch, packing) for state in initial]
    rows = packing.pack(x)
    tapes: list[sequence.SequenceTape] = []
    finals: list[list[Array]] = []
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN pass silently, as in torch
        for layer in range(num_layers):
            if layer > 0 and masks:
                rows = rows * masks[layer - 1]
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                output, final, tape = sequence.forward(
                    kind,
                    rows,
                    [_in_order(state[index], direction) for state in before],
                    weights_of[index],
                    packing.batch_sizes,
                    reverse=direction == 1,
                    extras=sequence.Extras(
                        new_rows,
                        None if of_samples is None else of_samples[index],
                        [None if h is None else packing.pack(h[index]) for h in padded_holds],
                        skip,
                    ),
                    save=save,
                )
                outputs.append(output)
                finals.append([_in_order(state, direction) for state in final])
                if tape is not None:
                    tapes.append(tape)
            rows = np.concatenate(outputs, axis=1)
    final_states = [_together(group, packing) for group in zip(*finals, strict=True)]
    return Result(
        packing.unpack(rows),
        final_states,
        Tape(tapes, packing, masks, output_shape, shapes, directions) if save else None,
    )


def backward(
    tape: Tape | None,
    grad_output: ArrayLike | None = None,
    grad_states: Sequence[ArrayLike | None] | None = None,
) -> Gradients:
    """Backpropagation through time.

    Args:
        tape: of ``forward``. It is not consumed and may serve again.
        grad_output: gradient of the loss by ``Result.output``, (T, B, D*P). None: zeros. What it
            holds past a sample's length has no influence.
        grad_states: gradients by ``Result.states``, of the same shapes. None, or None for one of
            them: zeros.

    Returns:
        The gradients by the input (zero past each sample's length), by the initial states and by
        the weights, as lists in the order in which ``forward`` takes them.

    Raises:
        ValueError: a shape is wrong, or the tape is None. TypeError: a dtype is wrong.
    """
    if tape is None:
        raise ValueError("the tape is None: call forward with save=True")
    packing, directions = tape.packing, tape.directions
    output_grad, state_grads = check_grads(
        grad_output, grad_states, tape.sequences[0].rows, tape.output_shape, tape.state_shapes
    )
    grad_rows = packing.pack(output_grad)
    finals = [_by_step(grad, packing.batch, packing) for grad in state_grads]
    initials: list[list[Array]] = [[]] * len(tape.sequences)
    weights: list[list[Array]] = [[]] * len(tape.sequences)
    with np.errstate(over="ignore", invalid="ignore"):
        for layer in reversed(range(len(tape.sequences) // directions)):
            grad_inputs = []
            for direction, grad in enumerate(np.split(grad_rows, directions, axis=1)):
                index = layer * directions + direction
                gradients = sequence.backward(
                    tape.sequences[index],
                    grad,
                    [_in_order(state[index], direction) for state in finals],
                )
                grad_inputs.append(gradients.rows)
                initials[index] = [_in_order(state, direction) for state in gradients.states]
                weights[index] = _as_given(gradients.weights, tape.sequences[index].weights)
            grad_rows = grad_inputs[0] if directions == 1 else grad_inputs[0] + grad_inputs[1]
            if layer > 0 and tape.masks:
                grad_rows = grad_rows * tape.masks[layer - 1]
    return Gradients(
        packing.unpack(grad_rows),
        [_together(group, packing) for group in zip(*initials, strict=True)],
        [gradient for group in weights for gradient in group],
    )


def _by_step(states: Array, batch: int, packing: Packing) -> Array:
    """States of d steps, (K, d*B, F), as (K, d, B, F) in the order of the packed rows."""
    count, rows, size = states.shape
    several = rows // batch if batch else 1
    apart = states.reshape(count * several, batch, size)
    return packing.sort(apart).reshape(count, several, batch, size)


def _together(states: Sequence[Array], packing: Packing) -> Array:
    """The inverse of ``_by_step``, from the (d, B, F) of each layer and direction."""
    several, batch, size = states[0].shape
    joined = packing.unsort(np.concatenate(states))
    return joined.reshape(len(states), several * batch, size)


def _in_order(states: Array, direction: int) -> Array:
    """(d, B, F): from the caller's order, or to it; of a reverse one it is the nearest first."""
    return states[::-1] if direction else states


def _as_given(gradients: Weights, weights: Weights) -> list[Array]:
    """The gradients in the order of the weights, each of which must have one."""
    assert gradients.keys() == weights.keys(), "a cell's weight_gradients does not name its weights"
    return [gradients[name] for name in weights]
