"""The fixed weights of a reservoir: drawn, and scaled to a spectral radius."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigs

Array = NDArray[np.floating[Any]]

# Up to this size all eigenvalues of the dense matrix are found at once; up to the other, where the
# iteration does not converge: it takes a minute.
_DENSE_FIRST, _DENSE_LAST = 100, 4000
# Vectors that the iteration holds: more of them tell eigenvalues apart that lie closer together.
_ARNOLDI_VECTORS = (64, 256)


class Weights(NamedTuple):
    """Of H units that hear I inputs, all of one dtype."""

    input: Array  # (H, I)
    bias: Array  # (H,)
    recurrent: Any  # (H, H), scipy.sparse CSR
    leak: Array  # (H,), the part of a unit that is new at each step


def random_topology(units: int, fan_in: int, rng: np.random.Generator) -> Any:
    """(H, H), CSR: each unit hears ``fan_in`` others, or itself, by weights from (-1, 1).

    The same number for each unit, so that a vector of units has no lane that waits.
    """
    columns = [
        np.sort(rng.choice(units, fan_in, replace=False, shuffle=False)) for _ in range(units)
    ]
    values = rng.uniform(-1, 1, units * fan_in)
    offsets = np.arange(units + 1) * fan_in
    return sparse.csr_array((values, np.concatenate(columns), offsets), (units, units))


def spectral_radius(matrix: Any) -> float:
    """The largest absolute value of an eigenvalue, real or one of a complex pair.

    Args:
        matrix: (H, H), an array or a sparse one.

    Small matrices: all eigenvalues, by LAPACK. Large ones: some of the largest, by the implicitly
    restarted Arnoldi iteration (ARPACK), whose Krylov space holds complex pairs as real ones. A
    matrix whose graph has no cycle is nilpotent: its radius is 0, exactly.

    Raises:
        ValueError: neither converged, of a matrix too large for all eigenvalues.
    """
    graph = sparse.csr_array(matrix, dtype=np.float64)
    graph.eliminate_zeros()
    units = graph.shape[0]
    if not graph.nnz:
        return 0.0
    parts, _ = connected_components(graph, connection="strong")
    if parts == units and not graph.diagonal().any():
        return 0.0
    if units > _DENSE_FIRST:
        # The start is fixed, so that the same matrix has the same radius.
        start = np.random.default_rng(0).uniform(-1, 1, units)
        for vectors in _ARNOLDI_VECTORS:
            try:
                # Several: one alone may converge to the second largest.
                found = eigs(
                    graph, k=6, ncv=vectors, v0=start, maxiter=300, return_eigenvectors=False
                )
                return float(np.abs(found).max())
            except ArpackNoConvergence:
                continue
        if units > _DENSE_LAST:
            raise ValueError(
                f"the spectral radius of {units} units was not found: too many eigenvalues of "
                "about the same size. Scale recurrent_weights, and pass spectral_radius=None"
            )
    return float(np.abs(np.linalg.eigvals(graph.toarray())).max())


def scaled(matrix: Any, radius: float) -> Any:
    """The matrix times what gives it this spectral radius.

    Raises:
        ValueError: its radius is 0, as of an empty matrix and of one without a cycle.
    """
    found = spectral_radius(matrix)
    if found == 0:
        raise ValueError(
            f"recurrent weights of spectral radius 0 (no cycle among {matrix.shape[0]} units, "
            f"{matrix.nnz} connections) cannot be scaled to spectral_radius={radius}; "
            "spectral_radius=None leaves them as they are"
        )
    return matrix * (radius / found)
