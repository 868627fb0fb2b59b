"""Recursive networks over trees.

``forest.py`` turns parents into a schedule, once per batch of trees; ``modules.py`` and
``functional.py`` are what programs call. Below them ``ops.py`` (the path of a call, autograd, the
operators), ``cpu.py`` (the kernels) and ``composite.py`` (the same in torch operations).
"""

from .forest import Trees
from .functional import tree_lstm, tree_rnn
from .modules import TreeLSTM, TreeRNN

__all__ = ["TreeLSTM", "TreeRNN", "Trees", "tree_lstm", "tree_rnn"]
