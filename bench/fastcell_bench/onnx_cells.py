"""onnxruntime on the cells that ONNX has, in a process of its own.

Its threads spin after a call: between its blocks the process is stopped, as in ``processes.py``.
ONNX's order: LSTM gates i o f c and peepholes i o f; GRU gates z r h; a coupled cell's f is unread.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy.typing as npt
import torch

import fastcell

Array = npt.NDArray[Any]
NOT_INSTALLED = "onnx and onnxruntime are not installed"
_ACTIVATIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu", "softsign": "Softsign"}


def why_not(layer: torch.nn.Module, call: dict[str, Any]) -> str:
    """What keeps onnxruntime from running this layer; nothing if it can."""
    if any([importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")]):
        return NOT_INSTALLED
    if set(call) - {"lengths"}:
        return "ONNX has no such control"
    if type(layer) not in (fastcell.LSTM, fastcell.GRU, fastcell.RNN):
        return "ONNX has no such cell"
    drawn = ("zoneout", "recurrent_dropout", "weight_dropout", "layer_norm")
    if any([getattr(layer, name, 0) for name in drawn]) or getattr(layer, "skip", 1) != 1:
        return "ONNX has no such option"
    return ""


def model_of(layer: torch.nn.RNNBase, ragged: bool) -> bytes:
    """One node, serialized: X (T, B, I) and, where ragged, lengths (B,) to Y (T, 1, B, H)."""
    import onnx

    helper, hidden = onnx.helper, layer.hidden_size
    given = {name: p.detach() for name, p in layer.named_parameters()}
    attributes: dict[str, Any] = {"hidden_size": hidden}
    order: tuple[int, ...] = (0,)
    peepholes = None
    if isinstance(layer, fastcell.LSTM):
        # (Of a coupled cell's blocks i g o: the third of ONNX's is not read.)
        order = (0, 2, 0, 1) if layer.coupled else (0, 3, 1, 2)
        attributes["input_forget"] = int(layer.coupled)
        names = ("sigmoid", layer.activation, layer.output_activation)
        attributes["activations"] = [_ACTIVATIONS[name] for name in names]
        if layer.cell_clip is not None:
            attributes["clip"] = float(layer.cell_clip)
        if layer.peephole:
            rows = given["weight_peephole_l0"]
            peepholes = torch.cat([rows[k] for k in ((0, 1, 0) if layer.coupled else (0, 2, 1))])
    elif isinstance(layer, fastcell.GRU):
        order = (1, 0, 2)
        attributes["linear_before_reset"] = int(layer.reset_after)

    def blocks(name: str) -> torch.Tensor:
        value = given[name]
        return torch.cat([value[k * hidden : (k + 1) * hidden] for k in order])

    values = {
        "W": blocks("weight_ih_l0"),
        "R": blocks("weight_hh_l0"),
        "B": torch.cat((blocks("bias_ih_l0"), blocks("bias_hh_l0"))),
    }
    inputs = [
        "X",
        *values,
        "lengths" if ragged else "",
        *([] if peepholes is None else ["", "", "P"]),
    ]
    inputs = inputs if isinstance(layer, fastcell.LSTM) else inputs[:5]
    if peepholes is not None:
        values["P"] = peepholes
    single, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(layer.mode.split("_")[0], inputs, ["Y"], **attributes)],
        "cell",
        [
            helper.make_tensor_value_info("X", single, [None, None, layer.input_size]),
            *([helper.make_tensor_value_info("lengths", whole, [None])] if ragged else []),
        ],
        [helper.make_tensor_value_info("Y", single, None)],
        [onnx.numpy_helper.from_array(v[None].numpy(), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


class OnnxRuntime:
    """A layer in onnxruntime. Use as a context manager: leaving it ends the process."""

    def __init__(self, layer: torch.nn.RNNBase, x: torch.Tensor, call: dict[str, Any]) -> None:
        feeds = {"X": x.detach().numpy()}
        if "lengths" in call:
            feeds["lengths"] = call["lengths"].to(torch.int32).numpy()
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = (other, model_of(layer, len(feeds) > 1), feeds, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()

    def output(self) -> torch.Tensor:
        """(T, B, H), of one call."""
        return torch.from_numpy(self._ask(None)).squeeze(1)

    def block(self, seconds: float) -> float:
        """Seconds per call, over a block of that length; calls before it are not counted."""
        return float(self._ask(seconds))

    def _ask(self, request: float | None) -> Any:
        self._signal("SIGCONT")
        self._pipe.send(request)
        answer = self._pipe.recv()
        self._signal("SIGSTOP")
        if isinstance(answer, str):
            raise RuntimeError(f"onnxruntime: {answer}")
        return answer

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.pid is not None:
            os.kill(self._process.pid, getattr(signal, name))


def _serve(pipe: Connection, model: bytes, feeds: dict[str, Array], threads: int) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    while True:
        seconds = pipe.recv()
        try:
            if seconds is None:
                pipe.send(session.run(None, feeds)[0])
                continue
            begin = time.perf_counter()
            while time.perf_counter() - begin < 0.2 * seconds:
                session.run(None, feeds)
            begin, count = time.perf_counter(), 0
            while not count or time.perf_counter() - begin < seconds:
                session.run(None, feeds)
                count += 1
            pipe.send((time.perf_counter() - begin) / count)
        except Exception as error:  # whatever the library throws is the row's sentence
            pipe.send(f"{type(error).__name__}: {error}"[:300])
