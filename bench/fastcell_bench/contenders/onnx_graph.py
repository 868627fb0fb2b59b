"""A case as an ONNX model: the standard's own LSTM, GRU and RNN nodes, built by hand.

Orders differ: torch's LSTM gates are i, f, g, o and ONNX's i, o, f, c; torch's GRU gates are r, z,
n and ONNX's z, r, h, with `linear_before_reset=1` for torch's reset after the product.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fastcell_bench.cases import Case
from fastcell_bench.problem import Array, Problem, pack

OPSET = 17
IR_VERSION = 8
# ONNX's gate g is torch's gate ORDER[cell][g].
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,), "RNN_RELU": (0,)}


def build_model(case: Case, problem: Problem) -> bytes:
    """Serialized model: X (T, B, I) and, where ragged, lengths (B,) int32; to Y (T, D, B, H) and
    the final states of each layer, h_0, c_0, h_1, ... (D, B, H)."""
    onnx = importlib.import_module("onnx")
    helper: Any = onnx.helper
    single = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("X", single, [case.T, case.B, case.I])]
    if case.ragged:
        inputs.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, [case.B]))
    constants: list[Any] = []
    nodes: list[Any] = []
    outputs: list[Any] = []

    def constant(name: str, value: Array) -> str:
        constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    D, H = case.directions, case.H
    attributes: dict[str, Any] = {"hidden_size": H}
    attributes["direction"] = "bidirectional" if case.bidirectional else "forward"
    if case.cell == "GRU":
        attributes["linear_before_reset"] = 1
    if case.cell == "RNN_RELU":
        attributes["activations"] = ["Relu"] * D
    kind = "RNN" if case.cell == "RNN_RELU" else case.cell

    x = "X"
    for layer in range(case.layers):
        names = [f"l{layer}{suffix}" for suffix in ("", "_reverse")[:D]]
        w, r, bw, br = (
            np.stack([_reorder(case, problem.weights[f"{part}_{name}"]) for name in names])
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        states = [f"h_{layer}"] + ([f"c_{layer}"] if case.cell == "LSTM" else [])
        nodes.append(
            helper.make_node(
                kind,
                [
                    x,
                    constant(f"W_{layer}", w),
                    constant(f"R_{layer}", r),
                    constant(f"B_{layer}", np.concatenate([bw, br], axis=1)),
                    "lengths" if case.ragged else "",
                ],
                [f"Y_{layer}", *states],
                **attributes,
            )
        )
        outputs += [helper.make_tensor_value_info(name, single, [D, case.B, H]) for name in states]
        if layer + 1 < case.layers:
            shape = constant(f"shape_{layer}", np.asarray([case.T, case.B, D * H], dtype=np.int64))
            nodes.append(
                helper.make_node("Transpose", [f"Y_{layer}"], [f"YT_{layer}"], perm=[0, 2, 1, 3])
            )
            x = f"X_{layer + 1}"
            nodes.append(helper.make_node("Reshape", [f"YT_{layer}", shape], [x]))
    last = f"Y_{case.layers - 1}"
    outputs.insert(0, helper.make_tensor_value_info(last, single, [case.T, D, case.B, H]))
    graph = helper.make_graph(nodes, "layer", inputs, outputs, constants)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    serialized: bytes = model.SerializeToString()
    return serialized


def feeds(case: Case, problem: Problem) -> dict[str, Array]:
    """The model's inputs by name."""
    values = {"X": problem.input}
    if case.ragged:
        values["lengths"] = problem.lengths.astype(np.int32)
    return values


def named_results(case: Case, values: list[Array]) -> dict[str, Array]:
    """The model's outputs, in the order of build_model, to a contender's result names."""
    output = values[0].transpose(0, 2, 1, 3).reshape(case.T, case.B, case.directions * case.H)
    if case.ragged:
        output = pack(output, np.asarray(case.lengths))
    states = values[1:]
    if case.cell != "LSTM":
        return {"output": output, "h_n": np.concatenate(states)}
    return {
        "output": output,
        "h_n": np.concatenate(states[0::2]),
        "c_n": np.concatenate(states[1::2]),
    }


def why_not(case: Case) -> str | None:
    """What the ONNX runtimes leave out."""
    if case.training:
        return "inference only"
    if case.dtype != "float32":
        return "float32 only"
    return None


def _reorder(case: Case, value: Array) -> Array:
    blocks = value.reshape(case.gates, case.H, *value.shape[1:])
    ordered: Array = blocks[list(ORDER[case.cell])].reshape(value.shape)
    return ordered
