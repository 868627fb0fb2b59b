"""The echo state network, as a scikit-learn regressor and transformer of time series."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.metrics import r2_score
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from .ridge import RidgeSums
from .sequences import Form, plain, split
from .units import units_of
from .weights import Array, Weights, random_topology, scaled

# Sequences, and numbers of their states, that are held at a time, but where all are asked for.
_TOGETHER, _PIECE = 256, 1 << 22


class ReservoirRNN(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, RegressorMixin, BaseEstimator
):
    """An echo state network: fixed random leaky units, and a linear readout that is trained alone.

        v_t = tanh(W_in x_t + b + W h_{t-1})
        h_t = (1 - leak) * h_{t-1} + leak * v_t
        y_t = W_out [x_t; h_t] + c

    W is sparse and scaled to a spectral radius; W_in, b and W are drawn once and stay. W_out and c
    are found by ridge regression over all steps, without backpropagation through time.

    X is a time series, not a set of samples: its rows are the steps, in order. The forms are

    * (T, I): one sequence;
    * (B, T, I): B sequences, each from its own initial state;
    * a list of arrays (T_b, I): sequences of any lengths.

    y goes with it: (T,) or (T, O), (B, T) or (B, T, O), or a list of such; y None stands for the
    next step of X itself, for which the last step of each sequence gives no pair. Results come in
    the form of X. Tensors are taken too, and give tensors, on the CPU and without a gradient. The
    dtype is float32 if X of ``fit`` is, else float64.

    Every call starts each sequence from the state 0 (or from ``initial_state``), so that the same
    call gives the same result. A subset or a permutation of the rows is another time series.

    Args:
        n_reservoir: units, H.
        spectral_radius: of W, the largest absolute value of an eigenvalue. None: W stays as drawn.
        density: connections of each unit, as a part of all H; each has the same number, at least 1.
        input_scaling: weights of the input are drawn from (-input_scaling, input_scaling); one
            number, or one for each of the I features.
        bias_scaling: the same for the units' biases.
        leak: the leaking rate, in (0, 1], the part of a unit that is new at each step; one number,
            or one for each of the H units. (``fastcell.LeakyRNN``'s alpha is 1 - leak.)
        ridge: what is added to the diagonal of the readout's normal equations, as
            ``sklearn.linear_model.Ridge``'s alpha. The intercept is free.
        washout: steps at the start of each sequence that count neither in fitting nor in ``score``,
            since they still show the initial state.
        recurrent_weights: (H, H), an array or a sparse one, to be scaled and used instead of a
            random W; ``density`` is without effect then.
        random_state: int, ``numpy.random.RandomState`` or None, as everywhere in scikit-learn.

    Attributes:
        input_weights_: (H, I). bias_: (H,). recurrent_weights_: (H, H), scipy.sparse CSR.
        leak_: (H,).
        coef_: (O, I + H), inputs first, or (I + H,) if y had one dimension per sequence.
        intercept_: (O,), or a number.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Sources: H. Jaeger, "The 'echo state' approach to analysing and training recurrent neural
    networks", GMD report 148 (2001); M. Lukoševičius, "A practical guide to applying echo state
    networks" (2012).
    """

    _state: Array  # final one of the last call that fitted

    def __init__(
        self,
        n_reservoir: int = 200,
        *,
        spectral_radius: float | None = 0.9,
        density: float = 0.1,
        input_scaling: float | ArrayLike = 1.0,
        bias_scaling: float = 0.2,
        leak: float | ArrayLike = 1.0,
        ridge: float = 1e-6,
        washout: int = 0,
        recurrent_weights: Any = None,
        random_state: Any = None,
    ) -> None:
        self.n_reservoir = n_reservoir
        self.spectral_radius = spectral_radius
        self.density = density
        self.input_scaling = input_scaling
        self.bias_scaling = bias_scaling
        self.leak = leak
        self.ridge = ridge
        self.washout = washout
        self.recurrent_weights = recurrent_weights
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # --- fitting ----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> ReservoirRNN:
        """Draw the reservoir, run X through it, and solve for the readout.

        Raises:
            ValueError, TypeError: an argument of the constructor, X or y is not as described
                above, or no step is left after ``washout``.
        """
        return self._fit(X, y, reset=True, continues=False)

    def partial_fit(self, X: Any, y: Any = None, *, continues: bool = False) -> ReservoirRNN:
        """Add steps to those that were fitted before, and solve again; the first call is ``fit``.

        What is kept are sums of products of states, in float64: memory does not grow with the
        steps, and the result is that of all of them at once, to rounding.

        Args:
            continues: X goes on where the previous call ended: each of its sequences from that
                one's final state, and without a washout. (With y None let X begin with the row
                that the previous X ended with, which was a target only.)

        Raises:
            ValueError: as ``fit``; nothing to continue; another number of sequences, features or
                outputs.
        """
        return self._fit(X, y, reset=not hasattr(self, "_sums"), continues=continues)

    def _fit(self, X: Any, y: Any, reset: bool, continues: bool) -> ReservoirRNN:
        washout = _number("washout", self.washout, Integral, 0)
        ridge = _number("ridge", self.ridge, Real, 0)
        if continues and reset:
            raise ValueError("continues=True needs a previous call of fit or partial_fit")
        sequences, form = self._check_inputs(X, reset)
        sequences, targets, flat = _pairs(sequences, y, form)
        outputs = targets[0].shape[1]
        if continues:
            if len(self._state) != len(sequences):
                raise ValueError(
                    f"X must hold {len(self._state)} sequence(s), as those that it continues, "
                    f"got {len(sequences)}"
                )
            washout, state = 0, self._state
        if max(map(len, sequences)) <= washout:
            raise ValueError(
                f"washout={washout} leaves no step to fit: the longest of {len(sequences)} "
                f"sequence(s) has {max(map(len, sequences))}"
            )
        if reset:
            self._draw(sequences[0].shape[1], sequences[0].dtype)
            self._sums = RidgeSums(self.n_features_in_ + self._n_features_out, outputs)
            self._outputs, self._flat = outputs, flat
        elif outputs != self._outputs:
            raise ValueError(f"y must have {self._outputs} output(s) as before, got {outputs}")
        if not continues:
            state = self._zeros(len(sequences))
        self._state = state.copy()
        for b, begin, states in self._pieces(sequences, self._state):
            rows = slice(max(begin, washout), begin + len(states))
            z = np.concatenate([sequences[b][rows], states[rows.start - begin :]], axis=1)
            self._sums.add(z, targets[b][rows])
        self._weights_out, self._bias_out = self._sums.solve(ridge)
        self.coef_ = self._weights_out[0] if self._flat else self._weights_out
        self.intercept_ = float(self._bias_out[0]) if self._flat else self._bias_out
        return self

    def _draw(self, inputs: int, dtype: Any) -> None:
        units = int(_number("n_reservoir", self.n_reservoir, Integral, 1))
        density = _number("density", self.density, Real, 0, above=True, most=1)
        bias_scaling = _number("bias_scaling", self.bias_scaling, Real, 0)
        input_scaling = _numbers("input_scaling", self.input_scaling, inputs, "features")
        leak = _numbers("leak", self.leak, units, "units")
        if not ((leak > 0) & (leak <= 1)).all():
            raise ValueError(f"leak must lie in (0, 1], got {self.leak!r}")
        # A generator of its own: what is drawn from it does not depend on how scikit-learn's
        # legacy one draws.
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        rng = np.random.default_rng(seed)
        input_weights = rng.uniform(-1, 1, (units, inputs)) * input_scaling
        bias = rng.uniform(-1, 1, units) * bias_scaling
        if self.recurrent_weights is None:
            recurrent = random_topology(units, max(1, round(density * units)), rng)
        else:
            given = check_array(
                self.recurrent_weights, accept_sparse="csr", dtype=np.float64,
                input_name="recurrent_weights",
            )  # fmt: skip
            if given.shape != (units, units):
                raise ValueError(
                    f"recurrent_weights must have shape ({units}, {units}), for n_reservoir="
                    f"{units}, got {given.shape}"
                )
            recurrent = sparse.csr_array(given, copy=True)
            recurrent.sum_duplicates()
        if self.spectral_radius is not None:
            radius = _number("spectral_radius", self.spectral_radius, Real, 0)
            recurrent = scaled(recurrent, radius)
        weights = Weights(
            input_weights.astype(dtype),
            bias.astype(dtype),
            recurrent.astype(dtype),
            leak.astype(dtype),
        )
        self.input_weights_, self.bias_, self.recurrent_weights_, self.leak_ = weights
        self._n_features_out = units
        self._units = units_of(weights)

    # --- use --------------------------------------------------------------------------------------

    def predict(self, X: Any, *, initial_state: Any = None, return_state: bool = False) -> Any:
        """y of every step of X, (T, O), or (T,) if ``fit`` had that; in the form of X.

        The steps of the washout are among them: they still show the initial state.

        Args:
            initial_state: (H,), for several sequences (B, H), instead of zeros.
            return_state: give (y, final state) instead, the state like ``initial_state``: passed
                on with the rows that follow, it gives the same as all rows at once, bit for bit.
        """
        sequences, form, state = self._begin(X, initial_state)
        results = [np.empty((len(x), self._outputs), x.dtype) for x in sequences]
        for b, begin, states in self._pieces(sequences, state):
            rows = slice(begin, begin + len(states))
            results[b][rows] = self._read(sequences[b][rows], states)
        return self._end([r[:, 0] if self._flat else r for r in results], form, state, return_state)

    def transform(self, X: Any, *, initial_state: Any = None, return_state: bool = False) -> Any:
        """The states h of every step of X, (T, H), in the form of X; arguments as ``predict``'s.

        They need no readout: as features for another model.
        """
        sequences, form, state = self._begin(X, initial_state)
        states, state = self._units.run(sequences, state, True)
        return self._end(states, form, state, return_state)

    def generate(self, steps: int, X: Any, *, initial_state: Any = None) -> Any:
        """Hear X, then go on alone for some steps, each output being the next input.

        The first row is what ``predict`` gives for the last of X; the k-th what it would give if X
        were followed by the k - 1 rows before.

        Args:
            steps: at least 1.
            X: the warm-up, at least one step.

        Returns:
            (steps, O), or (steps,) if ``fit`` had y of one dimension; for several sequences in
            the form of X.

        Raises:
            ValueError: the network has not as many outputs as inputs; X or ``steps`` not as above.

        Warns:
            RuntimeWarning: the outputs ran away to what is not finite.
        """
        steps = int(_number("steps", steps, Integral, 1))
        sequences, form, state = self._begin(X, initial_state)
        if self._outputs != self.n_features_in_:
            raise ValueError(
                "generating feeds outputs back as inputs, so it needs as many of them, got "
                f"{self._outputs} output(s) and {self.n_features_in_} input(s): fit with y=None, "
                "or with the next step of X as y"
            )
        _, state = self._units.run(sequences, state, False)
        x = np.stack([sequence[-1] for sequence in sequences])
        state = np.ascontiguousarray(state)
        step = self._units.stepper(x, state)
        results = np.empty((len(sequences), steps, self._outputs), x.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(steps):
                if k > 0:
                    step()
                results[:, k] = self._read(x, state)
                x[:] = results[:, k]
        finite = np.isfinite(results).all(axis=(0, 2))
        if not finite.all():
            warnings.warn(
                f"the outputs ran away, and are not finite from step {finite.argmin()} of {steps} "
                "on: fed back, the readout is unstable; a longer warm-up or a larger ridge helps",
                RuntimeWarning,
                stacklevel=2,
            )
        return form.give(list(results[..., 0] if self._flat else results))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """R² of ``predict(X)`` over the steps after the washout, the mean of all outputs.

        Args:
            sample_weight: (T,) for one sequence; for several the rows of all, one after the other.

        Raises:
            ValueError: no step is left after ``washout``.
        """
        check_is_fitted(self)
        sequences, form = self._check_inputs(X, reset=False)
        sequences, targets, _ = _pairs(sequences, y, form)
        found = self.predict(sequences)
        counts = [np.arange(len(target)) >= self.washout for target in targets]
        counted = np.concatenate(counts)
        if not counted.any():
            raise ValueError(
                f"washout={self.washout} leaves no step to score: the longest of "
                f"{len(sequences)} sequence(s) has {max(map(len, sequences))}"
            )
        rows = np.concatenate([f.reshape(len(f), -1) for f in found])
        weight = None if sample_weight is None else np.asarray(sample_weight)[counted]
        score: float = r2_score(
            np.concatenate(targets)[counted], rows[counted], sample_weight=weight
        )
        return score

    # --- parts ------------------------------------------------------------------------------------

    def _check_inputs(self, X: Any, reset: bool) -> tuple[list[Array], Form]:
        """The sequences of X, each checked by scikit-learn, of one dtype."""
        given, form = split(X)
        dtype: Any = [np.float64, np.float32] if reset else self.bias_.dtype
        checked = [
            validate_data(self, x, reset=reset and b == 0, dtype=dtype, order="C")
            for b, x in enumerate(given)
        ]
        if len({x.dtype for x in checked}) > 1:
            checked = [x.astype(np.float64) for x in checked]
        return checked, form

    def _begin(self, X: Any, initial_state: Any) -> tuple[list[Array], Form, Array]:
        check_is_fitted(self)
        sequences, form = self._check_inputs(X, reset=False)
        state = self._zeros(len(sequences))
        if initial_state is not None:
            given = np.asarray(initial_state, state.dtype)
            expected = state.shape[1:] if form.kind == "one" else state.shape
            if given.shape != expected:
                raise ValueError(f"initial_state must have shape {expected}, got {given.shape}")
            state[:] = given
        return sequences, form, state

    @staticmethod
    def _end(results: list[Array], form: Form, state: Array, return_state: bool) -> Any:
        given = form.give(results)
        if not return_state:
            return given
        return given, state[0] if form.kind == "one" else state

    def _zeros(self, sequences: int) -> Array:
        return np.zeros((sequences, self._n_features_out), self.bias_.dtype)

    def _pieces(self, sequences: Sequence[Array], state: Array) -> Iterator[tuple[int, int, Array]]:
        """(sequence, first step, states) of pieces of all sequences; leaves the final states."""
        for first in range(0, len(sequences), _TOGETHER):
            group = range(first, min(first + _TOGETHER, len(sequences)))
            length = max(1, _PIECE // (len(group) * state.shape[1]))
            for begin in range(0, max(len(sequences[b]) for b in group), length):
                running = [b for b in group if len(sequences[b]) > begin]
                pieces = [sequences[b][begin : begin + length] for b in running]
                states, state[running] = self._units.run(pieces, state[running], True)
                for b, piece in zip(running, states, strict=True):
                    yield b, begin, piece

    def _read(self, x: Array, states: Array) -> NDArray[np.float64]:
        # A product for each row: the order of sums of one of all rows depends on their number.
        z = np.concatenate([x, states], axis=1, dtype=np.float64)
        y: NDArray[np.float64] = (z[:, None] @ self._weights_out.T)[:, 0] + self._bias_out
        return y


def _pairs(
    sequences: list[Array], y: Any, form: Form
) -> tuple[list[Array], list[NDArray[np.float64]], bool]:
    """Inputs, targets (T, O) in float64, and whether those came with one dimension."""
    if y is None:
        shortest = min(map(len, sequences))
        if shortest < 2:
            raise ValueError(
                "y=None, the next step of X, takes sequences of at least 2 steps, got one of "
                f"{shortest}"
            )
        targets = [x[1:].astype(np.float64) for x in sequences]
        return [x[:-1] for x in sequences], targets, False
    if form.kind != "one" and not hasattr(y, "__len__"):
        raise TypeError(f"y must hold {len(sequences)} sequences as X does, got {type(y).__name__}")
    given = [plain(target) for target in ([y] if form.kind == "one" else y)]
    if len(given) != len(sequences):
        raise ValueError(f"y must hold {len(sequences)} sequences as X does, got {len(given)}")
    checked = []
    for x, target in zip(sequences, given, strict=True):
        array = check_array(target, dtype=np.float64, ensure_2d=False, input_name="y")
        check_consistent_length(x, array)
        checked.append(array)
    shapes = {target.shape[1:] for target in checked}
    if len(shapes) > 1:
        raise ValueError(f"all of y must have the same outputs, got shapes {sorted(shapes)}")
    return sequences, [t.reshape(len(t), -1) for t in checked], checked[0].ndim == 1


def _number(
    name: str, value: Any, kind: Any, least: float, *, above: bool = False, most: float = np.inf
) -> Any:
    """``value`` if it is such a number."""
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = "an integer" if kind is Integral else "a number"
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not (least < value if above else least <= value) or value > most or value == np.inf:
        limits = f"above {least:g}" if above else f"at least {least:g}"
        limits += f" and at most {most:g}" if most < np.inf else " and finite"
        raise ValueError(f"{name} must be {limits}, got {value!r}")
    return value


def _numbers(name: str, value: Any, count: int, of: str) -> NDArray[np.float64]:
    """One number, or one for each of some, as one for each; finite."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise TypeError(f"{name} must be a number or an array of them, got {value!r}")
    if array.shape not in ((), (count,)):
        raise ValueError(
            f"{name} must be one number or one for each of the {count} {of}, got shape "
            f"{array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {value!r}")
    return np.broadcast_to(array, (count,)).astype(np.float64)
