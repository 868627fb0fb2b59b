"""Real-time inference: a layer stack fed block by block, with its state kept between the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _core
from .cells import CELL_OF_MODE, cell_of
from .cpu import DTYPES
from .operator_checks import check_stored_small
from .packing import dense, pack
from .plan import Config, plan_for
from .quantized import QuantizedLayer

Block = TypeVar("Block", Tensor, NDArray[np.floating])

_NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class Stream:
    """A recurrent layer that hears its input block by block.

    The state stays inside, the output goes to a buffer that the stream owns: a call allocates
    nothing, builds no graph, and returns what the same layer would for the whole sequence, bit for
    bit, however it is cut into blocks.

        stream = fastcell.Stream(layer)
        for block in microphone:            # (64, I), a NumPy array or a tensor
            heard = stream(block)           # (64, H): valid until the next call; copy it to keep it

    Args:
        module: fastcell's or torch.nn's RNN, LSTM or GRU on the CPU, float32 or float64, of one
            direction; or a quantized one (:func:`fastcell.quantize`), for float32. Its weights are
            taken as they are now; ``reload()`` takes them again. Dropout is not applied.
        batch_size: samples that are heard side by side, B.
        threads: the most threads that a call may use; default torch.get_num_threads(). Small layers
            take one.

    Call: ``output = stream(input)``.
        input: (T, B, I), or (B, T, I) if the module is ``batch_first``; with ``batch_size=1`` also
            (T, I), or (I,) for a single step. Any T from call to call, as a tensor or an array of
            the layer's dtype.
        output: (T, B, P) and so on, of the input's kind and number of dimensions.

    A stream belongs to one thread at a time; several streams run in several threads at once.

    Raises:
        TypeError: another module, or a block of another type or dtype.
        ValueError: two directions, delays (``skip``), another device or dtype, or a block of
            another shape.
    """

    def __init__(
        self,
        module: torch.nn.RNNBase | QuantizedLayer,
        batch_size: int = 1,
        *,
        threads: int | None = None,
    ) -> None:
        layer = isinstance(module, (torch.nn.RNNBase, QuantizedLayer))
        cell = cell_of(module) if layer and module.mode in CELL_OF_MODE else None
        if cell is None:
            raise TypeError(
                f"a stream needs an RNN, LSTM or GRU layer, got {type(module).__name__}"
            )
        if getattr(module, "layer_norm", False):
            raise ValueError("a stream takes no layer with layer_norm")
        if getattr(module, "skip", 1) > 1:
            raise ValueError("a stream takes no layer with skip, whose state is that of many steps")
        if module.bidirectional:
            raise ValueError("a stream hears no future: the layer must not be bidirectional")
        for name, number in (("batch_size", batch_size), ("threads", threads or 1)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        self._module = module
        self._batch_size = batch_size
        self._threads = threads or torch.get_num_threads()
        products = module.products if isinstance(module, QuantizedLayer) else "exact"
        self._config = Config(cell, module.num_layers, False, module.bias, False, products)
        self._features = module.input_size
        self._batch_first = module.batch_first
        self._steps = 0  # that the buffers have room for
        self.reload()

    def reload(self) -> None:
        """Take the module's weights as they are now; the state stays."""
        module = self._module
        if isinstance(module, QuantizedLayer):
            weights, dtype = [dense(w) for w in module.weights()], torch.float32
            wrong = False
            check_stored_small(module.products, weights)
        else:
            # By name: a parametrization computes its weights when asked.
            weights = [dense(getattr(module, n).detach()) for n in module._flat_weights_names]
            dtype = weights[0].dtype
            wrong = any(w.dtype is not dtype or dtype not in DTYPES for w in weights)
        if wrong or any(not w.is_cpu for w in weights):
            raise ValueError(
                "a stream needs weights on the CPU, all float32 or all float64, got "
                f"{sorted({f'{w.dtype} on {w.device}' for w in weights})}"
            )
        plan = plan_for(self._config, torch.empty(0, self._features, dtype=dtype), weights)
        if self._steps == 0:
            self.dtype = dtype
            self._plan = plan
            self._bound = _core.Stream(
                plan.stack, self._batch_size, self._batch_first, self._threads
            )
            shapes = [(plan.stacked, self._batch_size, size) for size in plan.state_sizes]
            with torch.inference_mode(False):  # to be changed in place later, wherever that is
                self._states = [
                    (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
                    for shape in shapes
                ]
        elif (plan.state_sizes, dtype) != (self._plan.state_sizes, self.dtype):
            raise ValueError(
                f"the stream was made for states of {self._plan.state_sizes} and {self.dtype}, "
                f"the weights are for {plan.state_sizes} and {dtype} now"
            )
        self._packed = pack(self._config, plan, weights, self._threads)
        self._reserve(max(self._steps, 1))

    def _reserve(self, steps: int) -> None:
        """Make room for blocks of this many steps."""
        if steps > self._steps:
            self._steps = steps
            size = self._bound.workspace_bytes(steps)
            self._workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
            output = torch.zeros(
                steps, self._batch_size, self._plan.width, dtype=self.dtype, device="cpu"
            )
            self._output = output, output.numpy()
            # Views of the buffer: making one would take longer than a small step.
            self._views: dict[tuple[int, int, int], Tensor | NDArray[np.floating]] = {}
            self._heard: Tensor | NDArray[np.floating]  # what an array like the last one gives
        self._bound.bind(
            self._packed.data_ptr(),
            [(a.data_ptr(), b.data_ptr()) for a, b in self._states],
            self._workspace.data_ptr(),
            self._steps,
            self._output[0].data_ptr(),
        )

    @property
    def module(self) -> torch.nn.RNNBase | QuantizedLayer:
        """The layer whose weights are taken."""
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
    def state(self) -> tuple[Tensor, ...]:
        """A copy of the current state: h, for an LSTM h and c, each (L, B, ·)."""
        return tuple([pair[self._bound.current].clone() for pair in self._states])

    def reset(self, hx: Tensor | Sequence[Tensor] | None = None) -> None:
        """Begin anew: from zeros, or from ``hx`` as the layer takes it (h, or h and c).

        Raises ValueError for states of another number, shape, dtype or device.
        """
        current = [pair[self._bound.current] for pair in self._states]
        if hx is None:
            for state in current:
                state.zero_()
            return
        given = [hx] if isinstance(hx, Tensor) else list(hx)
        expected = [tuple(c.shape) for c in current]
        if [tuple(g.shape) if isinstance(g, Tensor) else g for g in given] != expected or any(
            [g.dtype is not self.dtype or not g.is_cpu for g in given]
        ):
            said = [
                (tuple(g.shape), g.dtype, str(g.device)) if isinstance(g, Tensor) else g
                for g in given
            ]
            raise ValueError(f"the state must be {expected} of {self.dtype} on the CPU, got {said}")
        for state, value in zip(current, given, strict=True):
            state.copy_(value.detach())

    def __call__(self, input: Block) -> Block:
        if type(input) is np.ndarray and self._bound.run_array(input):
            return cast(Block, self._heard)
        if isinstance(input, Tensor):
            kind, item = 0, 1
            if input.dtype is not self.dtype or not input.is_cpu:
                raise TypeError(
                    f"a block must be {self.dtype} on the CPU, got {input.dtype} on {input.device}"
                )
            strides = input.stride()
            if strides[-1:] != (1,) or input.is_neg():
                input = dense(input)
                strides = input.stride()
            pointer = input.data_ptr()
        elif isinstance(input, np.ndarray) and not isinstance(input, np.ma.MaskedArray):
            kind, item = 1, input.itemsize
            if input.dtype != _NUMPY[self.dtype]:
                raise TypeError(f"a block must be {_NUMPY[self.dtype]}, got {input.dtype}")
            strides = input.strides
            if strides[-1:] != (item,) or any([s % item for s in strides]):
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
            self._heard = view
            self._bound.remember_array(rank, steps)
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
