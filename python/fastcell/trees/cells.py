"""What the layers above the kernels must know of each recursive cell."""

from __future__ import annotations

from typing import NamedTuple


class TreeSpec(NamedTuple):
    """A recursive cell.

    Attributes:
        gates: blocks of H rows in ``weight_ih``.
        states: 1 for h, 2 for h and c.
        forgets: whether one of the gates is a forget gate, which each child has for itself.
        like: the cell of ``fastcell.cells.CELLS`` that it is on a chain.
    """

    gates: int
    states: int
    forgets: bool
    like: str


SPECS = {
    "tree_lstm": TreeSpec(4, 2, True, "lstm"),
    "tree_rnn_tanh": TreeSpec(1, 1, False, "rnn_tanh"),
    "tree_rnn_relu": TreeSpec(1, 1, False, "rnn_relu"),
}


class Config(NamedTuple):
    """The part of a call that is no tensor; ``arity`` 0: the children's sum."""

    cell: str
    arity: int
    bias: bool

    @property
    def positions(self) -> int:
        """Recurrent matrices side by side."""
        return self.arity or 1

    def weight_shapes(self, input_size: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights, in order."""
        spec = SPECS[self.cell]
        rows = spec.gates * hidden_size
        recurrent = rows + spec.forgets * (self.positions - 1) * hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (recurrent, self.positions * hidden_size),
        }
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        return shapes
