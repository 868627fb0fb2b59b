"""The model that shares calls out (csrc/cpu/schedule.cpp) against the clock.

Slow, and only as steady as the machine is: `pytest -m slow tests/test_schedule.py`, on one that
does nothing else.
"""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch

import fastcell
from fastcell import packing
from fastcell.plan import bound_stack
from support import threads

THREADS = 2
SHAPES = [  # cell, T, B, I, H, bidirectional
    *itertools.product(["LSTM", "GRU", "RNN"], [100], [1, 8, 32], [64], [32, 128, 256], [False]),
    *itertools.product(["LSTM", "RNN"], [20], [2, 3, 64], [300], [100, 500], [False]),
    *itertools.product(["GRU", "RNN"], [50], [1, 5, 40], [20], [48, 300], [True]),
    *itertools.product(["LSTM", "RNN"], [1, 5], [1, 16, 256], [128], [128], [False]),
]


def ways(directions: int, batch: int) -> list[tuple[int, ...]]:
    found = [(1, 1, 1), (1, 1, THREADS)]
    if batch >= THREADS:
        found.append((1, THREADS, 1))
    if directions == THREADS:
        found.append((THREADS, 1, 1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_choice_is_near_the_best(shape, training):
    cell, steps, batch, features, hidden, bidirectional = shape
    layer = getattr(fastcell, cell)(features, hidden, bidirectional=bidirectional)
    x = torch.randn(steps, batch, features, requires_grad=training)
    weights = list(layer.parameters())
    with threads(THREADS), torch.set_grad_enabled(training):
        layer(x)
        config = packing._entries[tuple(map(id, weights))].call[0]
        stack = bound_stack(config, x, weights)
        candidates = ways(2 if bidirectional else 1, batch)

        def run() -> None:
            output = layer(x)[0]
            if training:
                output.backward(output.detach())

        def seconds(way: tuple[int, ...]) -> float:
            stack.force_schedule(*way, *[1] * (4 - len(way)))
            run()
            begin = time.perf_counter()
            count = 0
            while count < 3 or time.perf_counter() - begin < 0.01:
                run()
                count += 1
            return (time.perf_counter() - begin) / count

        try:
            chosen = (0, 0, 0)
            times = {way: [] for way in (*candidates, chosen)}
            for _ in range(7):
                for way, found in times.items():
                    found.append(seconds(way))
        finally:
            stack.force_schedule(0, 0, 0, 1)
    took = {way: statistics.median(found) for way, found in times.items()}
    best = min(took[way] for way in candidates)
    said = stack.explain(steps, batch, steps * batch, 0, THREADS, True)
    ratio = took[chosen] / best
    print(f"{shape} chose {said}: {ratio:.2f}", {w: f"{t * 1e6:.0f}" for w, t in took.items()})
    assert ratio <= 1.15, (said, took)
