"""fastcell.reference: the equations in plain NumPy, forward and backpropagation through time."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import Array, Problem, pack

_NAMES = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh", "RNN_RELU": "rnn_relu"}


class NumpyReference(Contender):
    """`forward`, and in training `backward`; NumPy's matrix products use its own BLAS threads."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._library: Any = importlib.import_module("fastcell.reference")
        self._names: list[str] = []

    @property
    def version(self) -> str:
        return np.__version__

    def algorithm(self, case: Case) -> str:
        return "fastcell.reference, loop over steps"

    def prepare(self, case: Case, problem: Problem) -> Call:
        forward, backward = self._library.forward, self._library.backward
        self._names = list(problem.weights)
        weights = list(problem.weights.values())
        options: dict[str, Any] = {
            "num_layers": case.layers,
            "bidirectional": case.bidirectional,
            "lengths": problem.lengths if case.ragged else None,
            "save": case.training,
        }
        name = _NAMES[case.cell]
        if not case.training:
            return lambda: (forward(name, problem.input, None, weights, **options), None)

        def step() -> tuple[Any, Any]:
            result = forward(name, problem.input, None, weights, **options)
            return result, backward(result.tape, problem.output_gradient)

        return step

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        result, gradients = raw
        lengths = np.asarray(case.lengths)

        def rows(padded: Array) -> Array:
            return pack(padded, lengths) if case.ragged else padded

        found = {"output": rows(result.output)}
        found.update(zip(("h_n", "c_n"), result.states, strict=False))
        if gradients is not None:
            found["grad_input"] = rows(gradients.input)
            named = zip(self._names, gradients.weights, strict=True)
            found.update({f"grad_{name}": value for name, value in named})
        return found
