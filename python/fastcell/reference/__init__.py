"""Recurrent networks in plain NumPy, forward and backpropagation through time, to be read.

The fast kernels are tested against this package. It computes in the dtype it is given (float16,
float32, float64, longdouble), imports nothing but NumPy, and says each equation once, beside its
source: start at cells.py (one step), then sequence.py (the time loop) and stack.py (layers and
directions). Apart from these stand networks over trees (tree.py), layer normalisation (normed.py)
and the echo state network (reservoir.py).

>>> import numpy as np
>>> from fastcell import reference
>>> rng = np.random.default_rng(0)
>>> T, B, I, H = 5, 2, 3, 4
>>> shapes = [(3 * H, I), (3 * H, H), (3 * H,), (3 * H,)]  # weight_ih, weight_hh, bias_ih, bias_hh
>>> weights = [rng.normal(size=shape) for shape in shapes]
>>> x, h0 = rng.normal(size=(T, B, I)), np.zeros((1, B, H))
>>> output, (h,), tape = reference.forward("gru", x, [h0], weights, lengths=[5, 3])
>>> output.shape, np.array_equal(output[2, 1], h[0, 1])
((5, 2, 4), True)
>>> gradients = reference.backward(tape, grad_output=np.ones_like(output))
>>> gradients.input.shape, [g.shape for g in gradients.weights]
((5, 2, 3), [(12, 3), (12, 4), (12,), (12,)])
"""

from . import normed, reservoir, tree
from .cells import CELLS, Options
from .stack import Gradients, Result, Tape, backward, forward

__all__ = [
    "CELLS",
    "Gradients",
    "Options",
    "Result",
    "Tape",
    "backward",
    "forward",
    "normed",
    "reservoir",
    "tree",
]
