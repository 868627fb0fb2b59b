"""torch.nn with the sign of one weight changed: the benchmark must refuse it. For test_bench.py."""

from __future__ import annotations

from dataclasses import replace

from fastcell_bench.cases import Case
from fastcell_bench.contenders.contract import Call
from fastcell_bench.contenders.torch_layers import TorchLayers
from fastcell_bench.problem import Problem


class FlippedTorch(TorchLayers):
    """Differs in one number of the input weights, and in nothing else."""

    def prepare(self, case: Case, problem: Problem) -> Call:
        weight = problem.weights["weight_ih_l0"].copy()
        weight.flat[0] *= -1
        weights = {**problem.weights, "weight_ih_l0": weight}
        return super().prepare(case, replace(problem, weights=weights))
