"""What the contract tests share: one module in fastcell's and in torch.nn's form, and comparing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastcell
from tolerances import accumulation_length, assert_close

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The module of fastcell and that of torch.nn, with the same numbers in their parameters."""
    torch.manual_seed(0)
    ours = getattr(fastcell, name)(*args, **kwargs)
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def has_two_states(name: str) -> bool:
    return name.startswith("LSTM")


def states(name: str, *shape: int, **kwargs: Any) -> Any:
    """Initial states as the module takes them, each of ``shape``."""
    if has_two_states(name):
        return torch.randn(shape, **kwargs), torch.randn(shape, **kwargs)
    return torch.randn(shape, **kwargs)


def tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in an output, a PackedSequence's data among them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value or () for t in tensors(part)]


def same_values(actual: Any, expected: Any, steps: int = 16, length: int = 64) -> None:
    """Equal structure, and equal values but for rounding."""
    assert type(actual) is type(expected)
    if isinstance(expected, PackedSequence):
        for mine, other in zip(actual[1:], expected[1:], strict=True):
            assert (mine is None and other is None) or torch.equal(mine, other)
    for mine, other in zip(tensors(actual), tensors(expected), strict=True):
        assert mine.dtype is other.dtype
        assert_close(mine, other, dtype=other.dtype, steps=steps, length=length)


def gradients(module: torch.nn.Module, call: Callable[[Any], Any]) -> dict[str, Tensor | None]:
    """The parameters' gradients of a sum over everything that ``call(module)`` returns."""
    module.zero_grad(set_to_none=True)
    sum((i + 1) * t.sum() for i, t in enumerate(tensors(call(module)))).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def same_gradients(ours: Any, theirs: Any, call: Callable[[Any], Any]) -> None:
    expected = gradients(theirs, call)
    actual = gradients(ours, call)
    assert list(actual) == list(expected)
    assert any(grad is not None for grad in expected.values())
    for name, grad in expected.items():
        if grad is None:
            assert actual[name] is None, name
        else:
            length = accumulation_length(16, 16, gates=4, batch=8)
            assert_close(actual[name], grad, dtype=grad.dtype, steps=16, length=length, name=name)


def raised(call: Callable[[Any], Any], library: Any) -> BaseException:
    """What ``call(library)`` raises; an AssertionError of this test if it raises nothing."""
    try:
        call(library)
    except Exception as error:
        return error
    raise AssertionError(f"{library.__name__} raised nothing")


def same_error(call: Callable[[Any], Any]) -> None:
    """``call(fastcell)`` and ``call(torch.nn)`` raise the same type with the same text."""
    theirs, ours = raised(call, torch.nn), raised(call, fastcell)
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))


def same_error_type(call: Callable[[Any], Any]) -> None:
    """The same type; for errors whose text in torch comes from inside a matrix product."""
    theirs, ours = raised(call, torch.nn), raised(call, fastcell)
    assert type(ours) is type(theirs), f"{ours!r}, torch: {theirs!r}"
