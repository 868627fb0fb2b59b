"""Derivatives of the backward call, by running the stack again in differentiable operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import composite
from .autocast import without_autocast
from .plan import Config, Extras


def double_backward(
    config: Config,
    grad_outputs: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    needs: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients for [*grad_outputs, input, *hx, *weights], where ``wanted`` says so.

    The backward call maps these tensors to the gradients of [input, *hx, *weights] that ``needs``
    picks; ``grad_grads`` are the incoming gradients of those, in the same order. The result is
    itself differentiable where grad mode is on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(input):
        primals = [_own(t) for t in (input, *(hx or ()), *weights)]
        outer = [None if g is None else _own(g) for g in grad_outputs]
        asked = [p for p, need in zip(primals, needs, strict=True) if need]
        firsts = _gradients(
            _outputs(config, primals, hx, batch_sizes, extras), asked, outer, create_graph=True
        )
        targets = [*outer, *primals]
        chosen = [t if w else None for t, w in zip(targets, wanted, strict=True)]
        found = iter(
            _gradients(firsts, [t for t in chosen if t is not None], grad_grads, create_graph)
        )
    return [None if t is None else next(found) for t in chosen]


def composite_backward(
    config: Config,
    grad_outputs: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The backward call itself in the same way: gradients of [input, *hx, *weights]."""
    primals = (input, *(hx or ()), *weights)

    def outputs_of(*primals: Tensor) -> Sequence[Tensor]:
        return _outputs(config, primals, hx, batch_sizes, extras)

    return gradients_with_graph(outputs_of, primals, grad_outputs, needs)


def gradients_with_graph(
    outputs_of: Callable[..., Sequence[Tensor]],
    primals: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``primals``, where ``needs`` says so, as differentiable operations.

    ``outputs_of(*primals)`` is computed once more, under torch.func's transforms too.
    """
    present = [p for p in primals if p is not None]

    def outputs_of_present(*some: Tensor) -> tuple[Tensor, ...]:
        values = iter(some)
        return tuple(outputs_of(*[None if p is None else next(values) for p in primals]))

    with without_autocast(present[0]):
        if torch._C._are_functorch_transforms_active():
            outputs, pull = torch.func.vjp(outputs_of_present, *present)[:2]
            cotangents = [
                torch.zeros_like(o) if g is None else g.to(o.dtype)
                for o, g in zip(outputs, grad_outputs, strict=True)
            ]
            pulled = iter(pull(tuple(cotangents)))
            every = [None if p is None else next(pulled) for p in primals]
            return [g if need else None for g, need in zip(every, needs, strict=True)]
        with torch.enable_grad():
            own = [None if p is None else _own(p) for p in primals]
            outputs = tuple(outputs_of(*own))
        asked = [p for p, need in zip(own, needs, strict=True) if need and p is not None]
        found = iter(_gradients(outputs, asked, grad_outputs, torch.is_grad_enabled()))
    return [
        next(found) if need and p is not None else None for p, need in zip(own, needs, strict=True)
    ]


def _own(t: Tensor) -> Tensor:
    """A view of its own, which needs a gradient.

    A tensor that was made from another one (a state from the input, a tied weight) must not draw
    the other's gradient to itself.
    """
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _outputs(
    config: Config,
    primals: Sequence[Tensor],
    hx: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    extras: Extras,
) -> list[Tensor]:
    count = 1 + len(hx or ())
    output, states = composite.sequence(
        config, primals[0], primals[1:count] or None, primals[count:], batch_sizes, extras
    )
    return [output, *states]


def _gradients(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """torch.autograd.grad over those outputs that there are and that have an incoming gradient."""
    pairs = [
        (o, g.to(o.dtype))  # (kernels keep an LSTM's c wider than 16 bits)
        for o, g in zip(outputs, grad_outputs, strict=True)
        if o is not None and o.requires_grad and g is not None
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [g for _, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )
