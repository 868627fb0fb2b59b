"""LSTM and GRU with layer normalisation: a stack, layer by layer and direction by direction.

The input terms of all steps are one product and one norm, in torch's operations. The steps, with
the norms that they need, are a kernel on the CPU (csrc/cpu/normed.h), and kernels on a GPU
(normed_cuda.py); elsewhere, and for derivatives of derivatives, they run one by one in torch's
operations.

Source: J. Ba, J. Kiros, G. Hinton, "Layer normalization", arXiv:1607.06450 (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import layer_norm, linear

from . import _core, transforms
from .cpu import DTYPES, row_offsets, scratch
from .operators import is_plain
from .packing import dense

States = tuple[Tensor, ...]
_EPSILON = 1e-5  # as in csrc/cpu/normed.h
# Gates whose recurrent terms are normalised together.
PARTS = {"lstm": (4,), "gru": (2, 1)}
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


class Norms(NamedTuple):
    """The weights of a layer and direction: (G*H, I), (G*H, H), (G*H,) and for c's norm (2, H)."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    norm_ih: Tensor
    norm_hh: Tensor
    norm_c: Tensor | None


def stack(
    cell: str,
    rows: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Norms],
    sizes: Sequence[int],
    reset: Tensor | None,
    directions: int,
    dropout: float,
    lengths: Tensor | None,
    run: Callable[..., tuple[Tensor, States]],
) -> tuple[Tensor, States]:
    """A stack on packed rows (rows, I), of which the first ``sizes[0]`` are step 0, and so on.

    ``hx``: each (L*D, B, H); ``reset``: (rows,); ``lengths``: of the samples (B,), where rows are
    not packed; ``run``: :func:`direction`, or another engine's. Returns output rows and the final
    states.
    """
    finals: list[States] = []
    for k in range(0, len(weights), directions):
        if k:
            rows = torch.nn.functional.dropout(rows, dropout)
        outputs = []
        for d in range(directions):
            w = weights[k + d]
            given = None if hx is None else [h[k + d] for h in hx]
            output, final = run(cell, rows, given, w, sizes, reset, d == 1, lengths)
            outputs.append(output)
            finals.append(final)
        rows = torch.cat(outputs, -1)
    return rows, tuple([torch.stack(parts) for parts in zip(*finals, strict=True)])


def direction(
    cell: str,
    rows: Tensor,
    hx: Sequence[Tensor] | None,
    w: Norms,
    sizes: Sequence[int],
    reset: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, States]:
    """One layer and direction: by the CPU's kernel where it can be, else step by step."""
    hidden = w.w_hh.shape[1]
    terms = norm(linear(rows, w.w_ih), w.norm_ih, PARTS[cell], hidden)
    if w.b_ih is not None:
        terms = terms + w.b_ih
    if hx is None:
        zeros = rows.new_zeros((sizes[0], hidden))
        hx = (zeros,) if w.norm_c is None else (zeros, zeros)
    tensors = (terms, *hx, w.w_hh, w.norm_hh, w.b_hh, w.norm_c)
    if rows.is_cpu and lengths is None and kernels_run(rows, DTYPES):
        output, *states = _Sweep.apply(  # type: ignore[no-untyped-call]
            cell, tuple(sizes), reset, reverse, *tensors
        )
        return output, tuple(states)
    return steps(cell, sizes, reset, reverse, *tensors, lengths=lengths)


def kernels_run(rows: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether kernels for these dtypes can be called here, with such a tensor."""
    if torch.compiler.is_compiling() or rows.dtype not in dtypes:
        return False
    return is_plain(rows) and not transforms.transformed()


def norm(x: Tensor, gain: Tensor, parts: Sequence[int], hidden: int) -> Tensor:
    widths = [n * hidden for n in parts]
    pieces = zip(torch.split(x, widths, -1), torch.split(gain, widths), strict=True)
    return torch.cat([layer_norm(a, g.shape, g, None, _EPSILON) for a, g in pieces], -1)


def steps(
    cell: str,
    sizes: Sequence[int],
    reset: Tensor | None,
    reverse: bool,
    *tensors: Any,
    lengths: Tensor | None = None,
) -> tuple[Tensor, States]:
    """The steps in torch's operations: output rows and final states."""
    terms, *hx, w_hh, gain, bias, norm_c = tensors
    state: States = tuple(hx)
    hidden = w_hh.shape[1]
    given = torch.split(terms, list(sizes))
    anew = None if reset is None else torch.split(reset, list(sizes))
    outputs: list[Tensor] = [terms] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n, x = sizes[t], given[t]
        now = tuple([s[:n] for s in state])
        if anew is not None:
            now = tuple([s.masked_fill(anew[t][:, None], 0) for s in now])
        u = norm(linear(now[0], w_hh), gain, PARTS[cell], hidden)
        u = u if bias is None else u + bias
        if cell == "lstm":
            i, f, g, o = (x + u).chunk(4, -1)
            c = torch.sigmoid(f) * now[1] + torch.sigmoid(i) * torch.tanh(g)
            m = layer_norm(c, (hidden,), norm_c[0], norm_c[1], _EPSILON)
            new: States = (torch.sigmoid(o) * torch.tanh(m), c)
        else:
            (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, -1), u.chunk(3, -1)
            z = torch.sigmoid(x_z + u_z)
            candidate = torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n)
            new = ((1 - z) * candidate + z * now[0],)
        outputs[t] = new[0]
        if lengths is not None:
            alive = (t < lengths)[:, None]
            outputs[t] = new[0].where(alive, 0)
            new = tuple([a.where(alive, s) for a, s in zip(new, state, strict=True)])
        state = tuple([torch.cat((a, s[n:])) for a, s in zip(new, state, strict=True)])
    return torch.cat(outputs), state


@lru_cache(maxsize=256)
def _kernel(cell: str, float64: bool, hidden: int, reverse: bool) -> Any:
    return _core.Normed(cell, float64, hidden, reverse)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class _Sweep(Function):
    """The steps as kernels: (terms, *hx, w_hh, gain, bias, norm_c) -> (output, *final states)."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        sizes: tuple[int, ...],
        reset: Tensor | None,
        reverse: bool,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        terms, *rest = [t if t is None else dense(t) for t in tensors]
        *hx, w_hh, gain, bias, norm_c = cast(list[Any], rest)
        assert terms is not None
        rows, hidden = terms.shape[0], w_hh.shape[1]
        kernel = _kernel(cell, terms.dtype is torch.float64, hidden, reverse)
        kept = terms.new_empty(rows, kernel.kept_elements)
        output = terms.new_empty(rows, hidden)
        finals = [torch.empty_like(h) for h in hx if h is not None]
        offsets = row_offsets(torch.tensor(sizes, device="cpu"))
        given = (terms, w_hh, gain, bias, norm_c)
        reset = None if reset is None else dense(reset)
        _run(kernel, sizes, rows, offsets, given, hx, finals, reset, output, kept, ())
        ctx.call = cell, sizes, reverse, kernel
        ctx.set_materialize_grads(False)
        # A copy: the caller may change his output in place.
        ctx.save_for_backward(reset, offsets, kept, output.clone(), *tensors)
        return output, *finals

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, *d_finals: Tensor | None) -> Any:
        cell, sizes, reverse, kernel = ctx.call
        reset, offsets, kept, output, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        grads = (d_output, *d_finals)
        if (
            torch.is_grad_enabled()
            or transforms.transformed()
            or any([g is not None and _is_legacy_batched(g) for g in grads])
        ):
            found = _differentiable(cell, sizes, reset, reverse, tensors, grads, needs)
            return None, None, None, None, *found
        terms, *rest = [t if t is None else dense(t) for t in tensors]
        *hx, w_hh, gain, bias, norm_c = cast(list[Any], rest)
        rows, hidden = output.shape
        assert terms is not None
        d_hx = [torch.empty_like(h) for h in hx]
        d_terms, d_sums, d_normed = (torch.empty_like(terms) for _ in range(3))
        d_cell = None if norm_c is None else torch.empty_like(output)
        before = torch.empty_like(output)
        d_given = [None if g is None else dense(g) for g in grads]
        gradients = (
            d_given[0], *(*d_given[1:], None)[:2], *(*d_hx, None)[:2], d_terms, d_sums, d_normed,
            d_cell, before,
        )  # fmt: skip
        given = (terms, w_hh, gain, bias, norm_c)
        _run(kernel, sizes, rows, offsets, given, hx, (), reset, output, kept, gradients)
        normed = kept[:, : terms.shape[1]]
        d_norm_c = None
        if d_cell is not None:
            at = kernel.kept_elements - hidden - len(PARTS[cell]) - 1
            normed_c = kept[:, at : at + hidden]
            d_norm_c = torch.stack(((d_cell * normed_c).sum(0), d_cell.sum(0)))
        found = [
            d_terms,
            *d_hx,
            d_sums.t() @ before,
            (d_normed * normed).sum(0),
            None if bias is None else d_normed.sum(0),
            d_norm_c,
        ]
        return (
            None,
            None,
            None,
            None,
            *[g if need else None for g, need in zip(found, needs, strict=True)],
        )


def _run(
    kernel: Any,
    sizes: Sequence[int],
    rows: int,
    offsets: Tensor,
    given: Sequence[Tensor | None],
    hx: Sequence[Tensor | None],
    finals: Sequence[Tensor],
    reset: Tensor | None,
    output: Tensor,
    kept: Tensor,
    gradients: Sequence[Tensor | None],
) -> None:
    threads = torch.get_num_threads()
    steps, batch = len(sizes), sizes[0]
    workspace, _fresh = scratch(kernel.workspace(steps, batch, rows, bool(gradients), threads))
    pointers = [
        offsets.data_ptr(), *map(_pointer, given), *map(_pointer, (*hx, None)[:2]),
        *map(_pointer, (*finals, None, None)[:2]), _pointer(reset), output.data_ptr(),
        kept.data_ptr(), workspace,
    ]  # fmt: skip
    kernel.run(steps, batch, rows, pointers, [_pointer(g) for g in gradients], threads)


def _differentiable(
    cell: str,
    sizes: Sequence[int],
    reset: Tensor | None,
    reverse: bool,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients with a graph of their own, of the steps once more."""
    with torch.enable_grad():
        own = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        output, states = steps(cell, sizes, reset, reverse, *own)
        pairs = [(o, g) for o, g in zip((output, *states), grads, strict=True) if g is not None]
        asked = [t for t, need in zip(own, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [t for t in asked if t is not None],
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needs]
