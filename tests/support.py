"""What the kernel tests share: problems and their answers, NaN-poisoned memory, child processes."""

from __future__ import annotations

import copy
import itertools
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcell
from fastcell import _core, reference
from tolerances import accumulation_length, assert_close, tolerance

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")  # torch.nn's
VARIANTS = (
    "lstm_peephole", "lstm_coupled", "lstm_coupled_peephole", "leaky_tanh", "leaky_relu",
)  # fmt: skip
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
GATES |= {"lstm_peephole": 4, "lstm_coupled": 3, "lstm_coupled_peephole": 3}
GATES |= {"leaky_tanh": 1, "leaky_relu": 1}
# Vectors beside the matrices.
OWN = {"lstm_peephole": 3, "lstm_coupled_peephole": 2, "leaky_tanh": 1, "leaky_relu": 1}

Values = dict[str, Tensor]


class Case(NamedTuple):
    """A configuration of a layer and the shape of its input.

    ``form`` is how the input comes: "padded" (every sample T steps long), "sorted" or "ragged"
    (a PackedSequence, of sorted lengths or not) or "unbatched".
    """

    cell: str = "lstm"
    dtype: torch.dtype = torch.float32
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    projected: bool = False
    form: str = "padded"
    hx: bool = True
    T: int = 5
    B: int = 3
    I: int = 4  # noqa: E741
    H: int = 7
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        flags = "bidirectional bias batch_first projected hx"
        words = [self.cell, str(self.dtype).removeprefix("torch."), self.form]
        words += [flag for flag in flags.split() if getattr(self, flag)]
        words += [f"L{self.layers}", f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        return "-".join(words)

    @property
    def lstm(self) -> bool:
        return self.cell.startswith("lstm")

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def proj(self) -> int:
        return (self.H + 1) // 2 if self.projected else 0

    @property
    def output(self) -> int:
        return self.proj or self.H

    @property
    def packed(self) -> bool:
        return self.form in ("sorted", "ragged")

    @property
    def state_names(self) -> list[str]:
        return ["h", "c"] if self.lstm else ["h"]

    @property
    def flops(self) -> int:
        """Of the forward products."""
        width = max(self.I, self.directions * self.output)
        rows = self.T * self.B * self.layers * self.directions
        return 2 * rows * GATES[self.cell] * self.H * (width + self.output)


class Problem:
    """Weights, input, states and incoming gradients for a case, drawn in float64 and rounded."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        G, H, P, D = GATES[case.cell], case.H, case.output, case.directions

        def rounded(values: np.ndarray) -> np.ndarray:
            return torch.from_numpy(values).to(case.dtype).double().numpy()

        def normal(*shape: int) -> np.ndarray:
            return rounded(rng.normal(size=shape))

        def weight(*shape: int) -> np.ndarray:  # of torch's initial size
            return rounded(rng.uniform(-(H**-0.5), H**-0.5, shape))

        self.weights: list[np.ndarray] = []
        for layer in range(case.layers):
            for _ in range(D):
                width = D * P if layer else case.I
                shapes = [(G * H, width), (G * H, P), *[(G * H,)] * 2 * case.bias]
                shapes += [(P, H)] * case.projected
                shapes += [(OWN.get(case.cell, 0), H)] * (case.cell in OWN)
                self.weights += [weight(*shape) for shape in shapes]
        count = case.layers * D
        sizes = [P, H][: len(case.state_names)]
        self.x = normal(case.T, case.B, case.I)
        self.states = [normal(count, case.B, size) for size in sizes] if case.hx else None
        self.grad_output = normal(case.T, case.B, D * P)
        self.grad_states = [normal(count, case.B, size) for size in sizes]
        self.lengths: np.ndarray | None = None
        if case.packed:
            lengths = rng.integers(1, case.T + 1, case.B)
            lengths[rng.integers(case.B)] = case.T
            self.lengths = -np.sort(-lengths) if case.form == "sorted" else lengths

    def samples(self, chosen: Sequence[int], form: str) -> Problem:
        """The problem of some of the samples, in the order given, with the same weights."""
        part = copy.copy(self)
        pick = list(chosen)
        steps = self.case.T if self.lengths is None else int(self.lengths[pick].max())
        part.case = self.case._replace(B=len(pick), T=steps, form=form)
        part.x, part.grad_output = self.x[:steps, pick], self.grad_output[:steps, pick]
        part.states = None if self.states is None else [state[:, pick] for state in self.states]
        part.grad_states = [grad[:, pick] for grad in self.grad_states]
        part.lengths = None if self.lengths is None else self.lengths[pick]
        return part

    def steps(self, begin: int, end: int) -> Problem:
        """The problem of some of the steps, with the same weights and initial states."""
        part = copy.copy(self)
        part.case = self.case._replace(T=end - begin)
        part.x, part.grad_output = self.x[begin:end], self.grad_output[begin:end]
        return part

    def layer(self, library: Any) -> torch.nn.RNNBase:
        """The layer of ``library`` (fastcell or torch.nn) with the problem's weights."""
        case = self.case
        options = {
            "num_layers": case.layers,
            "bias": case.bias,
            "batch_first": case.batch_first,
            "bidirectional": case.bidirectional,
            "dtype": case.dtype,
            "device": case.device,
        }
        if case.lstm:
            options["proj_size"] = case.proj
            for option in ("peephole", "coupled"):
                if option in case.cell:
                    options[option] = True
        elif case.cell != "gru":
            kind, options["nonlinearity"] = case.cell.split("_")
            if kind == "leaky":
                options["learn_alpha"] = True
        name = case.cell.split("_")[0].upper()
        name = "LeakyRNN" if name == "LEAKY" else name
        layer: torch.nn.RNNBase = getattr(library, name)(case.I, case.H, **options)
        with torch.no_grad():
            for parameter, value in zip(layer.parameters(), self.weights, strict=True):
                parameter.copy_(torch.from_numpy(value))
        return layer

    def to_caller(self, value: np.ndarray, *, state: bool = False) -> Tensor:
        """A (T, B, ·) array, or a state, in the layout and dtype of the layer's caller."""
        tensor = torch.tensor(value, dtype=self.case.dtype, device=self.case.device)
        if self.case.form == "unbatched":
            return tensor.squeeze(1)
        if not state and self.case.batch_first:
            return tensor.transpose(0, 1).contiguous()
        return tensor

    def inputs(self) -> Values:
        """x and the initial states as leaves that want a gradient, by name."""
        found = {"x": self.to_caller(self.x)}
        for name, value in zip(self.case.state_names, self.states or (), strict=False):
            found[f"{name}0"] = self.to_caller(value, state=True)
        return {name: tensor.requires_grad_() for name, tensor in found.items()}

    def gradients_in(self) -> list[Tensor]:
        """The gradients of the output and the final states."""
        states = [self.to_caller(grad, state=True) for grad in self.grad_states]
        return [self.to_caller(self.grad_output), *states]

    def call(self, layer: torch.nn.RNNBase, inputs: Values) -> Values:
        """The layer's output (of a PackedSequence: padded again) and final states."""
        case, x = self.case, inputs["x"]
        states = [inputs[f"{name}0"] for name in case.state_names if f"{name}0" in inputs]
        hx = None if not states else tuple(states) if case.lstm else states[0]
        if self.lengths is not None:
            x = torch.nn.utils.rnn.pack_padded_sequence(
                x,
                torch.from_numpy(self.lengths),
                batch_first=case.batch_first,
                enforce_sorted=case.form == "sorted",
            )
        with warnings.catch_warnings():  # torch.nn's, once: a projection goes without oneDNN
            warnings.filterwarnings("ignore", "LSTM with projections")
            output, final = layer(x, hx)
        if self.lengths is not None:
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(
                output, batch_first=case.batch_first, total_length=case.T
            )
        finals = final if case.lstm else (final,)
        return {"output": output, **dict(zip(case.state_names, finals, strict=True))}

    def run(self, layer: torch.nn.RNNBase) -> Values:
        """Forward and backward: output, states, and the gradient of every input and parameter."""
        inputs = self.inputs()
        values = self.call(layer, inputs)
        torch.autograd.backward(list(values.values()), self.gradients_in())
        leaves = inputs | dict(layer.named_parameters())
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        assert all(gradient is not None for gradient in gradients.values())
        return {name: value.detach() for name, value in (values | gradients).items()}

    def widened(self) -> Problem:
        """The same numbers in float64."""
        wide = copy.copy(self)
        wide.case = self.case._replace(dtype=torch.float64, device="cpu")
        return wide

    def truth(self, dropout_masks: np.ndarray | None = None) -> Values:
        """The same of the reference, in float64."""
        case = self.case
        result = reference.forward(
            case.cell,
            self.x,
            self.states,
            self.weights,
            num_layers=case.layers,
            bidirectional=case.bidirectional,
            bias=case.bias,
            lengths=self.lengths,
            dropout_masks=dropout_masks,
        )
        grads = reference.backward(result.tape, self.grad_output, self.grad_states)
        wide = self.widened()
        values = {"output": wide.to_caller(result.output)}
        for name, state in zip(case.state_names, result.states, strict=True):
            values[name] = wide.to_caller(state, state=True)
        values["gradient of x"] = wide.to_caller(grads.input)
        if self.states is not None:
            for name, grad in zip(case.state_names, grads.states, strict=True):
                values[f"gradient of {name}0"] = wide.to_caller(grad, state=True)
        for (name, _), grad in zip(
            self.layer(fastcell).named_parameters(), grads.weights, strict=True
        ):
            values[f"gradient of {name}"] = torch.from_numpy(grad)
        return values

    def assert_close(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Hold ``actual`` to ``expected`` under the tolerance policy, name by name.

        A parameter's gradient is a sum over all rows. Its natural size, the policy's unit, is that
        of all parameters' gradients together: one number alone may have cancelled to anything.
        """
        case = self.case
        assert actual.keys() == expected.keys()
        width = max(case.I, case.directions * case.output)
        whole = accumulation_length(width, case.H, gates=GATES[case.cell], batch=case.B)
        sums = [expected[name].double().flatten() for name in expected if is_parameter(name)]
        finite = torch.cat([*sums, torch.zeros(0)])
        finite = finite[finite.isfinite()]
        size = max(1.0, finite.square().mean().sqrt().item() if len(finite) else 1.0)
        for name, value in actual.items():
            assert value.dtype is case.dtype, name
            assert_close(
                value,
                expected[name],
                dtype=case.dtype,
                steps=case.layers * case.T,
                length=whole if "gradient" in name else accumulation_length(width, case.H),
                unit=size if is_parameter(name) else 1.0,
                name=name,
            )


def is_parameter(name: str) -> bool:
    return name.startswith(("gradient of weight", "gradient of bias"))


def away_from_the_kink(case: Case) -> Case:
    """The case with the first seed under which no relu sits within rounding of its kink.

    There the derivative jumps from 0 to 1, so two right computations may differ by all of it.
    """
    if not case.cell.endswith("relu"):
        return case
    margin = tolerance(case.dtype, case.layers * case.T, case.I + 2 * case.H)
    relu = reference.CELLS[case.cell]
    nearest = [np.inf]
    original = relu.activation

    def observed(a: np.ndarray) -> np.ndarray:
        nearest[0] = min(nearest[0], float(np.abs(a).min(initial=np.inf)))
        return original(a)

    for seed in range(case.seed, case.seed + 1000):
        nearest[0] = np.inf
        moved = case._replace(seed=seed)
        relu.activation = observed  # type: ignore[method-assign]
        try:
            Problem(moved).truth()
        finally:
            del relu.activation
        if nearest[0] > margin:
            return moved
    raise AssertionError(f"no seed keeps {case} away from the kink: make the case smaller")


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Mapping[str, Any]], bool],
    seed: int,
) -> list[dict[str, Any]]:
    """Few choices of one value per factor that hold every allowed pair of values; deterministic."""
    rng = random.Random(seed)
    names = list(factors)

    def pairs_of(row: Mapping[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    open_pairs = [
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    ]
    rows: list[dict[str, Any]] = []
    remaining = dict.fromkeys(open_pairs)
    while remaining:
        a, x, b, y = first = next(iter(remaining))
        best: dict[str, Any] | None = None
        gain = 0
        for _ in range(100):
            row = {name: rng.choice(values) for name, values in factors.items()} | {a: x, b: y}
            if allowed(row):
                new = sum(pair in remaining for pair in pairs_of(row))
                if new > gain:
                    best, gain = row, new
        if best is None:  # a pair that cannot be
            del remaining[first]
            continue
        rows.append(best)
        for pair in pairs_of(best):
            remaining.pop(pair, None)
    return rows


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equality of every bit, signs of zeros included, name by name."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_equal_bits(value, expected[name], name)


def assert_equal_bits(actual: Tensor, expected: Tensor, name: str = "value") -> None:
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    assert actual.dtype is expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    mine, theirs = (t.detach().contiguous().view(integers) for t in (actual, expected))
    different = (mine != theirs).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise AssertionError(
            f"{name}: {len(different)} of {actual.numel()} elements have other bits; first at "
            f"{at}: {actual[at].item()!r}, expected {expected[at].item()!r}"
        )


def places_of(schedule: str) -> list[str]:
    """Where a layer runs on a GPU, forward and backward, in the words of ``fastcell.explain``."""
    said = {
        "one launch per step": "step",
        "over the device": "grid",
        "over each cluster": "cluster",
    }
    return [said[words] for words in re.findall("|".join(said), schedule)]


def lacking(limits: Mapping[str, Any], parameters: Mapping[str, Any]) -> str | None:
    """Why a test with these parameters cannot run on a GPU of these limits; None if it can.

    What a test wants, its parameters say: a ``place``, a ``dtype``, a ``row`` or ``case`` of them.
    """
    wanted: dict[str, Any] = dict(parameters)
    row, case = wanted.get("row"), wanted.get("case")
    if isinstance(row, Mapping):
        wanted |= row
    if isinstance(case, Case):
        wanted["dtype"] = case.dtype
    capability = limits["capability"]
    if capability < 75:
        return f"no kernels for compute capability {capability / 10}"
    if wanted.get("place") == "cluster" and limits["max_cluster"] == 1:
        return f"no thread-block clusters on compute capability {capability / 10}"
    if wanted.get("place") == "grid" and not limits["cooperative"]:
        return "no cooperative launches on this GPU"
    if wanted.get("dtype") in (torch.bfloat16, "bfloat16") and capability < 80:
        return f"no kernels for bfloat16 on compute capability {capability / 10}"
    return None


def skip_lacking(device: str, **parameters: Any) -> None:
    """Skips the test if ``device`` is a GPU that cannot run it; the emulated one has everything."""
    if torch.device(device).type == "cuda":
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        if reason := lacking(_core.cuda_limits(index), parameters):
            pytest.skip(reason)


def every_other(t: Tensor) -> Tensor:
    """The same values, with two gaps of NaN behind each."""
    wide = torch.full((*t.shape, 3), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


def in_other_order(t: Tensor) -> Tensor:
    return t.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def inside(t: Tensor) -> Tensor:
    """A corner of a larger tensor of NaN: rows dense, steps and samples not."""
    larger = torch.full([n + 2 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    larger[1:-1, 1:-1, 1:-1] = t
    return larger[1:-1, 1:-1, 1:-1]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


# Tensors that hold the same values otherwise.
LAYOUTS = {
    "every other": every_other,
    "in other order": in_other_order,
    "inside": inside,
    "transposed": transposed,
}


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch allocates without filling holds NaN (integers: all ones, NaN as floats)."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with another number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def python(
    code: str, *arguments: str, timeout: float = 120, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter that finds what this one finds; a crash fails the test."""
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, (
            f"status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done
