"""ONNX's operators RNN, GRU and LSTM, run by onnxruntime, as a peer with options.

ONNX's order: LSTM gates i o f c, peepholes i o f; GRU gates z r h. Coupled is input_forget, which
reads no block f.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcell
from tolerances import accumulation_length, assert_close

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

T, B, I, H = 6, 4, 5, 7  # noqa: E741
LENGTHS = [6, 3, 1, 5]
# What ours are called there, with alpha and beta where they have some.
NAMES = {
    "tanh": ("Tanh",),
    "relu": ("Relu",),
    "sigmoid": ("Sigmoid",),
    "identity": ("Affine", 1.0, 0.0),
    "softsign": ("Softsign",),
    "elu": ("Elu", 1.0),
}


def run(kind: str, layer: torch.nn.RNNBase, feeds: dict[str, Any], **attributes: Any) -> list[Any]:
    """Y (T, B, D*H) and the final states; ``feeds``: the operator's inputs, in order, or None."""
    directions = 2 if layer.bidirectional else 1
    if directions == 2:
        attributes["direction"] = "bidirectional"
    outputs = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    names = ["" if value is None else name for name, value in feeds.items()]
    node = onnx.helper.make_node(kind, names, outputs, hidden_size=H, **attributes)
    present = {name: value for name, value in feeds.items() if value is not None}
    given = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in present.items()
    ]
    wanted = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "graph", given, wanted),
        opset_imports=[onnx.helper.make_opsetid("", 14)],
        ir_version=8,
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    y, *states = session.run(None, present)
    return [y.transpose(0, 2, 1, 3).reshape(len(y), B, directions * H), *states]


def activations(names: list[str], directions: int) -> dict[str, list[Any]]:
    """The attributes; alphas and betas are lists of those alone that have some, in order."""
    chosen = [NAMES[name] for name in names * directions]
    found: dict[str, list[Any]] = {"activations": [c[0] for c in chosen]}
    for k, attribute in ((1, "activation_alpha"), (2, "activation_beta")):
        numbers = [c[k] for c in chosen if len(c) > k]
        if numbers:
            found[attribute] = numbers
    return found


def weights(layer: torch.nn.RNNBase, order: list[int | None]) -> dict[str, Any]:
    """W, R, B of the gates in ONNX's order; None: one that it wants and does not read."""
    given = dict(layer.named_parameters())

    def gates(name: str) -> np.ndarray:
        stacked = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            blocks = (
                given[f"{name}_l0{suffix}"].detach().view(-1, H, *given[name + "_l0"].shape[1:])
            )
            unread = torch.full_like(blocks[0], torch.nan)
            stacked.append(torch.cat([unread if k is None else blocks[k] for k in order]))
        return torch.stack(stacked).numpy()

    return {
        "W": gates("weight_ih"),
        "R": gates("weight_hh"),
        "B": np.concatenate((gates("bias_ih"), gates("bias_hh")), 1),
    }


def inputs(layer: torch.nn.RNNBase, states: int) -> tuple[Tensor, list[Tensor]]:
    """Input and initial states large enough for bounds; the weights likewise."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x = torch.randn(T, B, I, generator=generator)
    directions = 2 if layer.bidirectional else 1
    return x, [torch.randn(directions, B, H, generator=generator) for _ in range(states)]


def assert_same(ours: list[Tensor], theirs: list[np.ndarray], features: int = I) -> None:
    length = accumulation_length(features, H)
    for name, a, b in zip(("Y", "Y_h", "Y_c"), ours, theirs, strict=False):
        assert_close(a, b, dtype=torch.float32, steps=T, length=length, name=name)


LSTMS = [
    {"peephole": peephole, "coupled": coupled, **options}
    for peephole, coupled in itertools.product([False, True], repeat=2)
    for options in (
        {},
        {"activation": "relu", "output_activation": "softsign"},
        {"activation": "elu", "output_activation": "identity", "cell_clip": 1.2},
        {"activation": "sigmoid", "output_activation": "elu", "cell_clip": 0.9},
        {"activation": "identity", "output_activation": "relu", "cell_clip": 1.5},
    )
]


def run_lstm(
    layer: fastcell.LSTM, x: Tensor, states: list[Tensor], lengths: list[int] | None = None
) -> list[np.ndarray]:
    """onnxruntime's Y, Y_h, Y_c of our layer."""
    rows = None
    if layer.peephole:
        order = (0, 1, None) if layer.coupled else (0, 2, 1)
        own = [p.detach() for name, p in layer.named_parameters() if "peephole" in name]
        unread = torch.full((H,), torch.nan)
        rows = np.stack([torch.cat([unread if k is None else p[k] for k in order]) for p in own])
    feeds = {
        "X": x.numpy(),
        **weights(layer, [0, 2, None, 1] if layer.coupled else [0, 3, 1, 2]),
        "sequence_lens": None if lengths is None else np.array(lengths, np.int32),
        "initial_h": states[0].numpy(),
        "initial_c": states[1].numpy(),
        "P": rows,
    }
    more: dict[str, Any] = {"input_forget": 1} if layer.coupled else {}
    if layer.cell_clip is not None:
        more["clip"] = layer.cell_clip
    names = ["sigmoid", layer.activation, layer.output_activation]
    return run("LSTM", layer, feeds, **more, **activations(names, 1 + layer.bidirectional))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", LSTMS, ids=lambda o: "-".join(map(str, o.values())))
def test_lstm(options, lengths, bidirectional):
    layer = fastcell.LSTM(I, H, bidirectional=bidirectional, **options)
    x, states = inputs(layer, 2)
    theirs = run_lstm(layer, x, states, lengths)
    with torch.no_grad():
        given = None if lengths is None else torch.tensor(lengths)
        output, (h, c) = layer(x, tuple(states), lengths=given)
    assert_same([output, h, c], theirs)


def test_no_bound_is_put_on_c():
    """As onnxruntime; ONNX has clip "applied to the input of activations", of which c is one."""
    layer = fastcell.LSTM(I, H, output_activation="identity", cell_clip=0.5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    x, states = torch.zeros(1, B, I), [torch.zeros(1, B, H), torch.full((1, B, H), 4.0)]
    y, _, c = run_lstm(layer, x, states)
    with torch.no_grad():
        output, (_, final) = layer(x, tuple(states))
    assert np.all(c == 2.0)
    assert torch.all(final == 2.0)  # sigmoid(0) * 4
    assert np.all(y == 1.0)  # sigmoid(0) * 2
    assert torch.all(output == 1.0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("activation", list(NAMES))
def test_gru(activation, reset_after, lengths, bidirectional):
    layer = fastcell.GRU(
        I, H, bidirectional=bidirectional, activation=activation, reset_after=reset_after
    )
    x, (h,) = inputs(layer, 1)
    feeds = {
        "X": x.numpy(),
        **weights(layer, [1, 0, 2]),
        "sequence_lens": None if lengths is None else np.array(lengths, np.int32),
        "initial_h": h.numpy(),
    }
    more = activations(["sigmoid", activation], 1 + bidirectional)
    theirs = run("GRU", layer, feeds, linear_before_reset=int(reset_after), **more)
    with torch.no_grad():
        given = None if lengths is None else torch.tensor(lengths)
        output, h = layer(x, h, lengths=given)
    assert_same([output, h], theirs)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn(nonlinearity, lengths, bidirectional):
    layer = fastcell.RNN(I, H, nonlinearity=nonlinearity, bidirectional=bidirectional)
    x, (h,) = inputs(layer, 1)
    feeds = {
        "X": x.numpy(),
        **weights(layer, [0]),
        "sequence_lens": None if lengths is None else np.array(lengths, np.int32),
        "initial_h": h.numpy(),
    }
    theirs = run("RNN", layer, feeds, **activations([nonlinearity], 1 + bidirectional))
    with torch.no_grad():
        given = None if lengths is None else torch.tensor(lengths)
        output, h = layer(x, h, lengths=given)
    assert_same([output, h], theirs)
