"""One call of a stack of layers, whatever the form of its input.

Padded, without a batch, packed, with lengths: :func:`run_stack` turns each into the form that the
operators take. Sizes, ranks and dtypes are refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .cells import spec_of
from .checks import check_batch_sizes, check_tensors
from .ragged import checked_lengths, run_ragged, values_of

Sequences: TypeAlias = Tensor | PackedSequence
States: TypeAlias = tuple[Tensor, ...]
# Called with (input, states, batch_sizes) where a size or the dtype is not the expected one. It
# raises in its owner's words, or returns where the difference is allowed (autocast).
Refuse: TypeAlias = Callable[[Tensor, States | None, Tensor | None], None]
# Runs what is no plain stack of torch's weights: called with (cell, input, states, batch_sizes,
# steps, reset) once the sizes are known to be right.
Launch: TypeAlias = Callable[
    [str, Tensor, States | None, Tensor | None, int, Tensor | None], tuple[Tensor, States]
]


class Stack(Protocol):
    """What :func:`run_stack` reads of a layer; torch.nn.RNNBase has these attributes."""

    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    training: bool
    recompute: bool

    @property
    def recurrent_dropout(self) -> float | Tensor: ...  # a probability, or the factors


@dataclass
class Sizes:
    """A :class:`Stack` of its own."""

    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    training: bool
    recompute: bool
    recurrent_dropout: float | Tensor


def run_normed(
    layer: Stack,
    cell: str,
    input: Sequences,
    states: States | None,
    weights: Sequence[Tensor],
    refuse: Refuse,
    lengths: Tensor | None,
    reset: Sequences | None,
) -> tuple[Sequences, States]:
    """A stack with layer normalisation, on any form of input, as :func:`run_stack` runs others."""

    def launch(
        cell: str,
        input: Tensor,
        states: States | None,
        batch_sizes: Tensor | None,
        steps: int,
        reset: Tensor | None,
    ) -> tuple[Tensor, States]:
        return ops.normed(
            cell, input, states, weights, batch_sizes, reset, bias=layer.bias,
            projected=layer.proj_size > 0, directions=2 if layer.bidirectional else 1,
            batch_first=layer.batch_first, dropout=layer.dropout if layer.training else 0.0,
        )  # fmt: skip

    return run_stack(
        layer, cell, input, states, weights, refuse, launch, lengths=lengths, reset=reset,
        rows_alone=True,
    )  # fmt: skip


def two_states(hx: Sequence[Tensor]) -> States:
    """(h, c) of an LSTM's ``hx``, refused in torch's words unless it has two parts."""
    states = (hx[0], hx[1])
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    return states


def refuse_sizes(stack: Stack, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
    """Raise RuntimeError or ValueError that names the first wrong size of a call, if any."""
    if batch_sizes is not None and input.dim() != 2:
        raise ValueError(f"packed input must have 2 dimensions, got {input.dim()}")
    if input.shape[-1] != stack.input_size:
        raise RuntimeError(
            f"Expected input with {stack.input_size} features, got {input.shape[-1]}"
        )
    batch = input.shape[0 if stack.batch_first else 1] if batch_sizes is None else batch_sizes[0]
    refuse_states(stack, states, (int(batch), int(batch)))


def refuse_states(stack: Stack, states: States, rows: tuple[int, int]) -> None:
    """Raise RuntimeError that names the first state that is not (L*D, rows, .), if any."""
    sizes = (stack.proj_size or stack.hidden_size, stack.hidden_size)
    layers = stack.num_layers * (2 if stack.bidirectional else 1)
    for name, state, n, size in zip(("h_0", "c_0"), states, rows, sizes, strict=False):
        expected = [layers, n, size]
        if list(state.shape) != expected:
            raise RuntimeError(f"Expected {name} of size {expected}, got {list(state.shape)}")


def refuse_dropout(stack: Stack) -> None:
    """Raise RuntimeError if what a call would draw with is no probability."""
    p = stack.dropout
    if p and not 0 <= p <= 1 and stack.training and stack.num_layers > 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p:g}")


# The title that a layer's messages start with, and the end of the one about its input's rank.
_TITLES = {"lstm": ("LSTM", "D"), "gru": ("GRU", "D")}
_OTHER_TITLE = ("RNN", "D tensor")


def run_stack(
    layer: Stack,
    cell: str,
    input: Sequences,
    states: States | None,
    weights: Sequence[Tensor],
    refuse: Refuse,
    launch: Launch | None = None,
    lengths: Tensor | None = None,
    reset: Sequences | None = None,
    rows_alone: bool = False,
) -> tuple[Sequences, States]:
    """Run a stack on any form of input; the final states have the form of ``states``.

    Ranks, devices, dtypes and the weights' shapes are refused here, in torch's words; ``refuse``
    finds the words for a wrong size or dtype of the input or a wrong size of the states. With
    ``launch`` that is what runs, and refuses all but sizes itself; ``weights`` are not looked at.
    ``rows_alone``: on a CPU it takes rows, and no lengths.
    """
    if lengths is not None:
        return _run_lengths(
            layer, cell, input, states, weights, refuse, launch, lengths, reset, rows_alone
        )
    if isinstance(input, PackedSequence):
        return run_packed(layer, cell, input, states, weights, refuse, launch, reset)
    rank = input.dim()
    if rank == 3:
        if states is not None:
            for state in states:
                if state.dim() != 3:
                    _refuse_rank("batched 3-D", 3, states)
        steps, batch, _ = input.shape
        if layer.batch_first:
            steps, batch = batch, steps
        if reset is not None:
            reset = checked_reset(reset, input, layer.batch_first)
        return _launch(
            layer, cell, input, states, weights, None, steps, batch, refuse, launch, reset
        )
    if rank == 2:
        return _run_unbatched(layer, cell, input, states, weights, refuse, launch, reset)
    title, d = _TITLES.get(spec_of(cell).name.split("_")[0], _OTHER_TITLE)
    raise ValueError(f"{title}: Expected input to be 2D or 3D, got {rank}{d} instead")


def _run_unbatched(
    layer: Stack,
    cell: str,
    input: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    refuse: Refuse,
    launch: Launch | None,
    reset: Sequences | None,
) -> tuple[Tensor, States]:
    if states is not None:
        for state in states:
            if state.dim() != 2:
                _refuse_rank("unbatched 2-D", 2, states)
        states = tuple([state.unsqueeze(1) for state in states])
    at = 0 if layer.batch_first else 1
    steps = input.shape[0]
    if reset is not None:
        reset = checked_reset(reset, input, False)[:, None]
    output, states = _launch(
        layer, cell, input.unsqueeze(at), states, weights, None, steps, 1, refuse, launch, reset
    )
    return output.squeeze(at), tuple([state.squeeze(1) for state in states])


def _refuse_rank(form: str, rank: int, states: States) -> None:
    if len(states) == 1:
        what, got = "hx", f"{states[0].dim()}-D tensor"
    else:
        what, got = "hx and cx", f"({', '.join([f'{s.dim()}-D' for s in states])}) tensors"
    raise RuntimeError(f"For {form} input, {what} should also be {rank}-D but got {got}")


def run_packed(
    layer: Stack,
    cell: str,
    input: PackedSequence,
    states: States | None,
    weights: Sequence[Tensor],
    refuse: Refuse,
    launch: Launch | None = None,
    reset: Sequences | None = None,
) -> tuple[PackedSequence, States]:
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if data.dim() != 2:
        refuse(data, states, batch_sizes)
        raise RuntimeError(f"packed input must have 2 dimensions, got {data.dim()}")
    if states is not None and sorted_indices is not None:
        states = tuple([state.index_select(1, sorted_indices) for state in states])
    batch: int | None
    if torch.compiler.is_compiling():
        # Reading batch_sizes would break the graph; the operator checks them when it runs.
        steps, batch = batch_sizes.shape[0], None
    else:
        steps = check_batch_sizes(batch_sizes, data.shape[0])
        batch = int(batch_sizes[0])
        if states is None and data.is_meta:
            # The operator cannot read a batch size off a tensor that it does not run on.
            states = _zeros(layer, cell, data, batch)
    if reset is not None:
        rows = reset.data if isinstance(reset, PackedSequence) else reset
        reset = checked_reset(rows, data, False)
    output, states = _launch(
        layer, cell, data, states, weights, batch_sizes, steps, batch, refuse, launch, reset
    )
    if unsorted_indices is not None:
        states = tuple([state.index_select(1, unsorted_indices) for state in states])
    return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), states


def _run_lengths(
    layer: Stack,
    cell: str,
    input: Sequences,
    states: States | None,
    weights: Sequence[Tensor],
    refuse: Refuse,
    launch: Launch | None,
    lengths: Tensor,
    reset: Sequences | None,
    rows_alone: bool,
) -> tuple[Tensor, States]:
    if isinstance(input, PackedSequence) or input.dim() != 3:
        got = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D input"
        raise ValueError(f"lengths go with a padded batch of 3 dimensions, got {got}")
    if states is not None and any([state.dim() != 3 for state in states]):
        _refuse_rank("batched 3-D", 3, states)
    steps, batch, _ = input.shape
    if layer.batch_first:
        steps, batch = batch, steps
    lengths = checked_lengths(lengths, batch, steps, input.device)
    if reset is not None:
        reset = checked_reset(reset, input, layer.batch_first)
    values = values_of(lengths)
    if values and min(values) == steps:
        return _launch(
            layer, cell, input, states, weights, None, steps, batch, refuse, launch, reset
        )
    if takes_lengths(layer, input, lengths, rows_alone):
        # (A copy on a CPU: the backward call reads them again, whatever the caller has done.)
        dense = torch.contiguous_format
        lengths = lengths.clone(memory_format=dense) if lengths.is_cpu else lengths.contiguous()
        return _launch(
            layer, cell, input, states, weights, lengths, steps, batch, refuse, launch, reset
        )
    wrong_dtype = launch is None and input.dtype != weights[0].dtype
    _refuse_wrong_sizes(layer, cell, input, states, batch, None, refuse, wrong_dtype)
    if not lengths.any():
        if states is None:
            states = _zeros(layer, cell, input, batch)
        # A call of which nothing is used: dtypes and graph are those of any other call.
        output, finals = _launch(
            layer, cell, _nothing_of(input), states, weights, None, steps, batch, refuse, launch
        )
        kept = [s.to(f.dtype) + _nothing_of(f) for s, f in zip(states, finals, strict=True)]
        return _nothing_of(output), tuple(kept)

    def run(
        rows: Tensor, states: States | None, batch_sizes: Tensor, reset: Tensor | None
    ) -> tuple[Tensor, States]:
        alive = int(batch_sizes[0])
        count = batch_sizes.shape[0]
        return _launch(
            layer, cell, rows, states, weights, batch_sizes, count, alive, refuse, launch, reset
        )

    return run_ragged(input, states, lengths, layer.batch_first, reset, run)


def takes_lengths(layer: Stack, input: Tensor, lengths: Tensor, rows_alone: bool) -> bool:
    """Whether the kernels read the lengths of a call. What runs around them on a CPU takes rows."""
    own = lengths.device == input.device and not rows_alone and not layer.recompute
    return own or not lengths.is_cpu


def checked_reset(reset: Sequences, input: Tensor, batch_first: bool) -> Tensor:
    """``reset`` in the order of time, (T, B), after refusing what does not fit the input."""
    if not isinstance(reset, Tensor):
        raise TypeError(
            f"reset of a padded batch must be a bool tensor, got {type(reset).__name__}"
        )
    shape = input.shape[:-1]
    if reset.dtype is not torch.bool or reset.shape != shape or reset.device != input.device:
        raise ValueError(
            f"reset must be a bool tensor of shape {tuple(shape)} on {input.device}, got "
            f"{reset.dtype} of shape {tuple(reset.shape)} on {reset.device}"
        )
    return reset.t() if batch_first else reset


def _nothing_of(t: Tensor) -> Tensor:
    """Zeros with the graph of ``t``, whatever it holds."""
    return t.where(torch.zeros((), dtype=torch.bool, device=t.device), 0)


def _zeros(layer: Stack, cell: str, input: Tensor, batch: int) -> States:
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: spec_of(cell).states]
    return tuple([input.new_zeros((stacked, batch, size)) for size in sizes])


def _refuse_wrong_sizes(
    layer: Stack,
    cell: str,
    input: Tensor,
    states: States | None,
    batch: int | None,
    batch_sizes: Tensor | None,
    refuse: Refuse,
    wrong_dtype: bool = False,
) -> None:
    """Let ``refuse`` find the words if a size of input or states, or the dtype, is wrong."""
    wrong_size = input.shape[-1] != layer.input_size
    if states is not None and batch is not None:
        stacked = layer.num_layers * (2 if layer.bidirectional else 1)
        if states[0].shape != (stacked, batch, layer.proj_size or layer.hidden_size):
            wrong_size = True
        if spec_of(cell).states == 2 and states[1].shape != (stacked, batch, layer.hidden_size):
            wrong_size = True
    if wrong_size or wrong_dtype:
        # (Of a padded batch's lengths, torch's own checks would think that they are packed.)
        refuse(input, states, None if input.dim() == 3 else batch_sizes)
        if wrong_size:  # a subclass can have checks of its own that let anything pass
            raise RuntimeError("input or initial states are of a wrong size")


def _launch(
    layer: Stack,
    cell: str,
    input: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    steps: int,
    batch: int | None,
    refuse: Refuse,
    launch: Launch | None,
    reset: Tensor | None = None,
) -> tuple[Tensor, States]:
    spec = spec_of(cell)
    hidden_size = layer.hidden_size
    proj_size = layer.proj_size
    num_layers = layer.num_layers
    bidirectional = layer.bidirectional
    directions = 2 if bidirectional else 1

    # Looked at before anything is built: this is all that a right call pays for.
    wrong_dtype = launch is None and input.dtype != weights[0].dtype
    _refuse_wrong_sizes(layer, cell, input, states, batch, batch_sizes, refuse, wrong_dtype)
    if launch is not None:
        return launch(cell, input, states, batch_sizes, steps, reset)

    check_tensors(
        input, states, weights, steps, spec,
        layer.input_size, hidden_size, proj_size, num_layers, directions, layer.bias,
    )  # fmt: skip
    refuse_dropout(layer)
    return ops.sequence(
        cell,
        input,
        states,
        weights,
        batch_sizes,
        num_layers=num_layers,
        bidirectional=bidirectional,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        training=layer.training,
        recompute=layer.recompute,
        recurrent_dropout=layer.recurrent_dropout,
        reset=reset,
    )
