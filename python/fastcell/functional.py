"""Recurrent layers as functions: no state, no parameters of their own, one call per stack.

:func:`rnn`, :func:`lstm` and :func:`gru` take the input, the initial states and a flat list of
weights. The modules of :mod:`fastcell.modules` are the same with parameters attached: both end in
:func:`run_stack`, which turns every form of input into the one that the operators take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .cells import (
    checked_probability,
    gru_cell,
    independent_cell,
    lstm_cell,
    rnn_cell,
    spec_of,
    weights_per_direction,
)
from .checks import autocast_enabled, check_batch_sizes, check_tensors
from .normed import weights_each
from .ragged import checked_lengths, run_ragged, values_of
from .trees.functional import tree_lstm, tree_rnn

__all__ = [
    "gru",
    "independent_rnn",
    "leaky_rnn",
    "lstm",
    "rnn",
    "tree_lstm",
    "tree_rnn",
]

Sequences: TypeAlias = Tensor | PackedSequence
In = TypeVar("In", Tensor, PackedSequence)  # the output has the type of the input
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
    recurrent_dropout: float


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
    recurrent_dropout: float


def rnn(
    input: In,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
) -> tuple[In, Tensor]:
    """An Elman network, h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), in layers.

    With T steps, batch B, I input features, H hidden units, L layers and D directions:

    Args:
        input: (T, B, I); with ``batch_first`` (B, T, I); without a batch (T, I); a PackedSequence;
            or the rows of one, (sum of batch_sizes, I), together with ``batch_sizes``.
        hx: h_0 of shape (L*D, B, H), without a batch (L*D, H); None for zeros. With ``batch_sizes``
            its batch is in the order of the packed rows, longest sequence first.
        weights: in one flat list, per layer and direction: ``weight_ih`` (H, I) (above the first
            layer (H, D*H)), ``weight_hh`` (H, H) and, with ``bias``, ``bias_ih`` (H,) and
            ``bias_hh`` (H,).
        nonlinearity: ``"tanh"`` or ``"relu"``.
        dropout: probability with which an element between two layers is zeroed, if ``training``.
        batch_sizes: int64 CPU tensor (T,): how many sequences are alive at each step.
        lengths: (B,) integers, the steps of each sample of a padded batch, in any order; behind
            them the output is zero and the states stay. On a GPU they may be there, and are not
            waited for; values above T then count as T.
        reset: bool, shaped as the input's steps and samples, (T, B); with ``batch_first`` (B, T),
            without a batch (T,), for a PackedSequence another one of its shape: where the states
            before a step become zero, and no gradient passes.
        recurrent_dropout: probability, if ``training``, with which a unit of h_{t-1} is not seen by
            the recurrent product, the same units in all steps of a sample (Gal & Ghahramani 2016).
        zoneout: probability with which a unit keeps its h, drawn for each step if ``training``;
            else h_t is the expectation (Krueger et al. 2016).
        recompute: training with O(sqrt(T)) memory, as in :class:`fastcell.RNN`.

    Returns:
        The output in the input's layout, (T, B, D*H), and h_n of shape (L*D, B, H).

    Raises:
        TypeError: a weight is not a tensor.
        ValueError: unknown ``nonlinearity``, wrong rank, or input and weights of two dtypes.
        RuntimeError: sizes, devices or dtypes that do not belong together, or no time step.

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14 (1990).
    """
    output, states = _run(
        rnn_cell(nonlinearity, zoneout), input, None if hx is None else (hx,), weights, batch_sizes,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        recurrent_dropout, lengths, reset,
    )  # fmt: skip
    return output, states[0]


def leaky_rnn(
    input: In,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    recurrent_dropout: float = 0.0,
) -> tuple[In, Tensor]:
    """Leaky units, h_t = alpha h_{t-1} + (1 - alpha) tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Arguments, shapes, results and errors are those of :func:`rnn`, except that each layer and
    direction has one more weight at the end: ``weight_leak`` (1, H), the alphas.

    Source: I. Goodfellow et al., Deep Learning (2016), chapter 10.9.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    output, states = _run(
        "leaky_" + nonlinearity, input, None if hx is None else (hx,), weights, batch_sizes,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        recurrent_dropout, lengths, reset,
    )  # fmt: skip
    return output, states[0]


def independent_rnn(
    input: In,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "relu",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    zoneout: float = 0.0,
) -> tuple[In, Tensor]:
    """Independent units, h_t = phi(W_ih x_t + b_ih + w_hh h_{t-1} + b_hh), w_hh a number per unit.

    Arguments, shapes, results and errors are those of :func:`rnn`, except that ``weight_hh`` is
    (1, H), and that ``nonlinearity`` may be any that :func:`lstm` knows.

    Source: S. Li et al., Independently recurrent neural network, CVPR (2018).
    """
    output, states = _run(
        independent_cell(nonlinearity, zoneout), input, None if hx is None else (hx,), weights,
        batch_sizes, num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        0.0, lengths, reset,
    )  # fmt: skip
    return output, states[0]


def lstm(
    input: In,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float | tuple[float, float] = 0.0,
    peephole: bool = False,
    coupled: bool = False,
    activation: str = "tanh",
    output_activation: str = "tanh",
    cell_clip: float | None = None,
    layer_norm: bool = False,
) -> tuple[In, tuple[Tensor, Tensor]]:
    """Long short-term memory in layers, gates in the order i, f, g, o, with optional projection.

    With T steps, batch B, I input features, H memory cells, P outputs per step (H, or less with a
    projection), L layers and D directions:

    Args:
        input: as for :func:`rnn`.
        hx: (h_0, c_0) of shapes (L*D, B, P) and (L*D, B, H), without a batch (L*D, P) and (L*D, H);
            None for zeros.
        weights: in one flat list, per layer and direction: ``weight_ih`` (4*H, I) (above the first
            layer (4*H, D*P)), ``weight_hh`` (4*H, P), with ``bias`` also ``bias_ih`` (4*H,) and
            ``bias_hh`` (4*H,), and for a projection ``weight_hr`` (P, H). Their number tells
            whether there is a projection. With ``peephole``, last, ``weight_peephole`` (3, H), rows
            i, f, o. With ``coupled`` there are three gates, i, g, o, in place of four, and two rows
            of peepholes, i and o.
        peephole: the gates also see the cell: i and f c_{t-1}, o c_t.
        coupled: f = 1 - i.
        activation, output_activation: of g, and of c before the output gate: ``"tanh"``,
            ``"relu"``, ``"sigmoid"``, ``"identity"``, ``"softsign"`` or ``"elu"``.
        cell_clip: bound on the arguments of all gates: ``clip`` as onnxruntime has it.
        zoneout: of h and c, or a pair; with a projection of c alone, ``(0, p)``.
        layer_norm: the weights of each layer and direction end with ``norm_ih`` and ``norm_hh``
            (G*H,) and ``norm_c`` (2, H), as :class:`fastcell.LSTM` says; with ``peephole`` and
            ``coupled`` and no other option.
        bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes, lengths,
            reset, recompute, recurrent_dropout: as for :func:`rnn`.

    Returns:
        The output in the input's layout, (T, B, D*P), and (h_n, c_n), shaped as ``hx``.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`rnn`.

    Source: S. Hochreiter and J. Schmidhuber, Neural Computation 9 (1997); F. Gers et al. (2000)
    for the forget gate; H. Sak et al. (2014) for the projection; F. Gers and J. Schmidhuber (2000)
    for peepholes; K. Greff et al. (2015) for coupled gates.
    """
    if layer_norm:
        plain = activation == output_activation == "tanh" and cell_clip is None and not recompute
        output, states = _normed(
            lstm_cell(peephole, coupled), input, None if hx is None else two_states(hx), weights,
            batch_sizes, num_layers, bias, batch_first, dropout, bidirectional, training, lengths,
            reset,
            plain and zoneout in (0, (0, 0)) and recurrent_dropout == 0,
        )  # fmt: skip
        return output, (states[0], states[1])
    spec = spec_of(lstm_cell(peephole, coupled))
    each = weights_per_direction(bias, True, parameters=spec.rows)
    cell = lstm_cell(
        peephole, coupled, activation=activation, output_activation=output_activation,
        clip=cell_clip, zoneout=zoneout,
        projected=len(weights) == each * num_layers * (2 if bidirectional else 1),
    )  # fmt: skip
    output, states = _run(
        cell, input, None if hx is None else two_states(hx), weights,
        batch_sizes,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        recurrent_dropout, lengths, reset,
    )  # fmt: skip
    return output, (states[0], states[1])


def gru(
    input: In,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    recompute: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    reset_after: bool = True,
    activation: str = "tanh",
    layer_norm: bool = False,
) -> tuple[In, Tensor]:
    """Gated recurrent units in layers, gates in the order r, z, n.

    The reset gate comes after the product with h_{t-1}, n = tanh(W x + b + r * (U h + b_h)); with
    ``reset_after=False`` before it, n = tanh(W x + b + U (r * h) + b_h).

    Arguments, shapes, results and errors are those of :func:`rnn`, except that ``weight_ih`` is
    (3*H, I) (above the first layer (3*H, D*H)), ``weight_hh`` (3*H, H) and each bias (3*H,), and
    ``activation`` is n's, as for :func:`lstm`. With ``layer_norm`` the weights of each layer and
    direction end with ``norm_ih`` and ``norm_hh`` (3*H,), as :class:`fastcell.GRU` says.

    Source: K. Cho et al. (2014), where the reset gate comes before the product; after it in cuDNN.
    """
    if layer_norm:
        plain = reset_after and activation == "tanh" and not recompute
        output, states = _normed(
            "gru", input, None if hx is None else (hx,), weights, batch_sizes, num_layers, bias,
            batch_first, dropout, bidirectional, training, lengths, reset,
            plain and zoneout == 0 and recurrent_dropout == 0,
        )  # fmt: skip
        return output, states[0]
    output, states = _run(
        gru_cell(reset_after, activation=activation, zoneout=zoneout), input,
        None if hx is None else (hx,), weights, batch_sizes,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        recurrent_dropout, lengths, reset,
    )  # fmt: skip
    return output, states[0]


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
        layer, cell, input, states, weights, refuse, launch, lengths=lengths, reset=reset
    )


def two_states(hx: Sequence[Tensor]) -> States:
    """(h, c) of an LSTM's ``hx``, refused in torch's words unless it has two parts."""
    states = (hx[0], hx[1])
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    return states


def _normed(
    cell: str,
    input: In,
    states: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    bidirectional: bool,
    training: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    plain: bool,
) -> tuple[In, States]:
    """A public function's call with layer normalisation; ``plain``: and with what goes with it."""
    if not plain:
        raise ValueError(
            "layer_norm goes with peephole and coupled, with no other option and no recompute"
        )
    each = weights_each(cell, bias, False)
    stacked = num_layers * (2 if bidirectional else 1)
    projected = spec_of(cell).projection and len(weights) == (each + 1) * stacked
    if len(weights) != each * stacked and not projected:
        raise RuntimeError(
            f"Expected {each} weights for each of {stacked} layers and directions, or one more for "
            f"a projection of an LSTM, got {len(weights)}"
        )
    w_ih, w_hh = weights[0], weights[1]
    sizes = Sizes(
        w_ih.shape[1], w_ih.shape[0] // spec_of(cell).gates,
        w_hh.shape[1] if projected else 0, num_layers, bias, batch_first, dropout, bidirectional,
        training, False, 0.0,
    )  # fmt: skip

    def refuse(input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        _refuse(sizes, w_ih.dtype, input, states or (), batch_sizes)

    if batch_sizes is None:
        found = run_normed(sizes, cell, input, states, weights, refuse, lengths, reset)
        return cast(tuple[In, States], found)
    if isinstance(input, PackedSequence) or lengths is not None:
        raise ValueError("batch_sizes goes with the rows of a PackedSequence alone")
    packed = PackedSequence(input, batch_sizes)
    output, states = run_normed(sizes, cell, packed, states, weights, refuse, None, reset)
    assert isinstance(output, PackedSequence)
    return output.data, states


def _run(
    cell: str,
    input: In,
    states: States | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    bidirectional: bool,
    training: bool,
    recompute: bool,
    recurrent_dropout: float,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[In, States]:
    """A public function's call: the sizes are read off the weights of the first layer."""
    spec = spec_of(cell)
    if num_layers < 1:
        raise ValueError("num_layers must be greater than zero")
    stacked = num_layers * (2 if bidirectional else 1)
    plain = weights_per_direction(bias, False, parameters=spec.rows)
    projected = spec.projection and len(weights) == stacked * (plain + 1)
    if len(weights) != stacked * plain and not projected:
        raise RuntimeError(
            f"Expected {plain} weights for each of {stacked} layers and directions, or "
            f"{plain + 1} with a projection, got {len(weights)}"
            if spec.projection
            else f"Expected {plain} weights for each of {stacked} layers and directions, "
            f"got {len(weights)}"
        )
    w_ih, w_hh = weights[0], weights[1]
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(
            f"Expected weight_ih and weight_hh of 2 dimensions, got {w_ih.dim()} and {w_hh.dim()}"
        )
    stack = Sizes(
        w_ih.shape[1], w_ih.shape[0] // spec.gates, w_hh.shape[1] if projected else 0,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        checked_probability("recurrent_dropout", recurrent_dropout),
    )  # fmt: skip

    def refuse(input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        _refuse(stack, w_ih.dtype, input, states or (), batch_sizes)

    if batch_sizes is None:
        output, states = run_stack(
            stack, cell, input, states, weights, refuse, lengths=lengths, reset=reset
        )
        return cast(In, output), states
    if lengths is not None:
        raise ValueError("lengths go with a padded batch: batch_sizes say how long samples are")
    if isinstance(input, PackedSequence):
        raise ValueError("batch_sizes goes with the rows of a PackedSequence, not with the whole")
    packed = PackedSequence(input, batch_sizes)
    packed, states = _run_packed(stack, cell, packed, states, weights, refuse, reset=reset)
    return packed.data, states


def _refuse(
    stack: Stack, dtype: torch.dtype, input: Tensor, states: States, batch_sizes: Tensor | None
) -> None:
    if input.dtype != dtype and not autocast_enabled():
        raise ValueError(f"input is {input.dtype}, but the weights are {dtype}")
    refuse_sizes(stack, input, states, batch_sizes)


def refuse_sizes(stack: Stack, input: Tensor, states: States, batch_sizes: Tensor | None) -> None:
    """Raise RuntimeError or ValueError that names the first wrong size of a call, if any."""
    if batch_sizes is not None and input.dim() != 2:
        raise ValueError(f"packed input must have 2 dimensions, got {input.dim()}")
    if input.shape[-1] != stack.input_size:
        raise RuntimeError(
            f"Expected input with {stack.input_size} features, got {input.shape[-1]}"
        )
    batch = input.shape[0 if stack.batch_first else 1] if batch_sizes is None else batch_sizes[0]
    sizes = (stack.proj_size or stack.hidden_size, stack.hidden_size)
    layers = stack.num_layers * (2 if stack.bidirectional else 1)
    for state, size, name in zip(states, sizes, ("h_0", "c_0"), strict=False):
        expected = [layers, int(batch), size]
        if list(state.shape) != expected:
            raise RuntimeError(f"Expected {name} of size {expected}, got {list(state.shape)}")


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
) -> tuple[Sequences, States]:
    """Run a stack on any form of input; the final states have the form of ``states``.

    Ranks, devices, dtypes and the weights' shapes are refused here, in torch's words; ``refuse``
    finds the words for a wrong size or dtype of the input or a wrong size of the states. With
    ``launch`` that is what runs, and refuses all but sizes itself; ``weights`` are not looked at.
    """
    if lengths is not None:
        return _run_lengths(layer, cell, input, states, weights, refuse, launch, lengths, reset)
    if isinstance(input, PackedSequence):
        return _run_packed(layer, cell, input, states, weights, refuse, launch, reset)
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


def _run_packed(
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
) -> tuple[Tensor, States]:
    if isinstance(input, PackedSequence) or input.dim() != 3:
        got = "a PackedSequence" if isinstance(input, PackedSequence) else f"{input.dim()}-D input"
        raise ValueError(f"lengths go with a padded batch of 3 dimensions, got {got}")
    if states is not None and any([state.dim() != 3 for state in states]):
        _refuse_rank("batched 3-D", 3, states)
    steps, batch, _ = input.shape
    if layer.batch_first:
        steps, batch = batch, steps
    lengths = checked_lengths(lengths, batch, steps)
    if reset is not None:
        reset = checked_reset(reset, input, layer.batch_first)
    if not lengths.is_cpu and lengths.device != input.device:
        raise RuntimeError(
            f"lengths must be on the CPU or the input's device, got {lengths.device} and "
            f"{input.device}"
        )
    values = values_of(lengths)
    if values and min(values) == steps:
        return _launch(
            layer, cell, input, states, weights, None, steps, batch, refuse, launch, reset
        )
    # The kernels read lengths. What runs around them on a CPU takes rows.
    whole = lengths.device == input.device and launch is None and not layer.recompute
    if not lengths.is_cpu or whole:
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
    dropout, training = layer.dropout, layer.training
    if dropout and not 0 <= dropout <= 1 and training and num_layers > 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout:g}")
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
        dropout=dropout,
        training=training,
        recompute=layer.recompute,
        recurrent_dropout=layer.recurrent_dropout,
        reset=reset,
    )
