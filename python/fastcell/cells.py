"""The table of cells: what the layers above the kernels must know of each one.

A cell's equations live in two places only: ``csrc/cells/<cell>.h`` (the kernels) and
``composite.py`` (the same step in plain torch operations); ``fastcell.reference`` holds the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        second: how many gates, the last ones, have a recurrent product with what the others make.
        recurrent: whether there is a matrix ``weight_hh``; else those vectors are in its place.
        autocast: whether a whole layer runs in the autocast dtype on a CPU, as torch.nn's does.
        autocast_cell: the same for the single-step module.
    """

    name: str
    gates: int
    states: int
    projection: bool = False
    autocast: bool = True
    autocast_cell: bool = False
    parameters: int = 0
    parameters_name: str = ""
    recurrent: bool = True
    second: int = 0

    @property
    def rows(self) -> int:
        """Of the weight that the cell has besides ``weight_ih``, ``weight_hh`` and the biases."""
        return self.parameters if self.recurrent else 0


class Options(NamedTuple):
    """What a cell is told besides its kind. The order is that of csrc/common/options.h.

    Attributes:
        activation: of the candidate: an LSTM's g, a GRU's n, an RNN's h.
        output_activation: of an LSTM's c, before the output gate.
        clip: bound on the arguments of an LSTM's gates.
        zoneout_h, zoneout_c: probabilities with which a unit keeps its h, its c.
    """

    activation: str = "tanh"
    output_activation: str = "tanh"
    clip: float = math.inf
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0

    @property
    def zoneout(self) -> tuple[float, float]:
        return self.zoneout_h, self.zoneout_c


# Those whose kernels also multiply in 16 and 8 bits.
NARROW_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
# Those that there are with layer normalisation, too.
NORMED_CELLS = ("lstm", "lstm_peephole", "lstm_coupled", "lstm_coupled_peephole", "gru")
ACTIVATIONS = ("tanh", "relu", "sigmoid", "identity", "softsign", "elu")
_PLAIN = Options()


def _lstms() -> Iterator[CellSpec]:
    for general in ("", "_general"):
        yield CellSpec("lstm" + general, 4, 2, True)
        yield CellSpec("lstm_peephole" + general, 4, 2, True, True, False, 3, "weight_peephole")
        yield CellSpec("lstm_coupled" + general, 3, 2, True)
        yield CellSpec(
            "lstm_coupled_peephole" + general, 3, 2, True, True, False, 2, "weight_peephole"
        )


CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("rnn_tanh", 1, 1, autocast_cell=True),
        CellSpec("rnn_relu", 1, 1, autocast_cell=True),
        CellSpec("rnn_general", 1, 1, autocast_cell=True),
        CellSpec("leaky_tanh", 1, 1, False, True, True, 1, "weight_leak"),
        CellSpec("leaky_relu", 1, 1, False, True, True, 1, "weight_leak"),
        CellSpec("independent", 1, 1, False, True, True, 1, "weight_hh", recurrent=False),
        *_lstms(),
        CellSpec("gru", 3, 1, autocast=False),
        CellSpec("gru_general", 3, 1, autocast=False),
        CellSpec("gru_before", 3, 1, autocast=False, second=1),
    )
}


def checked_options(
    cell: str,
    *,
    activation: str = "tanh",
    output_activation: str = "tanh",
    clip: float | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    projected: bool = False,
) -> Options:
    """The options of a layer, as its user gives them.

    Raises ValueError for what is no activation, bound or probability.
    """
    for name in (activation, output_activation):
        if name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be a positive number or None, got {clip!r}")
    states = spec_of(cell).states
    parts = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout,) * states
    if len(parts) != states or not all([0 <= p <= 1 for p in parts]):
        wanted = "a probability or a pair of them, of h and c" if states > 1 else "a probability"
        raise ValueError(f"zoneout must be {wanted}, got {zoneout!r}")
    if projected and parts[0] > 0:
        raise ValueError(f"with proj_size only c can be zoned out, zoneout=(0, p): got {zoneout!r}")
    return Options(
        activation,
        output_activation,
        math.inf if clip is None else float(clip),
        *[float(p) for p in parts],
    )


def checked_probability(name: str, p: float) -> float:
    """``p``, or ValueError where it is no probability below 1."""
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be from 0 to below 1, got {p!r}")
    return float(p)


def check_skip(skip: int, beside: bool) -> None:
    """Raise ValueError where it is no delay, or none that can be beside the last step."""
    if type(skip) is not int or skip < 1:
        raise ValueError(f"skip must be a positive number of steps, got {skip!r}")
    if beside and skip < 2:
        raise ValueError(f"skip_beside=True takes a skip of 2 or more steps, got {skip}")


def with_options(cell: str, options: Options) -> str:
    """The name of a cell with these options: itself, unless there are some."""
    if options == _PLAIN:
        return cell
    if not cell.endswith("_general") and f"{cell}_general" in CELLS:
        cell += "_general"
    return _made(f"{cell}[{','.join(map(str, options))}]")


def with_delay(cell: str, delay: int) -> str:
    """The name of a cell that sees h of ``delay`` (2 or more) steps before, besides the last."""
    return _made(f"{cell}~{delay}")


# Names that were made here: no cache of functools, which Dynamo warns of.
_known: dict[str, tuple[CellSpec, Options, int]] = {}


def _made(cell: str) -> str:
    if cell not in _known and len(_known) < 256:
        _known[cell] = _parsed(cell)
    return cell


def _parsed(cell: str) -> tuple[CellSpec, Options, int]:
    if cell in _known:
        return _known[cell]
    plain, _, delay = cell.partition("~")
    name, bracket, options = plain.partition("[")
    parts = options.removesuffix("]").split(",")
    if name not in CELLS or (bracket and len(parts) != len(Options._fields)):
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    chosen = Options(parts[0], parts[1], *map(float, parts[2:])) if bracket else _PLAIN
    return CELLS[name], chosen, int(delay or 0)


def spec_of(cell: str) -> CellSpec:
    """What is known of a cell, by its name with or without options."""
    return CELLS.get(cell) or _parsed(cell)[0]


def options_of(cell: str) -> Options:
    """The options in a cell's name."""
    return _PLAIN if cell in CELLS else _parsed(cell)[1]


def delay_of(cell: str) -> int:
    """Steps of the link besides the one of length one; 0: there is none."""
    return 0 if cell in CELLS else _parsed(cell)[2]


def remembered_of(cell: str) -> int:
    """Steps whose h a layer begins with and leaves: its first state has so many times the batch."""
    return delay_of(cell) or 1


# How torch.nn's layers name their cell, in the attribute ``mode``.
CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


def cell_of(layer: Any) -> str:
    """The name of the cell of a layer, torch.nn's or fastcell's."""
    return getattr(layer, "_cell", None) or CELL_OF_MODE[layer.mode]


def rnn_cell(nonlinearity: str, zoneout: float) -> str:
    """The name of an Elman layer's cell."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell = "rnn_" + nonlinearity
    options = checked_options(cell, zoneout=zoneout)
    if options == _PLAIN:
        return cell
    return with_options("rnn_general", options._replace(activation=nonlinearity))


def checked_alpha(alpha: Any, count: int, hidden: int) -> Tensor:
    """What leaky units keep of h, (count, H), from a number, (H,) or (count, H).

    Raises ValueError for another shape, or a value outside of 0 .. 1.
    """
    given = torch.as_tensor(alpha, dtype=torch.float64).cpu()
    if given.shape not in ((), (hidden,), (count, hidden)):
        raise ValueError(
            f"alpha must be a number or of shape ({hidden},) or ({count}, {hidden}), got "
            f"{tuple(given.shape)}"
        )
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    return given.expand(count, hidden).clone()


def independent_cell(nonlinearity: str, zoneout: float) -> str:
    """The name of the cell of a layer of independent units."""
    options = checked_options("independent", activation=nonlinearity, zoneout=zoneout)
    return with_options("independent", options)


def lstm_cell(peephole: bool = False, coupled: bool = False, **options: Any) -> str:
    """The name of an LSTM's cell; ``options``: those of ``checked_options``."""
    cell = "lstm" + "_coupled" * coupled + "_peephole" * peephole
    return with_options(cell, checked_options(cell, **options))


def gru_cell(reset_after: bool = True, **options: Any) -> str:
    """The name of a GRU's cell; ``options``: those of ``checked_options``."""
    cell = "gru" if reset_after else "gru_before"
    return with_options(cell, checked_options(cell, **options))


def weights_per_direction(
    bias: bool, projection: bool, quantized: bool = False, parameters: int = 0
) -> int:
    """Weight tensors of one layer and direction: w_ih, w_hh[, b_ih, b_hh][, w_hr][, w_peephole].

    Quantized ones are followed by the scales of w_ih, w_hh[, w_hr].
    """
    return 2 + 2 * bias + projection + (parameters > 0) + quantized * (2 + projection)
