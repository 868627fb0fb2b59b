"""Ridge regression from sums, which take rows in any number of pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Matrix = NDArray[np.float64]


class RidgeSums:
    """Minimises Σ |y - (W z + c)|² + ridge |W|² over rows (z, y); the intercept c is free.

    What is kept does not grow with the rows: their number, means, and products of deviations from
    the means, in float64. Pieces are joined as in T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances" (1979), which loses no digits
    to means that are large beside the deviations.
    """

    def __init__(self, features: int, outputs: int) -> None:
        self.rows = 0
        self._features = features
        self._mean = np.zeros(features + outputs)
        self._products = np.zeros((features, features + outputs))  # Σ z zᵀ, Σ z yᵀ, about the means

    def add(self, z: NDArray[Any], y: NDArray[Any]) -> None:
        """Rows z (n, features) and y (n, outputs)."""
        if len(z) == 0:
            return
        both = np.concatenate([z, y], axis=1, dtype=np.float64)
        mean = both.mean(axis=0)
        both -= mean
        total = self.rows + len(both)
        change = mean - self._mean
        self._products += both[:, : self._features].T @ both
        self._products += (self.rows * len(both) / total) * np.outer(
            change[: self._features], change
        )
        self._mean += change * (len(both) / total)
        self.rows = total

    def solve(self, ridge: float) -> tuple[Matrix, Matrix]:
        """W (outputs, features) and c (outputs,).

        Where the sums leave W open (ridge 0, fewer rows than features) it is the shortest one.
        """
        left, right = np.split(self._products, [self._features], axis=1)
        left = left + ridge * np.eye(self._features)
        try:
            solution = linalg.cho_solve(linalg.cho_factor(left), right)
        except linalg.LinAlgError:  # not positive definite, to rounding
            solution = linalg.lstsq(left, right)[0]
        weights: Matrix = solution.T
        z_mean, y_mean = np.split(self._mean, [self._features])
        return weights, y_mean - weights @ z_mean
