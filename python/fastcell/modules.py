"""RNN, LSTM and GRU: torch.nn's layers with fastcell's kernels.

They share torch.nn.RNNBase with torch's own: parameters, their names and initial numbers,
``state_dict``, copying and pickling, ``extra_repr`` and most checks are inherited, so they cannot
drift apart. They do not derive from torch.nn.RNN, LSTM and GRU, since torch.compile gives up on
every subclass of those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .cells import (
    cell_of,
    checked_probability,
    gru_cell,
    independent_cell,
    lstm_cell,
    options_of,
    rnn_cell,
    spec_of,
)
from .checks import autocast_enabled, check_tensors
from .functional import (
    Sequences,
    Sizes,
    States,
    checked_reset,
    refuse_sizes,
    run_normed,
    run_stack,
    two_states,
)
from .packing import clear_packed_weights
from .ragged import checked_lengths
from .skip import run_beside, run_delayed
from .small import Small

__all__ = ["GRU", "LSTM", "RNN", "IndRNN", "LeakyRNN"]


class Swappable(torch.nn.Module):
    """A module whose parameters torch can exchange for others in ``.to()`` and the like.

    torch.__future__.set_swap_module_params_on_conversion(True) asks for that, and torch refuses it
    while weak references to a parameter are alive: the cache of packed weights holds such.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if torch.__future__.get_swap_module_params_on_conversion():
            clear_packed_weights()
            self.__dict__.pop("_small", None)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class _Layer(Swappable, torch.nn.RNNBase):
    """What the three layers have in common: where the weights are read, and fastcell's options."""

    # Only a layer that was told otherwise has attributes of its own: the others have torch.nn's.
    recompute: bool = False
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: Any = 0.0
    skip: int = 1
    skip_beside: bool = False
    layer_norm: bool = False

    def _set_options(self, cell: str | None = None, **options: Any) -> None:
        """Attributes for what differs from the class's own, and the cell, if it has a name."""
        for name in ("recurrent_dropout", "weight_dropout"):
            checked_probability(name, options.get(name, 0.0))
        skip = options.get("skip", 1)
        if type(skip) is not int or skip < 1:
            raise ValueError(f"skip must be a positive number of steps, got {skip!r}")
        for name, value in options.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)
        if self.skip_beside and skip < 2:
            raise ValueError(f"skip_beside=True takes a skip of 2 or more steps, got {skip}")
        if cell is not None:
            self._become(cell)
        if self.skip_beside:
            self._add_weights("weight_skip", self._rows(), self._output_size())
        if self.layer_norm:
            self._add_norms(cell)

    def _add_norms(self, cell: str | None) -> None:
        others = ("zoneout", "recurrent_dropout", "skip", "recompute")
        beside = [name for name in others if name in self.__dict__]
        if cell is not None or self.proj_size or beside:
            raise ValueError(
                "layer_norm goes with the plain cell alone, without projection, delays, zoneout, "
                f"recurrent dropout and recompute: got {self.extra_repr()}"
            )
        rows = self._rows()
        self._add_weights("norm_ih", rows)
        self._add_weights("norm_hh", rows)
        if self.mode == "LSTM":
            self._add_weights("norm_c", 2, self.hidden_size)
        self._reset_norms()

    def _reset_norms(self) -> None:
        """Gains of one, biases of zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("norm_"):
                    parameter.fill_(1)
                if name.startswith("norm_c"):
                    parameter[1] = 0

    def reset_parameters(self) -> None:
        """As torch.nn's, and norms that change nothing but scale."""
        super().reset_parameters()
        self._reset_norms()

    def _add_weights(self, name: str, *shape: int) -> None:
        """One more weight for each layer and direction, after the others."""
        like = self.get_parameter(self._all_weights[0][0])
        bound = self.hidden_size**-0.5
        for own in self._all_weights:
            added = name + own[0].removeprefix("weight_ih")
            parameter = torch.nn.Parameter(like.new_empty(shape))
            self.register_parameter(added, parameter)
            torch.nn.init.uniform_(parameter, -bound, bound)
            own.append(added)
        self._read_names()

    def _read_names(self) -> None:
        """After ``_all_weights`` has changed. ``parameters()`` has the same order."""
        self._flat_weights_names = [name for own in self._all_weights for name in own]
        for name in self._flat_weights_names:
            self._parameters[name] = self._parameters.pop(name)
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        self._init_flat_weights()

    def extra_repr(self) -> str:
        own = [f"{name}={self.__dict__[name]!r}" for name in self._options if name in self.__dict__]
        return ", ".join([super().extra_repr(), *own])

    _options: tuple[str, ...] = (
        "zoneout", "recurrent_dropout", "weight_dropout", "layer_norm", "skip", "skip_beside",
        "recompute",
    )  # fmt: skip

    def flatten_parameters(self) -> None:
        """Kept for programs that call it; the kernels pack weights themselves."""

    def _become(self, cell: str) -> None:
        """Another cell's parameters in place of those that torch.nn's constructor made."""
        self._cell = cell
        hidden, spec = self.hidden_size, spec_of(cell)
        if spec.recurrent and not spec.parameters and hidden * spec.gates == self._rows():
            return
        names: list[list[str]] = []
        for own in self._all_weights:
            old = {name: self._parameters.pop(name) for name in own}
            shapes = {
                name: p.shape if "weight_hr" in name else (spec.gates * hidden, *p.shape[1:])
                for name, p in old.items()
                if p is not None
            }
            if not spec.recurrent:
                shapes[own[1]] = (spec.parameters, hidden)
            if spec.rows:
                suffix = own[0].removeprefix("weight_ih")
                shapes[f"{spec.parameters_name}{suffix}"] = (spec.parameters, hidden)
            like = next(iter(old.values()))
            assert like is not None
            for name, shape in shapes.items():
                self.register_parameter(name, torch.nn.Parameter(like.new_empty(shape)))
            names.append(list(shapes))
        self._all_weights = names
        self._read_names()
        self.reset_parameters()

    def _rows(self) -> int:
        """Of the first layer's ``weight_ih``."""
        return int(self.get_parameter(self._all_weights[0][0]).shape[0])

    def _dropped(self, weights: list[Tensor]) -> list[Tensor]:
        """DropConnect: in training, some of the recurrent weights are not there."""
        if not self.training or self.weight_dropout == 0:
            return weights
        return [
            torch.nn.functional.dropout(w, self.weight_dropout) if "weight_hh" in name else w
            for name, w in zip(self._flat_weights_names, weights, strict=True)
        ]

    def _weights(self) -> list[Tensor]:
        """The weights of this call, in the order of ``_flat_weights_names``.

        ``_flat_weights`` holds them unless something has put other tensors in the parameters'
        places since: torch.func.functional_call, a parametrization, weight_norm, pruning,
        DataParallel. Those are read by name and not kept, so that no graph outlives its call.
        """
        names, parameters = self._flat_weights_names, self._parameters
        weights = cast(list[Tensor], self._flat_weights)
        for name, ref in zip(names, self._flat_weight_refs, strict=False):
            known = None if ref is None else ref()
            if known is None or known is not parameters.get(name):
                return [getattr(self, n, w) for n, w in zip(names, weights, strict=True)]
        return weights

    def __getstate__(self) -> dict[str, Any]:
        # What was remembered of calls belongs to this object and this process.
        state = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        state.pop("_small", None)
        return state

    def _run(
        self,
        cell: str,
        input: Sequences,
        states: States | None,
        lengths: Tensor | None,
        reset: Sequences | None,
    ) -> tuple[Sequences, States]:
        """A call: as the small one that it may repeat, or with all that a call takes."""
        compiling = torch.compiler.is_compiling()
        small = None if compiling else self.__dict__.get("_small")
        if small is not None and lengths is None and reset is None:
            found = small.run(self, input, states)
            if found is not None:
                return cast(tuple[Sequences, States], found)
        weights = self._weights()
        if self.layer_norm:
            return run_normed(
                self, cell, input, states, self._dropped(weights), self._refuse, lengths, reset
            )
        if self.skip > 1:
            return self._run_skipping(cell, input, states, lengths, reset, self._dropped(weights))
        result = run_stack(
            self, cell, input, states, self._dropped(weights), self._refuse, lengths=lengths,
            reset=reset,
        )  # fmt: skip
        if compiling or torch.is_grad_enabled() or lengths is not None or reset is not None:
            return result
        if not self.training or not self._draws(cell):
            if small is None:
                small = self.__dict__["_small"] = Small()
            small.note(self, cell, input, weights)
        return result

    def _run_all(
        self,
        cell: str,
        input: Sequences,
        states: States | None,
        lengths: Tensor | None,
        reset: Sequences | None,
    ) -> tuple[Sequences, States, tuple[Tensor, ...]]:
        """Output, final states, and of each kind of state all: (L*D, T, B, .)."""
        if self.layer_norm:
            raise ValueError("return_states does not go with layer_norm")
        if self.skip > 1:
            raise ValueError("return_states does not go with skip, whose layers run by phases")
        weights = self._dropped(self._weights())
        directions = 2 if self.bidirectional else 1

        def launch(
            cell: str,
            input: Tensor,
            states: States | None,
            batch_sizes: Tensor | None,
            steps: int,
            reset: Tensor | None,
        ) -> tuple[Tensor, States]:
            check_tensors(
                input, states, weights, steps, spec_of(cell), self.input_size, self.hidden_size,
                self.proj_size, self.num_layers, directions, self.bias,
            )  # fmt: skip
            return ops.all_states(
                cell, input, states, weights, batch_sizes, num_layers=self.num_layers,
                bidirectional=self.bidirectional, batch_first=self.batch_first,
                dropout=self.dropout, training=self.training, bias=self.bias,
                recurrent_dropout=self.recurrent_dropout, reset=reset,
            )  # fmt: skip

        wide, finals = run_stack(
            self, cell, input, states, weights, self._refuse, launch, lengths=lengths, reset=reset
        )
        count = self.num_layers * directions
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: len(finals)]

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

    def _run_skipping(
        self,
        cell: str,
        input: Sequences,
        states: States | None,
        lengths: Tensor | None,
        reset: Sequences | None,
        weights: list[Tensor],
    ) -> tuple[Tensor, States]:
        """A call with ``skip``: the states of h are those of the ``skip`` steps before."""
        if not isinstance(input, Tensor) or not isinstance(reset, Tensor | None):
            raise ValueError("skip goes with padded input, and lengths: got a PackedSequence")
        if reset is not None and self.bidirectional:
            raise ValueError("with skip, reset goes with one direction")
        if input.dim() not in (2, 3):
            raise ValueError(f"Expected input to be 2D or 3D, got {input.dim()}D")
        sizes = Sizes(**{field.name: getattr(self, field.name) for field in fields(Sizes)})
        sizes.batch_first = False
        batched = input.dim() == 3
        # Time first, with a batch.
        turned = batched and self.batch_first

        def timed(t: Tensor) -> Tensor:
            return t.transpose(0, 1) if turned else t if batched else t.unsqueeze(1)

        def run(
            input: Tensor, states: States | None, lengths: Tensor | None, reset: Tensor | None
        ) -> tuple[Tensor, States]:
            def refuse(input: Tensor, states: States | None, _: Tensor | None) -> None:
                refuse_sizes(sizes, input, states or (), None)

            found = run_stack(
                sizes, cell, input, states, weights, refuse, lengths=lengths, reset=reset
            )
            return cast(tuple[Tensor, States], found)

        if self.skip_beside:
            if lengths is not None:
                raise ValueError("lengths do not go with skip_beside, which runs block by block")
            rows = None if reset is None else timed(checked_reset(reset, input, False))
            output, states = self._run_beside(cell, timed(input), states, rows, weights, sizes)
            return output.transpose(0, 1) if turned else output if batched else output[:, 0], states
        if lengths is not None:
            steps, batch = timed(input).shape[:2]
            lengths = checked_lengths(lengths, batch, steps)
        output, states = run_delayed(
            self.skip, 2 if self.bidirectional else 1, timed(input), states, lengths,
            None if reset is None else timed(checked_reset(reset, input, False)), run,
        )  # fmt: skip
        return output.transpose(0, 1) if turned else output if batched else output[:, 0], states

    def _run_beside(
        self,
        cell: str,
        input: Tensor,
        states: States | None,
        reset: Tensor | None,
        weights: list[Tensor],
        sizes: Sizes,
    ) -> tuple[Tensor, States]:
        """The same with h_{t-1} besides: layer by layer, direction by direction."""
        d, directions, output = self.skip, 2 if self.bidirectional else 1, self._output_size()
        count, each = self.num_layers * directions, len(weights) // (self.num_layers * directions)
        batch = input.shape[1]
        shapes = [(count, d * batch, output), (count, batch, self.hidden_size)]
        for name, state, shape in zip(("h_0", "c_0"), states or (), shapes, strict=False):
            if tuple(state.shape) != shape:
                raise RuntimeError(f"Expected {name} of size {shape}, got {tuple(state.shape)}")
        one = replace(sizes, num_layers=1, bidirectional=False, dropout=0.0)
        pasts, finals = [], []
        outputs: list[Tensor] = []
        for k in range(count):
            if k % directions == 0:
                if k:
                    input = torch.cat(outputs, -1)
                    input = torch.nn.functional.dropout(input, self.dropout, self.training)
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

    def _output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def _draws(self, cell: str) -> bool:
        """Whether a call in training draws random numbers for its steps."""
        return bool(self.recurrent_dropout or self.weight_dropout or any(options_of(cell).zoneout))

    def _refuse(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        """Let torch's own checks of the input and of a single state find the words."""
        if states is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, states[0], batch_sizes)


class _HiddenLayer(_Layer):
    """A layer whose one state is h."""

    @overload
    def forward(
        self,
        input: Sequences,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Sequences | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[Sequences, Tensor]: ...

    @overload
    def forward(
        self,
        input: Sequences,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Sequences | None = None,
        return_states: Literal[True],
    ) -> tuple[Sequences, Tensor, Tensor]: ...

    def forward(
        self,
        input: Sequences,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Sequences | None = None,
        return_states: bool = False,
    ) -> Any:
        given = None if hx is None else (hx,)
        cell = self._checked_cell()
        if return_states:
            output, (h,), (all_h,) = self._run_all(cell, input, given, lengths, reset)
            return output, h, all_h
        output, states = self._run(cell, input, given, lengths, reset)
        return output, states[0]

    def _checked_cell(self) -> str:
        return cell_of(self)


def _forward_of(name: str) -> Any:
    """``_HiddenLayer.forward`` under the name that a layer's own would have in messages."""
    base: Any = _HiddenLayer.forward
    own = FunctionType(base.__code__, base.__globals__, "forward", base.__defaults__)
    own.__kwdefaults__, own.__annotations__ = base.__kwdefaults__, base.__annotations__
    own.__qualname__, own.__module__ = f"{name}.forward", base.__module__
    return own


class RNN(_HiddenLayer):
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
            first (of the reverse direction nearest first): (L*D, d*B, H). Not for packed input.
        skip_beside: h_t sees h_{t-d} beside h_{t-1}, through ``weight_skip_l*`` (shaped as
            ``weight_hh_l*``; Lin et al. 1996). h is then given and returned for d steps, and an
            LSTM's c for one. Not for lengths.
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
        forward = _forward_of("RNN")

    def _checked_cell(self) -> str:
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
            super().__init__(*args, **kwargs)
            count = self.num_layers * (2 if self.bidirectional else 1)
            given = torch.as_tensor(alpha, dtype=torch.float64).cpu()
            if given.shape not in ((), (self.hidden_size,), (count, self.hidden_size)):
                raise ValueError(
                    f"alpha must be a number or of shape ({self.hidden_size},) or "
                    f"({count}, {self.hidden_size}), got {tuple(given.shape)}"
                )
            if not bool(((given >= 0) & (given <= 1)).all()):
                raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
            self._alpha = given.expand(count, self.hidden_size).clone()
            self.learn_alpha = learn_alpha
            self._become("leaky_" + self.nonlinearity)
            for own in self._all_weights:
                self._parameters[own[-1]].requires_grad_(learn_alpha)

    def reset_parameters(self) -> None:
        """As torch.nn.RNN, and the alphas as they were given."""
        super().reset_parameters()
        if not hasattr(self, "_cell"):
            return  # torch.nn's constructor, which knows of no alphas
        alphas = cast(Tensor, self._alpha)
        with torch.no_grad():
            for own, alpha in zip(self._all_weights, alphas, strict=True):
                self.get_parameter(own[-1]).copy_(alpha[None])

    def extra_repr(self) -> str:
        return super().extra_repr() + (", learn_alpha=True" if self.learn_alpha else "")


class IndRNN(_HiddenLayer):
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
        forward = _forward_of("IndRNN")

    _options = ("nonlinearity", *_Layer._options)

    def reset_parameters(self) -> None:
        """As torch.nn.RNN, and the recurrent weights uniform in 0 .. 1."""
        super().reset_parameters()
        for own in self._all_weights:
            torch.nn.init.uniform_(self.get_parameter(own[1]))


class LSTM(_Layer):
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
            gains ``norm_ih_l*`` and ``norm_hh_l*`` (4*H,) and, of c, gain and bias ``norm_c_l*``
            (2, H) (Ba et al. 2016). Not with other options of the cell; no kernels on a GPU.

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
        "peephole", "coupled", "activation", "output_activation", "cell_clip", *_Layer._options,
    )  # fmt: skip

    # torch.nn.LSTM's versions of three methods of RNNBase, for a pair of states. Their messages
    # are then those of the torch that is installed.
    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    def _refuse(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        if (
            batch_sizes is not None
            and input.dtype != self._weights()[0].dtype
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
            return self._run_all(cell_of(self), input, given, lengths, reset)
        output, (h, c) = self._run(cell_of(self), input, given, lengths, reset)
        return output, (h, c)


class GRU(_HiddenLayer):
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
        forward = _forward_of("GRU")

    reset_after: bool = True
    activation: str = "tanh"
    _options = ("reset_after", "activation", *_Layer._options)


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
