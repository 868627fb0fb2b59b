"""Sizes of a call on a CUDA device, and what its forward pass keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """Sizes of a call, those of one layer and direction in particular."""

    cell: str
    gates: int
    apart: int
    states: int
    saved: int
    parameters: int
    recurrent: bool
    second: int
    layers: int
    directions: int
    bias: bool
    hidden: int
    output: int
    projected: bool
    steps: int
    batch: int
    rows: int
    dtype: torch.dtype

    @property
    def real(self) -> torch.dtype:
        """The dtype of sums and of what is saved."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def gate_stride(self) -> int:
        """Of the buffer that holds the input terms first and what is saved after."""
        return max(self.gates, self.saved) * self.hidden

    @property
    def weights_each(self) -> int:
        return 2 + 2 * self.bias + self.projected + (self.parameters > 0 and self.recurrent)

    @property
    def first_rows(self) -> int:
        """Of ``weight_hh``: of the gates whose recurrent product takes h itself."""
        return (self.gates - self.second) * self.hidden

    @property
    def two_products(self) -> bool:
        """Whether a step has a second product: a projection, or some gates' own."""
        return self.projected or self.second > 0

    @property
    def parameters_at(self) -> int:
        """Where the cell's own vectors are among the weights of a layer and direction."""
        return -1 if self.recurrent else 1


class Reserve:
    """What a forward call keeps, as views of one buffer; without one it only measures."""

    def __init__(self, layer: Layer, memory: Tensor | None) -> None:
        self.bytes = 0
        count = layer.layers * layer.directions
        rows, real, hidden = layer.rows, layer.real, layer.hidden

        def take(width: int, dtype: torch.dtype) -> Any:
            begin, size = self.bytes, rows * width * dtype.itemsize
            self.bytes += -(-size // 256) * 256
            if memory is None:
                return None
            return memory[begin : begin + size].view(dtype).view(rows, width)

        self.gates = [take(layer.gate_stride, real) for _ in range(count)]
        self.cells = [take(hidden, real) if layer.states > 1 else None for _ in range(count)]
        self.cell_output = [
            take(hidden, layer.dtype) if layer.projected else None for _ in range(count)
        ]
        width = layer.directions * layer.output
        self.outputs = [take(width, layer.dtype) for _ in range(layer.layers)]
