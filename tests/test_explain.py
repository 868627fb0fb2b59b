"""``fastcell.explain``: it says what a call does, and says it before."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence

import fastcell
from fastcell import _core
from fastcell.explain import explain
from fastcell.packing import clear_packed_weights


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_cpu_tensors_run_on_the_kernels(name, dtype):
    layer = getattr(fastcell, name)(3, 5, dtype=dtype)
    for shape in [(4, 3), (3,)] if name.endswith("Cell") else [(7, 4, 3), (7, 3)]:
        said = explain(layer, torch.randn(shape, dtype=dtype))
        assert (said.engine, said.path, said.isa) == ("cpu", "kernel", _core.isa())
        assert (said.dtype, said.arithmetic, said.autocast) == (dtype, dtype, None)
        assert said.threads == torch.get_num_threads()
        assert said.gradients
        assert said.schedule is not None
        assert str(layer) in str(said)
        assert _core.isa() in str(said)
    assert explain(layer).schedule is None


def test_packed_weights_are_held_after_the_first_call_and_until_they_change():
    clear_packed_weights()
    layer, x = fastcell.GRU(3, 17, 2), torch.randn(2, 4, 3)
    said = explain(layer, x)
    assert not said.packed
    assert said.packed_bytes >= 4 * sum(w.numel() for w in layer.parameters() if w.dim() == 2)
    layer(x)
    assert explain(layer, x).packed
    with torch.no_grad():
        layer.weight_hh_l1.add_(1)
    assert not explain(layer, x).packed


def test_schedule_follows_threads_and_shape(two_threads):
    layer = fastcell.LSTM(64, 128, bidirectional=True)
    assert "directions" in explain(layer, torch.randn(20, 4, 64)).schedule
    layer = fastcell.LSTM(64, 128)
    assert "the hidden units over 2 threads" in explain(layer, torch.randn(20, 1, 64)).schedule
    assert "the batch in 2 parts" in explain(layer, torch.randn(20, 64, 64)).schedule
    first = fastcell.LSTM(64, 128, batch_first=True)
    assert "the batch in 2 parts" in explain(first, torch.randn(64, 20, 64)).schedule
    ragged = pack_sequence([torch.randn(20, 64) for _ in range(64)])
    assert "the hidden units over 2 threads" in explain(layer, ragged).schedule
    torch.set_num_threads(1)
    said = explain(layer, torch.randn(20, 64, 64))
    assert said.threads == 1
    assert "one does all" in said.schedule


def test_gradients_are_kept_only_where_they_are_wanted():
    layer, x = fastcell.RNN(3, 5), torch.randn(2, 1, 3)
    assert explain(layer, x).gradients
    with torch.no_grad():
        assert not explain(layer, x).gradients
    layer.requires_grad_(False)
    assert not explain(layer, x).gradients
    assert explain(layer, x.requires_grad_()).gradients


def test_autocast_is_named():
    layer, x = fastcell.LSTM(3, 5), torch.randn(2, 1, 3)
    layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = explain(layer, x)
        assert layer(x)[0].dtype is said.autocast is torch.bfloat16
        assert said.arithmetic is torch.float32
        assert not said.packed
        assert "bfloat16" in str(said)
        gru, cell = fastcell.GRU(3, 5), fastcell.LSTMCell(3, 5)
        assert explain(gru, x).autocast is None
        assert gru(x)[0].dtype is torch.float32
        assert explain(cell, x[0]).autocast is None
        assert cell(x[0])[0].dtype is torch.float32
    half = layer.to(torch.bfloat16)
    said = explain(half, x.to(torch.bfloat16))
    assert (said.dtype, said.arithmetic) == (torch.bfloat16, torch.float32)
    assert (said.path, said.products) == ("kernel", "bfloat16")
    assert not said.packed
    assert "packed by every call" in str(said)
    with torch.no_grad():
        half(x.to(torch.bfloat16))
        said = explain(half, x.to(torch.bfloat16))
    assert said.packed
    assert "already packed" in str(said)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_quantized_layers_and_cells(dtype):
    x = torch.randn(2, 1, 3)
    name = str(dtype).removeprefix("torch.")
    for module, given in ((fastcell.LSTM(3, 5), x), (torch.nn.GRUCell(3, 5), x[0])):
        small = fastcell.quantize(module, dtype)
        assert explain(small).products == name
        small(given)
        said = explain(small, given)
        assert (said.engine, said.path, said.products) == ("cpu", "kernel", name)
        assert (said.dtype, said.packed) == (torch.float32, True)
        assert f"products of {name}" in str(said)


def test_meta_tensors_have_shapes_only():
    layer = fastcell.LSTM(3, 5, device="meta")
    said = explain(layer, torch.empty(2, 1, 3, device="meta"))
    assert (said.engine, said.path, said.isa, said.packed_bytes) == ("meta", "operator", None, None)


def test_forward_mode_takes_the_composite():
    layer, x = fastcell.LSTM(3, 5), torch.randn(2, 1, 3)
    with forward_ad.dual_level():
        said = explain(layer, x)
    assert (said.engine, said.path, said.isa) == ("torch", "composite", None)
    assert "forward-mode" in said.reason


def test_it_sees_one_bias_missing_in_a_cell_and_relu():
    cell = fastcell.RNNCell(3, 5, nonlinearity="relu")
    cell.bias_ih = None
    said = explain(cell, torch.randn(2, 3))
    assert said.path == "kernel"
    assert cell(torch.randn(2, 3)).shape == (2, 5)


@pytest.mark.parametrize("module", [torch.nn.LSTM(3, 5), torch.nn.Linear(3, 5), "LSTM", None])
def test_what_is_no_layer_of_ours_is_refused(module):
    with pytest.raises(TypeError, match="takes a fastcell layer or cell"):
        explain(module)


def test_input_that_does_not_fit_is_refused():
    layer = fastcell.LSTM(3, 5)
    with pytest.raises(RuntimeError, match="input size 4"):
        explain(layer, torch.randn(2, 1, 4))
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        explain(layer, torch.randn(2, 1, 1, 3))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layer_normalisation_is_shared_out_in_its_own_way(kind):
    layer = getattr(fastcell, kind)(4, 5, layer_norm=True)
    found = fastcell.explain(layer, torch.zeros(3, 2, 4))
    assert found.engine == "cpu"
    assert "two barriers per step" in found.schedule
    assert not found.packed
    assert found.packed_bytes is None
    assert fastcell.explain(layer).schedule is None
    assert fastcell.explain(layer.bfloat16(), torch.zeros(3, 2, 4).bfloat16()).products == "exact"
    cell = getattr(fastcell, kind + "Cell")(4, 5, layer_norm=True)
    assert "two barriers per step" in fastcell.explain(cell, torch.zeros(2, 4)).schedule
