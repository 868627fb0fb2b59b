"""JAX: `lax.scan` over the steps of a cell written by hand, compiled by XLA."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import Array, Problem, pack

jax: Any = importlib.import_module("jax")
jnp: Any = jax.numpy

States = tuple[Any, ...]


class JaxScan(Contender):
    """One jitted function per case, as a JAX user writes it who knows where the time goes:

    * the input's products are one matrix product in front of the scan;
    * `jax.vjp` goes through the scan for the gradients of the gates alone, and the gradient of the
      recurrent weights is one matrix product behind it. Left to itself the transposed scan adds to
      a whole matrix at each step, and at small batches that is most of its time;
    * weights lie as Flax has them, (inputs, gates*H); unrolling the scan gains nothing;
    * dispatch is synchronous: for a caller who waits for the result, handing a small step to
      another thread takes longer than the step.

    Samples of different lengths are padded, and a sample that has ended keeps its state.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        # The size of XLA's pool, read when the backend starts; no flag of XLA or option of JAX
        # changes it. Versions before PJRT_NPROC read NPROC.
        os.environ["PJRT_NPROC"] = os.environ["NPROC"] = str(threads)
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.config.update("jax_enable_x64", True)

    @property
    def version(self) -> str:
        return str(jax.__version__)

    def algorithm(self, case: Case) -> str:
        return "lax.scan over steps, jit"

    def prepare(self, case: Case, problem: Problem) -> Call:
        alive = None
        if case.ragged:
            alive = (np.arange(case.T)[:, None] < problem.lengths)[:, :, None]
        layers = _stack(case, alive)
        weights = jax.device_put({name: _turn(name, w) for name, w in problem.weights.items()})
        x = jax.device_put(problem.input)

        if not case.training:
            inference = jax.jit(layers)
            return _compiled(lambda: (inference(x, weights), None))

        def training(x: Any, weights: Any, gradient: Any) -> Any:
            output, pull, states = jax.vjp(layers, x, weights, has_aux=True)
            return (output, states), pull(gradient)

        step, gradient = jax.jit(training), jax.device_put(problem.output_gradient)
        return _compiled(lambda: step(x, weights, gradient))

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        (output, states), gradients = raw
        lengths = np.asarray(case.lengths)

        def rows(padded: Any) -> Array:
            return pack(np.asarray(padded), lengths) if case.ragged else np.asarray(padded)

        found = {"output": rows(output)}
        found.update(zip(("h_n", "c_n"), map(np.asarray, states), strict=False))
        if gradients is not None:
            found["grad_input"] = rows(gradients[0])
            for name, value in gradients[1].items():
                found[f"grad_{name}"] = _turn(name, np.asarray(value))
        return found


def _compiled(run: Callable[[], Any]) -> Call:
    """The first call compiles."""

    def call() -> Any:
        return jax.block_until_ready(run())

    call()
    return call


def _turn(name: str, value: Array) -> Array:
    return np.ascontiguousarray(value.T) if name.startswith("weight") else value


def _stack(case: Case, alive: Array | None) -> Callable[[Any, Any], tuple[Any, Any]]:
    """(x (T, B, I), weights) to output (T, B, D*H) and the final states, (layers*D, B, H) each."""
    scans = [_recurrence(case.cell, reverse, alive) for reverse in (False, True)[: case.directions]]

    def layers(x: Any, weights: Any) -> tuple[Any, Any]:
        finals: list[States] = []
        for layer in range(case.layers):
            outputs = []
            for suffix, scan in zip(("", "_reverse"), scans, strict=False):
                w, u, b, c = (
                    weights[f"{part}_l{layer}{suffix}"]
                    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                output, final = scan(u, _terms(case.cell, x @ w, b, c))
                outputs.append(output)
                finals.append(final)
            x = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)
        return x, tuple(jnp.stack(state) for state in zip(*finals, strict=True))

    return layers


def _recurrence(cell: str, reverse: bool, alive: Array | None) -> Any:
    """(U (H, G*H), terms) to h of every step (T, B, H) and the final states, differentiable.

    Past a sample's end (where `alive` (T, B, 1) is false) it repeats the state, so that the
    gradient of a gate is zero there.
    """
    cells: dict[str, Callable[..., States]]
    cells = {"LSTM": _lstm, "GRU": _gru, "RNN": _tanh, "RNN_RELU": _relu}
    advance = cells[cell]

    def scan(u: Any, terms: States) -> tuple[Any, States]:
        zero = jnp.zeros((terms[0].shape[1], u.shape[0]), u.dtype)

        def step(old: States, given: Any) -> tuple[States, Any]:
            term, lives = given
            new = advance(old, old[0] @ u, *term)
            if lives is not None:
                new = tuple(jnp.where(lives, n, o) for n, o in zip(new, old, strict=True))
            return new, new[0]

        start = (zero, zero) if cell == "LSTM" else (zero,)
        final, output = jax.lax.scan(step, start, (terms, alive), reverse=reverse)
        return output, final

    def forward(u: Any, terms: States) -> tuple[Any, Any]:
        result, pull = jax.vjp(lambda terms: scan(u, terms), terms)
        return result, (result[0], pull)

    def backward(saved: Any, gradient: Any) -> tuple[Any, States]:
        output, pull = saved
        (terms,) = pull(gradient)
        zero = jnp.zeros_like(output[:1])
        neighbours = (output[1:], zero) if reverse else (zero, output[:-1])
        before = jnp.concatenate(neighbours)
        return jnp.einsum("tbh,tbg->hg", before, _product_gradient(cell, terms)), terms

    differentiable = jax.custom_vjp(scan)
    differentiable.defvjp(forward, backward)
    return differentiable


def _terms(cell: str, products: Any, b: Any, c: Any) -> States:
    """What a step adds to h @ U: (T, B, G*H); for GRU also the bias inside the reset, (T, B, H),
    with an entry per step since its gradient per step belongs to that of h @ U."""
    if cell != "GRU":
        return (products + (b + c),)
    H = c.shape[0] // 3
    outside = c.at[2 * H :].set(0)
    return products + (b + outside), jnp.broadcast_to(c[2 * H :], (*products.shape[:2], H))


def _product_gradient(cell: str, terms: States) -> Any:
    """The gradient of h @ U (T, B, G*H) from those of the terms, which are added to it."""
    if cell != "GRU":
        return terms[0]
    return jnp.concatenate([terms[0][..., : -terms[1].shape[2]], terms[1]], axis=2)


def _lstm(old: States, product: Any, term: Any) -> States:
    i, f, g, o = jnp.split(product + term, 4, axis=1)
    c = jax.nn.sigmoid(f) * old[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(old: States, product: Any, term: Any, inside: Any) -> States:
    xr, xz, xn = jnp.split(term, 3, axis=1)
    hr, hz, hn = jnp.split(product, 3, axis=1)
    n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * (hn + inside))
    return (n + jax.nn.sigmoid(xz + hz) * (old[0] - n),)


def _tanh(old: States, product: Any, term: Any) -> States:
    return (jnp.tanh(product + term),)


def _relu(old: States, product: Any, term: Any) -> States:
    return (jax.nn.relu(product + term),)
