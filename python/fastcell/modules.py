"""RNN, LSTM and GRU, and what is built on them: torch.nn's layers with fastcell's kernels.

They do not derive from torch.nn.RNN, LSTM and GRU, since torch.compile gives up on every subclass
of those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from .cells import (
    cell_of,
    check_skip,
    checked_alpha,
    gru_cell,
    independent_cell,
    lstm_cell,
    rnn_cell,
)
from .checks import autocast_enabled
from .layer import HiddenLayer, Layer, forward_of
from .stack import Sequences, States, two_states

__all__ = ["GRU", "LSTM", "RNN", "IndRNN", "LeakyRNN"]


class RNN(HiddenLayer):
    """A stack of Elman layers, h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Drop-in for torch.nn.RNN.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        num_layers: layers, each fed with the one below, L.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether there are ``bias_ih_l*`` and ``bias_hh_l*``.
        batch_first: input and output are (B, T, ·) instead of (T, B, ·).
        dropout: probability of dropping an element between layers, in training.
        bidirectional: a second direction, backwards in time, concatenated; D = 2, else 1.
        device, dtype: of the parameters.
        zoneout: probability with which a unit keeps its h for a step, drawn in training for each
            step; else h is the expectation of that (Krueger et al. 2016).
        recurrent_dropout: probability with which, in training, the recurrent product does not see a
            unit, the same ones in all steps of a sample (Gal and Ghahramani 2016).
        weight_dropout: the same for single weights ``weight_hh_l*``, in all samples and steps of a
            call (DropConnect; Merity et al. 2017).
        skip: the delay d of the recurrent links: h_t sees h_{t-d} in place of h_{t-1} (dilated;
            Chang et al. 2017). The states, given and returned, are then those of d steps, oldest
            first (of the reverse direction nearest first): (L*D, d*B, H).
        skip_beside: h_t sees h_{t-d} beside h_{t-1}, through ``weight_skip_l*`` (shaped as
            ``weight_hh_l*``; Lin et al. 1996). h is then given and returned for d steps, and an
            LSTM's c for one.
        recompute: train with O(sqrt(T)) memory: a backward pass computes again what it needs, in
            segments of the sequence, which takes another forward pass. Also an attribute. With two
            directions the layers' outputs are kept, and input is not packed. Has no effect under
            torch.compile and torch.func, and with dropout draws other masks than without.

    Call: ``output, h_n = layer(input, h_0=None, *, lengths=None, reset=None)``.
        input: (T, B, I), (T, I) without a batch, or a PackedSequence.
        lengths: (B,) integers, the steps of each sample of a padded batch, in any order, on the CPU
            or the input's device: the result is that of a PackedSequence, padded with zeros.
        reset: bool (T, B), with ``batch_first`` (B, T), without a batch (T,), or a PackedSequence:
            the steps before which a sample's states become zero, where no gradient passes, as at
            the ends of episodes.
        return_states: also return every h_t, (L*D, T, B, H) (L*D first in any layout; of a
            PackedSequence (L*D, rows, H)), differentiable, as a third result.
        h_0, h_n: (L*D, B, H), without a batch (L*D, H); zeros if not given.
        output: (T, B, D*H), in the input's layout.

    Raises:
        TypeError, ValueError, RuntimeError: as torch.nn.RNN, with the same messages.

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14 (1990).
    """

    nonlinearity: str

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            recompute: bool = False,
            zoneout: float = 0.0,
            recurrent_dropout: float = 0.0,
            weight_dropout: float = 0.0,
            skip: int = 1,
            skip_beside: bool = False,
        ) -> None: ...

    else:

        def __init__(
            self,
            *args: Any,
            recompute: bool = False,
            zoneout: float = 0.0,
            recurrent_dropout: float = 0.0,
            weight_dropout: float = 0.0,
            skip: int = 1,
            skip_beside: bool = False,
            **kwargs: Any,
        ) -> None:
            _refuse_projection(kwargs)
            if len(args) > 3:
                nonlinearity, args = args[3], (*args[:3], *args[4:])
            else:
                nonlinearity = kwargs.pop("nonlinearity", "tanh")
            cell = rnn_cell(nonlinearity, zoneout)
            super().__init__("RNN_" + nonlinearity.upper(), *args, **kwargs)
            self.nonlinearity = nonlinearity
            self._set_options(
                cell if zoneout else None, recompute=recompute, zoneout=zoneout,
                recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout, skip=skip,
                skip_beside=skip_beside,
            )  # fmt: skip

    if not TYPE_CHECKING:
        forward = forward_of("RNN")

    def checked_cell(self) -> str:
        if self.mode not in ("RNN_TANH", "RNN_RELU"):
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return cell_of(self)


class LeakyRNN(RNN):
    """A stack of leaky units, h_t = alpha h_{t-1} + (1 - alpha) v_t.

    v_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh) is what :class:`RNN` would give. A unit with
    alpha near 1 changes slowly, over 1 / (1 - alpha) steps, and so carries what happened long ago.

    Args:
        alpha: of all units, a number, or of each, (H,), or of each layer and direction, (L*D, H).
        learn_alpha: whether training changes the alphas, ``weight_leak_l*`` (1, H).
        All others are those of :class:`RNN`.

    Call: as :class:`RNN`.

    Raises:
        ValueError: an alpha outside of 0 .. 1, or of another shape; else as :class:`RNN`.

    Source: I. Goodfellow, Y. Bengio, A. Courville, Deep Learning (2016), chapter 10.9.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            alpha: float | Tensor = 0.5,
            learn_alpha: bool = False,
            recompute: bool = False,
            recurrent_dropout: float = 0.0,
            weight_dropout: float = 0.0,
            skip: int = 1,
            skip_beside: bool = False,
        ) -> None: ...

    else:

        def __init__(
            self,
            *args: Any,
            alpha: float | Tensor = 0.5,
            learn_alpha: bool = False,
            **kwargs: Any,
        ) -> None:
            if kwargs.pop("zoneout", 0.0):
                raise ValueError("leaky units have no zoneout: alpha keeps a part of h already")
            beside = kwargs.pop("skip_beside", False)
            check_skip(kwargs.get("skip", 1), beside)
            super().__init__(*args, **kwargs)
            count = self.num_layers * (2 if self.bidirectional else 1)
            self._alpha = checked_alpha(alpha, count, self.hidden_size)
            self.learn_alpha = learn_alpha
            self._become("leaky_" + self.nonlinearity)
            for leak in self._leaks():
                leak.requires_grad_(learn_alpha)
            if beside:
                self.skip_beside = True
                self._add_skip()

    def _leaks(self) -> list[Tensor]:
        """``weight_leak_l*`` of each layer and direction."""
        names = [
            name for own in self._all_weights for name in own if name.startswith("weight_leak")
        ]
        return [self.get_parameter(name) for name in names]

    def reset_parameters(self) -> None:
        """As torch.nn.RNN, and the alphas as they were given."""
        super().reset_parameters()
        if not self._cell:
            return  # torch.nn's constructor, which knows of no alphas
        alphas = cast(Tensor, self._alpha)
        with torch.no_grad():
            for leak, alpha in zip(self._leaks(), alphas, strict=True):
                leak.copy_(alpha[None])

    def extra_repr(self) -> str:
        return super().extra_repr() + (", learn_alpha=True" if self.learn_alpha else "")


class IndRNN(HiddenLayer):
    """A stack of independent units, h_t = phi(W_ih x_t + b_ih + w_hh h_{t-1} + b_hh).

    w_hh is a number per unit: a unit sees its own past alone, and others in the layer above. With
    relu and weights near 1 gradients neither vanish nor explode over thousands of steps.

    Args:
        nonlinearity: ``"relu"``, ``"tanh"``, ``"sigmoid"``, ``"identity"``, ``"softsign"`` or
            ``"elu"``.
        All others are those of :class:`RNN`, but for ``recurrent_dropout``.

    Parameters: as :class:`RNN`, except ``weight_hh_l*`` (1, H), which begin uniform in 0 .. 1.

    Call: as :class:`RNN`.

    Raises:
        ValueError: another nonlinearity; else as :class:`RNN`.

    Source: S. Li, W. Li, C. Cook, C. Zhu, Y. Gao, "Independently recurrent neural network (IndRNN):
    building a longer and deeper RNN", CVPR (2018).
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        zoneout: float = 0.0,
        weight_dropout: float = 0.0,
        skip: int = 1,
        skip_beside: bool = False,
    ) -> None:
        cell = independent_cell(nonlinearity, zoneout)
        super().__init__(
            "RNN_RELU", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity
        self._set_options(
            cell,
            recompute=recompute,
            zoneout=zoneout,
            weight_dropout=weight_dropout,
            skip=skip,
            skip_beside=skip_beside,
        )

    if not TYPE_CHECKING:
        forward = forward_of("IndRNN")

    _options = ("nonlinearity", *Layer._options)

    def reset_parameters(self) -> None:
        """As torch.nn.RNN, and the recurrent weights uniform in 0 .. 1."""
        super().reset_parameters()
        for own in self._all_weights:
            torch.nn.init.uniform_(self.get_parameter(own[1]))


class LSTM(Layer):
    """A stack of long short-term memory layers, gates in the order i, f, g, o.

    Drop-in for torch.nn.LSTM.

    Args:
        input_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype, recompute:
            as for :class:`RNN`.
        hidden_size: memory cells, H.
        proj_size: outputs of a step, P < H, as h_t = W_hr (o_t * tanh(c_t)); 0 for no projection
            (then P = H).
        peephole: the gates also see the cell, through weights per unit: i and f c_{t-1}, o c_t.
            The parameters ``weight_peephole_l*`` (3, H) hold the rows i, f, o.
        coupled: f = 1 - i: forgets only where it writes. There are three gates, i, g, o: the
            other parameters have 3*H rows, and peepholes two, i and o.
        activation, output_activation: in place of tanh for g, and for c before the output gate:
            ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"identity"``, ``"softsign"`` or ``"elu"``.
        cell_clip: bound on the arguments of all gates, as onnxruntime has ONNX's ``clip``; None for
            none.
        zoneout: as for :class:`RNN`, of h and c, or a pair for each; with ``proj_size`` of c alone,
            ``(0, p)``.
        recurrent_dropout, weight_dropout: as for :class:`RNN`.
        layer_norm: the gates' input and recurrent terms and c are normalised over the units, with
            gains ``norm_ih_l*`` and ``norm_hh_l*`` (G*H,) and, of c, gain and bias ``norm_c_l*``
            (2, H) (Ba et al. 2016). With ``peephole``, ``coupled`` and ``proj_size``; not with
            the other options of the cell.

    Call: ``output, (h_n, c_n) = layer(input, (h_0, c_0)=None, *, lengths=None, reset=None)``.
        input, lengths, reset: as for :class:`RNN`.
        return_states: also return every h_t and c_t, as for :class:`RNN`, as a pair.
        h_0, h_n: (L*D, B, P), without a batch (L*D, P); zeros if not given.
        c_0, c_n: (L*D, B, H), without a batch (L*D, H); zeros if not given.
        output: (T, B, D*P), in the input's layout.

    Raises:
        TypeError, ValueError, RuntimeError: as torch.nn.LSTM, with the same messages.

    Source: S. Hochreiter and J. Schmidhuber, Neural Computation 9 (1997); F. Gers et al. (2000)
    for the forget gate; H. Sak et al. (2014) for the projection; F. Gers and J. Schmidhuber (2000)
    for peepholes; K. Greff et al. (2015) for coupled gates.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            recompute: bool = False,
            peephole: bool = False,
            coupled: bool = False,
            activation: str = "tanh",
            output_activation: str = "tanh",
            cell_clip: float | None = None,
            zoneout: float | tuple[float, float] = 0.0,
            recurrent_dropout: float = 0.0,
            weight_dropout: float = 0.0,
            layer_norm: bool = False,
            skip: int = 1,
            skip_beside: bool = False,
        ) -> None: ...

    else:

        def __init__(
            self,
            *args: Any,
            recompute: bool = False,
            peephole: bool = False,
            coupled: bool = False,
            activation: str = "tanh",
            output_activation: str = "tanh",
            cell_clip: float | None = None,
            zoneout: float | tuple[float, float] = 0.0,
            recurrent_dropout: float = 0.0,
            weight_dropout: float = 0.0,
            layer_norm: bool = False,
            skip: int = 1,
            skip_beside: bool = False,
            **kwargs: Any,
        ) -> None:
            super().__init__("LSTM", *args, **kwargs)
            cell = lstm_cell(
                peephole, coupled, activation=activation, output_activation=output_activation,
                clip=cell_clip, zoneout=zoneout, projected=self.proj_size > 0,
            )  # fmt: skip
            self._set_options(
                None if cell == "lstm" else cell, recompute=recompute, peephole=peephole,
                coupled=coupled, activation=activation, output_activation=output_activation,
                cell_clip=cell_clip, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
                weight_dropout=weight_dropout, layer_norm=layer_norm, skip=skip,
                skip_beside=skip_beside,
            )  # fmt: skip

    peephole: bool = False
    coupled: bool = False
    activation: str = "tanh"
    output_activation: str = "tanh"
    cell_clip: float | None = None
    _options = (
        "peephole", "coupled", "activation", "output_activation", "cell_clip", *Layer._options,
    )  # fmt: skip

    # torch.nn.LSTM's versions of three methods of RNNBase, for a pair of states. Their messages
    # are then those of the torch that is installed.
    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    def refuse(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        if (
            batch_sizes is not None
            and input.dtype != self.weights_of_call()[0].dtype
            and not autocast_enabled()
        ):
            return  # torch.nn.LSTM leaves this one to the operator: check_tensors refuses it
        if states is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, states, batch_sizes)

    @overload
    def forward(
        self,
        input: Sequences,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Sequences | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Sequences, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: Sequences,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Sequences | None = None,
        return_states: Literal[True],
    ) -> tuple[Sequences, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Sequences,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Sequences | None = None,
        return_states: bool = False,
    ) -> Any:
        given = None if hx is None else two_states(hx)
        if return_states:
            return self.run_all(input, given, lengths, reset)
        output, (h, c) = self._run(input, given, lengths, reset)
        return output, (h, c)


class GRU(HiddenLayer):
    """A stack of gated recurrent units, gates in the order r, z, n.

    Drop-in for torch.nn.GRU.

    Args:
        reset_after: whether the reset gate comes after the product with h_{t-1}, as in torch and
            cuDNN, n = tanh(W x + b + r * (U h + b_h)), or before it, as in the original,
            n = tanh(W x + b + U (r * h) + b_h).
        activation: n's, in place of tanh; as for :class:`LSTM`.
        layer_norm: the gates' input and recurrent terms are normalised over the units, r's and z's
            together and n's apart, with gains ``norm_ih_l*`` and ``norm_hh_l*`` (3*H,) (Ba et al.
            2016). Not with other options of the cell; no kernels on a GPU.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype, zoneout, recurrent_dropout, weight_dropout, recompute: as for :class:`RNN`.

    Call: as :class:`RNN`.

    Raises:
        TypeError, ValueError, RuntimeError: as torch.nn.GRU, with the same messages.

    Source: K. Cho et al., arXiv:1406.1078 (2014).
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: torch.device | str | int | None = None,
            dtype: torch.dtype | None = None,
            *,
            recompute: bool = False,
            reset_after: bool = True,
            activation: str = "tanh",
            zoneout: float = 0.0,
            recurrent_dropout: float = 0.0,
            weight_dropout: float = 0.0,
            layer_norm: bool = False,
            skip: int = 1,
            skip_beside: bool = False,
        ) -> None: ...

    else:

        def __init__(
            self,
            *args: Any,
            recompute: bool = False,
            reset_after: bool = True,
            activation: str = "tanh",
            zoneout: float = 0.0,
            recurrent_dropout: float = 0.0,
            weight_dropout: float = 0.0,
            layer_norm: bool = False,
            skip: int = 1,
            skip_beside: bool = False,
            **kwargs: Any,
        ) -> None:
            _refuse_projection(kwargs)
            super().__init__("GRU", *args, **kwargs)
            cell = gru_cell(reset_after, activation=activation, zoneout=zoneout)
            self._set_options(
                None if cell == "gru" else cell, recompute=recompute, reset_after=reset_after,
                activation=activation, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
                weight_dropout=weight_dropout, layer_norm=layer_norm, skip=skip,
                skip_beside=skip_beside,
            )  # fmt: skip

    if not TYPE_CHECKING:
        forward = forward_of("GRU")

    reset_after: bool = True
    activation: str = "tanh"
    _options = ("reset_after", "activation", *Layer._options)


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
