"""RNN, LSTM and GRU against torch.nn's contract: construction, calls, errors, life as a module."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastcell
from against_torch import (
    LAYERS,
    gradients,
    has_two_states,
    same_error,
    same_error_type,
    same_gradients,
    same_values,
    states,
    tensors,
    twins,
)
from tolerances import assert_close

T, B, I, H = 4, 3, 5, 6  # noqa: E741

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each_layer = pytest.mark.parametrize("name", LAYERS)


# --- construction ---------------------------------------------------------------------------------

POSITIONAL = {
    "RNN": [
        (I, H),
        (I, H, 2),
        (I, H, 2, "relu"),
        (I, H, 2, "tanh", False),
        (I, H, 2, "relu", True, True),
        (I, H, 2, "relu", True, False, 0.5),
        (I, H, 2, "relu", True, False, 0.5, True),
    ],
    "LSTM": [
        (I, H),
        (I, H, 2),
        (I, H, 2, False),
        (I, H, 2, True, True),
        (I, H, 2, True, False, 0.5),
        (I, H, 2, True, False, 0.5, True),
        (I, H, 2, True, False, 0.5, True, 4),
    ],
    "GRU": [
        (I, H),
        (I, H, 2),
        (I, H, 2, False),
        (I, H, 2, True, True),
        (I, H, 2, True, False, 0.5),
        (I, H, 2, True, False, 0.5, True),
    ],
}
KEYWORDS = [
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 3, "dropout": 0.25},
    {"bidirectional": True},
    {"dtype": torch.float64},
    {"device": "meta"},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
]


def constructions():
    for name in LAYERS:
        for args in POSITIONAL[name]:
            yield pytest.param(name, args, {}, id=f"{name}{args}")
        keywords = [*KEYWORDS]
        if name == "RNN":
            keywords += [{"nonlinearity": "relu"}, {"nonlinearity": "tanh", "bias": False}]
        if name == "LSTM":
            keywords += [{"proj_size": 2}, {"proj_size": 2, "num_layers": 2, "bidirectional": True}]
        for kwargs in keywords:
            yield pytest.param(name, (I, H), kwargs, id=f"{name}-{kwargs}")


@pytest.mark.parametrize(("name", "args", "kwargs"), [*constructions()])
def test_construction_is_torchs(name, args, kwargs):
    torch.manual_seed(3)
    ours = getattr(fastcell, name)(*args, **kwargs)
    after = torch.rand(1)
    torch.manual_seed(3)
    theirs = getattr(nn, name)(*args, **kwargs)

    assert torch.equal(torch.rand(1), after), "another number of random numbers was drawn"
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.RNNBase)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (key, mine), (other_key, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert (key, mine.shape, mine.dtype, mine.device) == (
            other_key,
            other.shape,
            other.dtype,
            other.device,
        )
        assert mine.is_meta or torch.equal(mine, other), key
    hidden = {"_parameters", "_flat_weights", "_flat_weight_refs"}
    assert {k: v for k, v in vars(ours).items() if k not in hidden} == {
        k: v for k, v in vars(theirs).items() if k not in hidden
    }
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in theirs.all_weights
    ]
    assert all(w is p for w, p in zip(ours._flat_weights, ours.parameters(), strict=True))


@each_layer
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((I,), {}),
        ((I, H, 1, "x"), {}),
        ((I, H, 1, "relu"), {"nonlinearity": "tanh"}),
        ((I, H), {"nonlinearity": "sigmoid"}),
        ((I, H), {"proj_size": H}),
        ((I, H), {"proj_size": -1}),
        ((I, H), {"dropout": 1.5, "num_layers": 2}),
        ((I, H), {"dropout": -0.5, "num_layers": 2}),
        ((I, H), {"dropout": True, "num_layers": 2}),
        ((I, H), {"dropout": "much"}),
        ((I, H), {"dropout": None}),
        ((I, H, 0), {}),
        ((I, H, -1), {}),
        ((I, H, 1.5), {}),
        ((0, H), {}),
        ((-3, H), {}),
        ((I, 0), {}),
        ((5.0, H), {}),
        ((I, 6.0), {}),
        (("5", H), {}),
        ((I, H), {"bias": 1}),
        ((I, H), {"bias": "True"}),
        ((I, H), {"batch_first": 1}),
        ((I, H), {"unknown": 1}),
        ((I, H), {"mode": "LSTM"}),
        ((I, H), {"dtype": torch.int64}),
        ((I, H), {"device": "nowhere"}),
        ((2**62, 2**61), {"device": "meta"}),
        ((I, H, 1, True, False, 0.0, False, 0, None, None, 0), {}),
    ],
    ids=str,
)
def test_construction_is_refused_as_by_torch(name, args, kwargs):
    if name == "LSTM" and (args, kwargs) == ((I, H, 1, "relu"), {"nonlinearity": "tanh"}):
        pytest.skip("LSTM takes no nonlinearity")
    same_error(lambda library: getattr(library, name)(*args, **kwargs))


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_projection_is_for_lstm_alone(name):
    same_error(lambda library: getattr(library, name)(I, H, proj_size=2))
    same_error(lambda library: getattr(library, name)(I, H, proj_size=0))


@each_layer
def test_dropout_of_a_single_layer_warns_as_torch(name):
    texts = []
    for library in (fastcell, nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(library, name)(I, H, dropout=0.5)
        texts.append([(w.category, str(w.message)) for w in caught])
    assert texts[0] == texts[1]
    assert texts[0][0][0] is UserWarning


# --- calls ----------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
]


def variants():
    for name in LAYERS:
        extra = {"RNN": [{"nonlinearity": "relu"}], "LSTM": [{"proj_size": 2}], "GRU": []}[name]
        for options in [*OPTIONS, *extra, *({**OPTIONS[3], **e} for e in extra)]:
            yield pytest.param(name, options, id=f"{name}-{options}")


def example(layer, form, dtype=torch.float32):
    """An input of the given form, and initial states that fit it."""
    torch.manual_seed(1)
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if form == "unbatched" else (B,)
    h = torch.randn(stacked, *batch, layer.proj_size or H, dtype=dtype)
    hx = (h, torch.randn(stacked, *batch, H, dtype=dtype)) if layer.mode == "LSTM" else h
    if form == "unbatched":
        return torch.randn(T, I, dtype=dtype), hx
    x = torch.randn(T, B, I, dtype=dtype)
    if layer.batch_first:
        x = x.transpose(0, 1)
    if form == "padded":
        return x, hx
    lengths = {"sorted": [T, 2, 1], "ragged": [1, T, 2]}[form]
    packed = pack_padded_sequence(
        x, torch.tensor(lengths), batch_first=layer.batch_first, enforce_sorted=form == "sorted"
    )
    return packed, hx


@pytest.mark.parametrize("form", ["padded", "unbatched", "sorted", "ragged"])
@pytest.mark.parametrize(("name", "options"), [*variants()])
def test_call_and_gradients_equal_torchs(name, options, form):
    ours, theirs = twins(name, I, H, **options, dtype=torch.float64)
    x, hx = example(theirs, form, torch.float64)
    for args in ((x,), (x, hx), (x, None)):
        same_values(ours(*args), theirs(*args))
    same_gradients(ours, theirs, lambda m: m(x, hx))
    same_gradients(ours, theirs, lambda m: m(x))
    # BPTT does not depend on the mode: torch differentiates a layer in evaluation too.
    same_gradients(ours.eval(), theirs.eval(), lambda m: m(x, hx))


@each_layer
def test_states_of_an_lstm_may_be_any_pair(name):
    ours, theirs = twins(name, I, H)
    x = torch.randn(T, B, I)
    hx = states(name, 1, B, H)
    if has_two_states(name):
        hx = list(hx)
    same_values(ours(x, hx), theirs(x, hx))
    same_values(ours(input=x, hx=hx), theirs(input=x, hx=hx))


@each_layer
def test_input_and_states_may_be_strided_or_expanded(name):
    ours, theirs = twins(name, I, H)
    x = torch.randn(T, I, 2 * B).transpose(1, 2)[:, ::2]
    wide = torch.randn(1, 1, H).expand(1, B, H)
    hx = (wide, wide) if has_two_states(name) else wide
    assert not x.is_contiguous()
    same_values(ours(x, hx), theirs(x, hx))
    same_values(ours(x[:1, :1].expand(T, B, I)), theirs(x[:1, :1].expand(T, B, I)))


@each_layer
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_dropout_draws_torchs_numbers(name, p, form):
    ours, theirs = twins(name, I, H, 3, dropout=p, bidirectional=True)
    x, hx = example(theirs, form)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        results.append((layer(x, hx), torch.rand(1)))
    same_values(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]), "the generator is left elsewhere"
    same_values(ours.eval()(x, hx), theirs.eval()(x, hx))


@each_layer
def test_attributes_may_change_between_calls(name):
    ours, theirs = twins(name, I, H, 2)
    x = torch.randn(T, T, I)
    for attribute, value in (("batch_first", True), ("dropout", 0.5)):
        setattr(ours, attribute, value)
        setattr(theirs, attribute, value)
        results = []
        for layer in (ours, theirs):
            torch.manual_seed(5)
            results.append(layer(x))
        same_values(*results)


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(name, batch_first):
    ours, theirs = twins(name, I, H, 2, batch_first=batch_first, bidirectional=True)
    x = torch.randn((0, T, I) if batch_first else (T, 0, I), requires_grad=True)
    mine, other = ours(x), theirs(x)
    assert mine[0].shape == other[0].shape
    same_values(mine, other)
    mine[0].sum().backward()
    assert x.grad.shape == x.shape
    for p in ours.parameters():
        assert p.grad is None or not p.grad.any()


@each_layer
def test_meta_device(name):
    ours, theirs = twins(name, I, H, 2, bidirectional=True, device="meta")
    for form in ("padded", "unbatched", "ragged"):
        x, _ = example(theirs, form)
        mine, other = ours(x.to("meta")), theirs(x.to("meta"))
        assert mine[0][0].shape == other[0][0].shape
        assert mine[0][0].is_meta
    ours.to_empty(device="cpu")
    filled = twins(name, I, H, 2, bidirectional=True)[0]
    ours.load_state_dict(filled.state_dict())
    x, hx = example(theirs, "padded")
    same_values(ours(x, hx), filled(x, hx))


@each_layer
@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_autocast_gives_torchs_dtypes(name, inside):
    ours, theirs = twins(name, I, H)
    x, hx = example(theirs, "padded", inside)
    with torch.autocast("cpu", torch.bfloat16):
        for args in ((x,), (x, hx)):
            mine, other = ours(*args), theirs(*args)
            for ours_, theirs_ in zip(tensors(mine), tensors(other), strict=True):
                assert ours_.dtype is theirs_.dtype
                # torch.nn.GRU rounds its products to bfloat16 and returns float32.
                assert_close(ours_, theirs_, dtype=torch.bfloat16, steps=T, length=I + H)
        with pytest.raises(RuntimeError, match=r"input\.size"):
            ours(x[..., :2])


@each_layer
def test_inference_mode_and_no_grad(name):
    ours, theirs = twins(name, I, H)
    x, hx = example(theirs, "padded")
    expected = theirs(x, hx)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            result = ours(x, hx)
        assert not result[0].requires_grad
        for mine, other in zip((result[0], *result[1:]), (expected[0], *expected[1:]), strict=True):
            same_values(mine, other)


@each_layer
def test_compiles_without_a_graph_break(name):
    layer = twins(name, I, H, 2, bidirectional=True)[0]
    x, hx = example(layer, "padded")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    same_values(compiled(x), layer(x))
    same_values(compiled(x, hx), layer(x, hx))
    packed, hx = example(layer, "ragged")
    same_values(compiled(packed, hx), layer(packed, hx))
    with pytest.raises(Exception, match="input_size"):
        compiled(x[..., :2])
    torch.compiler.reset()


# --- refused calls --------------------------------------------------------------------------------


def call(name, x, hx=None, **options):
    return lambda library: getattr(library, name)(I, H, 2, **options)(x, hx)


@each_layer
def test_wrong_input_is_refused_as_by_torch(name):
    x = torch.randn(T, B, I)
    unbatched = torch.randn(T, I)
    for bad in (
        torch.randn(I),
        torch.randn(1, T, B, I),
        torch.tensor(1.0),
        torch.randn(T, B, I + 1),
        torch.randn(T, B, I - 1),
        torch.randn(T, I + 1),
        x.double(),
        x.half(),
        x.long(),
        x.to("meta"),
        x[:0],
        x[:0, :0],
        unbatched[:0],
        [1.0, 2.0],
        None,
        x.numpy(),
        "text",
    ):
        same_error(call(name, bad))
    same_error(call(name, torch.randn(B, 0, I), batch_first=True))
    same_error(call(name, torch.randn(0, B, I, dtype=torch.double), dtype=torch.double))
    same_error(call(name, x, device="meta"))
    same_error(call(name, x[:0].to("meta"), device="meta"))
    same_error(lambda library: getattr(library, name)(I, H)())
    same_error(lambda library: getattr(library, name)(I, H)(x, None, None))


@each_layer
def test_wrong_states_are_refused_as_by_torch(name):
    x = torch.randn(T, B, I)
    for shape in ((2, H), (1, 2, B, H), (2, B + 1, H), (3, B, H), (2, B, H + 1), (1, B, H), (0,)):
        same_error(call(name, x, states(name, *shape)))
    for shape in ((2, 1, H), (H,), (2, H + 1), (3, H)):
        same_error(call(name, x[:, 0], states(name, *shape)))
    same_error(call(name, x, states(name, 2, B, H), batch_first=True))
    same_error(call(name, x, states(name, 2, B, H, device="meta")))
    same_error(call(name, x.to("meta"), states(name, 2, B, H)))
    same_error(call(name, x, "ab"))
    same_error(call(name, x, (torch.randn(2, B, H),)))
    same_error(call(name, x, (torch.randn(2, B, H),) * 3))
    same_error(call(name, x, 3))
    other = torch.randn(2, B, H) if has_two_states(name) else (torch.randn(2, B, H),) * 2
    same_error(call(name, x, other))
    if has_two_states(name):
        good, bad = torch.randn(2, B, H), torch.randn(2, B, H + 1)
        same_error(call(name, x, (good, bad)))
        same_error(call(name, x, (bad, good)))
        projected = {"proj_size": 2}
        same_error(call(name, x, (good, good), **projected))
        same_error(call(name, x, (good, torch.randn(2, B, 2)), **projected))
        same_error(call(name, x[:, 0], (torch.randn(2, H), torch.randn(2, H)), **projected))


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_states_of_another_dtype(name, dtype):
    x = torch.randn(T, B, I)
    hx = torch.zeros(2, B, H, dtype=dtype)
    if has_two_states(name):
        # torch.nn.LSTM's text comes from oneDNN here; ours is that of its other layers.
        same_error_type(call(name, x, (hx, hx)))
        hx = (hx, hx)
    else:
        same_error(call(name, x, hx))
    with pytest.raises(RuntimeError, match="must have the same dtype, but got") as caught:
        call(name, x, hx)(fastcell)
    if hasattr(caught.value, "__notes__"):
        assert "hx[0] is" in caught.value.__notes__[0]


@each_layer
def test_wrong_packed_input_is_refused_as_by_torch(name):
    def packed(data, sizes=(B, 1), **kwargs):
        return PackedSequence(data, torch.tensor(sizes), **kwargs)

    rows = torch.randn(B + 1, I)
    ragged = pack_padded_sequence(torch.randn(2, B, I), [1, 2, 1], enforce_sorted=False)
    same = same_error_type if has_two_states(name) else same_error
    for bad in (
        packed(rows[:, :2]),
        packed(rows.unsqueeze(-1).expand(-1, I, I)),
        packed(rows[:, 0]),
    ):
        same(call(name, bad))
    same_error(call(name, packed(rows.double())))
    same_error(call(name, PackedSequence(rows, torch.tensor([], dtype=torch.int64))))
    same_error(call(name, PackedSequence(rows, torch.tensor([B, 1], dtype=torch.int32))))
    same(call(name, packed(rows), states(name, 2, B + 1, H)))
    same(call(name, packed(rows), states(name, 3, B, H)))
    same_error_type(call(name, ragged, states(name, 2, B - 1, H)))
    if not has_two_states(name):
        same_error(call(name, packed(rows), torch.randn(2, H)))
        same_error(call(name, packed(rows), torch.randn(2, B, H).double()))
    for sizes in ((B, 2), (B, 1, 1), (1, B), (B + 1, 1, -1)):
        same_error_type(call(name, packed(rows, sizes)))
    # torch runs on and drops rows here; a kernel must not.
    with pytest.raises(RuntimeError, match="describe 3 rows of packed data, but there are 4"):
        call(name, packed(rows, (B,)))(fastcell)
    with pytest.raises(RuntimeError, match="must be positive"):
        call(name, packed(rows, (B, 1, 0)))(fastcell)
    with pytest.raises(RuntimeError, match="one-dimensional"):
        call(name, packed(rows, ((B, 1),)))(fastcell)


GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


@each_layer
def test_corrupt_weights_are_refused(name):
    x = torch.randn(T, B, I)
    rows = GATES[name] * H

    def with_weight(key, value):
        def corrupt(library):
            layer = getattr(library, name)(I, H, 2)
            setattr(layer, key, value)
            return layer(x)

        return corrupt

    same_error(with_weight("weight_hh_l1", None))
    same_error(with_weight("weight_ih_l0", None))
    same_error(with_weight("weight_hh_l1", nn.Parameter(torch.zeros(rows, H, device="meta"))))
    for key, shape in (
        ("weight_ih_l0", (rows, I + 1)),
        ("weight_hh_l0", (rows, H + 1)),
        ("weight_hh_l1", (rows + 1, H)),
        ("weight_hh_l1", (rows,)),
        ("bias_ih_l0", (rows - 1,)),
        ("bias_hh_l1", (rows, 1)),
    ):
        with pytest.raises(RuntimeError, match=r"Expected (weight|bias)_.h of size"):
            with_weight(key, nn.Parameter(torch.zeros(shape)))(fastcell)
    with pytest.raises(RuntimeError, match="one dtype"):
        with_weight("weight_hh_l1", nn.Parameter(torch.zeros(rows, H).double()))(fastcell)

    def with_attribute(key, value):
        def change(library):
            layer = getattr(library, name)(I, H, 2)
            setattr(layer, key, value)
            return layer(x)

        return change

    for key, value in (("num_layers", 3), ("bidirectional", True)):
        (same_error_type if name == "LSTM" else same_error)(with_attribute(key, value))
    for key, value in (("num_layers", 1), ("bias", False)):
        with pytest.raises(RuntimeError, match="Expected more weights"):
            with_attribute(key, value)(fastcell)
    with pytest.raises(RuntimeError, match="Expected weight_ih of size"):
        with_attribute("hidden_size", H + 1)(fastcell)
    same_error(with_attribute("dropout", 2.0))
    same_error(with_attribute("dropout", -1.0))
    if name == "RNN":
        same_error(with_attribute("mode", "RNN_SIGMOID"))


@each_layer
def test_no_wrong_size_reaches_a_kernel(name):
    class Trusting(getattr(fastcell, name)):
        def check_input(self, *args):
            pass

        def check_forward_args(self, *args):
            pass

    layer = Trusting(I, H)
    for args in ((torch.randn(T, B, I + 1),), (torch.randn(T, B, I), states(name, 1, B + 1, H))):
        with pytest.raises(RuntimeError, match="wrong size"):
            layer(*args)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(T, B, I).double())
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(T, B, I).double())


# --- state: saving, copying, moving ---------------------------------------------------------------


@each_layer
def test_state_dict_goes_both_ways(name):
    ours = getattr(fastcell, name)(I, H, 2, bidirectional=True)
    theirs = getattr(nn, name)(I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    theirs.load_state_dict(ours.state_dict())
    same_values(ours(x), theirs(x))
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.5)
    before = ours(x)[0]
    assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(theirs.state_dict())
    assert not torch.equal(ours(x)[0], before)
    same_values(ours(x), theirs(x))
    same_error(
        lambda library: getattr(library, name)(I, H).load_state_dict(
            getattr(nn, name)(I, H + 1).state_dict()
        )
    )


def round_trips():
    def through_file(layer):
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def through_pickle(layer):
        return pickle.loads(pickle.dumps(layer))

    return [copy.deepcopy, copy.copy, through_pickle, through_file]


@each_layer
@pytest.mark.parametrize("trip", round_trips(), ids=lambda f: f.__name__)
def test_copies_and_files(name, trip):
    ours, theirs = twins(name, I, H, 2, dropout=0.5, bidirectional=True)
    ours.eval()
    x, hx = example(theirs, "padded")
    expected = ours(x, hx)
    again = trip(ours)
    assert type(again) is type(ours)
    assert repr(again) == repr(ours)
    assert not again.training
    same_values(again(x, hx), expected)
    for flat, p in zip(again._flat_weights, again.parameters(), strict=True):
        assert flat is p
    if trip is not copy.copy:
        with torch.no_grad():
            next(again.parameters()).add_(1)
        same_values(ours(x, hx), expected)
        assert not torch.equal(again(x, hx)[0], expected[0])


@each_layer
def test_old_checkpoints(name):
    for missing in ((), ("proj_size",), ("proj_size", "_all_weights", "_flat_weights")):
        results = []
        for layer in twins(name, I, H, 2):
            state = layer.__getstate__()
            for key in missing:
                del state[key]
            if "_all_weights" in missing:
                # Before torch 1.0 the parameters themselves were stored under another name.
                state["all_weights"] = [list(layer.parameters())]
            old = type(layer).__new__(type(layer))
            old.__setstate__(state)
            results.append(old)
        ours, theirs = results
        assert ours.proj_size == theirs.proj_size == 0
        assert ours._flat_weights_names == theirs._flat_weights_names
        x, hx = example(theirs, "padded")
        same_values(ours(x, hx), theirs(x, hx))


@each_layer
def test_moving_between_dtypes(name):
    ours, theirs = twins(name, I, H, 2)
    for move in (
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(dtype=torch.float64, device="cpu"),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ):
        move(ours)
        move(theirs)
        ours.load_state_dict(theirs.state_dict())
        dtype = next(theirs.parameters()).dtype
        assert [p.dtype for p in ours._flat_weights] == [dtype] * 8
        if torch.isfinite(next(theirs.parameters())).all():
            theirs.reset_parameters()
            ours.load_state_dict(theirs.state_dict())
            x, hx = example(theirs, "padded", dtype)
            same_values(ours(x, hx), theirs(x, hx))


@each_layer
def test_flatten_parameters_is_kept(name):
    layer = getattr(fastcell, name)(I, H, 2)
    before = [p.data_ptr() for p in layer.parameters()]
    assert layer.flatten_parameters() is None
    assert [p.data_ptr() for p in layer.parameters()] == before


# --- parameters that are something else -----------------------------------------------------------


def both(pair, change):
    """Do the same to both layers and check that they still agree, forward and backward."""
    ours, theirs = pair
    for layer in pair:
        change(layer)
    x, hx = example(theirs, "padded", next(theirs.parameters()).dtype)
    same_values(ours(x, hx), theirs(x, hx))
    same_gradients(ours, theirs, lambda m: m(x, hx))


def step(layer):
    torch.manual_seed(2)
    x, hx = example(layer, "padded")
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.01)
    gradients(layer, lambda m: m(x, hx))
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@each_layer
def test_reparametrized_weights(name):
    def old_weight_norm(layer):
        nn.utils.weight_norm(layer, "weight_hh_l0")

    def set_g(layer):
        with torch.no_grad():
            layer.weight_hh_l0_g.mul_(2)

    pair = twins(name, I, H, 2)
    both(pair, old_weight_norm)
    both(pair, set_g)
    both(pair, step)
    both(pair, lambda m: nn.utils.remove_weight_norm(m, "weight_hh_l0"))
    both(pair, step)

    pair = twins(name, I, H, 2)
    both(pair, lambda m: parametrizations.weight_norm(m, "weight_hh_l0"))
    both(pair, step)
    both(pair, lambda m: parametrizations.weight_norm(m, "weight_ih_l1"))
    both(pair, step)
    ours = pair[0]
    x, hx = example(ours, "padded")
    same_values(copy.deepcopy(ours)(x, hx), ours(x, hx))
    with parametrize.cached():
        same_values(ours(x, hx), pair[1](x, hx))
    both(pair, lambda m: parametrize.remove_parametrizations(m, "weight_hh_l0"))
    both(pair, lambda m: parametrize.remove_parametrizations(m, "weight_ih_l1"))
    assert type(ours) is getattr(fastcell, name)
    both(pair, step)

    if name == "RNN":
        both(twins(name, I, H), lambda m: parametrizations.orthogonal(m, "weight_hh_l0"))


@each_layer
def test_a_parametrized_weight_is_not_kept_after_the_call(name):
    layer = getattr(fastcell, name)(I, H)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    seen = []
    layer.parametrizations.weight_hh_l0.register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(output))
    )
    layer(torch.randn(T, B, I))[0].sum().backward()
    gc.collect()
    assert len(seen) == 1, "the parametrization ran more than once"
    assert seen[0]() is None, "the computed weight outlives its call"


@each_layer
def test_pruned_weights(name):
    pair = twins(name, I, H, 2)
    both(pair, lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.3))
    both(pair, step)
    both(pair, lambda m: prune.remove(m, "weight_hh_l0"))
    both(pair, step)


@each_layer
def test_tied_replaced_and_dropped_weights(name):
    pair = twins(name, H, H, 2)

    def tie(layer):
        layer.weight_hh_l1 = layer.weight_hh_l0
        layer.weight_ih_l1 = layer.weight_ih_l0

    def replace(layer):
        torch.manual_seed(8)
        layer.weight_ih_l0 = nn.Parameter(torch.randn_like(layer.weight_ih_l0))

    def write(layer):
        layer.bias_hh_l0.data = torch.full_like(layer.bias_hh_l0, 0.25)
        layer.weight_hh_l0.data.mul_(0.5)

    def connection_dropout(layer):  # as WeightDrop does: a plain tensor in the parameter's place
        if "weight_raw" not in layer._parameters:
            raw = layer.weight_hh_l1
            del layer._parameters["weight_hh_l1"]
            layer.register_parameter("weight_raw", nn.Parameter(raw.detach().clone()))
        torch.manual_seed(9)
        layer.weight_hh_l1 = nn.functional.dropout(layer.weight_raw, 0.5)

    for change in (tie, replace, write, connection_dropout):
        for layer in pair:
            change(layer)
        ours, theirs = pair
        x = torch.randn(T, B, H)
        same_values(ours(x), theirs(x))
        if change is connection_dropout:
            for layer in pair:
                layer(x)[0].sum().backward()
            same_values(ours.weight_raw.grad, theirs.weight_raw.grad)
        else:
            same_gradients(ours, theirs, lambda m, x=x: m(x))


@each_layer
def test_weights_put_straight_into_flat_weights(name):
    pair = twins(name, I, H)
    torch.manual_seed(4)
    weights = [torch.randn_like(p) for p in pair[0].parameters()]
    x = torch.randn(T, B, I)
    before = pair[0](x)[0]
    for layer in pair:
        layer._flat_weights = list(weights)
    assert not torch.equal(pair[0](x)[0], before)
    same_values(pair[0](x), pair[1](x))


@each_layer
def test_a_deleted_weight_is_remembered_as_by_torch(name):
    pair = twins(name, I, H)
    for layer in pair:
        del layer.weight_hh_l0
    x = torch.randn(T, B, I)
    same_values(pair[0](x), pair[1](x))


@each_layer
def test_functional_call_leaves_no_trace(name):
    ours, theirs = twins(name, I, H, 2)
    x = torch.randn(T, B, I)
    torch.manual_seed(6)
    other = {key: torch.randn_like(p) for key, p in ours.named_parameters()}
    before = ours(x)
    same_values(
        torch.func.functional_call(ours, other, (x,)),
        torch.func.functional_call(theirs, other, (x,)),
    )
    same_values(ours(x), before)
    for flat, p in zip(ours._flat_weights, ours.parameters(), strict=True):
        assert flat is p


@each_layer
def test_part_of_the_parameters_frozen(name):
    pair = twins(name, I, H, 2, bidirectional=True)
    for frozen in (
        ["weight_hh_l0"],
        ["bias_ih_l0", "bias_hh_l0", "weight_ih_l0", "weight_hh_l0"],
        [key for key, _ in pair[0].named_parameters() if "weight" in key],
    ):
        for layer in pair:
            for key, p in layer.named_parameters():
                p.requires_grad_(key not in frozen)
        both(pair, lambda m: None)
    for layer in pair:
        layer.requires_grad_(False)
    x, hx = example(pair[0], "padded")
    assert not pair[0](x, hx)[0].requires_grad
    grads = []
    for layer in pair:
        leaf = x.clone().requires_grad_()
        layer(leaf, hx)[0].sum().backward()
        grads.append(leaf.grad)
    same_values(*grads)


@each_layer
def test_training_steps_are_torchs(name):
    pair = twins(name, I, H, 2, dtype=torch.float64)
    x, hx = example(pair[0], "ragged", torch.float64)
    target = torch.linspace(-1, 1, len(x.data) * H, dtype=torch.float64).view(-1, H)
    losses = []
    for layer in pair:
        optimizer = torch.optim.SGD(layer.parameters(), 0.5, momentum=0.9)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(layer(x, hx)[0].data, target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    assert losses[0][-1] < losses[0][0]
    same_values(*losses, steps=5 * T * 2)
    for mine, other in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        same_values(mine.data, other.data, steps=5 * T * 2)


@each_layer
def test_parameters_can_be_swapped_in_a_move(name):
    ours, theirs = twins(name, I, H)
    cell = getattr(fastcell, name + "Cell")(I, H)
    x = torch.randn(T, B, I)
    with torch.no_grad():  # a graph would hold the parameters too
        before = ours(x), cell(x[0])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for module in (ours, theirs, cell):
            module.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        same_values((ours(x), cell(x[0])), before)
    same_gradients(ours, theirs, lambda m: m(x))
