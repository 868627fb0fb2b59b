"""What fastcell's layers have in common: where weights are read, options, and the way of a call.

They share torch.nn.RNNBase with torch's own: parameters, their names and initial numbers,
``state_dict``, copying and pickling, ``extra_repr`` and most checks are inherited, so they cannot
drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from .cells import (
    NORMED_CELLS,
    cell_of,
    check_skip,
    checked_probability,
    options_of,
    spec_of,
    with_delay,
)
from .layer_skip import run_skipping
from .layer_states import run_all
from .packing import clear_packed_weights
from .plan import Config
from .remembered import Call, Remembered, forget_all
from .stack import Sequences, States, run_normed, run_stack
from .weight_dropout import dropped


class Remembering(torch.nn.Module):
    """A module with a memory of its last call, which is this object's and this process' alone.

    Its parameters can be exchanged for others in ``.to()`` and the like:
    torch.__future__.set_swap_module_params_on_conversion(True) asks for that, and torch refuses it
    while weak references to a parameter are alive; the cache of packed weights holds such.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if torch.__future__.get_swap_module_params_on_conversion():
            clear_packed_weights()
            forget_all()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        state.pop("_remembered", None)
        return state

    def _note(self, input: Any, call: Call) -> None:
        """Remember a call that has just run, if it is one that may soon come again."""
        remembered = self.__dict__.get("_remembered")
        if remembered is None:
            remembered = self.__dict__["_remembered"] = Remembered()
        remembered.note(self, input, call)


# What decides how a layer is run, beside its weights.
_DECIDING = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
    "bidirectional", "proj_size", "training", "skip", "skip_beside", "layer_norm", "zoneout",
    "recurrent_dropout", "weight_dropout", "recompute", "_cell",
)  # fmt: skip


class Layer(Remembering, torch.nn.RNNBase):
    """What the layers have in common: where the weights are read, and fastcell's options."""

    # Only a layer that was told otherwise has attributes of its own: the others have torch.nn's.
    # (Module.__getattr__, which looks for what is not there, is slow beside a small step.)
    _cell: str = ""
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
        check_skip(options.get("skip", 1), options.get("skip_beside", False))
        for name, value in options.items():
            if value != getattr(type(self), name):
                setattr(self, name, value)
        if cell is not None:
            self._become(cell)
        if self.skip_beside:
            self._add_skip()
        if self.layer_norm:
            self._add_norms(cell or cell_of(self))

    def _add_skip(self) -> None:
        with_delay(cell_of(self), self.skip)  # known before a call: Dynamo looks at what it reads
        self._add_weights("weight_skip", self._rows(), self.output_size())

    def _add_norms(self, cell: str) -> None:
        others = ("zoneout", "recurrent_dropout", "skip", "recompute")
        beside = [name for name in others if name in self.__dict__]
        if cell not in NORMED_CELLS or beside:
            raise ValueError(
                "layer_norm goes with the plain GRU and with the LSTM that has peepholes, coupled "
                "gates or a projection; not with another activation, a clip, delays, zoneout, "
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

    def dropped(self, weights: list[Tensor]) -> list[Tensor]:
        """DropConnect: in training, some of the recurrent weights are not there."""
        if not self.training or self.weight_dropout == 0:
            return weights
        return [
            dropped(w, self.weight_dropout) if "weight_hh" in name else w
            for name, w in zip(self._flat_weights_names, weights, strict=True)
        ]

    def weights_of_call(self) -> list[Tensor]:
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

    def _run(
        self,
        input: Sequences,
        states: States | None,
        lengths: Tensor | None,
        reset: Sequences | None,
    ) -> tuple[Sequences, States]:
        """A call: as the one that it may repeat, or with all that a call takes."""
        compiling = torch.compiler.is_compiling()
        alone = not compiling and lengths is None and reset is None
        if alone:
            remembered = self.__dict__.get("_remembered")
            if remembered is not None:
                found: Any = remembered.call(self.__dict__, input, states)
                if found is not None:
                    return found  # type: ignore[no-any-return]
        cell = self.checked_cell()
        weights = self.weights_of_call()
        if self.layer_norm:
            return run_normed(
                self, cell, input, states, self.dropped(weights), self.refuse, lengths, reset
            )
        if self.skip > 1:
            return run_skipping(self, cell, input, states, lengths, reset, self.dropped(weights))
        result = run_stack(
            self, cell, input, states, self.dropped(weights), self.refuse, lengths=lengths,
            reset=reset,
        )  # fmt: skip
        if alone and not (self.training and self._draws(cell)):
            config = Config(cell, self.num_layers, self.bidirectional, self.bias, self.batch_first)
            names = self._flat_weights_names
            differentiable = not self.recompute
            self._note(input, Call(config, False, weights, names, (), _DECIDING, differentiable))
        return result

    def run_all(
        self,
        input: Sequences,
        states: States | None,
        lengths: Tensor | None,
        reset: Sequences | None,
    ) -> tuple[Sequences, States, tuple[Tensor, ...]]:
        """A call with ``return_states=True``."""
        cell = self.checked_cell()
        weights = self.dropped(self.weights_of_call())
        if self.skip > 1:
            every: list[Tensor] = []
            output, finals = run_skipping(self, cell, input, states, lengths, reset, weights, every)
            return output, finals, tuple(every)
        return run_all(
            self, cell, input, states, weights, self.refuse, lengths, reset, self.layer_norm
        )

    def checked_cell(self) -> str:
        """The cell's name. Raises AssertionError where there is no such mode."""
        return cell_of(self)

    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def _draws(self, cell: str) -> bool:
        """Whether a call in training draws random numbers."""
        dropout = self.dropout and self.num_layers > 1
        own = self.recurrent_dropout or self.weight_dropout or any(options_of(cell).zoneout)
        return bool(dropout or own)

    def refuse(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        """Let torch's own checks of the input and of a single state find the words."""
        if states is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, states[0], batch_sizes)


class HiddenLayer(Layer):
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
        if return_states:
            output, (h,), (all_h,) = self.run_all(input, given, lengths, reset)
            return output, h, all_h
        output, states = self._run(input, given, lengths, reset)
        return output, states[0]


def forward_of(name: str) -> Any:
    """``HiddenLayer.forward`` under the name that a layer's own would have in messages."""
    base: Any = HiddenLayer.forward
    own = FunctionType(base.__code__, base.__globals__, "forward", base.__defaults__)
    own.__kwdefaults__, own.__annotations__ = base.__kwdefaults__, base.__annotations__
    own.__qualname__, own.__module__ = f"{name}.forward", base.__module__
    return own
