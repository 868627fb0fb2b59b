"""Keras on TensorFlow: keras.layers.LSTM, GRU and SimpleRNN inside a tf.function.

Orders differ: torch's GRU gates are r, z, n and Keras's z, r, h (LSTM has torch's i, f, g, o).
Keras is batch-major, keeps weights as (inputs, gates*H), and its LSTM and SimpleRNN have one bias,
which gets the sum of torch's two; the gradient of either of those is then the gradient of the sum.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import Array, Problem, pack

_LAYERS = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "SimpleRNN", "RNN_RELU": "SimpleRNN"}
_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_TRIAL_SECONDS = 0.02
_LEAST_TRIALS = 3


class KerasLayers(Contender):
    """The layers not unrolled, in a tf.function with or without XLA (jit_compile): whichever of the
    two is faster, timed as a case is prepared. Mostly it is XLA, which in training at larger
    batches can lose to TensorFlow's own kernels.

    What is called is the concrete function, which saves the search for it in every call. Samples of
    different lengths are padded and masked.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        os.environ["KERAS_BACKEND"] = "tensorflow"
        self._tf: Any = importlib.import_module("tensorflow")
        self._keras: Any = importlib.import_module("keras")
        self._tf.config.set_visible_devices([], "GPU")
        self._tf.config.threading.set_intra_op_parallelism_threads(threads)
        self._tf.config.threading.set_inter_op_parallelism_threads(1)
        self._algorithm = ""

    @property
    def version(self) -> str:
        return str(self._keras.__version__)

    def algorithm(self, case: Case) -> str:
        return self._algorithm

    def prepare(self, case: Case, problem: Problem) -> Call:
        tf = self._tf
        layers = [self._layer(case, problem, layer) for layer in range(case.layers)]
        variables = [variable.value for layer in layers for variable in layer.trainable_variables]
        alive = np.arange(case.T) < problem.lengths[:, None]
        mask = tf.constant(alive) if case.ragged else None
        x = tf.constant(_swap(problem.input))
        gradient = tf.constant(_swap(problem.output_gradient))

        def forward(x: Any) -> Any:
            states = []
            for layer in layers:
                x, *final = layer(x, mask=mask, training=case.training)
                states.append(final)
            return x, states

        def training(x: Any, gradient: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                output, states = forward(x)
            gradients = tape.gradient(output, [x, *variables], output_gradients=gradient)
            return (output, states), gradients

        def inference(x: Any) -> Any:
            return forward(x), None

        arguments = (x, gradient) if case.training else (x,)
        calls: dict[str, Call] = {}
        for name, compiled in (("tf.function", False), ("tf.function with XLA", True)):
            traced = tf.function(training if case.training else inference, jit_compile=compiled)
            concrete = traced.get_concrete_function(*arguments)
            calls[name] = functools.partial(concrete, *arguments)
        fastest = min(calls, key=lambda name: _trial(calls[name]))
        self._algorithm = f"{fastest}, TensorFlow {tf.__version__}"
        return calls[fastest]

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        (output, states), gradients = raw
        lengths = np.asarray(case.lengths)

        def rows(value: Any) -> Array:
            padded = _swap(value.numpy())
            return pack(padded, lengths) if case.ragged else padded

        # A layer's states come direction by direction: h, c, h, c.
        kinds = 2 if case.cell == "LSTM" else 1
        found = {"output": rows(output)}
        for kind, name in enumerate(("h_n", "c_n")[:kinds]):
            found[name] = np.stack([s.numpy() for final in states for s in final[kind::kinds]])
        if gradients is None:
            return found
        found["grad_input"] = rows(gradients[0])
        values = iter(gradients[1:])
        for names in _parameters(case):
            kernel, recurrent, bias = (next(values).numpy() for _ in range(3))
            biases = bias if bias.ndim == 2 else (bias, bias)
            for name, value in zip(names, (kernel.T, recurrent.T, *biases), strict=True):
                found[f"grad_{name}"] = _reorder(case, value)
        return found

    def _layer(self, case: Case, problem: Problem, index: int) -> Any:
        layers = self._keras.layers
        extras: dict[str, Any] = {"reset_after": True} if case.cell == "GRU" else {}
        if case.cell == "RNN_RELU":
            extras["activation"] = "relu"
        layer = getattr(layers, _LAYERS[case.cell])(
            case.H,
            return_sequences=True,
            return_state=True,
            unroll=False,
            dtype=case.dtype,
            **extras,
        )
        if case.bidirectional:
            layer = layers.Bidirectional(layer, dtype=case.dtype)
        layer.build((case.B, case.T, case.layer_inputs[index]))
        weights: list[Array] = []
        for names in _parameters(case, range(index, index + 1)):
            kernel, recurrent, b, c = (_reorder(case, problem.weights[name]) for name in names)
            bias = np.stack([b, c]) if case.cell == "GRU" else b + c
            weights += [kernel.T, recurrent.T, bias]
        layer.set_weights(weights)
        return layer


def _trial(call: Call) -> float:
    """The least seconds of a few calls; the first one compiles."""
    call()
    seconds: list[float] = []
    while len(seconds) < _LEAST_TRIALS or sum(seconds) < _TRIAL_SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _parameters(case: Case, layers: Sequence[int] | None = None) -> list[list[str]]:
    """torch's four names for each layer and direction."""
    return [
        [f"{part}_l{layer}{suffix}" for part in _PARTS]
        for layer in (range(case.layers) if layers is None else layers)
        for suffix in ("", "_reverse")[: case.directions]
    ]


def _swap(value: Array) -> Array:
    """(T, B, ...) to (B, T, ...) and back."""
    return np.ascontiguousarray(value.swapaxes(0, 1))


def _reorder(case: Case, value: Array) -> Array:
    """The rows of r, z, n to z, r, h and back: a swap is its own inverse."""
    if case.cell != "GRU":
        return value
    r, z, n = np.split(value, 3)
    return np.concatenate([z, r, n])
