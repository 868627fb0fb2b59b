"""One step of each cell, forward and backward, beside its equations.

Notation, for a batch of n samples of which each is one row:

    x    (n, I)   input of this step              W, U   weight_ih (G*H, I), weight_hh (G*H, P)
    h'   (n, P)   hidden state before the step    b, d   bias_ih and bias_hh (G*H,)
    c'   (n, H)   LSTM cell state before it       dv     gradient of the loss by v, for any v
    a_k  (n, H)   argument of the nonlinearity    *      elementwise product
                  of gate k                       σ      logistic sigmoid

The input term  x Wᵀ + b  does not depend on the state. It is computed for the whole sequence at
once and reaches a step as ``gx`` (n, G*H); the recurrent term  h' Uᵀ + d  as ``gh`` (n, G*H). Both
are the same for every cell, and so is what follows from their gradients: those of x, W, b, U, d,
and the part of dh' that goes through U (written + dgh U below). sequence.py has all of that, and a
class here only what is its own. ``step_backward`` does the work that must go backward in time; it
hands out the factors of which, summed over all steps (Σ below), ``weight_gradients`` makes the
gradients of the weights that no other cell has.

To add a cell, write one class here and name it in CELLS.

General source of the backward equations: Werbos, "Backpropagation through time: what it does and
how to do it", Proc. IEEE 78 (1990).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Weights = Mapping[str, Array]
# What a step returns: the new states, each (n, size), and what ``step_backward`` will need.
Step = tuple[list[Array], tuple[Array, ...]]
# And that: the gradients of the states before the step, but for what goes through U (None:
# nothing), and the factors.
StepBackward = tuple[list[Array | None], dict[str, Array]]


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


class Options(NamedTuple):
    """What a cell is told besides its kind.

    Attributes:
        activation: of the candidate: an LSTM's g, a GRU's n, an RNN's h. A name in ACTIVATIONS.
        output_activation: of an LSTM's c, before the output gate.
        clip: of an LSTM: bound on the arguments of its gates; where it holds one, no gradient
            passes.
        zoneout_h, zoneout_c: parts of h and of c that stay as they were (sequence.py).
    """

    activation: str = "tanh"
    output_activation: str = "tanh"
    clip: float = math.inf
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0


class Activation(NamedTuple):
    """A nonlinearity y(a), and da of dy, with the derivative expressed by y itself."""

    apply: Callable[[Array], Array]
    backward: Callable[[Array, Array], Array]


class Cell(ABC):
    """What the time loop needs to know of a cell. Instances hold nothing but their options."""

    gates: ClassVar[int]  # G: blocks of H rows in weight_ih and weight_hh
    projects: ClassVar[bool] = False  # whether it accepts weight_hr
    recurrent: ClassVar[bool] = True  # whether there is a matrix U; else gh is d alone
    masks: ClassVar[bool] = True  # whether what U multiplies may have a mask
    takes_q: ClassVar[bool] = False  # whether a step takes that too, as one more state
    own: ClassVar[tuple[str, int]] = ("", 0)  # name and rows of a weight of H columns beside these

    def __init__(self, name: str, options: Options | None = None, general: bool = False) -> None:
        self.name = name
        self.options = options or Options()
        self.general = general  # whether its user has the choice of options

    def having(self, options: Options) -> Cell:
        """The same cell with other options."""
        twin = copy.copy(self)
        twin.options = options
        return twin

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
    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        """The forward step."""

    @abstractmethod
    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        """The backward step.

        ``grads`` are the gradients of the new states, with all that reaches h from above added.
        Factor ``gx`` is the gradient of the argument gx; ``gh`` that of gh, where it is another;
        the rest are for ``weight_gradients``.
        """

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        """Return the gradients of the weights that are the cell's own.

        ``factors`` are those of ``step_backward``, the rows of all steps below each other.
        """
        return {}


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


def relu_backward(grad: Array, y: Array) -> Array:
    """da of dy for y = max(a, 0)."""
    # "y <= 0", not "y > 0": where y is NaN the gradient passes, as in torch.
    zero: Array = np.where(y <= 0, grad.dtype.type(0), grad)
    return zero


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(np.tanh, lambda grad, y: grad * (1 - y * y)),
    "relu": Activation(lambda a: np.maximum(a, 0), relu_backward),
    "sigmoid": Activation(sigmoid, lambda grad, y: grad * y * (1 - y)),
    "identity": Activation(lambda a: a, lambda grad, y: grad),
    "softsign": Activation(lambda a: a / (1 + abs(a)), lambda grad, y: grad * (1 - abs(y)) ** 2),
    "elu": Activation(
        lambda a: np.where(a <= 0, np.expm1(np.minimum(a, 0)), a),
        lambda grad, y: np.where(y <= 0, grad * (y + 1), grad),
    ),
}


class Elman(Cell):
    """Simple recurrent network, φ = tanh, relu or the activation of its options.

        a  = gx + gh
        h  = φ(a)

        da = dh * φ'(a), which for tanh is dh * (1 - h²), for relu dh where h > 0, else 0
        dgx = dgh = da

    Sources: Elman, "Finding structure in time", Cognitive Science 14 (1990); Goodfellow et al.,
    *Deep Learning*, chapter 10. relu: Le, Jaitly, Hinton, "A simple way to initialize recurrent
    networks of rectified linear units", arXiv:1504.00941 (2015).
    """

    gates = 1

    def activation(self, a: Array) -> Array:
        """h of a."""
        return ACTIVATIONS[self.options.activation].apply(a)

    def activation_backward(self, grad: Array, h: Array) -> Array:
        """da of dh, with the derivative expressed by h itself."""
        return ACTIVATIONS[self.options.activation].backward(grad, h)

    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        h = self.activation(gx + gh)
        return [h], (h,)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        (grad_h,) = grads
        (h,) = saved
        return [None], {"gx": self.activation_backward(grad_h, h)}


class Independent(Elman):
    """Independent units: ``Elman`` whose units see of the past themselves alone.

        h  = φ(gx + gh + u * h')            u = weight_hh (1, H), gh = d

        da = dh * φ'(a)    dh' = da * u    du = Σ da * h'

    Source: Li et al., "Independently recurrent neural network (IndRNN)", arXiv:1803.04831 (2018).
    """

    recurrent = False
    masks = False

    def weight_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        return super().weight_shapes(sizes) | {"weight_hh": (1, sizes.hidden)}

    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        (h_prev,) = states
        h = self.activation(gx + gh + w["weight_hh"] * h_prev)
        return [h], (h, h_prev)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        (grad_h,) = grads
        h, h_prev = saved
        grad_a = self.activation_backward(grad_h, h)
        return [grad_a * w["weight_hh"]], {"gx": grad_a, "u": grad_a * h_prev}

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        return {"weight_hh": factors["u"].sum(axis=0, keepdims=True)}


class LSTM(Cell):
    """Long short-term memory with forget gate, gates in the order i, f, g, o.

        [a_i a_f a_g a_o] = gx + gh
        i = σ(a_i)    f = σ(a_f)    g = tanh(a_g)    o = σ(a_o)
        c = f * c' + i * g
        m = o * tanh(c)
        h = m Rᵀ with a projection R = weight_hr (P, H), else h = m

        dm = dh R (or dh)           dR = Σ dhᵀ m
        do = dm * tanh(c)           dc += dm * o * (1 - tanh(c)²)
        di = dc * g    df = dc * c'    dg = dc * i    dc' = dc * f
        da = [di * i(1 - i)    df * f(1 - f)    dg * (1 - g²)    do * o(1 - o)]
        dgx = dgh = da

    Sources: Hochreiter and Schmidhuber, Neural Computation 9 (1997); the forget gate: Gers,
    Schmidhuber and Cummins, "Learning to forget", Neural Computation 12 (2000); the projection:
    Sak, Senior and Beaufays, arXiv:1402.1128 (2014); the backward equations: Greff et al., "LSTM: a
    search space odyssey", arXiv:1503.04069 (2015), appendix A.
    """

    gates = 4
    projects = True

    def state_sizes(self, sizes: Sizes) -> tuple[int, ...]:
        """h (P) and c (H)."""
        return (sizes.output, sizes.hidden)

    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        c_prev = states[1]
        a_i, a_f, a_g, a_o = blocks(gx + gh, 4)
        i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        c = f * c_prev + i * g
        tanh_c = np.tanh(c)
        m = o * tanh_c
        h = linear(m, w["weight_hr"], None) if "weight_hr" in w else m
        return [h, c], (c_prev, i, f, g, o, tanh_c, m)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        grad_h, grad_c = grads
        c_prev, i, f, g, o, tanh_c, m = saved
        grad_m, factors = self.projection_backward(grad_h, m, w)
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
        return [None, grad_c * f], factors

    def projection_backward(
        self, grad_h: Array, m: Array, w: Weights
    ) -> tuple[Array, dict[str, Array]]:
        """dm, and the factors of dR."""
        if "weight_hr" not in w:
            return grad_h, {}
        return grad_h @ w["weight_hr"], {"grad_h": grad_h, "m": m}

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        if "weight_hr" not in w:
            return {}
        return linear_gradients(factors["grad_h"], factors["m"], w, "hr")


class GRU(Cell):
    """Gated recurrent unit, reset gate after the recurrent product, gates in the order r, z, n.

        [u_r u_z u_n] = gh
        r = σ(gx_r + u_r)    z = σ(gx_z + u_z)    n = φ(gx_n + r * u_n)
        h = z * h' + (1 - z) * n

        dz = dh * (h' - n)    da_z = dz * z(1 - z)
        dn = dh * (1 - z)     da_n = dn * φ', which for φ = tanh is dn * (1 - n²)
        dr = da_n * u_n       da_r = dr * r(1 - r)
        dgx = [da_r da_z da_n]    dgh = [da_r da_z da_n * r]
        dh' = dh * z + dgh U

    The n block alone differs between dgx and dgh, because r multiplies the recurrent term only. φ
    is tanh, or the activation of the options.

    Source: Cho et al., arXiv:1406.1078 (2014), whose sign of z this is. There r multiplies h'
    before the product with U; here, as in torch and cuDNN, after it, so that one product serves
    all gates.
    """

    gates = 3

    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        (h_prev,) = states
        gx_r, gx_z, gx_n = blocks(gx, 3)
        u_r, u_z, u_n = blocks(gh, 3)
        r, z = sigmoid(gx_r + u_r), sigmoid(gx_z + u_z)
        n = ACTIVATIONS[self.options.activation].apply(gx_n + r * u_n)
        h = z * h_prev + (1 - z) * n
        return [h], (h_prev, r, z, n, u_n)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        (grad_h,) = grads
        h_prev, r, z, n, u_n = saved
        grad_z = grad_h * (h_prev - n) * z * (1 - z)
        grad_n = ACTIVATIONS[self.options.activation].backward(grad_h * (1 - z), n)
        grad_r = grad_n * u_n * r * (1 - r)
        grad_gx = np.concatenate([grad_r, grad_z, grad_n], axis=1)
        grad_gh = np.concatenate([grad_r, grad_z, grad_n * r], axis=1)
        return [grad_h * z], {"gx": grad_gx, "gh": grad_gh}


class GRUBefore(GRU):
    """``GRU`` with the reset gate before the recurrent product. As there, but

        s = r * q    n = φ(gx_n + s U_nᵀ + d_n)         of gh, its r and z blocks alone are used

        ds = da_n U_n    da_r = ds * q * r(1 - r)
        dgx = [da_r da_z da_n]    dgh = [da_r da_z 0]    dU_n = Σ da_nᵀ s    dd = Σ dgx
        dh' = dh * z    dq = ds * r + dgh U

    q is h', or what a mask leaves of it (sequence.py).

    Source: Cho et al., arXiv:1406.1078 (2014).
    """

    takes_q = True

    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        h_prev, q = states
        gx_r, gx_z, gx_n = blocks(gx, 3)
        u_r, u_z, _ = blocks(gh, 3)
        r, z = sigmoid(gx_r + u_r), sigmoid(gx_z + u_z)
        size, bias = h_prev.shape[1], w.get("bias_hh")
        own = linear(r * q, w["weight_hh"][2 * size :], None if bias is None else bias[2 * size :])
        n = ACTIVATIONS[self.options.activation].apply(gx_n + own)
        return [z * h_prev + (1 - z) * n], (h_prev, q, r, z, n)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        (grad_h,) = grads
        h_prev, q, r, z, n = saved
        grad_z = grad_h * (h_prev - n) * z * (1 - z)
        grad_n = ACTIVATIONS[self.options.activation].backward(grad_h * (1 - z), n)
        grad_s = grad_n @ w["weight_hh"][2 * h_prev.shape[1] :]
        grad_r = grad_s * q * r * (1 - r)
        return [grad_h * z, grad_s * r], {
            "gx": np.concatenate([grad_r, grad_z, grad_n], axis=1),
            "gh": np.concatenate([grad_r, grad_z, np.zeros_like(grad_n)], axis=1),
            "q": q,
            "s": r * q,
        }

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        size = factors["s"].shape[1]
        of_gates, of_n = factors["gx"][:, : 2 * size], factors["gx"][:, 2 * size :]
        found = {"weight_hh": np.concatenate([of_gates.T @ factors["q"], of_n.T @ factors["s"]])}
        if "bias_hh" in w:
            found["bias_hh"] = factors["gx"].sum(axis=0)
        return found


class Leaky(Elman):
    """Leaky units: ``Elman``'s h, here v, comes in by a part 1 - α of each unit.

        h  = α * h' + (1 - α) * v           v = tanh(a), or max(a, 0)

        dv = dh * (1 - α)    dα = Σ dh * (h' - v)    dh' = dh * α + dgh U

    Source: Goodfellow et al., *Deep Learning* (2016), chapter 10.9.
    """

    own = ("weight_leak", 1)

    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        (h_prev,) = states
        alpha = w["weight_leak"][0]
        v = self.activation(gx + gh)
        return [alpha * h_prev + (1 - alpha) * v], (h_prev, v)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        (grad_h,) = grads
        h_prev, v = saved
        alpha = w["weight_leak"][0]
        grad_a = self.activation_backward(grad_h * (1 - alpha), v)
        return [grad_h * alpha], {"gx": grad_a, "leak": grad_h * (h_prev - v)}

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        return {"weight_leak": factors["leak"].sum(axis=0, keepdims=True)}


class LSTMVariant(LSTM):
    """``LSTM`` with peepholes p (a row per gate), with coupled gates, with options. As there, but

        peephole   a_i += p_i * c'    a_f += p_f * c'    a_o += p_o * c
                   dc += da_o * p_o   dc' += da_i * p_i + da_f * p_f
                   dp_i = Σ da_i * c'    dp_f = Σ da_f * c'    dp_o = Σ da_o * c
        coupled    f = 1 - i, gates in the order i, g, o:    di = dc * (g - c')
        options    g = φ(a_g)    m = o * ψ(c)    φ, ψ: the activations
                   every a_k is held between -clip and clip first, and da_k = 0 where it is held

    Sources: Gers and Schmidhuber, "Recurrent nets that time and count", IJCNN (2000); Greff et
    al., arXiv:1503.04069 (2015): variants "V" (whose peepholes these are) and "CIFG"; activations
    and clip: the operator LSTM of ONNX, as onnxruntime has it.
    """

    def __init__(self, name: str, peephole: bool, coupled: bool, general: bool = False) -> None:
        super().__init__(name, general=general)
        self.coupled = coupled
        self.gates = 3 if coupled else 4  # type: ignore[misc]
        self.own = ("weight_peephole", (self.gates - 1) * peephole)  # type: ignore[misc]

    def step(self, gx: Array, gh: Array, states: Sequence[Array], w: Weights) -> Step:
        c_prev = states[1]
        p = w.get("weight_peephole")
        *inner, a_g, a_o = blocks(gx + gh, self.gates)
        if p is not None:
            inner = [a_k + p_k * c_prev for a_k, p_k in zip(inner, p, strict=False)]
        i, g = self.bounded("sigmoid", inner[0]), self.bounded(self.options.activation, a_g)
        f = 1 - i if self.coupled else self.bounded("sigmoid", inner[1])
        c = f * c_prev + i * g
        a_o = a_o if p is None else a_o + p[-1] * c
        o = self.bounded("sigmoid", a_o)
        phi_c = ACTIVATIONS[self.options.output_activation].apply(c)
        m = o * phi_c
        h = linear(m, w["weight_hr"], None) if "weight_hr" in w else m
        return [h, c], (c_prev, i, f, g, o, phi_c, m, c, a_g, a_o, *inner)

    def step_backward(
        self, grads: Sequence[Array], saved: tuple[Array, ...], w: Weights
    ) -> StepBackward:
        grad_h, grad_c = grads
        c_prev, i, f, g, o, phi_c, m, c, a_g, a_o, *a_inner = saved
        p = w.get("weight_peephole")
        grad_m, factors = self.projection_backward(grad_h, m, w)
        grad_o = self.bounded_backward("sigmoid", grad_m * phi_c, a_o, o)
        output = ACTIVATIONS[self.options.output_activation]
        grad_c = grad_c + output.backward(grad_m * o, phi_c)
        if p is not None:
            grad_c = grad_c + grad_o * p[-1]
        grad_prev = grad_c * f
        if self.coupled:
            inner = [(grad_c * (g - c_prev), i)]
        else:
            inner = [(grad_c * g, i), (grad_c * c_prev, f)]
        grad_inner = [
            self.bounded_backward("sigmoid", grad, a, y)
            for (grad, y), a in zip(inner, a_inner, strict=True)
        ]
        if p is not None:
            for grad_a, p_k in zip(grad_inner, p, strict=False):
                grad_prev = grad_prev + grad_a * p_k
            seen = [*[grad_a * c_prev for grad_a in grad_inner], grad_o * c]
            factors["peephole"] = np.concatenate(seen, axis=1)
        grad_g = self.bounded_backward(self.options.activation, grad_c * i, a_g, g)
        factors["gx"] = np.concatenate([*grad_inner, grad_g, grad_o], axis=1)
        return [None, grad_prev], factors

    def bounded(self, activation: str, a: Array) -> Array:
        """The activation of a, held within the bounds."""
        return ACTIVATIONS[activation].apply(np.clip(a, -self.options.clip, self.options.clip))

    def bounded_backward(self, activation: str, grad: Array, a: Array, y: Array) -> Array:
        """da of dy, where y = bounded(activation, a)."""
        held = abs(a) > self.options.clip
        passed: Array = np.where(held, 0, ACTIVATIONS[activation].backward(grad, y))
        return passed

    def weight_gradients(self, factors: Mapping[str, Array], w: Weights) -> dict[str, Array]:
        gradients = super().weight_gradients(factors, w)
        if "weight_peephole" in w:
            total = factors["peephole"].sum(axis=0)
            gradients["weight_peephole"] = total.reshape(w["weight_peephole"].shape)
        return gradients


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Elman("rnn_tanh"),
        Elman("rnn_relu", Options("relu")),
        LSTM("lstm"),
        GRU("gru"),
        Leaky("leaky_tanh"),
        Leaky("leaky_relu", Options("relu")),
        LSTMVariant("lstm_peephole", peephole=True, coupled=False),
        LSTMVariant("lstm_coupled", peephole=False, coupled=True),
        LSTMVariant("lstm_coupled_peephole", peephole=True, coupled=True),
        # With options.
        Elman("rnn_general", general=True),
        Independent("independent", general=True),
        LSTMVariant("lstm_general", peephole=False, coupled=False, general=True),
        LSTMVariant("lstm_peephole_general", peephole=True, coupled=False, general=True),
        LSTMVariant("lstm_coupled_general", peephole=False, coupled=True, general=True),
        LSTMVariant("lstm_coupled_peephole_general", peephole=True, coupled=True, general=True),
        GRU("gru_general", general=True),
        GRUBefore("gru_before", general=True),
    )
}
