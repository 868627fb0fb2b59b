"""onnxruntime: `InferenceSession.run` on its CPU provider."""

from __future__ import annotations

import importlib
from typing import Any

from fastcell_bench.cases import Case
from fastcell_bench.contenders import onnx_graph
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import Array, Problem


class OnnxRuntime(Contender):
    """All graph optimizations, one node after another, its pool left to spin as by default.

    `run` is its ordinary call and, like a layer's, allocates its outputs; binding them beforehand
    would save a few microseconds of a single small step.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._library: Any = importlib.import_module("onnxruntime")
        importlib.import_module("onnx")

    @property
    def version(self) -> str:
        return str(self._library.__version__)

    def algorithm(self, case: Case) -> str:
        return "InferenceSession.run, CPUExecutionProvider"

    def why_not(self, case: Case) -> str | None:
        return onnx_graph.why_not(case)

    def prepare(self, case: Case, problem: Problem) -> Call:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = self._library.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = self._library.InferenceSession(
            onnx_graph.build_model(case, problem), options, providers=["CPUExecutionProvider"]
        )
        values = onnx_graph.feeds(case, problem)
        return lambda: session.run(None, values)

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        return onnx_graph.named_results(case, raw)
