"""What tests of networks over trees share: random trees with weights, and their truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastcell
from fastcell import Trees, reference
from support import Values
from tolerances import accumulation_length, assert_close

CELLS = ("tree_lstm", "tree_rnn_tanh", "tree_rnn_relu")
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def random_parents(rng: np.random.Generator, nodes: int, most: int, shape: str) -> list[int]:
    """One tree whose nodes have at most ``most`` children and are numbered in any order."""
    if shape == "chain":
        above = list(range(-1, nodes - 1))
    elif shape == "star":  # as flat as can be
        above = [-1, *[(node - 1) // most for node in range(1, nodes)]]
    else:
        above, free = [-1], [0] * most
        for node in range(1, nodes):
            above.append(free.pop(int(rng.integers(len(free)))))
            free += [node] * most
    names = rng.permutation(nodes)
    parents = [-1] * nodes
    for node, parent in enumerate(above):
        parents[names[node]] = -1 if parent < 0 else int(names[parent])
    return parents


class Case(NamedTuple):
    cell: str = "tree_lstm"
    arity: int | None = None
    dtype: torch.dtype = torch.float32
    bias: bool = True
    sizes: tuple[int, ...] = (5, 1, 8)
    shape: str = "random"
    I: int = 4  # noqa: E741
    H: int = 7
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        sizes = "+".join(map(str, self.sizes))
        how = "sum" if self.arity is None else f"{self.arity}ary"
        bias = "bias" if self.bias else "plain"
        return f"{self.cell}-{how}-{name}-{bias}-{self.shape}-{sizes}-I{self.I}-H{self.H}"

    @property
    def states(self) -> tuple[str, ...]:
        return ("h", "c") if self.cell == "tree_lstm" else ("h",)


class Problem:
    """Trees, weights, input and incoming gradients, drawn in float64 and rounded."""

    def __init__(self, case: Case, each: Sequence[list[int]] | None = None) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        # As many children as nodes, but not in one star of all sizes: arity 1 is a chain.
        most = case.arity or 5
        self.each = list(each or [random_parents(rng, n, most, case.shape) for n in case.sizes])
        self.trees = Trees([p for tree in self.each for p in tree], [len(t) for t in self.each])
        G, H, N = (4 if case.cell == "tree_lstm" else 1), case.H, case.arity or 1
        recurrent = (3 + N) * H if case.cell == "tree_lstm" else H

        def rounded(values: np.ndarray) -> np.ndarray:
            return torch.from_numpy(values).to(case.dtype).double().numpy()

        shapes = [(G * H, case.I), (recurrent, N * H), *[(G * H,)] * 2 * case.bias]
        self.weights = [rounded(rng.uniform(-(H**-0.5), H**-0.5, shape)) for shape in shapes]
        nodes = self.trees.nodes
        self.x = rounded(rng.normal(size=(nodes, case.I)))
        self.grads = [rounded(rng.normal(size=(nodes, H))) for _ in case.states]
        self.root_grads = [rounded(rng.normal(size=(len(self.each), H))) for _ in case.states]

    def layer(self) -> fastcell.TreeLSTM | fastcell.TreeRNN:
        case = self.case
        sizes = (case.I, case.H, case.arity)
        if case.cell == "tree_lstm":
            layer = fastcell.TreeLSTM(*sizes, bias=case.bias, dtype=case.dtype)
        else:
            kind = case.cell.removeprefix("tree_rnn_")
            layer = fastcell.TreeRNN(*sizes, nonlinearity=kind, bias=case.bias, dtype=case.dtype)
        with torch.no_grad():
            for name, value in zip(WEIGHTS, self.weights, strict=False):
                layer.get_parameter(name).copy_(torch.from_numpy(value))
        return layer.to(case.device)

    def tensor(self, value: np.ndarray) -> Tensor:
        return torch.tensor(value, dtype=self.case.dtype, device=self.case.device)

    def call(self, layer: torch.nn.Module, x: Tensor, trees: Trees | None = None) -> Values:
        result = layer(x, trees or self.trees)
        states, roots = result if self.case.cell == "tree_lstm" else ((result[0],), (result[1],))
        found = dict(zip(self.case.states, states, strict=True))
        return found | {f"{n} of roots": r for n, r in zip(self.case.states, roots, strict=True)}

    def gradients_in(self) -> list[Tensor]:
        return [self.tensor(grad) for grad in (*self.grads, *self.root_grads)]

    def run(self, layer: torch.nn.Module) -> Values:
        """All states, and the gradients of input and parameters."""
        x = self.tensor(self.x).requires_grad_()
        found = self.call(layer, x)
        names = WEIGHTS[: len(self.weights)]
        leaves = [x, *[layer.get_parameter(name) for name in names]]
        grads = torch.autograd.grad(list(found.values()), leaves, self.gradients_in())
        for name, grad in zip(("x", *names), grads, strict=True):
            found[f"gradient of {name}"] = grad
        return {name: value.detach() for name, value in found.items()}

    def truth(self) -> Values:
        """The same from the reference, in float64."""
        case = self.case
        states, tape = reference.tree.forward(
            case.cell, self.x, self.trees.parents.tolist(), self.weights, case.arity
        )
        roots = self.trees.roots.numpy()
        grads = [grad.copy() for grad in self.grads]
        for grad, root_grad in zip(grads, self.root_grads, strict=True):
            grad[roots] += root_grad
        d_x, d_weights = reference.tree.backward(tape, grads)
        found = dict(zip(case.states, states, strict=True))
        found |= {f"{n} of roots": s[roots] for n, s in zip(case.states, states, strict=True)}
        found["gradient of x"] = d_x
        for name, grad in zip(WEIGHTS, d_weights, strict=False):
            found[f"gradient of {name}"] = grad
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def assert_close(self, actual: Values, expected: Values) -> None:
        """Under the tolerance policy; a weight's gradient has the size of all of them together."""
        case = self.case
        assert actual.keys() == expected.keys()
        positions = case.arity or max(1, self.trees.forest.most_children)
        gates = 3 + positions
        widest = accumulation_length(case.I, positions * case.H)
        whole = accumulation_length(case.I, positions * case.H, gates=gates, batch=self.trees.nodes)
        of_weights = [expected[k].flatten() for k in expected if k.startswith(PARAMETERS)]
        size = max(1.0, torch.cat(of_weights).square().mean().sqrt().item())
        for name, value in actual.items():
            assert value.dtype is case.dtype, name
            assert value.device.type == case.device, name
            assert_close(
                value.cpu(),
                expected[name],
                dtype=case.dtype,
                steps=self.trees.levels,
                length=whole if "gradient" in name else widest,
                unit=size if name.startswith(PARAMETERS) else 1.0,
                name=name,
            )


PARAMETERS = ("gradient of weight", "gradient of bias")
