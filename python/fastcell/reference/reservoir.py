"""The echo state network in plain NumPy: the run of the reservoir, and its readout.

Sources: H. Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks",
GMD report 148 (2001); M. Lukoševičius, "A practical guide to applying echo state networks" (2012),
whose equations are named below.
"""

from __future__ import annotations

import numpy as np

from .cells import CELLS, Array, linear


def run(
    x: Array, input_weights: Array, bias: Array, recurrent: Array, leak: Array, state: Array
) -> Array:
    """States (T, H) of one sequence x (T, I) (equations 2 and 3):

        v_t = tanh(W_in x_t + b + W h_{t-1})        h_t = (1 - leak) * h_{t-1} + leak * v_t

    ``input_weights`` (H, I), ``recurrent`` (H, H), dense; ``bias``, ``leak`` and the ``state``
    before the first step (H,). The step is that of ``Leaky``, whose α is 1 - leak.
    """
    weights = {"weight_leak": (1 - leak)[None]}
    h, states = state[None], np.empty((len(x), len(bias)), x.dtype)
    for t, gx in enumerate(linear(x, input_weights, bias)):
        (h,), _ = CELLS["leaky_tanh"].step(gx[None], linear(h, recurrent, None), [h], weights)
        states[t] = h[0]
    return states


def readout(rows: Array, targets: Array, ridge: float) -> tuple[Array, Array]:
    """W (O, F) and c (O,) that minimise Σ |y - (W z + c)|² + ridge |W|² (equation 9).

    rows z (n, F), targets y (n, O). As the least squares of the rows with √ridge I below them: no
    product of the rows with themselves, which would square the condition number.
    """
    n, features = rows.shape
    left = np.zeros((n + features, features + 1), rows.dtype)
    left[:n, :features], left[:n, features] = rows, 1
    left[n:, :features] = np.sqrt(ridge) * np.eye(features)
    right = np.concatenate([targets, np.zeros((features, targets.shape[1]), rows.dtype)])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution[:features].T, solution[features]
