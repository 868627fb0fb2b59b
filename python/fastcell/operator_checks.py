"""What the operators check before a kernel runs: programs can call them with anything.

Layers and ``functional`` check with torch's words before; this is for direct calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .cells import delay_of
from .engines import engine_of
from .plan import Config, Extras, plan_for, state_shapes


def _extent(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[int, int, int]:
    """(steps, batch, rows)."""
    if batch_sizes is None or x.dim() == 3:
        steps, batch, _ = x.shape
        if batch_first:
            steps, batch = batch, steps
        return steps, batch, steps * batch
    return batch_sizes.shape[0], int(batch_sizes[0]), x.shape[0]


def check(
    config: Config,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
) -> None:
    """Refuse what the kernels, which read raw memory, must not see.

    Layers and ``functional`` check with torch's words before; this is for direct calls of the
    operators. Raises RuntimeError, or ValueError for a wrong number of weights.
    """
    if config.products == "exact":
        _check_alike(x, weights, "weight")
    else:
        check_stored_small(config.products, weights)
    _check_alike(x, hx, "initial state")
    narrow = x.dtype in (torch.bfloat16, torch.float16)  # whose factors may be float32
    masks = [f for f in extras[:2] if f is not None]
    _check_alike(
        x, [f for f in masks if not narrow or f.dtype is not torch.float32], "dropout mask"
    )
    for mask in masks:
        if mask.device != x.device:
            raise RuntimeError(f"dropout masks must be on {x.device}, got {mask.device}")
    packed = batch_sizes is not None
    if batch_sizes is not None and x.dim() == 3:
        _check_lengths(x, batch_sizes, config.batch_first)
        packed = False
    if delay_of(config.cell) and engine_of(x) is not cpu:
        raise RuntimeError(f"there are no kernels with a delay on {x.device}")
    if x.dim() != (2 if packed else 3):
        raise RuntimeError(
            f"fastcell takes {'packed (rows, I)' if packed else '3-dimensional'} input, "
            f"got shape {tuple(x.shape)}"
        )
    if batch_sizes is not None and packed:
        _check_batch_sizes(batch_sizes, x.shape[0])
    plan = plan_for(config, x, weights)
    steps, batch, rows = _extent(x, batch_sizes, config.batch_first)
    if steps < 1:
        raise RuntimeError(f"fastcell takes at least one time step, got shape {tuple(x.shape)}")
    if hx:
        expected = state_shapes(config, plan, batch)
        given = [tuple(h.shape) for h in hx]
        if given != expected:
            raise RuntimeError(f"initial states must have shapes {expected}, got {given}")
    times = (rows,) if packed else (steps, batch)
    shapes = (
        (config.num_layers - 1, *times, plan.width),
        (plan.stacked, batch, plan.state_sizes[0]),
        times,
        (1,),
    )
    for name, extra, shape in zip(Extras._fields, extras, shapes, strict=True):
        if extra is not None and extra.shape != shape:
            raise RuntimeError(f"{name} must have shape {shape}, got {tuple(extra.shape)}")
    for name, extra, dtype in (
        ("reset", extras.reset, torch.bool),
        ("seed", extras.seed, torch.int64),
    ):
        if extra is not None and (extra.dtype is not dtype or extra.device != x.device):
            raise RuntimeError(
                f"{name} must be {dtype} on {x.device}, got {extra.dtype} on {extra.device}"
            )


def check_backward(
    config: Config,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reserve: Tensor,
    needs: Sequence[bool],
) -> None:
    """The rest of ``check``, for a backward call."""
    tensors = 1 + len(hx) + len(weights)
    if len(needs) != tensors:
        raise RuntimeError(f"needs has one entry for each of {tensors} tensors, got {len(needs)}")
    given = [g for g in (grad_output, *grad_states) if g is not None]
    _check_alike(x, given, "gradient")
    plan = plan_for(config, x, weights)
    _, batch, rows = _extent(x, batch_sizes, config.batch_first)
    shape = (*x.shape[:-1], plan.width)
    kept = engine_of(x).new_reserve(config, x.to("meta"), weights, rows)
    least = kept.numel()
    if batch_sizes is not None and x.dim() == 3 and batch_sizes.is_cpu:
        # A call past the operators keeps no more than the rows that exist.
        least = least // max(rows, 1) * int(batch_sizes.sum())
    if (
        reserve.dim() != 1
        or not least <= reserve.numel() <= kept.numel()
        or reserve.dtype is not kept.dtype
        or reserve.device != x.device
        or not reserve.is_contiguous()
    ):
        raise RuntimeError(
            f"the backward call needs a contiguous reserve of {kept.numel()} elements of "
            f"{kept.dtype}, got shape {tuple(reserve.shape)} of {reserve.dtype} on "
            f"{reserve.device}"
        )
    expected = [shape, *state_shapes(config, plan, batch)]
    grads = [grad_output, *grad_states]
    shapes = [None if g is None else tuple(g.shape) for g in grads]
    if len(grads) != len(expected) or any(
        [s is not None and s != e for s, e in zip(shapes, expected, strict=True)]
    ):
        raise RuntimeError(f"gradients must have shapes {expected}, got {shapes}")


def _check_alike(x: Tensor, others: Sequence[Tensor], what: str) -> None:
    taken = engine_of(x).DTYPES
    if x.dtype not in taken:
        names = " or ".join([str(dtype).removeprefix("torch.") for dtype in taken])
        raise RuntimeError(f"fastcell's kernels take {names}, got {x.dtype}")
    for t in others:
        if t.dtype is not x.dtype or t.device != x.device:
            raise RuntimeError(
                f"tensors must have one dtype and device: the input is {x.dtype} on {x.device}, "
                f"a {what} {t.dtype} on {t.device}"
            )


def check_stored_small(products: str, weights: Sequence[Tensor]) -> None:
    """Refuse weights of other dtypes than products of 16 or 8 bits take (RuntimeError)."""
    matrices = (torch.int8,) if products == "int8" else (torch.bfloat16, torch.float32)
    for w in weights:
        if w.dtype not in (matrices if w.dim() == 2 else (torch.float32,)) or not w.is_cpu:
            raise RuntimeError(
                f"weights for products of {products} are {matrices[0]} matrices and float32 "
                f"vectors on cpu, got {w.dtype} of shape {tuple(w.shape)} on {w.device}"
            )


def _check_lengths(x: Tensor, lengths: Tensor, batch_first: bool) -> None:
    batch = x.shape[0 if batch_first else 1]
    if (
        lengths.dtype is not torch.int64
        or lengths.shape != (batch,)
        or lengths.device != x.device
        or not lengths.is_contiguous()
    ):
        raise RuntimeError(
            f"lengths of a padded batch must be contiguous int64 of shape ({batch},) on "
            f"{x.device}, got {lengths.dtype} of shape {tuple(lengths.shape)} on {lengths.device}"
        )


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    sizes = batch_sizes.tolist()
    if (
        batch_sizes.dtype is not torch.int64
        or batch_sizes.dim() != 1
        or not sizes
        or sizes[-1] < 1
        or sizes != sorted(sizes, reverse=True)
        or sum(sizes) != rows
    ):
        raise RuntimeError(
            f"batch_sizes must be int64, positive, not increasing and add up to the {rows} rows "
            f"of the packed input, got {sizes}"
        )
