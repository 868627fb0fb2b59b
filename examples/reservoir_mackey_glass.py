"""An echo state network learns the chaotic Mackey-Glass series, and goes on with it by itself.

    python examples/reservoir_mackey_glass.py
    python examples/reservoir_mackey_glass.py --units 1000 --seed 3

It hears 2,000 steps and learns to foretell the next one. Printed: the error one step ahead on
steps that it has not heard, beside that of a linear model of the last 18 steps, and the error when
each output is fed back as the next input, so that nothing more is heard. Errors are root mean
squares, as parts of the series' standard deviation. Exit status 1 if it has not learned: one step
ahead no better than the linear model, or 100 steps alone worse than a tenth of the deviation.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

import fastcell

HEARD = 2000
AHEAD = (25, 50, 100, 200)
TAPS = 18  # the delay of the series, and one


def mackey_glass(steps: int, tau: int = 17, fine: int = 10) -> np.ndarray:
    """(steps, 1): dx/dt = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x, by Euler's method.

    M. C. Mackey and L. Glass, "Oscillation and chaos in physiological control systems", Science 197
    (1977). One step is a unit of t.
    """
    delay, before = tau * fine, 500 * fine
    x = np.full(delay + before + steps * fine, 1.2)
    for t in range(delay, len(x) - 1):
        late = x[t - delay]
        x[t + 1] = x[t] + (0.2 * late / (1 + late**10) - 0.1 * x[t]) / fine
    return x[delay + before :: fine, None] - 1


def nrmse(found: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square error as a part of the standard deviation."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / expected.var()))


def linear_error(series: np.ndarray, heard: int) -> float:
    """One step ahead, after ``heard`` steps, of the linear model of the last TAPS steps."""
    rows = np.lib.stride_tricks.sliding_window_view(series[:, 0], TAPS)[:-1]
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    weights, *_ = np.linalg.lstsq(rows[: heard - TAPS], series[TAPS:heard], rcond=None)
    return nrmse(rows[heard - TAPS :] @ weights, series[heard:])


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--units", type=int, default=500)
    arguments.add_argument("--spectral-radius", type=float, default=0.9)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()

    series = mackey_glass(HEARD + 1000)
    network = fastcell.ReservoirRNN(
        options.units,
        spectral_radius=options.spectral_radius,
        density=min(1.0, 10 / options.units),
        ridge=1e-8,
        washout=100,
        random_state=options.seed,
    )
    start = time.perf_counter()
    network.fit(series[:HEARD])
    print(f"{options.units} units fitted to {HEARD} steps in {time.perf_counter() - start:.2f} s")

    one = nrmse(network.predict(series[:-1])[HEARD - 1 :], series[HEARD:])
    linear = linear_error(series, HEARD)
    print(f"one step ahead: {one:.2e}, a linear model of {TAPS} steps {linear:.2e}")

    alone = network.generate(max(AHEAD), series[:HEARD])
    errors = {n: nrmse(alone[:n], series[HEARD : HEARD + n]) for n in AHEAD}
    print("alone for", ", ".join(f"{n} steps: {error:.2e}" for n, error in errors.items()))
    return 0 if one < linear and errors[100] < 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
