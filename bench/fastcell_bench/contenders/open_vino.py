"""OpenVINO: one inference request of a compiled model on its CPU device."""

from __future__ import annotations

import importlib
from typing import Any

from fastcell_bench.cases import Case
from fastcell_bench.contenders import onnx_graph
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import Array, Problem


class OpenVino(Contender):
    """Latency mode, one stream, inputs set once, `request.infer()` timed.

    float32 is asked for by name: left alone, OpenVINO computes in bfloat16 where the CPU has it.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._library: Any = importlib.import_module("openvino")
        importlib.import_module("onnx")
        self._core: Any = self._library.Core()

    @property
    def version(self) -> str:
        return str(self._library.__version__).partition("-")[0]

    def algorithm(self, case: Case) -> str:
        return "InferRequest.infer, CPU plugin, latency hint, float32"

    def why_not(self, case: Case) -> str | None:
        return onnx_graph.why_not(case)

    def prepare(self, case: Case, problem: Problem) -> Call:
        model = self._core.read_model(onnx_graph.build_model(case, problem))
        compiled = self._core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": str(self.threads),
                "NUM_STREAMS": "1",
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        request = compiled.create_infer_request()
        for name, value in onnx_graph.feeds(case, problem).items():
            request.set_tensor(name, self._library.Tensor(value))

        def run() -> Any:
            request.infer()
            return request

        return run

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        count = len(raw.model_outputs)
        values = [raw.get_output_tensor(index).data.copy() for index in range(count)]
        return onnx_graph.named_results(case, values)
