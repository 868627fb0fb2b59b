"""TreeLSTM against the ways to write one in torch. `python -m fastcell_bench.trees`

Two of them: the recursion over nodes that tutorials have, some torch calls per node and gate; and a
batched one, a level of all trees at a time, its index tensors made beforehand. All three compute
from the same weights and are timed after outputs and gradients compared equal within rounding.
Blocks alternate in one process; times are medians of blocks, ratios medians over pairs of
neighbouring ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastcell
from fastcell_bench.cli import positive, whole
from fastcell_bench.variants import alternate, gain

States = tuple[Tensor, Tensor]


class Shape(NamedTuple):
    """A batch: ``kind`` of its trees, how many of how many nodes, and the layer's sizes."""

    kind: str
    batch: int
    nodes: int
    inputs: int
    hidden: int

    def __str__(self) -> str:
        return ":".join(map(str, self))


# Sizes of the treebank experiments of Tai et al. (2015): 150 cells for constituency trees, 168 for
# dependency trees, word vectors of 300 numbers, batches of 25; and the extremes of form.
SHAPES = (
    Shape("constituency", 25, 39, 300, 150),
    Shape("constituency", 1, 39, 300, 150),
    Shape("dependency", 25, 19, 300, 168),
    Shape("dependency", 1, 19, 300, 168),
    Shape("complete", 16, 127, 128, 128),
    Shape("chain", 1, 100, 128, 128),
)


def parents_of(kind: str, nodes: int, generator: torch.Generator) -> list[int]:
    """One tree, the root first.

    constituency: binary, every inner node with two children; dependency: a node's parent is any
    node before it; complete: binary and full; chain: one leaf.
    """

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    if kind == "chain":
        return list(range(-1, nodes - 1))
    if kind == "complete":
        return [(node - 1) // 2 if node else -1 for node in range(nodes)]
    if kind == "dependency":
        return [draw(node) if node else -1 for node in range(nodes)]
    parents, leaves = [-1], [0]
    while len(parents) + 2 <= nodes:
        grown = leaves.pop(draw(len(leaves)))
        leaves += [len(parents), len(parents) + 1]
        parents += [grown, grown]
    return parents


def batch_of(shape: Shape, generator: torch.Generator) -> tuple[list[list[int]], fastcell.Trees]:
    """The parents of each tree, and all of them prepared."""
    each = [parents_of(shape.kind, shape.nodes, generator) for _ in range(shape.batch)]
    return each, fastcell.Trees([p for tree in each for p in tree], [len(tree) for tree in each])


def recursion(layer: fastcell.TreeLSTM, x: Tensor, each: list[list[int]]) -> Tensor:
    """h of every node, by a function that calls itself for the children."""
    w_ih, w_hh = layer.weight_ih, layer.weight_hh
    assert layer.bias_ih is not None
    assert layer.bias_hh is not None
    bias = layer.bias_ih + layer.bias_hh
    arity, hidden = layer.arity, layer.hidden_size
    zero = x.new_zeros(hidden)
    found: list[Tensor] = [zero] * len(x)

    def visit(node: int, first: int, children: list[list[int]]) -> States:
        below = [visit(k, first, children) for k in children[node]]
        xi, xf, xg, xo = torch.nn.functional.linear(x[first + node], w_ih, bias).chunk(4)
        hs = [h for h, _ in below]
        if arity is None:
            s = torch.stack(hs).sum(0) if hs else zero
            ui, uf, ug, uo = w_hh.chunk(4)
            forgets = [torch.sigmoid(xf + uf @ h) for h in hs]
        else:
            s = torch.cat([*hs, *[zero] * (arity - len(hs))])
            ui, *ufs, ug, uo = w_hh.chunk(3 + arity)
            forgets = [torch.sigmoid(xf + u @ s) for u, _ in zip(ufs, hs, strict=False)]
        c = torch.sigmoid(xi + ui @ s) * torch.tanh(xg + ug @ s)
        for f, (_, c_child) in zip(forgets, below, strict=True):
            c = c + f * c_child
        h = torch.sigmoid(xo + uo @ s) * torch.tanh(c)
        found[first + node] = h
        return h, c

    first = 0
    for parents in each:
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents):
            if parent >= 0:
                children[parent].append(node)
        visit(parents.index(-1), first, children)
        first += len(parents)
    return torch.stack(found)


class Level(NamedTuple):
    """Index tensors of one level: its nodes; of their children, in the order of the levels."""

    nodes: Tensor
    children: Tensor  # child-sum: (children,); N-ary: (nodes, N), 0 (a row of zeros) where none
    owners: Tensor  # child-sum: (children,)


def levels_of(trees: fastcell.Trees, arity: int | None) -> tuple[list[Level], Tensor]:
    """The levels, and where each node stands in their order; rows count from 1."""
    schedule = trees.forest.schedule
    place = torch.empty_like(schedule.order)
    place[schedule.order] = torch.arange(1, trees.nodes + 1)
    levels = []
    for begin, end in itertools.pairwise(schedule.level_offsets.tolist()):
        nodes = schedule.order[begin:end]
        at = torch.full((trees.nodes,), -1)
        at[nodes] = torch.arange(len(nodes))
        children = ((trees.parents >= 0) & (at[trees.parents] >= 0)).nonzero().squeeze(1)
        owners = at[trees.parents[children]]
        if arity is not None:
            table = torch.zeros(len(nodes), arity, dtype=torch.int64)
            table[owners, trees.positions[children]] = place[children]
            levels.append(Level(nodes, table, owners))
        else:
            levels.append(Level(nodes, place[children], owners))
    return levels, place


def batched(layer: fastcell.TreeLSTM, x: Tensor, levels: list[Level], place: Tensor) -> Tensor:
    """h of every node, a level at a time in torch's operations, input terms in one product."""
    w_hh, arity, hidden = layer.weight_hh, layer.arity, layer.hidden_size
    assert layer.bias_ih is not None
    assert layer.bias_hh is not None
    terms = torch.nn.functional.linear(x, layer.weight_ih, layer.bias_ih + layer.bias_hh)
    h_all = c_all = x.new_zeros(1, hidden)
    if arity is None:
        u_i, u_f, u_g, u_o = w_hh.chunk(4)
        u_node = torch.cat([u_i, u_g, u_o])
    for nodes, children, owners in levels:
        i, f, g, o = terms.index_select(0, nodes).chunk(4, 1)
        kept: Tensor | None = None
        if len(owners) and arity is None:
            h = h_all.index_select(0, children)
            forget = torch.sigmoid(f.index_select(0, owners) + torch.nn.functional.linear(h, u_f))
            empty = torch.zeros_like(g)
            kept = empty.index_add(0, owners, forget * c_all.index_select(0, children))
            seen = torch.nn.functional.linear(empty.index_add(0, owners, h), u_node).chunk(3, 1)
            i, g, o = i + seen[0], g + seen[1], o + seen[2]
        elif len(owners):
            assert arity is not None
            rows = torch.nn.functional.linear(
                h_all.index_select(0, children.flatten()).view(len(nodes), -1), w_hh
            )
            u_i, u_f, u_g, u_o = torch.split(rows, [hidden, arity * hidden, hidden, hidden], 1)
            forget = torch.sigmoid(f[:, None] + u_f.view(len(nodes), arity, hidden))
            c_children = c_all.index_select(0, children.flatten()).view(forget.shape)
            kept = (forget * c_children).sum(1)
            i, g, o = i + u_i, g + u_g, o + u_o
        c = torch.sigmoid(i) * torch.tanh(g)
        c = c if kept is None else c + kept
        h_all = torch.cat([h_all, torch.sigmoid(o) * torch.tanh(c)])
        c_all = torch.cat([c_all, c])
    return h_all.index_select(0, place)


def measure(shape: Shape, mode: str, blocks: int, min_time: float) -> dict[str, Any]:
    """One row: fastcell's time, and how many times that the others take."""
    generator = torch.Generator().manual_seed(0)
    each, trees = batch_of(shape, generator)
    arity = 2 if shape.kind in ("constituency", "complete") else None
    layer = fastcell.TreeLSTM(shape.inputs, shape.hidden, arity)
    x = torch.randn(trees.nodes, shape.inputs, generator=generator, requires_grad=True)
    grad = torch.randn(trees.nodes, shape.hidden, generator=generator)
    levels, place = levels_of(trees, arity)
    forms: list[Callable[[], Tensor]] = [
        lambda: layer(x, trees)[0][0],
        lambda: recursion(layer, x, each),
        lambda: batched(layer, x, levels, place),
    ]

    def run(form: Callable[[], Tensor]) -> list[Tensor]:
        if mode == "training":
            h = form()
            return [h, *torch.autograd.grad(h, [x, *layer.parameters()], grad)]
        with torch.no_grad():
            return [form()]

    ours = run(forms[0])
    for form in forms[1:]:
        for mine, other in zip(ours, run(form), strict=True):
            size = float(other.detach().square().mean().sqrt())
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * size)
    fused, recursive, level = alternate([partial(run, form) for form in forms], blocks, min_time)
    return {
        "shape": list(shape),
        "mode": mode,
        "levels": trees.levels,
        "seconds": statistics.median(fused),
        "recursion": gain(recursive, fused),
        "batched": gain(level, fused),
    }


def parse(text: str) -> Shape:
    """``KIND:TREES:NODES:I:H``."""
    kind, *sizes = text.split(":")
    if kind not in ("constituency", "dependency", "complete", "chain") or len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected KIND:TREES:NODES:I:H, got {text!r}")
    return Shape(kind, *[whole(size) for size in sizes])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fastcell_bench.trees",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--shape", action="append", type=parse, default=[], metavar="KIND:TREES:NODES:I:H",
        help="constituency, dependency, complete or chain (a table of them)",
    )  # fmt: skip
    result.add_argument("--mode", choices=["inference", "training", "both"], default="both")
    result.add_argument("--threads", type=whole, metavar="N", help="default: torch's")
    result.add_argument("--blocks", type=whole, default=7, metavar="N", help="(7)")
    result.add_argument("--min-time", type=positive, default=0.05, metavar="S", help="(0.05)")
    result.add_argument("--json", metavar="FILE", help="also as JSON")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run; 0, or 2 for bad options."""
    options = parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    modes = ["inference", "training"] if options.mode == "both" else [options.mode]
    rows = []
    print(f"fastcell {fastcell.__version__}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads: TreeLSTM in float32, and how many times its time")
    head = f"{'trees':32}{'levels':>8}{'fastcell µs':>13}{'levels in torch':>17}{'recursion':>11}"
    for mode in modes:
        print(f"\n{mode}\n{head}")
        for shape in options.shape or SHAPES:
            row = measure(shape, mode, options.blocks, options.min_time)
            rows.append(row)
            print(
                f"{shape!s:32}{row['levels']:8}{row['seconds'] * 1e6:13.4g}"
                f"{row['batched']:16.2f}x{row['recursion']:10.1f}x",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"fastcell": fastcell.info(), "rows": rows}, file, indent=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
