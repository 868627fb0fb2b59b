"""What a contender is. A new one is one file with such a class and one line in the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from fastcell_bench.cases import Case
from fastcell_bench.problem import Array, Problem

Call = Callable[[], Any]


class Contender(ABC):
    """One library, in a process of its own. Made once, prepared for one case after another.

    The constructor imports the library and takes its number of threads; an ImportError there means
    that the library is not installed.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @property
    @abstractmethod
    def version(self) -> str:
        """The library's version."""

    @abstractmethod
    def algorithm(self, case: Case) -> str:
        """How the library runs the case just prepared, for the record."""

    def why_not(self, case: Case) -> str | None:
        """Why the library cannot run the case, or None if it can."""
        return None

    def machine_rates(self, bytes_per_thread: int, seconds: float) -> tuple[float, float] | None:
        """The machine's float32 FMA rate (FLOP/s) and its read bandwidth (bytes/s) from a buffer of
        that size per thread, over all threads; None from those that cannot measure."""
        return None

    @abstractmethod
    def prepare(self, case: Case, problem: Problem) -> Call:
        """Everything that a user does once. The callable returned is what is timed: in inference a
        forward, in training a forward and all gradients (input, every weight and bias)."""

    @abstractmethod
    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        """Names to arrays out of what the callable returned; not timed.

        output: (T, B, D*H), or (sum of lengths, D*H) step by step where the case is ragged;
        h_n and, for LSTM, c_n: (layers*D, B, H);
        in training also grad_input, of the input's shape (or packed), and grad_<weight name>.
        """
