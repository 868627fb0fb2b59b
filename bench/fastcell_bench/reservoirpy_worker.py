"""reservoirpy, timed by another process: weights in a file, a block of calls per line of input.

Run by an interpreter that has reservoirpy and need not have fastcell, as a file.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import reservoirpy
from reservoirpy.nodes import Reservoir
from scipy.sparse import csr_array


def main(given: str, found: str) -> None:
    """Write the states, print what it is; then time a block of as many seconds as a line says."""
    with np.load(given) as file:
        part = dict(file)
    units = len(part["bias"])
    matrix = csr_array((part["data"], part["indices"], part["indptr"]), (units, units))
    x = list(part["x"])

    def run() -> list[np.ndarray]:
        node = Reservoir(
            W=matrix, Win=part["input"], bias=part["bias"], lr=part["leak"], dtype=x[0].dtype
        )
        return list(node.run(x))

    states = np.stack(run())
    np.save(found, states)
    print(f"reservoirpy {reservoirpy.__version__}, states in {states.dtype}", flush=True)
    for line in sys.stdin:
        begin, count = time.perf_counter(), 0
        while True:
            run()
            count += 1
            if (passed := time.perf_counter() - begin) >= float(line):
                break
        print(passed / count, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
