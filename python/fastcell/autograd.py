"""The derivative rules: the forward call, its backward call, and the derivative of that.

``RecurrentStack`` serves direct calls of the kernels and the operators under torch.compile,
``MappableStack`` those inside of torch.func; they share the backward call and its derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import operators, transforms, vmap
from .cells import spec_of
from .double_backward import composite_backward, double_backward
from .plan import Config, Extras

_EXTRAS = len(Extras._fields)
_transforms_active = torch._C._are_functorch_transforms_active
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def differentiable(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The stack's output and final states, with the graph for their derivatives."""
    hx = hx or ()
    arguments = (config, len(hx), batch_sizes, *extras, input, *hx, *weights)
    if _transforms_active():
        output, *states, _ = MappableStack.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        # The Python part of Function.apply serves torch.func alone, and takes longer than a small
        # step does.
        apply = super(Function, RecurrentStack).apply
        output, *states = apply(*arguments)  # type: ignore[no-untyped-call]
    return output, states


class RecurrentStack(Function):
    """(input, *hx, *weights) -> (output, *final states)."""

    @staticmethod
    def forward(
        ctx: Any,
        config: Config,
        state_count: int,
        batch_sizes: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        extras, input, hx, weights = _arguments(state_count, tensors)
        output, states, reserve = operators.forward(
            config, input, hx, weights, batch_sizes, extras, True
        )
        ctx.config, ctx.state_count = config, state_count
        ctx.set_materialize_grads(False)
        # Not the output: the caller may change it in place.
        ctx.save_for_backward(batch_sizes, None, reserve, *tensors)
        return output, *states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward(ctx, grads)


class MappableStack(Function):
    """The same for torch.func: (input, *hx, *weights) -> (output, *final states, reserve).

    There, what backward needs must be an output, and ``apply`` costs much more.
    """

    @staticmethod
    def forward(
        config: Config,
        state_count: int,
        batch_sizes: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        extras, input, hx, weights = _arguments(state_count, tensors)
        output, states, reserve = operators.forward(
            config, input, hx, weights, batch_sizes, extras, True
        )
        return output, *states, reserve

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.config, ctx.state_count, batch_sizes, *tensors = inputs
        reserve = output[-1]
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)
        # The output tells the rule of vmap whether a whole batch was kept as one.
        ctx.save_for_backward(batch_sizes, output[0], reserve, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward(ctx, grads[:-1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return vmap.forward(MappableStack.apply, info.batch_size, in_dims, *args)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    """The gradients for the arguments of ``apply``; ``grads``: of output and final states."""
    batch_sizes, output, reserve, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[3 + _EXTRAS :]
    extras, input, hx, weights = _arguments(ctx.state_count, tensors)
    found = gradients_of(
        ctx.config, grads, input, hx, weights, batch_sizes, extras, output, reserve, needs
    )
    return *(None,) * (3 + _EXTRAS), *found


def gradients_of(
    config: Config,
    grads: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
    output: Tensor | None,
    reserve: Tensor,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradients of [input, *hx, *weights] that are needed, with a graph where one is wanted.

    ``grads``: of output and final states; ``output`` and ``reserve``: what the forward call left
    (the output for the rule of vmap alone).
    """
    if transforms.forward_mode() or any([g is not None and _is_legacy_batched(g) for g in grads]):
        # Without rules: forward mode of what ran before in reverse, and the old vmap of
        # torch.autograd.grad(is_grads_batched=True).
        return composite_backward(config, grads, input, hx, weights, batch_sizes, extras, needs)
    if torch.is_grad_enabled() or _transforms_active():
        tensors = (*grads, input, *(hx or ()), *weights)
        some = iter(
            RecurrentStackGradient.apply(  # type: ignore[no-untyped-call]
                config, len(hx or ()), needs, batch_sizes, *extras, output, reserve, *tensors
            )
        )
        return [next(some) if need else None for need in needs]
    return operators.backward(
        config, grads[0], grads[1:], input, hx, weights, batch_sizes, extras, reserve, needs
    )


class RecurrentStackGradient(Function):
    """(*gradients of output and final states, input, *hx, *weights) -> the gradients needed."""

    @staticmethod
    def forward(
        config: Config,
        state_count: int,
        needs: Sequence[bool],
        batch_sizes: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        extras, (_, reserve, *rest) = Extras(*tensors[:_EXTRAS]), tensors[_EXTRAS:]
        (grad_output, *grad_states), input, hx, weights = _split(config, state_count, rest)
        found = operators.backward(
            config,
            grad_output,
            grad_states,
            input,
            hx,
            weights,
            batch_sizes,
            extras,
            reserve,
            needs,
        )
        return tuple([grad for grad in found if grad is not None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # The derivative recomputes what it needs: output and reserve are not saved.
        ctx.config, ctx.state_count, ctx.needs, batch_sizes, *tensors = inputs
        extras, (_, _, *tensors) = tensors[:_EXTRAS], tensors[_EXTRAS:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, *extras, *tensors)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        batch_sizes, *tensors = ctx.saved_tensors
        extras, tensors = Extras(*tensors[:_EXTRAS]), tensors[_EXTRAS:]
        grads, input, hx, weights = _split(ctx.config, ctx.state_count, tensors)
        found = double_backward(
            ctx.config, grads, input, hx, weights, batch_sizes, extras, ctx.needs, grad_grads,
            ctx.needs_input_grad[6 + _EXTRAS :],
        )  # fmt: skip
        return *(None,) * (6 + _EXTRAS), *found

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return vmap.backward(
            RecurrentStackGradient.apply, MappableStack.apply, info.batch_size, in_dims, *args
        )


def _arguments(state_count: int, tensors: Sequence[Any]) -> tuple[Extras, Any, Any, Any]:
    """(*extras, input, *hx, *weights) -> (extras, input, hx or None, weights)."""
    at = _EXTRAS + 1 + state_count
    hx = tensors[_EXTRAS + 1 : at] or None
    return Extras(*tensors[:_EXTRAS]), tensors[_EXTRAS], hx, tensors[at:]


def _split(config: Config, state_count: int, tensors: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """(*gradients, input, *hx, *weights) -> (gradients, input, hx or None, weights)."""
    at = 1 + spec_of(config.cell).states
    states = at + 1 + state_count
    return tensors[:at], tensors[at], tensors[at + 1 : states] or None, tensors[states:]
