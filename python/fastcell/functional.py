"""Recurrent layers as functions: no state, no parameters of their own, one call per stack.

:func:`rnn`, :func:`lstm` and :func:`gru` take the input, the initial states and a flat list of
weights. The modules of :mod:`fastcell.modules` are the same with parameters attached: both end in
:func:`fastcell.stack.run_stack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .cells import (
    check_skip,
    checked_probability,
    gru_cell,
    independent_cell,
    lstm_cell,
    rnn_cell,
    spec_of,
    weights_per_direction,
)
from .checks import autocast_enabled
from .layer_skip import SkippingSizes, run_skipping
from .normed import weights_each
from .stack import Sizes, Stack, States, refuse_sizes, run_normed, run_packed, run_stack, two_states
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

In = TypeVar("In", Tensor, PackedSequence)  # the output has the type of the input


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
    skip: int = 1,
    skip_beside: bool = False,
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
        skip: the delay d of the recurrent links; ``hx`` and h_n are then of d steps, as
            :class:`fastcell.RNN` says.
        skip_beside: beside the links of length one; then the weights of each layer and direction
            end with ``weight_skip``, as :class:`fastcell.RNN` says.

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
        recurrent_dropout, lengths, reset, skip, skip_beside,
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
    skip: int = 1,
    skip_beside: bool = False,
) -> tuple[In, Tensor]:
    """Leaky units, h_t = alpha h_{t-1} + (1 - alpha) tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Arguments, shapes, results and errors are those of :func:`rnn`, except that each layer and
    direction has one more weight after the biases: ``weight_leak`` (1, H), the alphas.

    Source: I. Goodfellow et al., Deep Learning (2016), chapter 10.9.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    output, states = _run(
        "leaky_" + nonlinearity, input, None if hx is None else (hx,), weights, batch_sizes,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        recurrent_dropout, lengths, reset, skip, skip_beside,
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
    skip: int = 1,
    skip_beside: bool = False,
) -> tuple[In, Tensor]:
    """Independent units, h_t = phi(W_ih x_t + b_ih + w_hh h_{t-1} + b_hh), w_hh a number per unit.

    Arguments, shapes, results and errors are those of :func:`rnn`, except that ``weight_hh`` is
    (1, H), and that ``nonlinearity`` may be any that :func:`lstm` knows.

    Source: S. Li et al., Independently recurrent neural network, CVPR (2018).
    """
    output, states = _run(
        independent_cell(nonlinearity, zoneout), input, None if hx is None else (hx,), weights,
        batch_sizes, num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        0.0, lengths, reset, skip, skip_beside,
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
    skip: int = 1,
    skip_beside: bool = False,
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
            whether there is a projection. With ``peephole``, after these, ``weight_peephole`` (3,
            H), rows i, f, o. With ``coupled`` there are three gates, i, g, o, in place of four, and
            two rows of peepholes, i and o.
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
            reset, recompute, recurrent_dropout, skip, skip_beside: as for :func:`rnn`. (With
            ``skip_beside``, c is of one step.)

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
        plain = plain and skip == 1 and not skip_beside
        output, states = _normed(
            lstm_cell(peephole, coupled), input, None if hx is None else two_states(hx), weights,
            batch_sizes, num_layers, bias, batch_first, dropout, bidirectional, training, lengths,
            reset,
            plain and zoneout in (0, (0, 0)) and recurrent_dropout == 0,
        )  # fmt: skip
        return output, (states[0], states[1])
    spec = spec_of(lstm_cell(peephole, coupled))
    each = weights_per_direction(bias, True, parameters=spec.rows) + skip_beside
    cell = lstm_cell(
        peephole, coupled, activation=activation, output_activation=output_activation,
        clip=cell_clip, zoneout=zoneout,
        projected=len(weights) == each * num_layers * (2 if bidirectional else 1),
    )  # fmt: skip
    output, states = _run(
        cell, input, None if hx is None else two_states(hx), weights,
        batch_sizes,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        recurrent_dropout, lengths, reset, skip, skip_beside,
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
    skip: int = 1,
    skip_beside: bool = False,
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
        plain = plain and skip == 1 and not skip_beside
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
        recurrent_dropout, lengths, reset, skip, skip_beside,
    )  # fmt: skip
    return output, states[0]


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
        return cast("tuple[In, States]", found)
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
    skip: int,
    skip_beside: bool,
) -> tuple[In, States]:
    """A public function's call: the sizes are read off the weights of the first layer."""
    spec = spec_of(cell)
    if num_layers < 1:
        raise ValueError("num_layers must be greater than zero")
    stacked = num_layers * (2 if bidirectional else 1)
    check_skip(skip, skip_beside)
    plain = weights_per_direction(bias, False, parameters=spec.rows) + skip_beside
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
    stack = SkippingSizes(
        w_ih.shape[1], w_ih.shape[0] // spec.gates, w_hh.shape[1] if projected else 0,
        num_layers, bias, batch_first, dropout, bidirectional, training, recompute,
        checked_probability("recurrent_dropout", recurrent_dropout), skip, skip_beside,
    )  # fmt: skip

    def refuse(input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        _refuse(stack, w_ih.dtype, input, states or (), batch_sizes)

    if batch_sizes is None and skip > 1:
        found = run_skipping(stack, cell, input, states, lengths, reset, list(weights))
        return cast("tuple[In, States]", found)
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
    if skip > 1:
        output, states = run_skipping(stack, cell, packed, states, None, reset, list(weights))
        return cast("PackedSequence", output).data, states
    packed, states = run_packed(stack, cell, packed, states, weights, refuse, reset=reset)
    return packed.data, states


def _refuse(
    stack: Stack, dtype: torch.dtype, input: Tensor, states: States, batch_sizes: Tensor | None
) -> None:
    if input.dtype != dtype and not autocast_enabled():
        raise ValueError(f"input is {input.dtype}, but the weights are {dtype}")
    refuse_sizes(stack, input, states, batch_sizes)
