"""One step of each cell, forward and backward, beside its equations.

Notation, for a batch of n samples of which each is one row:

    x    (n, I)   input of this step              W, U   weight_ih (G*H, I), weight_hh (G*H, P)
    h'   (n, P)   hidden state before the step    b, d   bias_ih and bias_hh (G*H,)
    c'   (n, H)   LSTM cell state before it       dv     gradient of the loss by v, for any v
    a_k  (n, H)   argument of the nonlinearity    *      elementwise product
                  of gate k                       σ      logistic sigmoid

The input term  x Wᵀ + b  does not depend on the state. It is computed for the whole sequence at
once (sequence.py) and reaches a step as ``gx`` (n, G*H). Likewise ``step_backward`` does only the
work that must go backward in time; it hands out the factors whose products, summed over all steps
(Σ below), are the weights' gradients, and ``weight_gradients`` forms those products once for the
whole sequence. The gradients of x, W and b follow from dgx in the same way for every cell.

To add a cell, write one class here and name it in CELLS.

General source of the backward equations: Werbos, "Backpropagation through time: what it does and
how to do it", Proc. IEEE 78 (1990).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Weights = Mapping[str, Array]


class Sizes(NamedTuple):
    """Sizes of one layer in one direction."""

    input: int
    hidden: int
    projection: int  # 0: no projection
    bias: bool

    @property
    def output(self) -> int:
        """Size P of h: that of the projection, or of the hidden state."""
        return self.projection or self.hidden


class Cell(ABC):
    """What the time loop needs to know of a cell. Instances hold no state."""

    name: ClassVar[str]
    gates: ClassVar[int]  # G: blocks of H rows in weight_ih and weight_hh
    projects: ClassVar[bool] = False  # whether it accepts weight_hr
    own: ClassVar[tuple[str, int]] = ("", 0)  # name and rows of a weight of H columns beside these

    def state_sizes(self, sizes: Sizes) -> tuple[int, ...]:
        """Width of each recurrent state. The first state is h, which is also the output."""
        return (sizes.output,)

    def weight_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Names (without torch's suffix) and shapes of the weights, in torch's order."""
        rows = self.gates * sizes.hidden
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, sizes.input),
            "weight_hh": (rows, sizes.output),
        }
        if sizes.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if sizes.projection:
            shapes["weight_hr"] = (sizes.projection, sizes.hidden)
        name, rows = self.own
        if rows:
            shapes[name] = (rows, sizes.hidden)
        return shapes

    @abstractmethod
    def step(
        self, gx: Array, states: Sequence[Array], w: Weights
    ) -> tuple[list[Array], tuple[Array, ...]]:
        """Return the new states, each (n, size), and what ``step_backward`` will need."""

    @abstractmethod
    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> tuple[list[Array], dict[str, Array]]:
        """Return the gradients of the states before the step, and the factors.

        ``grads`` are the gradients of the new states, with all that reaches h from above added.
        Factor ``gx`` is the gradient of the argument gx; the others are for ``weight_gradients``.
        """

    @abstractmethod
    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        """Return the gradient of every weight but weight_ih and bias_ih.

        ``factors`` are those of ``step_backward``, the rows of all steps below each other.
        """


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """x weightᵀ + bias, shapes (n, K), (M, K), (M,) -> (n, M)."""
    y: Array = x @ weight.T
    return y if bias is None else y + bias


def linear_gradients(grad: Array, x: Array, w: Weights, name: str) -> dict[str, Array]:
    """Gradients of weight_{name} and bias_{name} of y = linear(x, ...): Σ dyᵀ x and Σ dy."""
    gradients: dict[str, Array] = {f"weight_{name}": grad.T @ x}
    if f"bias_{name}" in w:
        gradients[f"bias_{name}"] = grad.sum(axis=0)
    return gradients


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)). Where exp overflows the result is 0, and would be below normal numbers."""
    y: Array = 1 / (1 + np.exp(-a))
    return y


def blocks(a: Array, count: int) -> list[Array]:
    """Views of the ``count`` gate blocks of a, (n, count*H) -> count times (n, H)."""
    size = a.shape[1] // count
    return [a[:, k * size : (k + 1) * size] for k in range(count)]


class ElmanTanh(Cell):
    """Simple recurrent network with tanh.

        a  = gx + h' Uᵀ + d                 gx = x Wᵀ + b
        h  = tanh(a)

        da = dh * (1 - h²)
        dgx = da     dh' = da U     dU = Σ daᵀ h'     dd = Σ da

    Source: Elman, "Finding structure in time", Cognitive Science 14 (1990); Goodfellow et al.,
    *Deep Learning*, chapter 10.
    """

    name = "rnn_tanh"
    gates = 1

    def activation(self, a: Array) -> Array:
        """h of a."""
        y: Array = np.tanh(a)
        return y

    def activation_backward(self, grad: Array, h: Array) -> Array:
        """da of dh, with the derivative expressed by h itself."""
        return grad * (1 - h * h)

    def step(
        self, gx: Array, states: Sequence[Array], w: Weights
    ) -> tuple[list[Array], tuple[Array, ...]]:
        (h_prev,) = states
        h = self.activation(gx + linear(h_prev, w["weight_hh"], w.get("bias_hh")))
        return [h], (h_prev, h)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> tuple[list[Array], dict[str, Array]]:
        (grad_h,) = grads
        h_prev, h = saved
        grad_a = self.activation_backward(grad_h, h)
        return [grad_a @ w["weight_hh"]], {"gx": grad_a, "h_prev": h_prev}

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        return linear_gradients(factors["gx"], factors["h_prev"], w, "hh")


class ElmanRelu(ElmanTanh):
    """Simple recurrent network with relu: ``ElmanTanh`` with

        h  = max(a, 0)          da = dh where h > 0, else 0

    Source: Le, Jaitly, Hinton, "A simple way to initialize recurrent networks of rectified linear
    units", arXiv:1504.00941 (2015).
    """

    name = "rnn_relu"

    def activation(self, a: Array) -> Array:
        y: Array = np.maximum(a, 0)
        return y

    def activation_backward(self, grad: Array, h: Array) -> Array:
        # "h <= 0", not "h > 0": where h is NaN the gradient passes, as in torch.
        y: Array = np.where(h <= 0, grad.dtype.type(0), grad)
        return y


class LSTM(Cell):
    """Long short-term memory with forget gate, gates in the order i, f, g, o.

        [a_i a_f a_g a_o] = gx + h' Uᵀ + d
        i = σ(a_i)    f = σ(a_f)    g = tanh(a_g)    o = σ(a_o)
        c = f * c' + i * g
        m = o * tanh(c)
        h = m Rᵀ with a projection R = weight_hr (P, H), else h = m

        dm = dh R (or dh)           dR = Σ dhᵀ m
        do = dm * tanh(c)           dc += dm * o * (1 - tanh(c)²)
        di = dc * g    df = dc * c'    dg = dc * i    dc' = dc * f
        da = [di * i(1 - i)    df * f(1 - f)    dg * (1 - g²)    do * o(1 - o)]
        dgx = da    dh' = da U    dU = Σ daᵀ h'    dd = Σ da

    Sources: Hochreiter and Schmidhuber, Neural Computation 9 (1997); the forget gate: Gers,
    Schmidhuber and Cummins, "Learning to forget", Neural Computation 12 (2000); the projection:
    Sak, Senior and Beaufays, arXiv:1402.1128 (2014); the backward equations: Greff et al., "LSTM: a
    search space odyssey", arXiv:1503.04069 (2015), appendix A.
    """

    name = "lstm"
    gates = 4
    projects = True

    def state_sizes(self, sizes: Sizes) -> tuple[int, ...]:
        """h (P) and c (H)."""
        return (sizes.output, sizes.hidden)

    def step(
        self, gx: Array, states: Sequence[Array], w: Weights
    ) -> tuple[list[Array], tuple[Array, ...]]:
        h_prev, c_prev = states
        a_i, a_f, a_g, a_o = blocks(gx + linear(h_prev, w["weight_hh"], w.get("bias_hh")), 4)
        i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        c = f * c_prev + i * g
        tanh_c = np.tanh(c)
        m = o * tanh_c
        h = linear(m, w["weight_hr"], None) if "weight_hr" in w else m
        return [h, c], (h_prev, c_prev, i, f, g, o, tanh_c, m)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> tuple[list[Array], dict[str, Array]]:
        grad_h, grad_c = grads
        h_prev, c_prev, i, f, g, o, tanh_c, m = saved
        factors = {"h_prev": h_prev}
        grad_m = grad_h
        if "weight_hr" in w:
            grad_m = grad_h @ w["weight_hr"]
            factors |= {"grad_h": grad_h, "m": m}
        grad_c = grad_c + grad_m * o * (1 - tanh_c * tanh_c)
        grad_a = np.concatenate(
            [
                grad_c * g * i * (1 - i),
                grad_c * c_prev * f * (1 - f),
                grad_c * i * (1 - g * g),
                grad_m * tanh_c * o * (1 - o),
            ],
            axis=1,
        )
        factors["gx"] = grad_a
        return [grad_a @ w["weight_hh"], grad_c * f], factors

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        gradients = linear_gradients(factors["gx"], factors["h_prev"], w, "hh")
        if "weight_hr" in w:
            gradients |= linear_gradients(factors["grad_h"], factors["m"], w, "hr")
        return gradients


class GRU(Cell):
    """Gated recurrent unit, reset gate after the recurrent product, gates in the order r, z, n.

        [u_r u_z u_n] = h' Uᵀ + d
        r = σ(gx_r + u_r)    z = σ(gx_z + u_z)    n = tanh(gx_n + r * u_n)
        h = z * h' + (1 - z) * n

        dz = dh * (h' - n)    da_z = dz * z(1 - z)
        dn = dh * (1 - z)     da_n = dn * (1 - n²)
        dr = da_n * u_n       da_r = dr * r(1 - r)
        dgx = [da_r da_z da_n]    du = [da_r da_z da_n * r]
        dh' = dh * z + du U    dU = Σ duᵀ h'    dd = Σ du

    The n block alone differs between dgx and du, because r multiplies the recurrent term only.

    Source: Cho et al., arXiv:1406.1078 (2014), whose sign of z this is. There r multiplies h'
    before the product with U; here, as in torch and cuDNN, after it, so that one product serves
    all gates.
    """

    name = "gru"
    gates = 3

    def step(
        self, gx: Array, states: Sequence[Array], w: Weights
    ) -> tuple[list[Array], tuple[Array, ...]]:
        (h_prev,) = states
        gx_r, gx_z, gx_n = blocks(gx, 3)
        u_r, u_z, u_n = blocks(linear(h_prev, w["weight_hh"], w.get("bias_hh")), 3)
        r, z = sigmoid(gx_r + u_r), sigmoid(gx_z + u_z)
        n = np.tanh(gx_n + r * u_n)
        h = z * h_prev + (1 - z) * n
        return [h], (h_prev, r, z, n, u_n)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> tuple[list[Array], dict[str, Array]]:
        (grad_h,) = grads
        h_prev, r, z, n, u_n = saved
        grad_z = grad_h * (h_prev - n) * z * (1 - z)
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_r = grad_n * u_n * r * (1 - r)
        grad_gx = np.concatenate([grad_r, grad_z, grad_n], axis=1)
        grad_u = np.concatenate([grad_r, grad_z, grad_n * r], axis=1)
        factors = {"gx": grad_gx, "u": grad_u, "h_prev": h_prev}
        return [grad_h * z + grad_u @ w["weight_hh"]], factors

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        return linear_gradients(factors["u"], factors["h_prev"], w, "hh")


class LeakyTanh(ElmanTanh):
    """Leaky units: ``ElmanTanh``'s h, here v, comes in by a part 1 - α of each unit.

        h  = α * h' + (1 - α) * v           v = tanh(a), or max(a, 0)

        dv = dh * (1 - α)    dα = Σ dh * (h' - v)    dh' = dh * α + da U

    Source: Goodfellow et al., *Deep Learning* (2016), chapter 10.9.
    """

    name = "leaky_tanh"
    own = ("weight_leak", 1)

    def step(
        self, gx: Array, states: Sequence[Array], w: Weights
    ) -> tuple[list[Array], tuple[Array, ...]]:
        (h_prev,) = states
        alpha = w["weight_leak"][0]
        v = self.activation(gx + linear(h_prev, w["weight_hh"], w.get("bias_hh")))
        return [alpha * h_prev + (1 - alpha) * v], (h_prev, v)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> tuple[list[Array], dict[str, Array]]:
        (grad_h,) = grads
        h_prev, v = saved
        alpha = w["weight_leak"][0]
        grad_a = self.activation_backward(grad_h * (1 - alpha), v)
        factors = {"gx": grad_a, "h_prev": h_prev, "leak": grad_h * (h_prev - v)}
        return [grad_h * alpha + grad_a @ w["weight_hh"]], factors

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        gradients = super().weight_gradients(factors, w)
        return gradients | {"weight_leak": factors["leak"].sum(axis=0, keepdims=True)}


class LeakyRelu(LeakyTanh):
    """``LeakyTanh`` with relu."""

    name = "leaky_relu"
    activation = ElmanRelu.activation
    activation_backward = ElmanRelu.activation_backward


class LSTMVariant(LSTM):
    """``LSTM`` with peepholes p (a row per gate), with coupled gates, or both. As there, but

        peephole   a_i += p_i * c'    a_f += p_f * c'    a_o += p_o * c
                   dc += da_o * p_o   dc' += da_i * p_i + da_f * p_f
                   dp_i = Σ da_i * c'    dp_f = Σ da_f * c'    dp_o = Σ da_o * c
        coupled    f = 1 - i, gates in the order i, g, o:    di = dc * (g - c')

    Sources: Gers and Schmidhuber, "Recurrent nets that time and count", IJCNN (2000); Greff et
    al., arXiv:1503.04069 (2015): variants "V" (whose peepholes these are) and "CIFG".
    """

    def __init__(self, name: str, peephole: bool, coupled: bool) -> None:
        self.name = name  # type: ignore[misc]
        self.coupled = coupled
        self.gates = 3 if coupled else 4  # type: ignore[misc]
        self.own = ("weight_peephole", (self.gates - 1) * peephole)  # type: ignore[misc]

    def step(
        self, gx: Array, states: Sequence[Array], w: Weights
    ) -> tuple[list[Array], tuple[Array, ...]]:
        h_prev, c_prev = states
        p = w.get("weight_peephole")
        a = blocks(gx + linear(h_prev, w["weight_hh"], w.get("bias_hh")), self.gates)
        if p is not None:
            a[:-2] = [a_k + p_k * c_prev for a_k, p_k in zip(a[:-2], p, strict=False)]
        i, g = sigmoid(a[0]), np.tanh(a[-2])
        f = 1 - i if self.coupled else sigmoid(a[1])
        c = f * c_prev + i * g
        o = sigmoid(a[-1] if p is None else a[-1] + p[-1] * c)
        tanh_c = np.tanh(c)
        m = o * tanh_c
        h = linear(m, w["weight_hr"], None) if "weight_hr" in w else m
        return [h, c], (h_prev, c_prev, i, f, g, o, tanh_c, m, c)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> tuple[list[Array], dict[str, Array]]:
        grad_h, grad_c = grads
        h_prev, c_prev, i, f, g, o, tanh_c, m, c = saved
        p = w.get("weight_peephole")
        factors = {"h_prev": h_prev}
        grad_m = grad_h
        if "weight_hr" in w:
            grad_m = grad_h @ w["weight_hr"]
            factors |= {"grad_h": grad_h, "m": m}
        grad_o = grad_m * tanh_c * o * (1 - o)
        grad_c = grad_c + grad_m * o * (1 - tanh_c * tanh_c)
        if p is not None:
            grad_c = grad_c + grad_o * p[-1]
        grad_prev = grad_c * f
        if self.coupled:
            inner = [grad_c * (g - c_prev) * i * (1 - i)]
        else:
            inner = [grad_c * g * i * (1 - i), grad_c * c_prev * f * (1 - f)]
        if p is not None:
            for grad_a, p_k in zip(inner, p, strict=False):
                grad_prev = grad_prev + grad_a * p_k
            seen = [*[grad_a * c_prev for grad_a in inner], grad_o * c]
            factors["peephole"] = np.concatenate(seen, axis=1)
        grad_a = np.concatenate([*inner, grad_c * i * (1 - g * g), grad_o], axis=1)
        factors["gx"] = grad_a
        return [grad_a @ w["weight_hh"], grad_prev], factors

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        gradients = super().weight_gradients(factors, w)
        if "weight_peephole" in w:
            total = factors["peephole"].sum(axis=0)
            gradients["weight_peephole"] = total.reshape(w["weight_peephole"].shape)
        return gradients


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        ElmanTanh(),
        ElmanRelu(),
        LSTM(),
        GRU(),
        LeakyTanh(),
        LeakyRelu(),
        LSTMVariant("lstm_peephole", peephole=True, coupled=False),
        LSTMVariant("lstm_coupled", peephole=False, coupled=True),
        LSTMVariant("lstm_coupled_peephole", peephole=True, coupled=True),
    )
}
