"""Real-time inference: layers fed block by block, with their state kept between the calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from . import _core
from .cells import CELL_OF_MODE, cell_of
from .cpu import DTYPES
from .operator_checks import check_stored_small
from .packing import dense, pack
from .plan import Config, plan_for
from .quantized import QuantizedLayer

Block = TypeVar("Block", Tensor, NDArray[np.floating])

_NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
# Of modules without weights.
_ACTIVATIONS: dict[type[Module], str] = {
    torch.nn.Tanh: "tanh",
    torch.nn.ReLU: "relu",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Softsign: "softsign",
    torch.nn.ELU: "elu",
}
_NOTHING = (torch.nn.Identity, torch.nn.Dropout)  # what they do when nothing is trained


class _Recurrent:
    """A recurrent layer of a stream: what is packed of it, and its states, twice each."""

    packed: Tensor
    dtype: torch.dtype

    def __init__(self, module: torch.nn.RNNBase | QuantizedLayer, batch_size: int) -> None:
        cell = cell_of(module)
        if getattr(module, "layer_norm", False):
            raise ValueError("a stream takes no layer with layer_norm")
        if getattr(module, "skip", 1) > 1:
            raise ValueError("a stream takes no layer with skip, whose state is that of many steps")
        if module.bidirectional:
            raise ValueError("a stream hears no future: the layer must not be bidirectional")
        products = module.products if isinstance(module, QuantizedLayer) else "exact"
        self.module = module
        self.batch_size = batch_size
        self.config = Config(cell, module.num_layers, False, module.bias, False, products)
        self.features: int = module.input_size
        self.states: list[tuple[Tensor, Tensor]] = []

    def pack(self, dtype: torch.dtype | None, threads: int) -> Tensor:
        """The weights as they are now; ``dtype``: theirs, if that is known."""
        module = self.module
        if isinstance(module, QuantizedLayer):
            weights, own = [dense(w) for w in module.weights()], torch.float32
            check_stored_small(module.products, weights)
            _refuse_weights(weights, own, dtype, True)
        else:
            # By name: a parametrization computes its weights when asked.
            weights = [dense(getattr(module, n).detach()) for n in module._flat_weights_names]
            own = weights[0].dtype
            _refuse_weights(weights, own, dtype, False)
        plan = plan_for(self.config, torch.empty(0, self.features, dtype=own), weights)
        if not self.states:
            self.sizes, self.stage, self.width = plan.state_sizes, plan.stack, plan.width
            self.dtype = own
            shapes = [(plan.stacked, self.batch_size, size) for size in plan.state_sizes]
            with torch.inference_mode(False):  # to be changed in place later, wherever that is
                self.states = [
                    (torch.zeros(shape, dtype=own), torch.zeros(shape, dtype=own))
                    for shape in shapes
                ]
        elif plan.state_sizes != self.sizes:
            raise ValueError(
                f"the stream was made for states of {self.sizes}, the weights are for "
                f"{plan.state_sizes} now"
            )
        return pack(self.config, plan, weights, threads)

    @property
    def memory(self) -> tuple[int, list[tuple[int, int]]]:
        pairs = [(a.data_ptr(), b.data_ptr()) for a, b in self.states]
        return self.packed.data_ptr(), pairs

    def reset(self, hx: Any, current: int) -> None:
        """Zeros or ``hx`` as the layer takes it."""
        states = [pair[current] for pair in self.states]
        if hx is None:
            for state in states:
                state.zero_()
            return
        dtype = states[0].dtype
        given = [hx] if isinstance(hx, Tensor) else list(hx)
        expected = [tuple(c.shape) for c in states]
        if [tuple(g.shape) if isinstance(g, Tensor) else g for g in given] != expected or any(
            [g.dtype is not dtype or not g.is_cpu for g in given]
        ):
            said = [
                (tuple(g.shape), g.dtype, str(g.device)) if isinstance(g, Tensor) else g
                for g in given
            ]
            raise ValueError(f"the state must be {expected} of {dtype} on the CPU, got {said}")
        for state, value in zip(states, given, strict=True):
            state.copy_(value.detach())


class _Linear:
    """A linear layer of a stream."""

    packed: Tensor
    dtype: torch.dtype

    def __init__(self, module: torch.nn.Linear) -> None:
        self.module = module
        self.features, self.width = module.in_features, module.out_features
        if self.features < 1 or self.width < 1:
            raise ValueError(f"a stream takes no linear layer without features: {module!r}")

    def pack(self, dtype: torch.dtype | None, threads: int) -> Tensor:
        """The weights as they are now; ``dtype``: theirs, if that is known."""
        weight, bias = self.module.weight, self.module.bias
        weights = [dense(w.detach()) for w in (weight, bias) if w is not None]
        own = weights[0].dtype
        _refuse_weights(weights, own, dtype, False)
        if weights[0].shape != (self.width, self.features):
            raise ValueError(
                f"the stream was made for a weight of {(self.width, self.features)}, it is "
                f"{tuple(weights[0].shape)} now"
            )
        self.stage, self.dtype = _core.Linear(own is torch.float64, self.features, self.width), own
        packed = torch.empty(self.stage.packed_bytes, dtype=torch.uint8, device="cpu")
        pointers = [w.data_ptr() for w in weights]
        self.stage.pack(pointers[0], pointers[1] if len(pointers) > 1 else 0, packed.data_ptr())
        return packed

    @property
    def memory(self) -> tuple[int, list[tuple[int, int]]]:
        return self.packed.data_ptr(), []


def _refuse_weights(
    weights: Sequence[Tensor], own: torch.dtype, dtype: torch.dtype | None, stored_small: bool
) -> None:
    wrong = not stored_small and any(w.dtype is not own or own not in DTYPES for w in weights)
    if wrong or any(not w.is_cpu for w in weights):
        raise ValueError(
            "a stream needs weights on the CPU, all float32 or all float64, got "
            f"{sorted({f'{w.dtype} on {w.device}' for w in weights})}"
        )
    if dtype is not None and own is not dtype:
        raise ValueError(f"the stream's other weights are {dtype}, these are {own}")


def _stages(module: Any, batch_size: int) -> Iterable[_Recurrent | _Linear | str]:
    """What a block goes through, in turn."""
    if isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList, list, tuple)):
        for part in module:
            yield from _stages(part, batch_size)
    elif isinstance(module, (torch.nn.RNNBase, QuantizedLayer)) and module.mode in CELL_OF_MODE:
        yield _Recurrent(module, batch_size)
    elif isinstance(module, torch.nn.Linear):
        yield _Linear(module)
    elif type(module) in _ACTIVATIONS and getattr(module, "alpha", 1.0) == 1.0:
        yield _ACTIVATIONS[type(module)]
    elif not isinstance(module, _NOTHING):
        what = f"{module!r}" if isinstance(module, torch.nn.ELU) else type(module).__name__
        raise TypeError(
            "a stream takes RNN, LSTM, GRU and Linear layers, Tanh, ReLU, Sigmoid, Softsign and "
            f"ELU (of alpha 1), got {what}"
        )


class Stream:
    """Recurrent layers, and what stands between them, that hear their input block by block.

    The state stays inside, the output goes to a buffer that the stream owns: a call allocates
    nothing, builds no graph, and returns what the same layers would for the whole sequence, bit for
    bit, however it is cut into blocks.

        stream = fastcell.Stream(layer)
        for block in microphone:            # (64, I), a NumPy array or a tensor
            heard = stream(block)           # (64, H): valid until the next call; copy it to keep it

        stream = fastcell.Stream([model.lstm, model.linear])    # a whole model

    Args:
        module: fastcell's or torch.nn's RNN, LSTM or GRU on the CPU, float32 or float64, of one
            direction; or a quantized one (:func:`fastcell.quantize`), for float32. Or several
            modules that a block goes through in turn, as a list or a torch.nn.Sequential: one such
            layer at least, torch.nn.Linear, Tanh, ReLU, Sigmoid, Softsign, ELU; Dropout and
            Identity do nothing. Weights are taken as they are now; ``reload()`` takes them again.
        batch_size: samples that are heard side by side, B.
        threads: the most threads that a call may use; default torch.get_num_threads(). Small layers
            take one.

    Call: ``output = stream(input)``.
        input: (T, B, I), or (B, T, I) if the module is ``batch_first``; with ``batch_size=1`` also
            (T, I), or (I,) for a single step. Any T from call to call, as a tensor or an array of
            the layer's dtype.
        output: (T, B, features) and so on, of the input's kind and number of dimensions.

    A stream belongs to one thread at a time; several streams run in several threads at once.

    Raises:
        TypeError: another module, or a block of another type or dtype.
        ValueError: two directions, delays (``skip``), another device or dtype, layers that do not
            fit together, or a block of another shape.
    """

    def __init__(
        self,
        module: Module | Sequence[Module],
        batch_size: int = 1,
        *,
        threads: int | None = None,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("threads", threads or 1)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        self._module = module
        self._stages = list(_stages(module, batch_size))
        self._layers = [stage for stage in self._stages if isinstance(stage, _Recurrent)]
        if not self._layers:
            raise TypeError(
                f"a stream needs an RNN, LSTM or GRU layer, got {type(module).__name__}"
            )
        if len({bool(layer.module.batch_first) for layer in self._layers}) > 1:
            raise ValueError("all layers of a stream must have the same batch_first")
        self._batch_size = batch_size
        self._threads = threads or torch.get_num_threads()
        self._batch_first = bool(self._layers[0].module.batch_first)
        self._steps = 0  # that the buffers have room for
        self.reload()

    def reload(self) -> None:
        """Take the modules' weights as they are now; the state stays."""
        dtype, packed = None if self._steps == 0 else self.dtype, []
        layers = [stage for stage in self._stages if not isinstance(stage, str)]
        for layer in layers:
            packed.append(layer.pack(dtype, self._threads))
            dtype = layer.dtype
        # Nothing has changed until here, where all is right.
        for layer, memory in zip(layers, packed, strict=True):
            layer.packed = memory
        if self._steps == 0:
            self._begin(layers)
        self._reserve(max(self._steps, 1))

    def _begin(self, layers: Sequence[_Recurrent | _Linear]) -> None:
        """Once their weights are known."""
        for before, after in itertools.pairwise(layers):
            if before.width != after.features:
                raise ValueError(
                    f"{after.module!r} takes {after.features} features, but {before.module!r} "
                    f"before it gives {before.width}"
                )
        self.dtype = layers[0].dtype
        self._features, self._width = layers[0].features, layers[-1].width
        self._bound = _core.Stream(
            [stage if isinstance(stage, str) else stage.stage for stage in self._stages],
            self._features, self.dtype is torch.float64, self._batch_size, self._batch_first,
            self._threads,
        )  # fmt: skip
        # What to do with an array like the last one.
        self._again = cast(Callable[[Any], Any], self._bound.again())

    def _reserve(self, steps: int) -> None:
        """Make room for blocks of this many steps."""
        if steps > self._steps:
            self._steps = steps
            size = self._bound.workspace_bytes(steps)
            self._workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
            output = torch.zeros(
                steps, self._batch_size, self._width, dtype=self.dtype, device="cpu"
            )
            self._output = output, output.numpy()
            # Views of the buffer: making one would take longer than a small step.
            self._views: dict[tuple[int, int, int], Tensor | NDArray[np.floating]] = {}
        self._bound.bind(
            [(0, []) if isinstance(stage, str) else stage.memory for stage in self._stages],
            self._workspace.data_ptr(),
            self._steps,
            self._output[0].data_ptr(),
            [self._workspace, self._output[0]]
            + [(layer.packed, layer.states) for layer in self._layers]
            + [stage.packed for stage in self._stages if isinstance(stage, _Linear)],
        )

    @property
    def module(self) -> Module | Sequence[Module]:
        """The layer, or the modules, whose weights are taken."""
        return self._module

    @property
    def batch_size(self) -> int:
        """Samples that are heard side by side."""
        return self._batch_size

    @property
    def threads(self) -> int:
        """The most threads that a call may use."""
        return self._threads

    @property
    def state(self) -> tuple[Any, ...]:
        """A copy of the current state: h, for an LSTM h and c, each (L, B, ·).

        Of several recurrent layers such a tuple for each.
        """
        current = self._bound.current
        states = [tuple([pair[current].clone() for pair in la.states]) for la in self._layers]
        return states[0] if len(states) == 1 else tuple(states)

    def reset(self, hx: Any = None) -> None:
        """Begin anew: from zeros, or from ``hx`` as the layer takes it (h, or h and c).

        Of several recurrent layers ``hx`` has such a state, or None, for each.
        Raises ValueError for states of another number, shape, dtype or device.
        """
        each = [hx]
        if len(self._layers) > 1:
            each = [None] * len(self._layers) if hx is None else list(hx)
        if len(each) != len(self._layers):
            raise ValueError(f"expected {len(self._layers)} layers' states, got {len(each)}")
        for layer, state in zip(self._layers, each, strict=True):
            layer.reset(state, self._bound.current)

    def __call__(self, input: Block) -> Block:
        heard = self._again(input)
        if heard is not None:
            return heard  # type: ignore[no-any-return]  # (a cast takes as long as a small step)
        if isinstance(input, Tensor):
            kind, item = 0, 1
            if input.dtype is not self.dtype or not input.is_cpu:
                raise TypeError(
                    f"a block must be {self.dtype} on the CPU, got {input.dtype} on {input.device}"
                )
            strides = input.stride()
            if (strides[-1:] != (1,) and input.shape[-1:] != (1,)) or input.is_neg():
                input = dense(input)
                strides = input.stride()
            pointer = input.data_ptr()
        elif isinstance(input, np.ndarray) and not isinstance(input, np.ma.MaskedArray):
            kind, item = 1, input.itemsize
            if input.dtype != _NUMPY[self.dtype]:
                raise TypeError(f"a block must be {_NUMPY[self.dtype]}, got {input.dtype}")
            strides = input.strides
            apart = strides[-1:] != (item,) and input.shape[-1:] != (1,)
            if apart or any([s % item for s in strides]):
                input = np.ascontiguousarray(input)
                strides = input.strides
            pointer = _core.address(input)
        else:
            raise TypeError(f"a block must be a tensor or an array, got {type(input).__name__}")

        shape = input.shape
        rank = len(shape)
        if rank == 3:
            steps, batch, _ = shape
            step, row = strides[0], strides[1]
            if self._batch_first:
                steps, batch, step, row = batch, steps, row, step
        else:
            steps, step, row, batch = 1, 0, 0, 1
            if rank == 2:
                steps, step = shape[0], strides[0]
        if batch != self._batch_size or not 1 <= rank <= 3 or shape[-1] != self._features:
            self._refuse(shape)
        if steps > self._steps:
            self._reserve(steps)
        elif steps < 1:
            self._refuse(shape)
        self._bound.run(pointer, steps, step // item, row // item)
        view = self._views.get((kind, rank, steps))
        if view is None:
            view = self._views[kind, rank, steps] = self._view(kind, rank, steps)
        if kind == 1:
            self._bound.remember(input, view, steps)
        return cast(Block, view)

    def _view(self, kind: int, rank: int, steps: int) -> Tensor | NDArray[np.floating]:
        view = self._output[kind][:steps]
        if rank == 3:
            return view.swapaxes(0, 1) if self._batch_first else view
        return view[:, 0] if rank == 2 else view[0, 0]

    def _refuse(self, shape: Sequence[int]) -> None:
        batch, features = self._batch_size, self._features
        expected = f"({batch}, T, {features})" if self._batch_first else f"(T, {batch}, {features})"
        if batch == 1:
            expected += f", (T, {features}) or ({features},)"
        raise ValueError(f"a block must have shape {expected} with T >= 1, got {tuple(shape)}")

    def __repr__(self) -> str:
        return (
            f"Stream({self._module!r}, batch_size={self._batch_size}, threads={self._threads}, "
            f"dtype={self.dtype})"
        )
