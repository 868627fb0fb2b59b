"""convert and revert: what is swapped, what stays as it was, and what is left alone and why."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastcell
from against_torch import CELLS, LAYERS, same_gradients, same_values
from fastcell.convert import survey

T, B, I, H = 4, 3, 5, 6  # noqa: E741

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Model(nn.Module):
    """Every kind of recurrent module, in several places."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, I)
        self.layers = nn.ModuleDict(
            {
                "rnn": nn.RNN(I, H, nonlinearity="relu"),
                "lstm": nn.LSTM(H, H, 2, dropout=0.3, proj_size=4, bidirectional=True),
                "gru": nn.GRU(8, H, bias=False, batch_first=False),
            }
        )
        self.cells = nn.ModuleList([nn.RNNCell(H, H), nn.LSTMCell(H, H), nn.GRUCell(H, H)])
        self.same = self.layers["gru"]
        self.head = nn.Sequential(nn.Linear(H, H), nn.Tanh())

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers.values():
            x = layer(x)[0]
        h = self.cells[0](x[-1])
        h = self.cells[1](h)[0]
        return self.head(self.cells[2](h))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


TOKENS = torch.arange(T * B).view(T, B) % 11


def types(model):
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def test_every_layer_is_swapped_and_swapped_back(model):
    model.eval()
    before = types(model)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    expected = model(TOKENS)
    text = repr(model)

    assert fastcell.convert(model) is model
    for name, kind in types(model).items():
        changed = before[name].__name__ in (*LAYERS, *CELLS)
        assert kind is (getattr(fastcell, before[name].__name__) if changed else before[name])
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.same is model.layers["gru"]
    assert repr(model) == text
    same_values(model(TOKENS), expected)

    assert fastcell.revert(model) is model
    assert types(model) == before
    assert {name: dict(vars(module)) for name, module in modules.items()} == attributes
    same_values(model(TOKENS), expected)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_a_layer_by_itself(name):
    layer = getattr(nn, name)(I, H)
    assert fastcell.convert(layer) is layer
    assert type(layer) is getattr(fastcell, name)
    assert fastcell.revert(layer) is layer
    assert type(layer) is getattr(nn, name)


def test_twice_is_once(model):
    before = types(model)
    fastcell.convert(fastcell.convert(model))
    fastcell.revert(fastcell.revert(model))
    assert types(model) == before


def test_a_converted_model_trains_as_before(model):
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, twin)]
    initial = [p.detach().clone() for p in model.layers.parameters()]
    fastcell.convert(model)
    for _ in range(3):
        outputs = []
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            torch.manual_seed(7)  # the dropout is the same
            optimizer.zero_grad()
            outputs.append(m(TOKENS))
            outputs[-1].square().sum().backward()
            optimizer.step()
        same_values(*outputs, steps=100)
    for before, after in zip(initial, model.layers.parameters(), strict=True):
        assert not torch.equal(before, after), "an optimizer from before does not train it"
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        same_values(mine.data, other.data, steps=1000)


def test_flags_hooks_and_attributes_stay(model):
    layer = model.layers["lstm"]
    seen = []
    layer.register_forward_hook(lambda m, args, output: seen.append(type(m)))
    layer.register_full_backward_hook(lambda m, grads, outputs: seen.append("backward"))
    layer.weight_hh_l0.requires_grad_(False)
    layer.note = "mine"
    layer.eval()
    fastcell.convert(model)
    assert not layer.training
    assert model.training
    assert layer.note == "mine"
    assert not layer.weight_hh_l0.requires_grad
    model(TOKENS).sum().backward()
    assert seen == [fastcell.LSTM, "backward"]
    assert layer.weight_hh_l0.grad is None
    assert layer.weight_ih_l0.grad is not None


def test_state_dict_and_copies(model):
    fastcell.convert(model)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    same_values(model.eval()(TOKENS), plain.eval()(TOKENS))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert types(again) == types(model)
        same_values(again(TOKENS), model(TOKENS))
        assert types(fastcell.revert(again)) == types(plain)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_parametrized_layers(name):
    suffix = "" if name.endswith("Cell") else "_l0"
    weight, other = "weight_hh" + suffix, "weight_ih" + suffix
    x = torch.randn(T, B, I)[0] if suffix == "" else torch.randn(T, B, I)
    layer = parametrizations.weight_norm(getattr(nn, name)(I, H), weight)
    copied, twin = copy.deepcopy(layer), copy.deepcopy(layer)
    model = nn.ModuleList([layer, copied])
    fastcell.convert(model)
    assert isinstance(layer, getattr(fastcell, name))
    assert type(layer).__name__ == f"Parametrized{name}"
    assert type(layer) is type(copied)
    assert parametrize.is_parametrized(layer, weight)
    same_values(layer(x), twin(x))
    same_gradients(layer, twin, lambda m: m(x))

    parametrizations.weight_norm(layer, other)  # added afterwards, it is kept too
    fastcell.revert(model)
    assert isinstance(layer, getattr(nn, name))
    assert parametrize.is_parametrized(layer, other)
    same_values(layer(x), parametrizations.weight_norm(twin, other)(x))
    fastcell.convert(layer)
    parametrize.remove_parametrizations(layer, weight)
    parametrize.remove_parametrizations(layer, other)
    assert type(layer) is getattr(fastcell, name)
    assert type(fastcell.revert(layer)) is getattr(nn, name)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weight_norm_pruning_and_tied_weights():
    x = torch.randn(T, B, H)
    layer = nn.utils.weight_norm(nn.LSTM(H, H, 2), "weight_hh_l0")
    prune.l1_unstructured(layer, "weight_ih_l0", amount=0.3)
    layer.weight_hh_l1 = layer.weight_ih_l1
    expected = layer(x)
    fastcell.convert(layer)
    same_values(layer(x), expected)
    assert layer.weight_hh_l1 is layer.weight_ih_l1
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0_g.grad is not None
    nn.utils.remove_weight_norm(layer, "weight_hh_l0")
    prune.remove(layer, "weight_ih_l0")
    same_values(layer(x), fastcell.revert(layer)(x))


class Forgetful(nn.LSTM):
    def forward(self, input, hx=None):
        output, _ = super().forward(input)
        return output, None


def left_alone(model):
    """(names, reasons) in the warning of convert(model)."""
    before = types(model)
    with pytest.warns(UserWarning, match="left .* alone") as caught:
        fastcell.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    lines = str(caught[0].message).splitlines()[1:]
    for line in lines:
        name = line.strip().split(":")[0]
        assert types(model)[name] is before[name]
    return lines


def test_what_is_left_alone_is_said_and_why():
    replaced = nn.GRU(I, H)
    replaced.forward = lambda *args: None
    model = nn.ModuleDict(
        {
            "plain": nn.LSTM(I, H),
            "subclass": Forgetful(I, H),
            "replaced": replaced,
            "complex": nn.RNN(I, H, dtype=torch.complex64),
            "parametrized": parametrizations.weight_norm(Forgetful(I, H), "weight_hh_l0"),
        }
    )
    lines = left_alone(model)
    assert type(model["plain"]) is fastcell.LSTM
    assert [line.strip().split(":")[0] for line in lines] == [
        "subclass",
        "replaced",
        "complex",
        "parametrized",
    ]
    assert "derive it from fastcell.LSTM" in lines[0]
    assert f"{__name__}.Forgetful is a subclass of torch.nn.LSTM" in lines[0]
    assert "forward was replaced" in lines[1]
    assert "no kernels for torch.complex64" in lines[2]
    assert "derive it from fastcell.LSTM" in lines[3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.filterwarnings("ignore:.*TypedStorage.*")
def test_quantized_and_scripted_layers_are_left_alone():
    model = nn.Sequential()
    model.scripted = torch.jit.script(nn.LSTM(I, H))
    model.quantizable = torch.ao.nn.quantizable.LSTM(I, H)
    model.quantized = torch.ao.nn.quantized.dynamic.LSTM(I, H)
    lines = left_alone(model)
    assert len(lines) == 3
    assert "TorchScript" in lines[0]
    assert "quantization" in lines[1]
    assert "quantization" in lines[2]


def test_a_device_without_kernels_is_left_alone():
    model = nn.LSTM(I, H)

    class Elsewhere(nn.Parameter):
        @property
        def device(self):
            return torch.device("xpu", 0)

    model.weight_hh_l0 = Elsewhere(model.weight_hh_l0.data)
    with pytest.warns(UserWarning, match="no kernels for device type 'xpu'"):
        fastcell.convert(model)
    assert type(model) is nn.LSTM


def test_layers_that_were_fastcells_stay_so(model):
    own = fastcell.GRU(I, H)
    model.own = own
    fastcell.convert(model)
    states = {finding.name: finding.state for finding in survey(model)}
    assert states["own"] == "fastcell"
    assert states["layers.gru"] == "converted"
    assert "same" not in states, "a shared module is told once"
    fastcell.revert(model)
    assert type(own) is fastcell.GRU
    assert type(model.same) is nn.GRU
    assert {f.state for f in survey(model) if f.name != "own"} == {"torch"}


def test_survey_changes_nothing(model):
    model.sub = Forgetful(I, H)
    before = types(model)
    findings = survey(model)
    assert types(model) == before
    assert len(findings) == 7
    assert str(findings[0]) == "layers.rnn: RNN, torch"
    assert str(findings[-1]).startswith("sub: Forgetful, left: ")


def test_a_subclass_of_ours_is_ours():
    class Mine(fastcell.LSTM):
        pass

    model = nn.Sequential(Mine(I, H))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastcell.convert(model)
        fastcell.revert(model)
    assert type(model[0]) is Mine


def test_nothing_to_do_is_no_warning():
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastcell.convert(model) is model
        assert fastcell.revert(model) is model


@pytest.mark.parametrize("function", [fastcell.convert, fastcell.revert, survey])
@pytest.mark.parametrize("thing", [None, nn.LSTM, "model", [nn.Linear(1, 1)]])
def test_only_modules_are_taken(function, thing):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got"):
        function(thing)


def test_swapped_layers_are_logged(model, caplog):
    with caplog.at_level("INFO", logger="fastcell"):
        fastcell.convert(model)
        fastcell.revert(model)
    assert "converted layers.lstm" in caplog.messages
    assert "reverted cells.1" in caplog.messages
    assert len(caplog.messages) == 12


def test_a_compiled_model_follows(model):
    torch.compiler.reset()
    compiled = torch.compile(model.cells[2], backend="eager")
    x = torch.randn(B, H)
    expected = compiled(x)
    fastcell.convert(compiled)
    assert type(model.cells[2]) is fastcell.GRUCell
    same_values(compiled(x), expected)
    torch.compiler.reset()
