"""One call over trees: the path it takes, its derivatives, and its operators.

As for sequences (``fastcell.ops``): plain tensors go straight to the kernels, where torch must see
one operator they run behind ``fastcell::tree``, and what no kernel serves runs in torch operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function

from .. import ops, transforms
from ..autocast import without_autocast
from ..double_backward import _gradients, _own
from ..engines import why_no_kernels
from ..operators import DEVICES, is_plain
from . import composite, cpu, cuda
from .cells import SPECS, Config
from .checks import check_dtypes, check_operands
from .forest import Forest, Schedule, Trees

# As fastcell.engines; a meta tensor has the CPU's sizes.
ENGINES: dict[str, Any] = {"cpu": cpu, "meta": cpu, "cuda": cuda}
_NARROW = (torch.bfloat16, torch.float16)
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def tree(
    config: Config, input: Tensor, weights: Sequence[Tensor], trees: Trees
) -> tuple[Tensor, ...]:
    """The states of all nodes, each (nodes, H); the arguments are taken as checked."""
    result_dtype = None
    if torch._C._is_any_autocast_enabled():
        like = SPECS[config.cell].like
        input, _, weights, result_dtype = ops._autocast(like, input, None, weights, False)
    path = route(input, weights)
    if input.dtype in _NARROW:
        result_dtype = result_dtype or input.dtype
        input, weights = input.float(), [w.float() for w in weights]
    states: Sequence[Tensor]
    if path == "kernel":
        states = _differentiable(config, input, weights, trees.forest)
    elif path == "composite":
        states = composite.run(config, trees.forest.schedule, input, weights)
    else:
        states = torch.ops.fastcell.tree(
            input, list(weights), trees.parents, trees.positions, *config
        )
    return tuple(states if result_dtype is None else [s.to(result_dtype) for s in states])


def route(input: Tensor, weights: Sequence[Tensor]) -> str:
    """``"kernel"``, ``"operator"`` or ``"composite"``; warns once of what has no kernels."""
    missing = no_kernels_for(input.device)
    if missing:
        return ops._without_kernel(missing)
    if not torch.compiler.is_compiling() and transforms.transformed():
        return "composite"
    return ops.route(input, weights)


def no_kernels_for(device: torch.device) -> str:
    """What has no kernels for trees where tensors are on this device; nothing where there are."""
    return why_no_kernels(device)


def _engine_of(input: Tensor) -> Any:
    return ENGINES[input.device.type]


def _differentiable(
    config: Config, input: Tensor, weights: Sequence[Tensor], forest: Forest
) -> Sequence[Tensor]:
    """The kernels' states, with the graph for their derivatives where one is wanted."""
    if torch.is_grad_enabled() and any([t.requires_grad for t in (input, *weights)]):
        found: Sequence[Tensor] = TreeFunction.apply(  # type: ignore[no-untyped-call]
            config, forest, forest.schedule.parents, forest.schedule.positions, input, *weights
        )
        return found
    states: Sequence[Tensor] = _engine_of(input).forward(config, forest, input, weights, False)[0]
    return states


class TreeFunction(Function):
    """(input, *weights) -> states of all nodes.

    ``forest`` may be None: then it is made of ``parents`` and ``positions``, behind an operator.
    """

    @staticmethod
    def forward(
        ctx: Any,
        config: Config,
        forest: Forest | None,
        parents: Tensor,
        positions: Tensor,
        input: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        if forest is None:
            states, kept = torch.ops.fastcell.tree_forward(
                input, list(weights), parents, positions, *config, True
            )
        else:
            states, kept = _engine_of(input).forward(config, forest, input, weights, True)
        ctx.config, ctx.forest = config, forest
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(parents, positions, kept, *states, input, *weights)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        parents, positions, kept, *tensors = ctx.saved_tensors
        config, forest, needs = ctx.config, ctx.forest, ctx.needs_input_grad[4:]
        count = SPECS[config.cell].states
        states, input, weights = tensors[:count], tensors[count], tensors[count + 1 :]
        batched = any([g is not None and _is_legacy_batched(g) for g in grads])
        if torch.is_grad_enabled() or transforms.transformed() or batched:
            schedule = (forest or Forest(parents, positions)).schedule
            found = _composite_backward(config, schedule, grads, input, weights, needs)
        elif forest is None:
            some = iter(
                torch.ops.fastcell.tree_backward(
                    list(grads), input, weights, parents, positions, states, kept, *config,
                    list(needs),
                )
            )  # fmt: skip
            found = [next(some) if need else None for need in needs]
        else:
            found = _engine_of(input).backward(
                config, forest, grads, input, weights, states, kept, needs
            )
        return None, None, None, None, *found


def _composite_backward(
    config: Config,
    schedule: Schedule,
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of [input, *weights] in operations that can be differentiated again."""
    with torch.enable_grad(), without_autocast(input):
        own = [_own(t) for t in (input, *weights)]
        states = composite.run(config, schedule, own[0], own[1:])
        asked = [t for t, need in zip(own, needs, strict=True) if need]
    some = iter(_gradients(states, asked, grads, torch.is_grad_enabled()))
    return [next(some) if need else None for need in needs]


# --- the operators --------------------------------------------------------------------------------

_OPERANDS = "Tensor input, Tensor[] weights, Tensor parents, Tensor positions"
_CONFIG = "str cell, int arity, bool bias"

_library = torch.library.Library("fastcell", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"tree({_OPERANDS}, {_CONFIG}) -> Tensor[]")  # type: ignore[no-untyped-call]


def _tree(
    input: Tensor, weights: Sequence[Tensor], parents: Tensor, positions: Tensor, *config: Any
) -> list[Tensor]:
    """``fastcell::tree``: the states of all nodes.

    ``parents``: rows of the batch, -1 at roots. Implicitly composite, as ``fastcell::sequence``.
    """
    checked = Config(*config)
    forest = None
    if is_plain(input):
        forest = _checked(checked, input, weights, parents, positions)
    if transforms.transformed():
        forest = forest or Forest(parents, positions)
        return list(composite.run(checked, forest.schedule, input, weights))
    if forest is not None:
        return list(_differentiable(checked, input, weights, forest))
    return list(
        TreeFunction.apply(  # type: ignore[no-untyped-call]
            checked, None, parents, positions, input, *weights
        )
    )


# Dynamo would look into it after a graph break.
_library.impl(  # type: ignore[no-untyped-call]
    "tree", _disable_dynamo(_tree), "CompositeImplicitAutograd"
)


def _checked(
    config: Config, input: Tensor, weights: Sequence[Tensor], parents: Tensor, positions: Tensor
) -> Forest:
    """The trees, after checks of all that the kernels will read: programs can give anything.

    Raises RuntimeError or ValueError.
    """
    if config.cell not in SPECS or config.arity < 0:
        raise ValueError(
            f"cell must be one of {', '.join(SPECS)} and arity 0 or more, got {config.cell!r} and "
            f"{config.arity}"
        )
    if input.dtype not in (torch.float32, torch.float64) or input.device.type not in DEVICES:
        raise RuntimeError(
            f"fastcell's kernels for trees take float32 or float64 on {' or '.join(DEVICES)}, got "
            f"{input.dtype} on {input.device}"
        )
    nodes = parents.numel()
    check_operands(config, input, weights, nodes)
    check_dtypes(input, weights)
    for name, t in (("parents", parents), ("positions", positions)):
        if t.dtype is not torch.int64 or t.shape != (nodes,) or not t.is_cpu:
            raise RuntimeError(
                f"{name} must be int64 of shape ({nodes},) on cpu, got {t.dtype} of shape "
                f"{tuple(t.shape)} on {t.device}"
            )
    if nodes and not (parents.min() >= -1 and parents.max() < nodes and positions.min() >= 0):
        raise RuntimeError(f"parents must be -1 to {nodes - 1}, and positions 0 or more")
    forest = Forest(parents, positions)
    if config.arity and forest.most_position >= config.arity:
        raise RuntimeError(
            f"positions must be below the arity {config.arity}, got {forest.most_position}"
        )
    return forest


@torch.library.custom_op(
    "fastcell::tree_forward",
    mutates_args=(),
    device_types=DEVICES,
    schema=f"({_OPERANDS}, {_CONFIG}, bool keep) -> (Tensor[], Tensor)",
)
def _tree_forward(
    input: Tensor,
    weights: Sequence[Tensor],
    parents: Tensor,
    positions: Tensor,
    cell: str,
    arity: int,
    bias: bool,
    keep: bool,
) -> tuple[list[Tensor], Tensor]:
    config = Config(cell, arity, bias)
    forest = _checked(config, input, weights, parents, positions)
    states, kept = _engine_of(input).forward(config, forest, input, weights, keep)
    return states, input.new_empty(0) if kept is None else kept


@_tree_forward.register_fake
def _(
    input: Tensor,
    weights: Sequence[Tensor],
    parents: Tensor,
    positions: Tensor,
    cell: str,
    arity: int,
    bias: bool,
    keep: bool,
) -> tuple[list[Tensor], Tensor]:
    config = Config(cell, arity, bias)
    nodes, hidden = input.shape[0], int(weights[1].shape[1]) // config.positions
    states = [input.new_empty((nodes, hidden)) for _ in range(SPECS[cell].states)]
    each = _engine_of(input).kept_elements(config, input.dtype, int(input.shape[1]), hidden)
    return states, input.new_empty(nodes * each if keep else 0)


@torch.library.custom_op(
    "fastcell::tree_backward",
    mutates_args=(),
    device_types=DEVICES,
    schema=(
        f"(Tensor?[] grads, {_OPERANDS}, Tensor[] states, Tensor kept, {_CONFIG}, bool[] needs)"
        " -> Tensor[]"
    ),
)
def _tree_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    weights: Sequence[Tensor],
    parents: Tensor,
    positions: Tensor,
    states: Sequence[Tensor],
    kept: Tensor,
    cell: str,
    arity: int,
    bias: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    config = Config(cell, arity, bias)
    forest = _checked(config, input, weights, parents, positions)
    engine = _engine_of(input)
    hidden = weights[1].shape[1] // config.positions
    count = SPECS[cell].states
    each = engine.kept_elements(config, input.dtype, input.shape[1], hidden)
    expected = (input.shape[0], hidden)
    alike = [*states, *[g for g in grads if g is not None]]
    if (
        len(states) != count
        or len(grads) != count
        or len(needs) != 1 + len(weights)
        or any(
            [
                t.shape != expected or t.dtype is not input.dtype or t.device != input.device
                for t in alike
            ]
        )
        or not all([s.is_contiguous() for s in states])
        or kept.shape != (input.shape[0] * each,)
        or kept.dtype is not input.dtype
        or kept.device != input.device
        or not kept.is_contiguous()
    ):
        raise RuntimeError(
            f"the backward call takes {count} states and gradients of shape {expected}, what the "
            f"forward call kept ({input.shape[0] * each} elements), all of {input.dtype}, and one "
            f"entry of needs for each of {1 + len(weights)} tensors"
        )
    found = engine.backward(config, forest, grads, input, weights, states, kept, needs)
    return [g for g in found if g is not None]


@_tree_backward.register_fake
def _(
    grads: Sequence[Tensor | None], input: Tensor, weights: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return [
        t.new_empty(t.shape) for t, need in zip((input, *weights), rest[-1], strict=True) if need
    ]
