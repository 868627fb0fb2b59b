"""Wrong calls of every kind: an error that says what is wrong, never a crash or a silent result.

Layers are held to torch.nn's own exceptions. Calls that might do harm run in a process of their
own, where a crash is a failed test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastcell
from fastcell import _core
from fastcell.plan import NO_EXTRAS
from support import python

KINDS = ["RNN", "LSTM", "GRU"]
ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)
I, H, T, B = 4, 5, 3, 2  # noqa: E741


def states(kind: str, *shape: int, **options: Any) -> Any:
    """hx of one shape: a tensor, for an LSTM a pair of it."""
    h = torch.zeros(*shape, **options)
    return (h, h) if kind == "LSTM" else h


def x(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*(shape or (T, B, I)), **options)


def packed(sizes: list[int], rows: int | None = None, **options: Any) -> PackedSequence:
    """A PackedSequence as it comes from its own constructor: unchecked."""
    sizes_tensor = torch.tensor(sizes, **options)
    return PackedSequence(x(sum(sizes) if rows is None else rows, I), sizes_tensor)


# name: call of a layer (I, H) of the kind.
LAYER_CALLS: dict[str, Callable[[torch.nn.Module, str], Any]] = {
    "rank 0": lambda m, k: m(torch.tensor(1.0)),
    "rank 1": lambda m, k: m(x(I)),
    "rank 4": lambda m, k: m(x(1, T, B, I)),
    "one feature less": lambda m, k: m(x(T, B, I - 1)),
    "one feature more": lambda m, k: m(x(T, B, I + 1)),
    "no features": lambda m, k: m(x(T, B, 0)),
    "no step": lambda m, k: m(x(0, B, I)),
    "no step, unbatched": lambda m, k: m(x(0, I)),
    "float64 input": lambda m, k: m(x(dtype=torch.float64)),
    "float16 input": lambda m, k: m(x(dtype=torch.float16)),
    "int64 input": lambda m, k: m(x(dtype=torch.int64)),
    "bool input": lambda m, k: m(x(dtype=torch.bool)),
    "complex input": lambda m, k: m(x(dtype=torch.complex64)),
    "meta input": lambda m, k: m(x(device="meta")),
    "a list": lambda m, k: m([[[0.0] * I] * B] * T),
    "None": lambda m, k: m(None),
    "hx of rank 2": lambda m, k: m(x(), states(k, B, H)),
    "hx of rank 4": lambda m, k: m(x(), states(k, 1, 1, B, H)),
    "hx for two layers": lambda m, k: m(x(), states(k, 2, B, H)),
    "hx for no layer": lambda m, k: m(x(), states(k, 0, B, H)),
    "hx for one sample more": lambda m, k: m(x(), states(k, 1, B + 1, H)),
    "hx for one sample": lambda m, k: m(x(), states(k, 1, 1, H)),
    "hx of one unit less": lambda m, k: m(x(), states(k, 1, B, H - 1)),
    "hx of one unit more": lambda m, k: m(x(), states(k, 1, B, H + 1)),
    "hx of float64": lambda m, k: m(x(), states(k, 1, B, H, dtype=torch.float64)),
    "hx of float16": lambda m, k: m(x(), states(k, 1, B, H, dtype=torch.float16)),
    "hx of int64": lambda m, k: m(x(), states(k, 1, B, H, dtype=torch.int64)),
    "hx on meta": lambda m, k: m(x(), states(k, 1, B, H, device="meta")),
    "unbatched, hx of rank 3": lambda m, k: m(x(T, I), states(k, 1, 1, H)),
    "unbatched, hx of one unit more": lambda m, k: m(x(T, I), states(k, 1, H + 1)),
    "packed of rank 1": lambda m, k: m(PackedSequence(x(T), torch.ones(T, dtype=torch.int64))),
    "packed, hx for one sample more": lambda m, k: m(packed([2, 1]), states(k, 1, 3, H)),
    "packed, hx for one sample": lambda m, k: m(packed([2, 1]), states(k, 1, 1, H)),
    "packed float64": lambda m, k: m(
        PackedSequence(x(T, I, dtype=torch.float64), torch.ones(T, dtype=torch.int64))
    ),
}

# What torch does not refuse, or refuses by a crash of its own: an error of some kind must come.
OURS_ALONE: dict[str, Callable[[torch.nn.Module, str], Any]] = {
    "packed, one feature more": lambda m, k: m(
        PackedSequence(x(T, I + 1), torch.ones(T, dtype=torch.int64))
    ),
    "batch_sizes for fewer rows": lambda m, k: m(packed([2, 1], 4)),
    "batch_sizes for more rows": lambda m, k: m(packed([2, 2], 3)),
    "batch_sizes that increase": lambda m, k: m(packed([1, 2])),
    "batch_sizes with a zero": lambda m, k: m(packed([2, 0])),
    "batch_sizes with a negative": lambda m, k: m(packed([4, -1], 3)),
    "batch_sizes of int32": lambda m, k: m(packed([2, 1], dtype=torch.int32)),
    "batch_sizes of float": lambda m, k: m(packed([2, 1], dtype=torch.float32)),
    "batch_sizes of rank 2": lambda m, k: m(PackedSequence(x(4, I), torch.ones(2, 2).long())),
    "batch_sizes that overflow": lambda m, k: m(packed([2**62, 2**62, 2**62, 2**62, 2], 2)),
    "more steps than memory": lambda m, k: m(x(1, 1, I).expand(2**58, B, I)),
    "more samples than memory": lambda m, k: m(x(1, 1, I).expand(1, 2**58, I)),
    "more rows than numbers": lambda m, k: m(x(1, 1, I).expand(2**40, 2**40, I)),
    "more packed rows than memory": lambda m, k: m(
        PackedSequence(x(1, I).expand(2**58, I), torch.tensor([2**58]))
    ),
    "more steps than memory, unbatched": lambda m, k: m(x(1, I).expand(2**60, I)),
    "no batch_sizes": lambda m, k: m(packed([], 0, dtype=torch.int64)),
    "sorted_indices beyond the batch": lambda m, k: m(
        PackedSequence(x(3, I), torch.tensor([2, 1]), torch.tensor([0, 7]), torch.tensor([0, 7])),
        states(k, 1, 2, H),
    ),
    "unsorted_indices beyond the batch": lambda m, k: m(
        PackedSequence(x(3, I), torch.tensor([2, 1]), torch.tensor([0, 1]), torch.tensor([0, 7]))
    ),
}


# torch.nn.LSTM passes these on to oneDNN, or to an operation inside, whose words are no contract.
WORDS_OF_A_BACKEND = {
    "hx of float64",
    "hx of float16",
    "hx of int64",
    "packed of rank 1",
    "packed, hx for one sample more",
    "packed, hx for one sample",
}


def outcome(call: Callable[[], Any], kinds: Any = ERRORS) -> Exception | None:
    try:
        call()
    except kinds as error:
        return error
    return None


def layer_of(library: Any, kind: str, **options: Any) -> Any:
    return getattr(library, kind)(I, H, **options)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYER_CALLS)
def test_layers_raise_what_torch_raises(name, kind, training):
    call = LAYER_CALLS[name]
    with torch.set_grad_enabled(training):
        ours, theirs = (
            outcome(lambda library=library: call(layer_of(library, kind), kind))
            for library in (fastcell, torch.nn)
        )
    assert theirs is not None, "torch accepts it: this test belongs elsewhere"
    assert type(ours) is type(theirs)
    if kind == "LSTM" and name in WORDS_OF_A_BACKEND:
        assert len(str(ours)) > 20
    else:
        assert str(ours).splitlines()[0] == str(theirs).splitlines()[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS_ALONE)
def test_layers_refuse_what_torch_lets_through(name, kind):
    error = outcome(lambda: OURS_ALONE[name](layer_of(fastcell, kind), kind))
    assert error is not None
    assert len(str(error)) > 10


@pytest.mark.parametrize("hx", [(), (1,), (1, 2, 3), 3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_hx_of_other_kinds(kind, hx):
    def given() -> Any:
        return tuple(x(1, B, H) for _ in hx) if isinstance(hx, tuple) else hx

    ours, theirs = (
        outcome(lambda library=library: layer_of(library, kind)(x(), given()))
        for library in (fastcell, torch.nn)
    )
    assert type(ours) is type(theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden_size": 0},
        {"hidden_size": -1},
        {"input_size": -1},
        {"num_layers": 0},
        {"num_layers": -2},
        {"hidden_size": 2**62},
        {"input_size": 2**62},
        {"hidden_size": 2**70},
        {"proj_size": -1},
        {"proj_size": H},
        {"dropout": -0.1},
        {"dropout": 1.5},
        {"dropout": "much"},
        {"hidden_size": 2.5},
        {"nonlinearity": "gelu"},
        {"device": "nowhere"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_constructors_raise_what_torch_raises(kind, arguments):
    given = {"input_size": I, "hidden_size": H} | arguments
    ours, theirs = (
        outcome(lambda library=library: getattr(library, kind)(**given))
        for library in (fastcell, torch.nn)
    )
    assert type(ours) is type(theirs)
    if theirs is not None:
        assert str(ours).splitlines()[0] == str(theirs).splitlines()[0]


# --- weights replaced in a layer ------------------------------------------------------------------


def other(layer: Any, name: str, value: Any) -> None:
    setattr(layer, name, value if value is None else torch.nn.Parameter(value))


WEIGHTS: dict[str, Callable[[Any], None]] = {
    "weight_ih of one row less": lambda m: other(m, "weight_ih_l0", m.weight_ih_l0.data[:-1]),
    "weight_ih of one column more": lambda m: other(
        m, "weight_ih_l0", x(m.weight_ih_l0.shape[0], I + 1)
    ),
    "weight_hh of one row less": lambda m: other(m, "weight_hh_l0", m.weight_hh_l0.data[1:]),
    "weight_hh of one column less": lambda m: other(m, "weight_hh_l0", m.weight_hh_l0.data[:, :-1]),
    "weight_hh of rank 1": lambda m: other(m, "weight_hh_l0", m.weight_hh_l0.data.flatten()),
    "weight_hh of the second layer empty": lambda m: other(m, "weight_hh_l1", x(0, 0)),
    "bias of one less": lambda m: other(m, "bias_hh_l1", m.bias_hh_l1.data[:-1]),
    "bias of rank 2": lambda m: other(m, "bias_hh_l1", m.bias_hh_l1.data[None]),
    "bias of float64": lambda m: other(m, "bias_hh_l1", m.bias_hh_l1.data.double()),
    "bias on meta": lambda m: other(m, "bias_hh_l1", m.bias_hh_l1.data.to("meta")),
    "weight is None": lambda m: other(m, "weight_hh_l0", None),
    "all of float64": lambda m: m.double(),
    "data of one row less": lambda m: setattr(m.weight_hh_l0, "data", m.weight_hh_l0.data[:-1]),
    "data of other shape": lambda m: setattr(
        m.weight_hh_l0, "data", m.weight_hh_l0.data[:, :-1].contiguous()
    ),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name, kind, called_before):
    """Whether or not the right ones are packed already."""
    layer = layer_of(fastcell, kind, num_layers=2)
    if called_before:
        layer(x())
    WEIGHTS[name](layer)
    error = outcome(lambda: layer(x()))
    assert error is not None
    assert len(str(error)) > 10


# --- functional and operators ---------------------------------------------------------------------


def call_of(cell: str) -> SimpleNamespace:
    """The arguments of a right call of torch.ops.fastcell.sequence, to be spoilt."""
    gates, count = {"lstm": 4, "gru": 3}.get(cell, 1), 2 if cell == "lstm" else 1
    weights = [torch.rand(gates * H, I), torch.rand(gates * H, H), *torch.rand(2, gates * H)]
    weights += [torch.rand(gates * H, H), torch.rand(gates * H, H), *torch.rand(2, gates * H)]
    return SimpleNamespace(
        input=torch.rand(T, B, I),
        hx=[torch.rand(2, B, H) for _ in range(count)],
        weights=weights,
        batch_sizes=None,
        masks=None,
        config=[cell, 2, False, True, False, "exact"],
    )


def pack_call(c: SimpleNamespace, sizes: Any) -> None:
    c.batch_sizes = sizes if isinstance(sizes, Tensor) else torch.tensor(sizes)
    c.input = torch.rand(T * B, I)


def spoil(**changes: Any) -> Callable[[SimpleNamespace], None]:
    def change(c: SimpleNamespace) -> None:
        for name, value in changes.items():
            setattr(c, name, value(c) if callable(value) else value)

    return change


def weight(index: int, value: Callable[[Tensor], Tensor]) -> Callable[[SimpleNamespace], None]:
    def change(c: SimpleNamespace) -> None:
        c.weights[index] = value(c.weights[index])

    return change


CALLS: dict[str, Callable[[SimpleNamespace], None]] = {
    "input of rank 1": spoil(input=x(I)),
    "input of rank 2": spoil(input=x(T, I)),
    "input of rank 4": spoil(input=x(1, T, B, I)),
    "input of one feature less": spoil(input=x(T, B, I - 1)),
    "input of one feature more": spoil(input=x(T, B, I + 1)),
    "input of no step": spoil(input=x(0, B, I)),
    "input of float64": spoil(input=x(dtype=torch.float64)),
    "input of int64": spoil(input=x(dtype=torch.int64)),
    "input on meta": spoil(input=x(device="meta")),
    "hx of one sample less": spoil(hx=lambda c: [h[:, 1:] for h in c.hx]),
    "hx of one sample more": spoil(hx=lambda c: [x(2, B + 1, H) for h in c.hx]),
    "hx of one unit less": spoil(hx=lambda c: [h[..., 1:] for h in c.hx]),
    "hx of one layer": spoil(hx=lambda c: [h[1:] for h in c.hx]),
    "hx of rank 2": spoil(hx=lambda c: [h[0] for h in c.hx]),
    "hx of float64": spoil(hx=lambda c: [h.double() for h in c.hx]),
    "hx on meta": spoil(hx=lambda c: [h.to("meta") for h in c.hx]),
    "a state too many": spoil(hx=lambda c: [*c.hx, c.hx[0]]),
    "no weights": spoil(weights=[]),
    "a weight less": spoil(weights=lambda c: c.weights[:-1]),
    "a weight more": spoil(weights=lambda c: [*c.weights, c.weights[0]]),
    "half of the weights": spoil(weights=lambda c: c.weights[:4]),
    "weight_ih of one row less": weight(0, lambda w: w[1:]),
    "weight_hh of one row less": weight(1, lambda w: w[1:]),
    "weight_hh of one column less": weight(5, lambda w: w[:, 1:]),
    "weight_hh of rank 3": weight(1, lambda w: w[None]),
    "weight_ih of rank 1": weight(0, lambda w: w[0]),
    "weight_ih of rank 0": weight(0, lambda w: w[0, 0]),
    "weight_ih empty": weight(0, lambda w: w[:0]),
    "bias of one less": weight(7, lambda w: w[1:]),
    "bias empty": weight(2, lambda w: w[:0]),
    "bias of float64": weight(2, lambda w: w.double()),
    "bias on meta": weight(2, lambda w: w.to("meta")),
    "unknown cell": spoil(config=["lru", 2, False, True, False, "exact"]),
    "no layers": lambda c: c.config.__setitem__(1, 0),
    "layers negative": lambda c: c.config.__setitem__(1, -2),
    "layers overflow": lambda c: c.config.__setitem__(1, 2**62),
    "bidirectional, weights not": lambda c: c.config.__setitem__(2, True),
    "no bias, weights with": lambda c: c.config.__setitem__(3, False),
    "batch_first, states not": lambda c: c.config.__setitem__(4, True),
    "packed input of rank 3": spoil(batch_sizes=torch.tensor([B] * T)),
    "batch_sizes for fewer rows": lambda c: pack_call(c, [B, B, B - 1]),
    "batch_sizes for more rows": lambda c: pack_call(c, [B, B, B, B]),
    "batch_sizes that increase": lambda c: pack_call(c, [2, 1, 3]),
    "batch_sizes that end in zero": lambda c: pack_call(c, [2, 2, 2, 0]),
    "batch_sizes negative": lambda c: pack_call(c, [2, 2, 4, -2]),
    "batch_sizes of int32": lambda c: pack_call(c, torch.tensor([2, 2, 2], dtype=torch.int32)),
    "batch_sizes of float": lambda c: pack_call(c, torch.tensor([2.0, 2.0, 2.0])),
    "batch_sizes of rank 2": lambda c: pack_call(c, torch.tensor([[2, 2, 2]])),
    "batch_sizes of rank 0": lambda c: pack_call(c, torch.tensor(6)),
    "batch_sizes empty": lambda c: pack_call(c, torch.empty(0, dtype=torch.int64)),
    "batch_sizes on meta": lambda c: pack_call(c, torch.tensor([2, 2, 2]).to("meta")),
    "batch_sizes for another batch than hx": lambda c: pack_call(c, [3, 2, 1]),
    "batch_sizes that overflow": lambda c: pack_call(c, [2**62, 2**62, 2**62, 2**62, 6]),
    "masks for a layer more": spoil(masks=x(2, T, B, H)),
    "masks of one unit less": spoil(masks=x(1, T, B, H - 1)),
    "masks of one step less": spoil(masks=x(1, T - 1, B, H)),
    "masks of float64": spoil(masks=x(1, T, B, H, dtype=torch.float64)),
    "masks of rank 1": spoil(masks=x(1)),
}


def sequence(c: SimpleNamespace) -> Any:
    return torch.ops.fastcell.sequence(
        c.input, c.hx, c.weights, c.batch_sizes, c.masks, None, None, None, *c.config
    )


def sequence_with_gradient(c: SimpleNamespace) -> Any:
    c.weights = [w.clone().requires_grad_(w.is_floating_point()) for w in c.weights]
    output, _ = sequence(c)
    return output.sum().backward()


def sequence_forward(c: SimpleNamespace) -> Any:
    return torch.ops.fastcell.sequence_forward(
        c.input, c.hx, c.weights, c.batch_sizes, c.masks, None, None, None, *c.config, True
    )


def sequence_backward(c: SimpleNamespace) -> Any:
    """The backward call with what the right forward call left."""
    right = call_of("lstm" if len(c.hx) > 1 else "gru")
    output, finals, reserve = sequence_forward(right)
    return torch.ops.fastcell.sequence_backward(
        output, finals, c.input, c.hx, c.weights, c.batch_sizes, c.masks, None, None, None, reserve,
        *c.config, [True] * (1 + len(c.hx) + len(c.weights)),
    )  # fmt: skip


def functional(c: SimpleNamespace) -> Any:
    cell, layers, bidirectional, bias, batch_first, _ = c.config
    if c.masks is not None:
        raise ValueError("not an argument")
    hx: Any = tuple(c.hx) if cell == "lstm" else c.hx[0]
    if cell != "lstm" and len(c.hx) > 1:
        raise ValueError("not an argument")
    return getattr(fastcell.functional, cell)(
        c.input, hx, c.weights, num_layers=layers, bidirectional=bidirectional, bias=bias,
        batch_first=batch_first, batch_sizes=c.batch_sizes,
    )  # fmt: skip


# What a right forward call leaves, spoilt: (gradients, reserve, needs).
BACKWARD: dict[str, Callable[[SimpleNamespace], None]] = {
    "grad_output of one step less": spoil(grad_output=lambda c: c.grad_output[1:]),
    "grad_output of one unit less": spoil(grad_output=lambda c: c.grad_output[..., 1:]),
    "grad_output of rank 1": spoil(grad_output=lambda c: c.grad_output.flatten()),
    "grad_output of float64": spoil(grad_output=lambda c: c.grad_output.double()),
    "grad_states of one sample less": spoil(
        grad_states=lambda c: [g[:, 1:] for g in c.grad_states]
    ),
    "a grad_state less": spoil(grad_states=lambda c: c.grad_states[1:]),
    "a grad_state more": spoil(grad_states=lambda c: [*c.grad_states, c.grad_states[0]]),
    "reserve of one less": spoil(reserve=lambda c: c.reserve[1:]),
    "reserve empty": spoil(reserve=lambda c: c.reserve[:0]),
    "reserve of stride 0": spoil(reserve=lambda c: c.reserve[:1].expand(c.reserve.shape)),
    "reserve of float64": spoil(reserve=lambda c: c.reserve.double()),
    "needs of one less": spoil(needs=lambda c: c.needs[1:]),
    "needs of one more": spoil(needs=lambda c: [*c.needs, True]),
    "no needs": spoil(needs=[]),
}


def backward_alone(c: SimpleNamespace) -> Any:
    return torch.ops.fastcell.sequence_backward(
        c.grad_output, c.grad_states, c.input, c.hx, c.weights, None, *NO_EXTRAS, c.reserve,
        *c.config, c.needs,
    )  # fmt: skip


def right_backward(cell: str) -> SimpleNamespace:
    c = call_of(cell)
    c.grad_output, c.grad_states, c.reserve = sequence_forward(c)
    c.needs = [True] * (1 + len(c.hx) + len(c.weights))
    return c


FORWARDS = [sequence, sequence_with_gradient, sequence_forward, sequence_backward, functional]


def wrong_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every wrong call with its name; the right one that it was made from runs first."""
    for run in FORWARDS:
        for cell in ("lstm", "gru"):
            run(call_of(cell))
            for name, change in CALLS.items():
                c = call_of(cell)
                change(c)
                yield f"{run.__name__}|{cell}|{name}", lambda run=run, c=c: run(c)  # type: ignore
    for cell in ("lstm", "gru"):
        backward_alone(right_backward(cell))
        for name, change in BACKWARD.items():
            c = right_backward(cell)
            change(c)
            yield f"sequence_backward|{cell}|{name}", lambda c=c: backward_alone(c)  # type: ignore


def report() -> None:
    """Run the wrong calls and print what came of each: its error, nothing, or a crash.

    They run in a fork of this process; where one ends it, the next ones run in another.
    """
    calls = list(wrong_calls())
    while calls:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(write, "w") as pipe:
                for name, call in calls:
                    error = outcome(call, Exception)
                    text = "" if error is None else f"{type(error).__name__}: {error}"
                    print(f"{name}|{text}".splitlines()[0], file=pipe, flush=True)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            lines = pipe.read().splitlines()
        print(*lines, sep="\n")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            print(f"{calls[len(lines)][0]}|CRASH {status}")
        calls = calls[len(lines) + 1 :]


@pytest.fixture(scope="module")
def reported() -> dict[str, str]:
    """What the child printed, by call."""
    done = python("import test_bad_input; test_bad_input.report()", OMP_NUM_THREADS="1")
    return dict(line.rsplit("|", 1) for line in done.stdout.splitlines() if "|" in line)


WRONG = [
    f"{run.__name__}|{cell}|{name}"
    for run in FORWARDS
    for cell in ("lstm", "gru")
    for name in CALLS
]
WRONG += [f"sequence_backward|{cell}|{name}" for cell in ("lstm", "gru") for name in BACKWARD]
# Python's own words, of a line that took a wrong argument for a right one.
UNCLEAR = ("zip() argument", "to unpack", "list index", "division", "KeyError", "unpacking long")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("call", WRONG)
def test_functions_and_operators_refuse(call, reported):
    found = reported[call]
    assert not found.startswith("CRASH"), found
    if found == "" and "meta" in call:
        return  # torch sees a call for shapes alone, and that is what it gives
    assert len(found) > 25, "no error, or one that says nothing"
    assert not any(words in found for words in UNCLEAR), found


@pytest.mark.parametrize(
    "arguments",
    [
        ("lru", "float32", "exact", 2, 3, 0, 1, 1, True),
        ("gru", "float16", "exact", 2, 3, 0, 1, 1, True),
        ("gru", "float32", "int4", 2, 3, 0, 1, 1, True),
        ("gru", "float64", "int8", 2, 3, 0, 1, 1, True),
        ("gru", "float32", "exact", -1, 3, 0, 1, 1, True),
        ("gru", "float32", "exact", 2, 0, 0, 1, 1, True),
        ("gru", "float32", "exact", 2, -3, 0, 1, 1, True),
        ("gru", "float32", "exact", 2, 3, 0, 0, 1, True),
        ("gru", "float32", "exact", 2, 3, 0, 1, 3, True),
        ("gru", "float32", "exact", 2, 3, 0, 1, 0, True),
        ("gru", "float32", "exact", 2**70, 3, 0, 1, 1, True),
    ],
)
def test_a_stack_refuses_sizes_that_cannot_be(arguments):
    with pytest.raises((ValueError, TypeError)):
        _core.Stack(*arguments)
