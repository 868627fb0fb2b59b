"""fastcell: fused recurrent layers for PyTorch, drop-in for torch.nn.RNN, LSTM and GRU.

    import fastcell
    layer = fastcell.LSTM(128, 256, num_layers=2, batch_first=True)   # as torch.nn.LSTM
    output, (h, c) = layer(input)

``fastcell.convert(model)`` swaps the layers of a model that exists already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# torch first: it brings the OpenMP runtime that the kernels share with it.
import torch as _torch  # noqa: F401  # isort: skip

from . import cuda, functional, reference
from .cell_modules import GRUCell, IndRNNCell, LeakyRNNCell, LSTMCell, RNNCell
from .convert import convert, revert
from .explain import explain
from .info import info
from .modules import GRU, LSTM, RNN, IndRNN, LeakyRNN
from .quantized import QuantizedCell, QuantizedLayer, quantize
from .stream import Stream
from .trees import TreeLSTM, TreeRNN, Trees

if TYPE_CHECKING:
    from .reservoir import ReservoirRNN as ReservoirRNN
else:

    def __getattr__(name: str) -> Any:
        # Once it is asked for: scikit-learn is optional, and takes its time to import.
        if name == "ReservoirRNN":
            from .reservoir import ReservoirRNN

            return ReservoirRNN
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "LeakyRNN",
    "LeakyRNNCell",
    "QuantizedCell",
    "QuantizedLayer",
    "RNNCell",
    "Stream",
    "TreeLSTM",
    "TreeRNN",
    "Trees",
    "__version__",
    "convert",
    "cuda",
    "explain",
    "functional",
    "info",
    "quantize",
    "reference",
    "revert",
]
