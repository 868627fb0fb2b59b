"""What torch's autograd promises of every layer, on the kernels and behind the operator."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import fastcell
from against_torch import CELLS, LAYERS, same_values, states, tensors, twins
from support import assert_equal_bits

EVERY = [*LAYERS, *CELLS]


def make(name, **kwargs):
    """Two equal modules and an input."""
    ours, theirs = twins(name, 3, 4, dtype=torch.float64, **kwargs)
    shape = (5, 3) if name.endswith("Cell") else (6, 5, 3)
    return ours, theirs, torch.randn(shape, dtype=torch.float64, requires_grad=True)


def loss(module, *inputs):
    return sum((i + 1) * t.square().sum() for i, t in enumerate(tensors(module(*inputs))))


def gradients(module, x, **kwargs):
    return torch.autograd.grad(loss(module, x), [x, *module.parameters()], **kwargs)


def assert_same(actual, expected):
    for mine, theirs in zip(actual, expected, strict=True):
        assert_equal_bits(mine, theirs)


@pytest.mark.parametrize("name", EVERY)
def test_retained_graph_gives_the_same_again(name):
    ours, _, x = make(name)
    value = loss(ours, x)
    leaves = [x, *ours.parameters()]
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    assert_same(torch.autograd.grad(value, leaves), first)


@pytest.mark.parametrize("name", EVERY)
def test_backward_twice_raises_as_in_torch(name):
    messages = []
    ours, theirs, x = make(name)
    for module in (ours, theirs):
        value = loss(module, x)
        value.backward()
        with pytest.raises(
            RuntimeError, match="backward through the graph a second time"
        ) as caught:
            value.backward()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("what", ["weight", "input", "state"])
def test_a_change_in_place_before_backward_raises(name, what):
    module, _, x = make(name)
    shape = (5, 4) if name.endswith("Cell") else (1, 5, 4)
    hx = states(name, *shape, dtype=torch.float64)
    value = loss(module, x, hx)
    changed = {
        "weight": next(p for n, p in module.named_parameters() if "weight_hh" in n),
        "input": x,
        "state": hx[0] if isinstance(hx, tuple) else hx,
    }[what]
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("name", EVERY)
def test_an_optimizer_step_after_backward_is_seen_by_the_next_call(name):
    ours, theirs, x = make(name)
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.001)
        before = tensors(module(x))[0]
        for _ in range(3):
            optimizer.zero_grad()
            loss(module, x).backward()
            optimizer.step()
        assert (tensors(module(x))[0] - before).abs().max() > 1e-3
    same_values(ours(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_final_states_may_be_changed_in_place_and_the_output_without_a_graph(name, batch_first):
    ours, theirs, x = make(name, batch_first=batch_first)
    results = []
    for module in (ours, theirs):
        with torch.no_grad():
            output = module(x)[0].mul_(2)
        final = tensors(module(x)[1])[0].mul_(2)
        results.append((output, torch.autograd.grad(final.square().sum(), x)))
    same_values(*results)


CHANGES = {
    "relu_": lambda y: y.relu_(),
    "a residual": lambda y: y.add_(1),
    "a part": lambda y: y[-1].zero_(),
    "dropout": lambda y: torch.nn.functional.dropout(y, 1.0, inplace=True),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("change", CHANGES)
def test_the_output_may_be_changed_in_place_before_backward(name, change):
    """As torch.nn's layers allow, but the LSTM that oneDNN runs: ReLU(inplace=True), y += x."""
    ours, theirs, x = make(name)
    found = []
    for layer in (ours, theirs):
        y = tensors(layer(x))[0]
        if layer is theirs:  # torch.nn.RNNCell's is what its tanh kept
            y = y.clone()
        CHANGES[change](y)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("batched", [True, False])
def test_the_state_of_a_cell_can_be_detached_in_place(name, batched):
    ours, _, x = make(name)
    for h in tensors(ours(x if batched else x[0])):
        h.detach_()
        assert not h.requires_grad


@pytest.mark.parametrize("name", EVERY)
def test_hooks_on_parameters_and_tensors(name):
    ours, _, x = make(name)
    plain = gradients(ours, x)
    seen = []
    for leaf in [x, *ours.parameters()]:
        leaf.register_hook(lambda g: seen.append(g) or g * 2)
    assert_same(gradients(ours, x), [g * 2 for g in plain])
    assert len(seen) == len(plain)


def test_post_accumulate_hooks_can_step_in_backward():
    ours, _, x = make("LSTM")
    before = [p.detach().clone() for p in ours.parameters()]

    def step(p):
        with torch.no_grad():
            p -= p.grad
        p.grad = None

    for p in ours.parameters():
        p.register_post_accumulate_grad_hook(step)
    loss(ours, x).backward()
    for p, old in zip(ours.parameters(), before, strict=True):
        assert p.grad is None
        assert not torch.equal(p, old)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_of_a_subset(name):
    ours, theirs, x = make(name)
    everything = gradients(ours, x)
    leaves = [x, *ours.parameters()]
    for i, leaf in enumerate(leaves):
        assert_equal_bits(torch.autograd.grad(loss(ours, x), leaf)[0], everything[i])
    for frozen in range(len(list(ours.parameters()))):
        for module in (ours, theirs):
            for i, p in enumerate(module.parameters()):
                p.requires_grad_(i != frozen)
        rest = [x, *[p for p in ours.parameters() if p.requires_grad]]
        found = torch.autograd.grad(loss(ours, x), rest)
        assert_same(found, [g for i, g in enumerate(everything) if i != frozen + 1])


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_accumulate(name):
    ours, _, x = make(name)
    loss(ours, x).backward()
    once = [p.grad.clone() for p in ours.parameters()]
    loss(ours, x).backward()
    assert_same([p.grad for p in ours.parameters()], [g * 2 for g in once])


@pytest.mark.parametrize("name", LAYERS)
def test_expanded_strided_and_negated_tensors(name):
    """Of input, states and incoming gradients, none has to be dense."""
    ours, _, _ = make(name, bidirectional=True)
    z = torch.randn(6, 5, 3, dtype=torch.complex128)
    inputs = {
        "negated": z.conj().imag,
        "transposed": torch.randn(5, 6, 3, dtype=torch.float64).transpose(0, 1),
        "expanded": torch.randn(1, 1, 3, dtype=torch.float64).expand(6, 5, 3),
        "every other": torch.randn(12, 5, 6, dtype=torch.float64)[::2, :, ::2],
        "columns": torch.randn(3, 5, 6, dtype=torch.float64).permute(2, 1, 0),
    }
    assert inputs["negated"].is_neg()
    for x in inputs.values():
        for state in (
            z[:2, :, :1].conj().imag.expand(2, 5, 4),
            torch.ones(4, 5, 2).double().mT[::2],
        ):
            if state.shape != (2, 5, 4):
                state = state.mT.expand(2, 5, 2).repeat(1, 1, 2)
            hx = (state, state) if name == "LSTM" else state
            dense = state.resolve_neg().contiguous().clone()
            results = []
            for x_, hx_ in (
                (x, hx),
                (x.resolve_neg().contiguous().clone(), (dense, dense) if name == "LSTM" else dense),
            ):
                x_ = x_.detach().requires_grad_()
                output, final = ours(x_, hx_)
                weight = z[:, :, :1].conj().imag.expand_as(output)
                grads = torch.autograd.grad(
                    [output, tensors(final)[0]],
                    [x_, *ours.parameters()],
                    [weight, state],
                )
                results.append([output, *grads])
            assert_same(*results)


@pytest.mark.parametrize("name", LAYERS)
def test_saved_tensor_hooks(name):
    ours, _, x = make(name, num_layers=2, batch_first=True)
    expected = gradients(ours, x)
    packed = []

    def pack(t):
        packed.append(t.numel())
        return t.tolist() if t.dtype is torch.int64 else (t.clone(),)

    def unpack(t):  # in another layout of memory
        return t[0].contiguous() if isinstance(t, tuple) else torch.tensor(t)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        value = loss(ours, x)
    assert_same(torch.autograd.grad(value, [x, *ours.parameters()]), expected)
    assert sum(packed) > sum(p.numel() for p in ours.parameters())
    with torch.autograd.graph.save_on_cpu():
        value = loss(ours, x)
    assert_same(torch.autograd.grad(value, [x, *ours.parameters()]), expected)


def flat(module):
    """The reentrant checkpoint follows no tensor inside of a tuple in a tuple."""
    return lambda x: tuple(tensors(module(x)))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(name, use_reentrant):
    ours, _, x = make(name)
    expected = gradients(ours, x)
    loss(lambda x: checkpoint(flat(ours), x, use_reentrant=use_reentrant), x).backward()
    assert_same([x.grad, *[p.grad for p in ours.parameters()]], expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_draws_the_same_dropout_again(use_reentrant):
    ours, _, x = make("LSTM", num_layers=3, dropout=0.5)
    torch.manual_seed(1)
    expected = gradients(ours, x)
    torch.manual_seed(1)
    loss(lambda x: checkpoint(flat(ours), x, use_reentrant=use_reentrant), x).backward()
    assert_same([x.grad, *[p.grad for p in ours.parameters()]], expected)


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode_and_no_grad(name):
    ours, theirs, x = make(name)
    with torch.inference_mode():
        result = ours(x)
        assert all(t.is_inference() for t in tensors(result))
        same_values(result, theirs(x))
        inside = getattr(fastcell, name)(3, 4, dtype=torch.float64)  # weights without a version
        inside.load_state_dict(ours.state_dict())
        same_values(inside(x), result)
        next(inside.parameters()).mul_(2)
        next(theirs.parameters()).mul_(2)
        same_values(inside(x), theirs(x))
    with torch.no_grad():
        assert not any(t.requires_grad for t in tensors(ours(x)))
    ours.requires_grad_(False)
    assert not any(t.requires_grad for t in tensors(ours(x.detach())))


def test_an_inference_tensor_cannot_be_kept_for_backward():
    ours, _, x = make("GRU")
    with torch.inference_mode():
        kept = x * 2
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ours(kept)


@pytest.mark.parametrize("name", LAYERS)
def test_unused_outputs_get_no_gradient(name):
    ours, theirs, x = make(name)
    for pick in (lambda r: r[0][2:3], lambda r: tensors(r[1])[-1], lambda r: r[0][:0].sum()):
        found = []
        for module in (ours, theirs):
            value = pick(module(x)).sum()
            found.append(torch.autograd.grad(value, [x, *module.parameters()], allow_unused=True))
        same_values(*found)


def test_anomaly_mode_names_the_layer():
    ours, _, x = make("LSTM")
    with pytest.warns(UserWarning), torch.autograd.detect_anomaly():
        output, _ = ours(torch.full_like(x, torch.nan))
        with pytest.raises(RuntimeError, match="RecurrentStackBackward.*nan"):
            output.sum().backward()


def test_the_graph_is_freed_with_its_last_output():
    ours, _, x = make("LSTM")
    output, final = ours(x)
    node = weakref.ref(output.grad_fn)
    gc.disable()
    try:
        assert node() is not None
        del output, final
        assert node() is None
        output, final = ours(x)
        output.sum().backward()
        node = weakref.ref(output.grad_fn)
        del output, final
        assert node() is None
    finally:
        gc.enable()


def test_backward_in_another_thread():
    ours, _, x = make("GRU", num_layers=2)
    expected = gradients(ours, x)
    value = loss(ours, x)
    thread = threading.Thread(target=value.backward)
    thread.start()
    thread.join()
    assert_same([x.grad, *[p.grad for p in ours.parameters()]], expected)


def test_a_tied_weight_gets_the_sum():
    ours, theirs, x = make("RNN", num_layers=2)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
    same_values(gradients(ours, x), gradients(theirs, x))


def test_gradients_of_packed_input_and_states():
    ours, theirs, _ = make("LSTM", bidirectional=True)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 3)]
    found = []
    for module in (ours, theirs):
        leaves = [s.clone().requires_grad_() for s in sequences]
        hx = [torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        value = loss(module, pack_sequence(leaves, enforce_sorted=False), tuple(hx))
        found.append(torch.autograd.grad(value, [*leaves, *hx, *module.parameters()]))
    same_values(*found)
