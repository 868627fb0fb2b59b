"""Trees as arrays of parents, and the schedule by which they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _core

__all__ = ["Forest", "Schedule", "Trees"]


class Schedule(NamedTuple):
    """The nodes level by level: all children of a level's nodes lie in the levels before it.

    With N nodes in L levels, int64 on the CPU: ``parents`` (N,), -1 at a root; ``positions`` (N,)
    among the children of the parent; ``order`` (N,), leaves first; ``level_offsets`` (L + 1,);
    ``child_offsets`` (N + 1,); ``children`` (N,), node by node, by position.
    """

    parents: Tensor
    positions: Tensor
    order: Tensor
    level_offsets: Tensor
    child_offsets: Tensor
    children: Tensor


class NotATreeError(ValueError):
    """Parents that are no trees: what is wrong (``"cycle"``, ``"same position"``), and where."""

    def __init__(self, fault: str, node: int) -> None:
        super().__init__(f"parents are not those of trees: {fault} at node {node}")
        self.fault, self.node = fault, node


class Forest:
    """Trees side by side without regard to which is which, with their schedule.

    Args:
        parents: (N,) int64 on the CPU, each in -1 .. N - 1.
        positions: (N,) as well; None: children are numbered in the order of the nodes.

    Raises:
        NotATreeError: a cycle, or two children at one position.
    """

    def __init__(self, parents: Tensor, positions: Tensor | None) -> None:
        nodes = parents.shape[0]
        number = positions is None
        positions = parents.new_empty(nodes) if positions is None else positions.contiguous()
        parents = parents.contiguous()
        order, children = parents.new_empty(nodes), parents.new_empty(nodes)
        level_offsets, child_offsets = parents.new_empty(nodes + 1), parents.new_empty(nodes + 1)
        levels, self.most_children, self.most_position, fault, node = _core.tree_levels(
            nodes, parents.data_ptr(), number, positions.data_ptr(), order.data_ptr(),
            level_offsets.data_ptr(), child_offsets.data_ptr(), children.data_ptr(),
        )  # fmt: skip
        if fault:
            raise NotATreeError(fault, node)
        self.levels: int = levels
        self._placed: dict[Any, Any] = {}
        self.schedule = Schedule(
            parents, positions, order, level_offsets[: levels + 1], child_offsets, children
        )

    def on(self, device: torch.device, what: str, make: Callable[[], Any]) -> Any:
        """What ``make`` makes for a device, once for as long as there are these trees.

        Each stream has its own: there alone memory can be used and freed without waiting.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (what, device, stream)
        if key not in self._placed:
            # (In inference mode tensors would be made that later calls could not use.)
            with torch.inference_mode(False):
                self._placed[key] = make()
        return self._placed[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_placed": {}}  # other processes make their own


class Trees:
    """A batch of trees, ready to be run as often as wanted.

    Making it sorts the nodes into levels, once; a layer then takes it with every call. Trees lie
    one behind the other, as their rows of the input do.

    Args:
        parents: (nodes,) int64, a tensor or what torch.as_tensor takes. The index of each node's
            parent within its own tree, counted from 0; -1 at the root. Nodes come in any order.
            With several trees, ``torch.cat`` of each one's array.
        sizes: (trees,) int64, nodes of each tree; None: all nodes are one tree.
        positions: (nodes,) int64, where each node is among the children of its parent, from 0 on,
            for cells that tell them apart: a position may be left empty. What stands at a root is
            not read. None: 0, 1, ... in the order of the nodes.

    Attributes:
        nodes, levels: how many; a leaf is on the first level.
        sizes: (trees,), nodes of each tree.
        parents: (nodes,), the parents' rows in the batch, -1 at a root.
        positions: (nodes,).
        roots: (trees,), the roots' rows in the batch.

    ``len()`` is the number of trees. All tensors are on the CPU; the arguments are copied.

    Raises:
        TypeError: an array of another dtype than int64.
        ValueError: arrays of wrong shapes, or a tree that is none: no root or several, a parent
            outside of the tree, a cycle, two children at one position. The text names tree and
            node.

    >>> trees = Trees([1, -1, 1, -1], sizes=[3, 1])  # a root with two children; a root alone
    >>> trees.roots.tolist(), trees.levels
    ([1, 3], 2)
    """

    def __init__(
        self,
        parents: Tensor | Sequence[int] | Any,
        sizes: Tensor | Sequence[int] | Any | None = None,
        *,
        positions: Tensor | Sequence[int] | Any | None = None,
    ) -> None:
        given = _vector(parents, "parents")
        self.nodes: int = given.shape[0]
        self.sizes = given.new_full((1,), self.nodes) if sizes is None else _vector(sizes, "sizes")
        self._check_sizes()
        self._starts = self.sizes.cumsum(0) - self.sizes
        tree_of = torch.repeat_interleave(torch.arange(len(self)), self.sizes)
        self._check_parents(given, tree_of)
        self.parents = torch.where(given < 0, given, given + self._starts[tree_of])
        self.roots = (given < 0).nonzero().squeeze(1)
        where = None
        if positions is not None:
            where = _vector(positions, "positions")
            self._check_positions(where)
        try:
            self.forest = Forest(self.parents, where)
        except NotATreeError as error:
            raise self._explained(error, where) from None
        self.positions = self.forest.schedule.positions
        self.levels = self.forest.levels

    def __len__(self) -> int:
        return self.sizes.shape[0]

    def __repr__(self) -> str:
        return f"Trees(trees={len(self)}, nodes={self.nodes}, levels={self.levels})"

    def check_arity(self, arity: int) -> None:
        """Refuse, with ValueError, children at positions that a cell of this arity has not."""
        if self.forest.most_position < arity:
            return
        node = int(((self.positions >= arity) & (self.parents >= 0)).nonzero()[0])
        parent = int(self.parents[node])
        count = int((self.parents == parent).sum())
        tree, index = self._place(parent)
        if count > arity:
            raise ValueError(
                f"tree {tree}: node {index} has {count} children, expected at most {arity}, the "
                "arity of the cell"
            )
        raise ValueError(
            f"tree {tree}: node {self._place(node)[1]} is at position {int(self.positions[node])}, "
            f"expected 0 to {arity - 1} with arity {arity}"
        )

    def _place(self, row: int) -> tuple[int, int]:
        """The tree of a row, and its index there."""
        tree = int(torch.searchsorted(self._starts, row, right=True)) - 1
        return tree, row - int(self._starts[tree])

    def _check_sizes(self) -> None:
        empty = (self.sizes < 1).nonzero()
        if len(empty):
            tree = int(empty[0])
            raise ValueError(
                f"tree {tree} has {int(self.sizes[tree])} nodes, expected at least one"
            )
        total = int(self.sizes.sum())
        if total != self.nodes:
            raise ValueError(
                f"sizes add up to {total} nodes, expected {self.nodes}, the number of parents"
            )

    def _check_parents(self, given: Tensor, tree_of: Tensor) -> None:
        outside = ((given < -1) | (given >= self.sizes[tree_of])).nonzero()
        if len(outside):
            row = int(outside[0])
            tree, node = self._place(row)
            raise ValueError(
                f"tree {tree}: node {node} has parent {int(given[row])}, expected -1 at the root "
                f"or a node of that tree, 0 to {int(self.sizes[tree]) - 1}"
            )
        roots = torch.bincount(tree_of[given < 0], minlength=len(self))
        wrong = (roots != 1).nonzero()
        if len(wrong):
            tree = int(wrong[0])
            found = ((given < 0) & (tree_of == tree)).nonzero().squeeze(1) - self._starts[tree]
            which = f"at nodes {_listed(found.tolist())}" if len(found) else "at no node"
            raise ValueError(
                f"tree {tree} has {len(found)} roots (parent -1 {which}), expected one"
            )

    def _check_positions(self, positions: Tensor) -> None:
        if positions.shape != self.parents.shape:
            raise ValueError(
                f"positions must have shape ({self.nodes},), one per node, got "
                f"{tuple(positions.shape)}"
            )
        negative = ((positions < 0) & (self.parents >= 0)).nonzero()
        if len(negative):
            tree, node = self._place(int(negative[0]))
            raise ValueError(
                f"tree {tree}: node {node} is at position {int(positions[negative[0]])}, expected "
                "0 or more"
            )

    def _explained(self, error: NotATreeError, positions: Tensor | None) -> ValueError:
        tree, node = self._place(error.node)
        if error.fault == "cycle":
            cycle, row = [node], int(self.parents[error.node])
            while row != error.node:
                cycle.append(self._place(row)[1])
                row = int(self.parents[row])
            return ValueError(
                f"tree {tree}: nodes {_listed(cycle)} are a cycle, each with the next as its "
                "parent, expected every node to lead up to the root"
            )
        assert positions is not None
        parent = self._place(int(self.parents[error.node]))[1]
        return ValueError(
            f"tree {tree}: node {parent} has two children at position "
            f"{int(positions[error.node])}, one of them node {node}, expected one at most"
        )


def _vector(value: Any, name: str) -> Tensor:
    found = torch.as_tensor(value)
    if not isinstance(value, Tensor) and found.numel() == 0:
        found = found.long()  # an empty list has no dtype
    if found.dtype is not torch.int64:
        raise TypeError(f"{name} must be int64, got {found.dtype}")
    if found.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(found.shape)}")
    return found.detach().cpu().clone()


def _listed(nodes: list[int]) -> str:
    return ", ".join(map(str, nodes[:6])) + (", ..." if len(nodes) > 6 else "")
