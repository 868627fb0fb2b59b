"""RNNCell, LSTMCell and GRUCell: one step of a layer, as torch.nn's cells.

A cell is a sequence of one step and runs through the layers' operator. Parameters, their initial
numbers and ``extra_repr`` are inherited from torch.nn.RNNCellBase.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .cells import (
    NORMED_CELLS,
    CellSpec,
    checked_alpha,
    gru_cell,
    independent_cell,
    lstm_cell,
    options_of,
    rnn_cell,
    spec_of,
)
from .checks import check_tensors
from .layer import Remembering
from .plan import Config
from .remembered import Call
from .stack import States

__all__ = ["GRUCell", "IndRNNCell", "LSTMCell", "LeakyRNNCell", "RNNCell"]


# What decides how a cell is run, beside its weights.
_DECIDING = ("hidden_size", "nonlinearity", "training", "zoneout", "layer_norm", "_cell")


class _Cell(Remembering, torch.nn.RNNCellBase):
    """What the cells have in common: one step on checked ranks."""

    def _again(self, input: Tensor, states: Any) -> Any:
        """The results, if this is the call that was made before; else None."""
        if torch.compiler.is_compiling():
            return None
        remembered = self.__dict__.get("_remembered")
        return None if remembered is None else remembered.call(self.__dict__, input, states)

    def _step(self, cell: str, input: Tensor, states: States | None) -> States:
        """One step; input (B, I) or (I,), states and results (B, H) or (H,).

        The caller has refused other ranks.
        """
        spec = spec_of(cell)
        w_ih, w_hh, b_ih, b_hh = self._weights()
        own = self._own(spec)
        if w_ih is None or w_hh is None:
            name, position = ("w_ih", 3) if w_ih is None else ("w_hh", 4)
            raise TypeError(
                f"{cell}_cell(): argument '{name}' (position {position}) must be Tensor, "
                "not NoneType"
            )
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            if states is not None:
                states = tuple([state.unsqueeze(0) for state in states])
        batch, features = input.shape
        input_size = w_ih.shape[1]
        if features != input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {features} expected {input_size}"
            )
        hidden_size = w_hh.shape[1]
        if states is not None:
            for state in states:
                if state.shape != (batch, hidden_size):
                    _refuse_states(states, batch, hidden_size)
        elif self.hidden_size != hidden_size:
            raise RuntimeError(
                f"hidden0 has inconsistent hidden_size: got {self.hidden_size}, "
                f"expected {hidden_size}"
            )

        weights = [w_ih, w_hh]
        if b_ih is not None and b_hh is not None:
            weights += b_ih, b_hh
        elif b_ih is not None:  # torch lets one of the two be missing
            weights += b_ih, torch.zeros_like(b_ih)
        elif b_hh is not None:
            weights += torch.zeros_like(b_hh), b_hh
        bias = len(weights) == 4
        weights += own
        check_tensors(input, states, weights, 1, spec, input_size, hidden_size, 0, 1, 1, bias)
        if hidden_size == 0:
            # torch allows it. A state of no element is made so that a gradient can flow through.
            states = (torch.nn.functional.linear(input, w_ih, b_ih),) * spec.states
            return states if batched else tuple([state.squeeze(0) for state in states])
        if self.layer_norm:
            return self._normed_step(cell, input, states, weights, bias, batched)
        _, states = ops.sequence(
            cell,
            input.unsqueeze(0),
            None if states is None else [state.unsqueeze(0) for state in states],
            weights,
            None,
            num_layers=1,
            bidirectional=False,
            bias=bias,
            batch_first=False,
            dropout=0.0,
            training=self.training,
            single_step=True,
        )
        draws = self.training and any(options_of(cell).zoneout)
        if batched and not draws and not torch.compiler.is_compiling():
            biases, others = ("bias_ih", "bias_hh"), [spec.parameters_name] if spec.rows else []
            names = ["weight_ih", "weight_hh", *(biases if bias else ()), *others]
            config = Config(cell, 1, False, bias, False)
            none = () if bias else biases
            self._note(input, Call(config, True, weights, names, none, _DECIDING))
        drop = 1 if batched else 2
        if torch._C._get_tracing_state() is not None:  # shapes would become constants
            return tuple([state.squeeze(0 if batched else (0, 1)) for state in states])
        # No views, whose detach_() would be refused: loops over steps cut their graph so.
        return tuple([torch.ops.aten._unsafe_view(state, state.shape[drop:]) for state in states])

    def _normed_step(
        self,
        cell: str,
        input: Tensor,
        states: States | None,
        weights: list[Tensor],
        bias: bool,
        batched: bool,
    ) -> States:
        names = ("norm_ih", "norm_hh", "norm_c")[: 1 + spec_of(cell).states]
        given = None if states is None else [state.unsqueeze(0) for state in states]
        _, states = ops.normed(
            cell, input.unsqueeze(0), given, [*weights, *[getattr(self, n) for n in names]], None,
            None, bias=bias, projected=False, directions=1, batch_first=False, dropout=0.0,
        )  # fmt: skip
        return tuple([state.squeeze(0 if batched else (0, 1)) for state in states])

    def _add_norms(self, cell: str) -> None:
        if cell not in NORMED_CELLS or self.zoneout:
            raise ValueError(
                "layer_norm goes with peephole, coupled and no other option of the cell: got "
                f"{self.extra_repr()}"
            )
        like = self.weight_ih
        for name in ("norm_ih", "norm_hh"):
            self.register_parameter(name, torch.nn.Parameter(torch.ones_like(like[:, 0])))
        if spec_of(cell).states > 1:
            gain = like.new_ones(self.hidden_size)
            norm = torch.stack((gain, torch.zeros_like(gain)))
            self.register_parameter("norm_c", torch.nn.Parameter(norm))

    def _become(self, cell: str) -> None:
        """A cell with options, and the weight that it may have besides torch.nn's."""
        self._cell, spec = cell, spec_of(cell)
        if spec.rows:
            like = self.weight_ih
            own = torch.nn.Parameter(like.new_empty((spec.rows, self.hidden_size)))
            self.register_parameter(spec.parameters_name, own)
            torch.nn.init.uniform_(own, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    def _own(self, spec: CellSpec) -> list[Tensor]:
        return [getattr(self, spec.parameters_name)] if spec.rows else []

    # Only a cell that was told otherwise has attributes of its own: the others have torch.nn's.
    zoneout: Any = 0.0
    layer_norm: bool = False
    _options: tuple[str, ...] = ("zoneout",)

    def _set_options(self, cell: str, layer_norm: bool = False, **options: Any) -> None:
        for name, value in options.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)
                self._cell = cell
        if hasattr(self, "_cell"):
            self._become(cell)
        if layer_norm:
            self.layer_norm = True
            self._add_norms(cell)

    def extra_repr(self) -> str:
        own = [f"{name}={self.__dict__[name]!r}" for name in self._options if name in self.__dict__]
        return ", ".join([super().extra_repr(), *own])

    def _weights(self) -> list[Tensor | None]:
        # Looked up where parameters are first: Module.__getattr__ is slow at this scale. What a
        # parametrization, weight_norm or pruning has put elsewhere comes through getattr.
        parameters = self._parameters
        return [
            parameters[name] if name in parameters else getattr(self, name)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]


def _refuse_states(states: States, batch: int, hidden_size: int) -> None:
    for i, state in enumerate(states):
        if state.shape[0] != batch:
            raise RuntimeError(
                f"Input batch size {batch} doesn't match hidden{i} batch size {state.shape[0]}"
            )
        if state.shape[1] != hidden_size or state.dim() != 2:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {state.shape[1]}, "
                f"expected {hidden_size}"
            )


def _refuse_rank(title: str, what: str, rank: int) -> None:
    raise ValueError(f"{title}: Expected {what} to be 1D or 2D, got {rank}D instead")


class RNNCell(_Cell):
    """One step of an Elman network, h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Drop-in for torch.nn.RNNCell.

    Args:
        input_size: features of the input, I.
        hidden_size: hidden units, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.
        zoneout: as for :class:`fastcell.RNN`, drawn in each call.

    Call: ``h_1 = cell(input, h_0=None)``.
        input: (B, I) or (I,).
        h_0, h_1: (B, H) or (H,); zeros if not given.

    Raises:
        ValueError, RuntimeError: as torch.nn.RNNCell, with the same messages.

    Source: J. L. Elman, Finding structure in time, Cognitive Science 14 (1990).
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout: float = 0.0,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity
        if zoneout:
            self._set_options(rnn_cell(nonlinearity, zoneout), zoneout=zoneout)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        again = self._again(input, None if hx is None else (hx,))
        if again is not None:
            return again[0]  # type: ignore[no-any-return]
        if input.dim() not in (1, 2):
            _refuse_rank("RNNCell", "input", input.dim())
        if hx is not None and hx.dim() not in (1, 2):
            _refuse_rank("RNNCell", "hidden", hx.dim())
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        cell = self.__dict__.get("_cell") or "rnn_" + self.nonlinearity
        return self._step(cell, input, None if hx is None else (hx,))[0]


class LeakyRNNCell(RNNCell):
    """One step of leaky units, h' = alpha h + (1 - alpha) tanh(W_ih x + b_ih + W_hh h + b_hh).

    Args:
        alpha, learn_alpha: as for :class:`fastcell.LeakyRNN`; alpha a number or of shape (H,). The
            parameter is ``weight_leak`` (1, H).
        All others are those of :class:`RNNCell`, but for ``zoneout``.

    Call, and Raises: as :class:`RNNCell`; ValueError for an alpha outside of 0 .. 1.

    Source: as :class:`fastcell.LeakyRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Tensor = 0.5,
        learn_alpha: bool = False,
    ) -> None:
        rnn_cell(nonlinearity, 0.0)  # refuses another
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self._alpha = checked_alpha(alpha, 1, hidden_size)
        self.learn_alpha = learn_alpha
        self._become("leaky_" + nonlinearity)
        self.get_parameter("weight_leak").requires_grad_(learn_alpha)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.RNNCell, and alpha as it was given."""
        super().reset_parameters()
        if "weight_leak" in self._parameters:
            with torch.no_grad():
                self.get_parameter("weight_leak").copy_(self._alpha)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", learn_alpha=True" if self.learn_alpha else "")


class IndRNNCell(_Cell):
    """One step of independent units, h' = phi(W_ih x + b_ih + w_hh h + b_hh).

    Args:
        nonlinearity, zoneout: as for :class:`fastcell.IndRNN`. ``weight_hh`` is (1, H).
        All others are those of :class:`RNNCell`.

    Call, and Raises: as :class:`RNNCell`.

    Source: as :class:`fastcell.IndRNN`.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        zoneout: float = 0.0,
    ) -> None:
        cell = independent_cell(nonlinearity, zoneout)
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self._cell = cell
        self.weight_hh = torch.nn.Parameter(self.weight_hh.new_empty((1, hidden_size)))
        self.nonlinearity = nonlinearity
        if zoneout:
            self.zoneout = zoneout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.RNNCell, and recurrent weights uniform in 0 .. 1."""
        super().reset_parameters()
        torch.nn.init.uniform_(self.weight_hh)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        again = self._again(input, None if hx is None else (hx,))
        if again is not None:
            return again[0]  # type: ignore[no-any-return]
        if input.dim() not in (1, 2):
            _refuse_rank("IndRNNCell", "input", input.dim())
        if hx is not None and hx.dim() not in (1, 2):
            _refuse_rank("IndRNNCell", "hidden", hx.dim())
        return self._step(self._cell, input, None if hx is None else (hx,))[0]

    def extra_repr(self) -> str:
        # torch.nn's leaves out what is its default, and not this class's.
        return super().extra_repr() + (", nonlinearity=tanh" if self.nonlinearity == "tanh" else "")


class LSTMCell(_Cell):
    """One step of long short-term memory, gates in the order i, f, g, o.

    Drop-in for torch.nn.LSTMCell.

    Args:
        input_size, hidden_size, bias, device, dtype: as for :class:`RNNCell`.
        peephole, coupled, activation, output_activation, cell_clip, zoneout, layer_norm: as for
            :class:`fastcell.LSTM`; its weights are ``weight_peephole`` and ``norm_ih``,
            ``norm_hh``, ``norm_c``.

    Call: ``h_1, c_1 = cell(input, (h_0, c_0)=None)``.
        input: (B, I) or (I,).
        h_0, c_0, h_1, c_1: (B, H) or (H,); zeros if not given.

    Raises:
        TypeError, ValueError, RuntimeError: as torch.nn.LSTMCell, with the same messages.

    Source: S. Hochreiter and J. Schmidhuber, Neural Computation 9 (1997); F. Gers et al. (2000).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        peephole: bool = False,
        coupled: bool = False,
        activation: str = "tanh",
        output_activation: str = "tanh",
        cell_clip: float | None = None,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
    ) -> None:
        cell = lstm_cell(
            peephole, coupled, activation=activation, output_activation=output_activation,
            clip=cell_clip, zoneout=zoneout,
        )  # fmt: skip
        super().__init__(input_size, hidden_size, bias, spec_of(cell).gates, device, dtype)
        self._set_options(
            cell, layer_norm=layer_norm, peephole=peephole, coupled=coupled, activation=activation,
            output_activation=output_activation, cell_clip=cell_clip, zoneout=zoneout,
        )  # fmt: skip

    peephole: bool = False
    coupled: bool = False
    activation: str = "tanh"
    output_activation: str = "tanh"
    cell_clip: float | None = None
    _options = (
        "peephole", "coupled", "activation", "output_activation", "cell_clip", "zoneout",
        "layer_norm",
    )  # fmt: skip

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        again = self._again(input, hx)
        if again is not None:
            return again  # type: ignore[no-any-return]
        if input.dim() not in (1, 2):
            _refuse_rank("LSTMCell", "input", input.dim())
        if hx is not None:
            for i, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    _refuse_rank("LSTMCell", f"hx[{i}]", state.dim())
            if isinstance(hx, Tensor):
                raise TypeError(
                    "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor"
                )
            if len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
            hx = (hx[0], hx[1])
        h, c = self._step(self.__dict__.get("_cell") or "lstm", input, hx)
        return h, c


class GRUCell(_Cell):
    """One step of a gated recurrent unit, gates in the order r, z, n.

    Drop-in for torch.nn.GRUCell.

    Args:
        input_size, hidden_size, bias, device, dtype: as for :class:`RNNCell`.
        reset_after, activation, zoneout, layer_norm: as for :class:`fastcell.GRU`.

    Call: ``h_1 = cell(input, h_0=None)``, shapes as for :class:`RNNCell`.

    Raises:
        ValueError, RuntimeError: as torch.nn.GRUCell, with the same messages.

    Source: K. Cho et al., arXiv:1406.1078 (2014).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        activation: str = "tanh",
        zoneout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)
        self._set_options(
            gru_cell(reset_after, activation=activation, zoneout=zoneout),
            layer_norm=layer_norm, reset_after=reset_after, activation=activation, zoneout=zoneout,
        )  # fmt: skip

    reset_after: bool = True
    activation: str = "tanh"
    _options = ("reset_after", "activation", "zoneout", "layer_norm")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        again = self._again(input, None if hx is None else (hx,))
        if again is not None:
            return again[0]  # type: ignore[no-any-return]
        if input.dim() not in (1, 2):
            _refuse_rank("GRUCell", "input", input.dim())
        if hx is not None and hx.dim() not in (1, 2):
            _refuse_rank("GRUCell", "hidden", hx.dim())
        return self._step(
            self.__dict__.get("_cell") or "gru", input, None if hx is None else (hx,)
        )[0]
