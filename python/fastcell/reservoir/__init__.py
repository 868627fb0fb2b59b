"""Reservoir computing: the echo state network as a scikit-learn estimator.

``fastcell.ReservoirRNN`` (estimator.py) draws fixed weights (weights.py), runs them on a fused
kernel (units.py) and trains a linear readout alone, by ridge regression (ridge.py).
"""

from __future__ import annotations

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fastcell.ReservoirRNN needs scikit-learn, which is not installed: "
        "pip install 'fastcell[reservoir]'"
    ) from error

from .estimator import ReservoirRNN
from .weights import spectral_radius

__all__ = ["ReservoirRNN", "spectral_radius"]
