"""The table of cells: what the layers above the kernels must know of each one.

A cell's equations live in two places only: ``csrc/cells/<cell>.h`` (the kernels) and
``composite.py`` (the same step in plain torch operations); ``fastcell.reference`` holds the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CellSpec:
    """One recurrent cell, as a layer sees it.

    Attributes:
        name: the key used by the operators, the kernels and the reference.
        gates: blocks of ``hidden_size`` rows in ``weight_ih`` and ``weight_hh``.
        states: state tensors carried through time (h, or h and c).
        projection: whether a ``weight_hr`` may follow the cell.
        parameters: vectors (H) that the cell has besides its matrices and biases, as the rows of
            one more weight, the last of its layer and direction.
        parameters_name: of that weight.
        autocast: whether a whole layer runs in the autocast dtype on a CPU, as torch.nn's does.
        autocast_cell: the same for the single-step module.
    """

    name: str
    gates: int
    states: int
    projection: bool
    autocast: bool
    autocast_cell: bool
    parameters: int = 0
    parameters_name: str = ""


CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("rnn_tanh", 1, 1, projection=False, autocast=True, autocast_cell=True),
        CellSpec("rnn_relu", 1, 1, projection=False, autocast=True, autocast_cell=True),
        CellSpec("lstm", 4, 2, projection=True, autocast=True, autocast_cell=False),
        CellSpec("gru", 3, 1, projection=False, autocast=False, autocast_cell=False),
        CellSpec("leaky_tanh", 1, 1, False, True, True, 1, "weight_leak"),
        CellSpec("leaky_relu", 1, 1, False, True, True, 1, "weight_leak"),
        CellSpec("lstm_peephole", 4, 2, True, True, False, 3, "weight_peephole"),
        CellSpec("lstm_coupled", 3, 2, True, True, False),
        CellSpec("lstm_coupled_peephole", 3, 2, True, True, False, 2, "weight_peephole"),
    )
}


# How torch.nn's layers name their cell, in the attribute ``mode``.
CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


def cell_of(layer: Any) -> str:
    """The name of the cell of a layer, torch.nn's or fastcell's."""
    return getattr(layer, "_cell", None) or CELL_OF_MODE[layer.mode]


def lstm_cell(peephole: bool, coupled: bool) -> str:
    """The name of an LSTM's cell."""
    return "lstm" + "_coupled" * coupled + "_peephole" * peephole


def weights_per_direction(
    bias: bool, projection: bool, quantized: bool = False, parameters: int = 0
) -> int:
    """Weight tensors of one layer and direction: w_ih, w_hh[, b_ih, b_hh][, w_hr][, w_peephole].

    Quantized ones are followed by the scales of w_ih, w_hh[, w_hr].
    """
    return 2 + 2 * bias + projection + (parameters > 0) + quantized * (2 + projection)
