"""Contenders for test_bench.py: small arithmetic instead of a network, and every way to fail."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import Array, Problem


class Honest(Contender):
    """Gives what Truth gives, rounded to the case's dtype."""

    version = "1.0"

    def algorithm(self, case: Case) -> str:
        return "arithmetic"

    def prepare(self, case: Case, problem: Problem) -> Call:
        exact = problem.input.astype(np.float64).sum(axis=2)
        values = {"output": np.tanh(exact).astype(case.dtype)}
        if case.training:
            values["grad_input"] = problem.input * 2
        return lambda: values

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        found: dict[str, Array] = dict(raw)
        return found


class Wrong(Honest):
    """One number of the output is off by a thousandth."""

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        output = raw["output"].copy()
        output.flat[0] += 1e-3
        return {**raw, "output": output}


class WrongGradient(Honest):
    """Right in inference; in training the gradient has the wrong sign."""

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        return {name: -value if "grad" in name else value for name, value in raw.items()}


class Absent(Honest):
    """Cannot be constructed."""

    def __init__(self, threads: int) -> None:
        raise ImportError("no such library")


class Picky(Honest):
    """Runs nothing."""

    def why_not(self, case: Case) -> str | None:
        return "does not do this"


class Raises(Honest):
    """An ordinary exception."""

    def prepare(self, case: Case, problem: Problem) -> Call:
        raise RuntimeError("out of luck")


class CrashesOnce(Honest):
    """Dies by a signal on inputs wider than 4, and works on others, in a new process."""

    def prepare(self, case: Case, problem: Problem) -> Call:
        if case.I > 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(case, problem)


class CrashesWhenTimed(Honest):
    """Dies in the second call, after its results were found right."""

    def prepare(self, case: Case, problem: Problem) -> Call:
        call, calls = super().prepare(case, problem), [0]

        def run() -> Any:
            calls[0] += 1
            if calls[0] > 1:
                print("the library says why", flush=True)
                os._exit(3)
            return call()

        return run


class Hangs(Honest):
    """Never answers."""

    def prepare(self, case: Case, problem: Problem) -> Call:
        time.sleep(1000)
        raise AssertionError


class Slow(Honest):
    """A call takes 30 ms."""

    def prepare(self, case: Case, problem: Problem) -> Call:
        call = super().prepare(case, problem)

        def run() -> Any:
            time.sleep(0.03)
            return call()

        return run
