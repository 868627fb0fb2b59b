"""From tensors to the CUDA kernels for trees and back: allocation, products, pointers. No autograd.

The input terms of all nodes are one matrix product. Then level by level (``_core.cuda_tree``), each
a few launches: the children's states are gathered, multiplied, and the cells finished. Backward the
same downwards, and the gradients of inputs and weights are matrix products over all nodes again.

The functions are those of ``cpu.py``. Nothing here waits for the device, but where trees come to it
for the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cuda as sequences
from ..autocast import without_autocast
from ..packing import dense
from .cells import SPECS, Config
from .forest import Forest

# As csrc/cuda/tree_level.h and shared_layout.h have them.
_TILE = 32  # rows of a product, and its columns
_GROUP = 8
_CHUNK_BYTES = 64
_POINTERS = (
    "order", "edge", "first_edge", "owner", "child", "position", "terms", "h", "c", "gates",
    "forget", "seen", "edge_seen", "products", "d_h", "d_c", "d_terms", "d_products", "d_forget",
    "d_edge_c", "d_seen", "d_edge_seen",
)  # fmt: skip


class _Placed(NamedTuple):
    """A forest as the kernels read it: the arrays of csrc/cuda/tree_level.h, and on the host sizes.

    ``level_offsets``, ``level_edges``: where a level's ranks and edges begin; ``most_inner``,
    ``most_edges``: of any level but the leaves'.
    """

    arrays: dict[str, Tensor]
    level_offsets: Tensor
    level_edges: Tensor
    inner: int
    edges: int
    most_inner: int
    most_edges: int


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.current_stream(device).cuda_stream)


def _placed(forest: Forest, device: torch.device) -> _Placed:
    found: _Placed = forest.on(device, "levels", lambda: _place(forest, device))
    return found


def _place(forest: Forest, device: torch.device) -> _Placed:
    _, positions, order, level_offsets, child_offsets, children = forest.schedule

    def numbers(count: int) -> Tensor:
        return torch.arange(count, device="cpu")

    nodes = order.shape[0]
    leaves = int(level_offsets[1]) if nodes else 0
    parents = order[leaves:]
    counts = child_offsets[parents + 1] - child_offsets[parents]
    first_edge = counts.new_zeros(nodes - leaves + 1)
    torch.cumsum(counts, 0, out=first_edge[1:])
    edges = int(first_edge[-1])
    owner = torch.repeat_interleave(numbers(nodes - leaves), counts)
    child = children[child_offsets[parents[owner]] + numbers(edges) - first_edge[owner]]
    ranks = torch.empty_like(order)
    ranks[order] = numbers(nodes)
    edge = torch.full_like(order, -1)
    edge[ranks[child]] = numbers(edges)
    level_edges = level_offsets.clone()
    level_edges[1:] = first_edge[level_offsets[1:] - leaves]
    found = {
        "order": order,
        "edge": edge,
        "first_edge": first_edge,
        "owner": owner,
        "child": child,
        "position": positions[child],
    }
    together = torch.cat(list(found.values())).to(device)
    split = together.split([len(t) for t in found.values()])  # type: ignore[no-untyped-call]

    def most(offsets: Tensor) -> int:
        return int(offsets[1:].diff().max()) if len(offsets) > 2 else 0

    return _Placed(
        dict(zip(found, split, strict=True)), level_offsets.contiguous(), level_edges,
        nodes - leaves, edges, most(level_offsets), most(level_edges),
    )  # fmt: skip


class _Sizes(NamedTuple):
    """Of a call."""

    config: Config
    hidden: int
    gates: int  # of a node
    forgets: int  # 1 where each child has a forget gate
    chunk: int  # numbers

    @property
    def sums(self) -> bool:
        return self.config.arity == 0

    @property
    def by_edge(self) -> bool:
        """Whether forget gates have a product of their own, with each child for itself."""
        return self.sums and self.forgets > 0

    @property
    def columns(self) -> int:
        """Of the recurrent terms of a node."""
        return (self.gates + (0 if self.sums else self.forgets * self.config.arity)) * self.hidden

    @property
    def seen(self) -> int:
        """Numbers that the recurrent product of a node takes."""
        return self.config.positions * self.hidden

    def padded(self, width: int) -> int:
        return -(-width // self.chunk) * self.chunk

    def matrices(self, w_hh: Tensor) -> tuple[Tensor, Tensor | None]:
        """Recurrent weights of nodes, and of edges."""
        if not self.by_edge:
            return w_hh, None
        hidden = self.hidden
        return torch.cat((w_hh[:hidden], w_hh[2 * hidden :])), w_hh[hidden : 2 * hidden]


def _sizes(config: Config, dtype: torch.dtype, hidden: int) -> _Sizes:
    spec = SPECS[config.cell]
    return _Sizes(
        config, hidden, spec.gates - spec.forgets, int(spec.forgets),
        _CHUNK_BYTES // dtype.itemsize,
    )  # fmt: skip


def architecture(device: torch.device) -> str:
    """Of a device, as kernels are compiled for it."""
    device_code: Any = sequences.device_code
    return f"sm_{device_code.cuda_limits(device.index or 0)['capability']}"


def kept_elements(config: Config, dtype: torch.dtype, input_size: int, hidden_size: int) -> int:
    """Numbers per node that a forward call keeps for its backward call, beside the states."""
    spec = SPECS[config.cell]
    return spec.gates * hidden_size if spec.forgets else 0


def _pack(weight: Tensor, sizes: _Sizes) -> Tensor:
    """(columns, k) as the kernels read it: [columns / 32][k chunk][4][8][64 bytes]."""
    columns, k = weight.shape
    width, high = sizes.padded(k), -(-columns // _TILE) * _TILE
    weight = torch.nn.functional.pad(weight, (0, width - k, 0, high - columns))
    return (
        weight.view(high // _TILE, _TILE // _GROUP, _GROUP, width // sizes.chunk, sizes.chunk)
        .permute(0, 3, 1, 2, 4)
        .contiguous()
    )


def _run(
    sizes: _Sizes,
    placed: _Placed,
    x: Tensor,
    backward: bool,
    again: bool,
    weights: tuple[Tensor | None, Tensor | None],
    tensors: dict[str, Tensor | None],
) -> None:
    """``tensors``: those of csrc/cuda/tree_level.h, TreeLevel, by name."""

    def pointer(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    given = placed.arrays | tensors
    device_code: Any = sequences.device_code
    device_code.cuda_tree(
        x.device.index or 0, sizes.config.cell, str(x.dtype).removeprefix("torch."), backward,
        again, len(placed.level_offsets) - 1, placed.level_offsets.data_ptr(),
        placed.level_edges.data_ptr(), sizes.hidden, sizes.config.positions, sizes.sums,
        (sizes.padded(sizes.seen), sizes.padded(sizes.hidden), sizes.columns,
         sizes.padded(sizes.columns)),
        [pointer(given.get(name)) for name in _POINTERS], *[pointer(w) for w in weights],
        _stream(x.device),
    )  # fmt: skip


def _split(sizes: _Sizes, kept: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Gates of nodes, and forget gates of edges, of which there are fewer than nodes."""
    count = nodes * sizes.gates * sizes.hidden
    return kept[:count], kept[count:]


def forward(
    config: Config, forest: Forest, x: Tensor, weights: Sequence[Tensor], keep: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The states of all nodes, each (nodes, H), and what the backward call needs or None.

    The arguments are taken as checked: ``x`` (nodes, I) in float32 or float64.
    """
    with without_autocast(x):
        return _forward(config, forest, x, weights, keep)


def _forward(
    config: Config, forest: Forest, x: Tensor, weights: Sequence[Tensor], keep: bool
) -> tuple[list[Tensor], Tensor | None]:
    nodes, hidden = x.shape[0], weights[1].shape[1] // config.positions
    sizes = _sizes(config, x.dtype, hidden)
    states = [x.new_empty((nodes, hidden)) for _ in range(SPECS[config.cell].states)]
    kept = None
    if keep:
        kept = x.new_empty(nodes * kept_elements(config, x.dtype, x.shape[1], hidden))
    if nodes == 0:
        return states, kept
    w_ih, w_hh, *biases = weights
    terms = torch.addmm(biases[0] + biases[1], x, w_ih.t()) if biases else x @ w_ih.t()
    placed = _placed(forest, x.device)
    gates = forget = edge_seen = None
    if sizes.forgets and kept is not None:
        gates, forget = _split(sizes, kept, nodes)
        forget[placed.edges * hidden :].zero_()  # the roots': a result has no unwritten memory
    if sizes.by_edge:
        forget = x.new_empty((placed.edges, hidden)) if forget is None else forget
        edge_seen = _rows(x, placed.most_edges, sizes.padded(hidden))
    matrix, edge_matrix = sizes.matrices(w_hh)
    edge_packed = None if edge_matrix is None else _pack(edge_matrix, sizes)
    _run(
        sizes, placed, x, False, False, (_pack(matrix, sizes), edge_packed),
        {
            "terms": terms.contiguous(),
            "h": states[0],
            "c": states[-1],
            "gates": gates,
            "forget": forget,
            "seen": _rows(x, placed.most_inner, sizes.padded(sizes.seen)),
            "edge_seen": edge_seen,
            "products": x.new_empty((placed.most_inner, sizes.columns)),
        },
    )  # fmt: skip
    return states, kept


def _rows(like: Tensor, count: int, width: int, zero: bool = False) -> Tensor:
    """Rows for a product, which reads whole tiles of them: what stands behind does not matter."""
    shape = (count + _TILE - 1, width)
    return like.new_zeros(shape) if zero else like.new_empty(shape)


def backward(
    config: Config,
    forest: Forest,
    grads: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    kept: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of [x, *weights] from those of the states; None where ``needs`` says so."""
    if x.shape[0] == 0:
        return [
            torch.zeros_like(t) if n else None for t, n in zip((x, *weights), needs, strict=True)
        ]
    # Autograd runs this in the autocast of whoever called backward().
    with without_autocast(x):
        return _backward(config, forest, grads, x, weights, states, kept, needs)


def _backward(
    config: Config,
    forest: Forest,
    grads: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    kept: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    nodes, hidden = x.shape[0], weights[1].shape[1] // config.positions
    sizes, placed = _sizes(config, x.dtype, hidden), _placed(forest, x.device)
    incoming = [None if g is None else dense(g) for g in grads]
    matrix, edge_matrix = sizes.matrices(weights[1])
    packed = _pack(matrix.t(), sizes)
    edge_packed = None if edge_matrix is None else _pack(edge_matrix.t(), sizes)
    d_terms = x.new_empty((nodes, weights[0].shape[0]))
    d_products = _rows(x, placed.inner, sizes.padded(sizes.columns), zero=True)
    seen = edge_seen = gates = forget = d_forget = d_edge_seen = None
    if sizes.forgets:
        gates, forget = _split(sizes, kept, nodes)
    if sizes.by_edge:
        d_forget = _rows(x, placed.edges, sizes.padded(hidden), zero=True)
        d_edge_seen = x.new_empty((placed.edges, hidden))
    if needs[2]:
        seen = x.new_empty((placed.inner, sizes.padded(sizes.seen)))
        if sizes.by_edge:
            edge_seen = x.new_empty((placed.edges, sizes.padded(hidden)))
    _run(
        sizes, placed, x, True, needs[2], (packed, edge_packed),
        {
            "h": states[0],
            "c": states[-1],
            "gates": gates,
            "forget": forget,
            "seen": seen,
            "edge_seen": edge_seen,
            "d_h": incoming[0],
            "d_c": (*incoming, None)[1],
            "d_terms": d_terms,
            "d_products": d_products,
            "d_forget": d_forget,
            "d_edge_c": x.new_empty((placed.edges, hidden)) if sizes.forgets else None,
            "d_seen": x.new_empty((placed.inner, sizes.seen)),
            "d_edge_seen": d_edge_seen,
        },
    )  # fmt: skip

    found: list[Tensor | None] = [None] * len(needs)
    if needs[0]:
        found[0] = d_terms @ weights[0]
    if needs[1]:
        found[1] = d_terms.t() @ x
    if seen is not None:
        d_w_hh = d_products[: placed.inner, : sizes.columns].t() @ seen[:, : sizes.seen]
        if d_forget is not None and edge_seen is not None:
            of_forget = d_forget[: placed.edges, :hidden].t() @ edge_seen[:, :hidden]
            d_w_hh = torch.cat((d_w_hh[:hidden], of_forget, d_w_hh[hidden:]))
        found[2] = d_w_hh
    if any(needs[3:]):
        # Both biases are added to the same sums. Two tensors, since a caller may change one.
        total = d_terms.sum(0)
        found[3:] = [total, total.clone()]
    return [g if need else None for g, need in zip(found, needs, strict=True)]
