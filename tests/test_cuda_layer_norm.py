"""Layer normalisation on CUDA devices: the kernels (csrc/cuda/normed.h) and the layers above them.

On a GPU where there is one, and emulated in any case, as in test_cuda.py.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcell
from emulation_build import emulated
from fastcell import normed_cuda, ops, reference
from fastcell.cells import spec_of
from fastcell.normed import split
from support import assert_equal_bits, skip_lacking
from tolerances import eps_of

pytestmark = pytest.mark.usefixtures("poison")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
KINDS = ("LSTM", "GRU")
LSTMS = ("lstm", "lstm_peephole", "lstm_coupled", "lstm_coupled_peephole")
CELLS = ("gru", *LSTMS, *[f"{cell} projected" for cell in LSTMS])
PROBLEMS = (*KINDS, "LSTM projected")
FORMS = ("padded", "packed", "lengths")


class Sizes(NamedTuple):
    T: int
    B: int
    I: int  # noqa: E741
    H: int

    @property
    def lengths(self) -> Tensor:
        """Falling, from all steps to few, one at least."""
        return (self.T - torch.arange(self.B) * self.T // self.B).clamp(min=1)


class Problem:
    """A stack with norms that do something of their own, its input, and its results' gradients.

    ``kind``: a cell, and " projected" behind it where it has a projection, to half the numbers.
    """

    def __init__(
        self, kind: str, sizes: Sizes, form: str = "padded", *, layers: int = 1,
        directions: int = 1, bias: bool = True, given: bool = True, reset: bool = False,
    ) -> None:  # fmt: skip
        self.kind, self.sizes, self.form, self.bias = kind, sizes, form, bias
        self.layers, self.directions = layers, directions
        self.cell, _, projected = kind.lower().partition(" ")
        self.projected = projected != ""
        spec = spec_of(self.cell)
        generator = torch.Generator().manual_seed(3)
        steps, batch, features, hidden = sizes
        self.output = output = (hidden + 1) // 2 if self.projected else hidden

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, dtype=F64, generator=generator)

        wide = spec.gates * hidden
        self.weights: list[Tensor] = []
        for layer in range(layers):
            width = features if layer == 0 else directions * output
            for _ in range(directions):
                self.weights += [draw(wide, width), draw(wide, output)]
                self.weights += [draw(wide, scale=0.3) for _ in range(2 * bias)]
                if self.projected:
                    self.weights.append(draw(output, hidden, scale=hidden**-0.5))
                self.weights += [draw(spec.parameters, hidden)] * (spec.parameters > 0)
                self.weights += [1 + draw(wide, scale=0.3) for _ in range(2)]
                if spec.states > 1:
                    self.weights.append(torch.stack((1 + draw(hidden), draw(hidden))))
        self.lengths = sizes.lengths
        rows = (int(self.lengths.sum()),) if form == "packed" else (steps, batch)
        widths = (output, hidden)[: spec.states]
        self.hx = [draw(layers * directions, batch, n) for n in widths] if given else []
        self.x = draw(*rows, features)
        self.d_output = draw(*rows, directions * output)
        self.d_states = [draw(layers * directions, batch, n) for n in widths]
        self.reset = torch.rand(rows, generator=generator) < 0.25 if reset else None
        self.d_cells = draw(*rows, directions * hidden)

    def run(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Output, final states and the gradients of all that was given."""
        given = (self.x, *self.hx, *self.weights)
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in given]
        x, hx, weights = leaves[0], leaves[1 : 1 + len(self.hx)], leaves[1 + len(self.hx) :]
        sizes = None
        if self.form == "packed":
            sizes = (torch.arange(self.sizes.T)[:, None] < self.lengths).sum(1)
        elif self.form == "lengths":
            sizes = self.lengths.to(device)
        output, states = ops.normed(
            self.cell, x, hx or None, weights, sizes,
            None if self.reset is None else self.reset.to(device), bias=self.bias,
            projected=self.projected, directions=self.directions, batch_first=False, dropout=0.0,
        )  # fmt: skip
        grads = [g.to(device, dtype) for g in (self.d_output, *self.d_states)]
        torch.autograd.backward([output, *states], grads)
        assert output.dtype is dtype
        gradients = [leaf.grad for leaf in leaves]
        return [t.detach().cpu() for t in (output, *states, *gradients) if t is not None]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same of other numbers."""
        other = copy.copy(self)
        for name in ("x", "d_output"):
            setattr(other, name, change(getattr(self, name)))
        for name in ("hx", "weights", "d_states"):
            setattr(other, name, [change(t) for t in getattr(self, name)])
        return other

    def rounded(self, dtype: torch.dtype) -> Problem:
        """The same of numbers that a dtype has, in float64."""
        return self.mapped(lambda t: t.to(dtype).double())

    def moved(self, dtype: torch.dtype, seed: int) -> Problem:
        """The same of numbers that are off by as much as rounding to a dtype may make them."""
        generator = torch.Generator().manual_seed(seed)
        return self.mapped(
            lambda t: t * (1 + eps_of(dtype) * (torch.rand(t.shape, generator=generator) - 0.5))
        )


def in_torch(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The same in torch's operations on the CPU, each of which rounds to ``dtype``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "normed_engine", lambda *_: None)
        patch.setattr(ops, "_NARROW", ())
        return problem.run(dtype, "cpu")


def by_reference(problem: Problem) -> list[np.ndarray]:
    """The same of the NumPy reference, as exactly as it can: one layer, one direction, padded."""
    own = ["weight_hr"] * problem.projected + ["weight_peephole"] * ("peephole" in problem.cell)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *own, "norm_ih", "norm_hh", "norm_c"]
    w = dict(zip(names, [wide(t) for t in problem.weights], strict=False))
    hx = [wide(t[0]) for t in problem.hx]
    output, final, tape = reference.normed.forward(problem.cell, wide(problem.x), hx, w)
    d_states = [wide(t[0]) for t in problem.d_states]
    d_x, d_hx, d_w = reference.normed.backward(
        problem.cell, tape, w, wide(problem.d_output), d_states
    )
    return [output, *[f[None] for f in final], d_x, *[d[None] for d in d_hx], *d_w.values()]


def wide(t: Tensor) -> np.ndarray:
    return t.double().numpy().astype(np.longdouble)


def check(
    problem: Problem, dtype: torch.dtype, device: str, exact: list[np.ndarray] | None = None,
    like: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Runs the kernels, and holds them against ``exact`` or torch's operations in float64.

    A norm's error depends on the numbers: it divides by their spread. So it may be a few times what
    torch's operations make of the same numbers in the same dtype, or in that of ``like``, of the
    results or of gradients; with a projection, also what becomes of numbers that differ by rounding
    alone.
    """
    numbers, like = problem.rounded(dtype), like or dtype
    if exact is None:
        exact = [wide(t) for t in in_torch(numbers, F64)]
    usual = [in_torch(problem, like)]
    if problem.projected:  # of few numbers, whose spread hangs on each
        usual += [in_torch(numbers.moved(like, seed), F64) for seed in range(3)]
    found = problem.run(dtype, device)
    assert len(found) == len(exact) == len(usual[0])
    results = 1 + len(problem.d_states)
    errors = [
        max(abs(wide(t) - b).max() for t in values)
        for values, b in zip(zip(*usual, strict=True), exact, strict=True)
    ]
    allowed = [max(errors[:results])] * results + [max(errors[results:])] * len(errors[results:])
    for i, (a, b, most) in enumerate(zip(found, exact, allowed, strict=True)):
        assert a.dtype is dtype
        assert a.shape == b.shape
        error = abs(wide(a) - b).max()
        assert error <= 4 * most + 4 * eps_of(dtype) * abs(b).max(), f"value {i}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran as kernels: the name of the cell and the pass of each call."""
    found: list[str] = []
    run = normed_cuda._Run.run

    def counted(self, **tensors):
        found.append(f"{self.call.cell} {'backward' if 'd_terms' in tensors else 'forward'}")
        run(self, **tensors)

    monkeypatch.setattr(normed_cuda._Run, "run", counted)
    return found


@pytest.mark.parametrize(
    "sizes",
    [Sizes(4, 3, 2, 1), Sizes(1, 1, 3, 5), Sizes(5, 19, 6, 37), Sizes(3, 2, 4, 300)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("kind", CELLS)
def test_as_the_reference(kind, dtype, sizes, device, launches):
    """One unit, one step, several tiles and blocks, more units than a block has threads."""
    problem = Problem(kind, sizes)
    check(problem, dtype, device, by_reference(problem.rounded(dtype)))
    assert launches == [f"{problem.cell} forward", f"{problem.cell} backward"]


@pytest.mark.parametrize(("dtype", "given"), [(F32, True), (F32, False), (BF16, True)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CELLS)
def test_every_form_of_input(kind, form, dtype, given, device, launches):
    """Layers, directions, resets; without biases where no states are given."""
    sizes = Sizes(4, 4, 3, 17)
    problem = Problem(
        kind, sizes, form, layers=2, directions=2, bias=given, given=given, reset=True
    )
    check(problem, dtype, device)
    assert len(launches) == 8


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", ["lstm", "lstm_peephole", "lstm_coupled projected"])
def test_c_of_all_steps(kind, dtype, device):
    """And its gradient: beside torch's operations in float64."""
    problem = Problem(kind, Sizes(5, 3, 4, 19), "lengths", reset=True)

    def run(dtype, device):
        x, *weights = (
            t.to(device, dtype, copy=True).requires_grad_() for t in (problem.x, *problem.weights)
        )
        outputs, cells, _ = ops.normed_states(
            problem.cell, x, None, weights, problem.lengths.to(device), problem.reset.to(device),
            bias=True, projected=problem.projected, directions=1, batch_first=False, dropout=0.0,
            every=True,
        )  # fmt: skip
        assert cells[0].dtype is dtype
        given = [problem.d_output, problem.d_cells]
        total = sum((t * g.to(t)).sum() for t, g in zip((*outputs, *cells), given, strict=True))
        found = (*outputs, *cells, *torch.autograd.grad(total, [x, *weights]))
        return [t.detach().cpu().double() for t in found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "normed_engine", lambda *_: None)
        patch.setattr(ops, "_NARROW", ())
        exact, usual = run(F64, "cpu"), run(dtype, "cpu")
    most = max((a - b).abs().max() / b.abs().max() for a, b in zip(usual, exact, strict=True))
    for a, b in zip(run(dtype, device), exact, strict=True):
        assert (a - b).abs().max() <= 4 * (most + eps_of(dtype)) * b.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", PROBLEMS)
def test_several_tiles(kind, form, device):
    """Of samples that end at different steps."""
    check(Problem(kind, Sizes(4, 70, 3, 11), form, directions=2, reset=True), F32, device)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_tf32(kind, device):
    """Operands of the products rounded to the mantissa of float16."""
    problem = Problem(kind, Sizes(4, 5, 3, 40))
    full = problem.run(F32, device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = problem.run(F32, device)
        if problem.projected:
            check(problem, F32, device, like=F16)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert not torch.equal(found[0], full[0])
    if not problem.projected:
        exact, usual = in_torch(problem, F64), in_torch(problem, F16)
        for a, b, c in zip(found, exact, usual, strict=True):
            assert (a - b).abs().max() <= (c - b).abs().max()


@pytest.mark.parametrize("kind", PROBLEMS)
def test_behind_its_end_a_sample_is_not_looked_at(kind, device):
    """Whatever stands there; with a length of zero its states stay."""
    problem = Problem(kind, Sizes(5, 4, 3, 7), "lengths", directions=2)
    problem.lengths = torch.tensor([2, 5, 0, 4])
    clean = problem.run(F64, device)
    beyond = torch.arange(5)[:, None] >= problem.lengths
    problem.x[beyond] = torch.nan
    for a, b in zip(problem.run(F64, device), clean, strict=True):
        assert_equal_bits(a, b)
    assert not clean[0][beyond].any()
    for given, final in zip(problem.hx, clean[1:], strict=False):
        assert torch.equal(given[:, 2], final[:, 2])


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_sample_has_the_same_bits_beside_others(kind, device):
    """In a batch whose product is shared out between warps in the same way."""
    problem = Problem(kind, Sizes(5, 13, 4, 50))
    terms = torch.randn(5 * 13, len(problem.weights[0]), device=device)
    given = [w.float().to(device) for w in problem.weights]
    (own,) = split(problem.cell, given, True, problem.projected)
    rest = (own.w_hh, own.projection, own.norm_hh, own.b_hh, own.norm_c, own.parameters)

    def run(terms, samples):
        call = normed_cuda.Call(problem.cell, (samples,) * 5, None, False, None, F32, False)
        return normed_cuda._forward(call, (terms, None, None, *rest), keep=False)[0]

    every = run(terms, 13).view(5, 13, -1)
    for b in (0, 7, 12):
        assert_equal_bits(run(terms.view(5, 13, -1)[:, b].contiguous(), 1), every[:, b])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "more"), [("LSTM", {}), ("GRU", {}), ("LSTM", {"proj_size": 2})])
def test_second_derivatives(kind, more, bias, device):
    torch.manual_seed(2)
    layer = getattr(fastcell, kind)(2, 3, layer_norm=True, bias=bias, **more).to(device, F64)
    x = torch.randn(2, 1, 2, dtype=F64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives_of_16_bits_with_lengths(kind, device):
    """Their dtypes, and that the graph is whole."""
    skip_lacking(device, dtype=BF16)
    problem = Problem(kind, Sizes(4, 3, 2, 5), "lengths", reset=True)
    x, *rest = [t.to(device, BF16).requires_grad_() for t in (problem.x, *problem.weights)]
    output, _ = ops.normed(
        problem.cell, x, None, rest, problem.lengths.to(device), None, bias=True,
        projected=problem.projected, directions=1, batch_first=False, dropout=0.0,
    )  # fmt: skip
    first = torch.autograd.grad(output.float().square().sum(), [x, *rest], create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), [x, *rest])
    assert all(g.dtype is BF16 and g.isfinite().all() and g.any() for g in second)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_cells_and_functions(kind, device, launches):
    """No warning, the caller's own output, and no gradient where none is wanted."""
    layer = getattr(fastcell, kind)(3, 6, layer_norm=True, device=device)
    cell = getattr(fastcell, f"{kind}Cell")(3, 6, layer_norm=True, device=device)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(4, 2, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, final = layer(x)
        wanted = torch.autograd.grad(output.relu().sum(), layer.weight_hh_l0, retain_graph=True)
        own = output.clone()
        output.relu_().sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad, wanted[0])
    with torch.no_grad():
        assert torch.equal(layer(x)[0], own)
        run = getattr(fastcell.functional, kind.lower())
        assert torch.equal(run(x, None, list(layer.parameters()), layer_norm=True)[0], own)
        step = cell(x[0])
        for t in range(1, 4):
            step = cell(x[t], step)
    for a, b in zip(step if kind == "LSTM" else (step,), final, strict=False):
        torch.testing.assert_close(a, b[0] if kind == "LSTM" else b)
    assert layer(torch.zeros(2, 0, 3, device=device))[0].shape == (2, 0, 6)
    assert len(launches) == 1 + 2 + 2 + 4
    frozen = getattr(fastcell, kind)(3, 6, layer_norm=True, device=device).requires_grad_(False)
    assert not frozen(x)[0].requires_grad
    assert torch.autograd.grad(frozen(x.requires_grad_())[0].sum(), x)[0].any()


@pytest.mark.parametrize("options", [{}, {"peephole": True, "coupled": True}], ids=str)
def test_layers_with_a_projection(options, device, launches):
    """No warning; functions, and all states."""
    layer = fastcell.LSTM(3, 7, 2, layer_norm=True, proj_size=3, bidirectional=True, **options)
    layer, x = layer.to(device), torch.randn(4, 2, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, (h, c) = layer(x)
        output.sum().backward()
        assert len(launches) == 8
        outputs = layer(x, return_states=True)[0]
        weights = list(layer.parameters())
        again = fastcell.functional.lstm(
            x, None, weights, num_layers=2, bidirectional=True, layer_norm=True, **options
        )
    assert (output.shape, h.shape, c.shape) == ((4, 2, 6), (4, 2, 3), (4, 2, 7))
    assert all(weight.grad.any() for weight in weights)
    for other in (outputs, again[0]):
        assert_equal_bits(other.detach().cpu(), output.detach().cpu())


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_changed_before_the_backward_pass_is_refused(kind, device):
    layer = getattr(fastcell, kind)(3, 6, layer_norm=True, device=device)
    reset = torch.rand(4, 2, device=device) < 0.5
    for changed in (reset, layer.norm_hh_l0):
        output, _ = layer(torch.randn(4, 2, 3, device=device), reset=reset)
        with torch.no_grad():
            changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_what_the_kernels_refuse():
    plan = emulated().CudaNormedPlan
    with pytest.raises(ValueError, match="no CUDA kernels for normalised cell rnn"):
        plan(0, "rnn", "float32", False, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="no CUDA kernels for products of float8"):
        plan(0, "lstm", "float8", False, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="other steps or samples than planned"):
        plan(0, "lstm", "float32", False, 2, 1, 1, 0).run(0, False, [1], 0, 0, [0] * 29)
