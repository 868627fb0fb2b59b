"""TreeLSTM and TreeRNN: recursive networks as modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .cells import Config
from .forest import Trees
from .functional import States, checked_arity, tree_lstm, tree_rnn

__all__ = ["TreeLSTM", "TreeRNN"]


class _TreeLayer(torch.nn.Module):
    """What the two have in common: sizes and parameters, named as those of torch.nn's cells."""

    config: Config
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        arity: int | None,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or input_size < 0:
            raise ValueError(
                "hidden_size must be greater than zero and input_size not negative, got "
                f"{hidden_size} and {input_size}"
            )
        self.input_size, self.hidden_size = input_size, hidden_size
        self.arity, self.bias = arity, bias
        self.config = Config(cell, checked_arity(arity), bias)
        for name in ("bias_ih", "bias_hh"):
            self.register_parameter(name, None)
        for name, shape in self.config.weight_shapes(input_size, hidden_size).items():
            parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform numbers up to 1 / sqrt(hidden_size), as torch.nn's recurrent layers have."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        text += "" if self.arity is None else f", arity={self.arity}"
        return text if self.bias else f"{text}, bias=False"

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.config.weight_shapes(0, 1)]


class TreeLSTM(_TreeLayer):
    """Long short-term memory over trees, gates in the order i, f, g, o.

    A node has one input, one forget gate for each child, and its state from its children's:
    c = i * g + sum_k f_k * c_k, h = o * tanh(c). The gates see the input and

    * without ``arity``, child-sum: i, g, o the sum of the children's h, f_k that of child k. Any
      number of children, in no order; a chain is an LSTM's sequence, with the same numbers.
    * with ``arity`` N: all of them, through a matrix for each position and gate; f_k, too, one for
      each pair of positions. For children with an order, such as left and right.

    Args:
        input_size: features of a node's input, I.
        hidden_size: memory cells, H.
        arity: children of a node at most, N; None: child-sum.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.

    Parameters:
        weight_ih: (4*H, I), rows of i, f, g, o.
        weight_hh: (4*H, H); with arity ((3 + N)*H, N*H): rows of i, f_1 .. f_N, g, o, columns of
            the child at position 1 .. N.
        bias_ih, bias_hh: (4*H,).

    Call: ``(h, c), (h_root, c_root) = layer(input, trees)``.
        input: (nodes, I), the rows of all trees one behind the other.
        trees: a :class:`fastcell.Trees`, made once and used as often as the batch comes, or the
            parents of one tree.
        h, c: (nodes, H), of every node.
        h_root, c_root: (trees, H), of the roots.

    Raises:
        TypeError, ValueError: parents that are no tree, input of another rank, more children than
            ``arity``: the text names tree and node.
        RuntimeError: tensors whose sizes, dtypes or devices do not belong together.

    Source: K. S. Tai, R. Socher, C. D. Manning, "Improved semantic representations from
    tree-structured long short-term memory networks", ACL (2015), equations 2-8 (child-sum) and
    9-14 (N-ary).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        arity: int | None = None,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("tree_lstm", input_size, hidden_size, arity, bias, device, dtype)

    def forward(self, input: Tensor, trees: Trees | Tensor | Any) -> tuple[States, States]:
        return tree_lstm(input, trees, self._weights(), arity=self.arity)


class TreeRNN(_TreeLayer):
    """A plain recursive network over trees.

    h = tanh(W x + b + U sum_k h_k), or with ``arity`` N tanh(W x + b + sum_k U_k h_k) with a matrix
    for each position.

    Args:
        nonlinearity: ``"tanh"`` or ``"relu"``.
        input_size, hidden_size, arity, bias, device, dtype: as for :class:`TreeLSTM`.

    Parameters:
        weight_ih: (H, I).
        weight_hh: (H, H); with arity (H, N*H), columns of the child at position 1 .. N.
        bias_ih, bias_hh: (H,).

    Call: ``h, h_root = layer(input, trees)``, as :class:`TreeLSTM`.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`TreeLSTM`.

    Source: R. Socher, C. C. Lin, A. Y. Ng, C. D. Manning, "Parsing natural scenes and natural
    language with recursive neural networks", ICML (2011).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        arity: int | None = None,
        nonlinearity: str = "tanh",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(
            f"tree_rnn_{nonlinearity}", input_size, hidden_size, arity, bias, device, dtype
        )
        self.nonlinearity = nonlinearity

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.nonlinearity == "tanh" else f"{text}, nonlinearity=relu"

    def forward(self, input: Tensor, trees: Trees | Tensor | Any) -> tuple[Tensor, Tensor]:
        return tree_rnn(
            input, trees, self._weights(), arity=self.arity, nonlinearity=self.nonlinearity
        )
