"""torch's own descriptions of its recurrent modules, with fastcell's classes in their place.

``torch.testing._internal.common_modules.module_db`` lists, for every module of torch.nn, arguments
of the constructor with inputs of the call, and calls that must fail with the text of the error.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastcell
from against_torch import CELLS, LAYERS, same_values

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
common_modules = pytest.importorskip("torch.testing._internal.common_modules")

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

INFOS = {
    info.module_cls.__name__: info
    for info in common_modules.module_db
    if info.module_cls in [getattr(torch.nn, name) for name in (*LAYERS, *CELLS)]
}


def test_every_recurrent_module_is_described():
    assert sorted(INFOS) == sorted((*LAYERS, *CELLS))


def samples(name, dtype, requires_grad=False, training=True, **kwargs):
    info = INFOS[name]
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **kwargs
    )
    return [s for s in found if s.forward_input is not None]


def pair(name, sample, dtype):
    """fastcell's module and torch's for a sample, with the same parameters."""
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    ours = getattr(fastcell, name)(*args, **kwargs, dtype=dtype)
    theirs = getattr(torch.nn, name)(*args, **kwargs, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INFOS)
def test_forward(name, dtype, training):
    packed = {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    chosen = samples(name, dtype, training=training, **packed)
    assert len(chosen) >= 2
    for sample in chosen:
        ours, theirs = pair(name, sample, dtype)
        ours.train(training)
        theirs.train(training)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        output = ours(*args, **kwargs)
        same_values(output, theirs(*args, **kwargs))
        same_values(copy.deepcopy(ours)(*args, **kwargs), output)
        assert repr(ours) == repr(theirs)
        if isinstance(args[0], torch.Tensor):  # torch's own answer: the call with a batch of one
            expected = sample.reference_fn(ours, *args, **kwargs)
            same_values(tree_flatten(output)[0], tree_flatten(expected)[0])


@pytest.mark.parametrize(
    ("check", "every"), [(gradcheck, 1), (gradgradcheck, 3)], ids=["first", "second"]
)
@pytest.mark.parametrize("name", INFOS)
def test_derivatives(name, check, every):
    """Against finite differences, with respect to every input and parameter together."""
    for sample in samples(name, torch.float64, requires_grad=True)[::every]:
        torch.manual_seed(1)
        module = pair(name, sample, torch.float64)[0]
        leaves, spec = tree_flatten((sample.forward_input.args, sample.forward_input.kwargs))

        def outputs(*tensors, module=module, spec=spec):
            args, kwargs = tree_unflatten(list(tensors[: spec.num_leaves]), spec)
            return tree_flatten(module(*args, **kwargs))[0]

        assert check(outputs, (*leaves, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_of_batches_of_gradients(name):
    """Slow mode, which also differentiates many directions at a time under vmap."""
    sample = samples(name, torch.float64, requires_grad=True)[-1]
    module = pair(name, sample, torch.float64)[0]
    leaves, spec = tree_flatten(sample.forward_input.args)

    def outputs(*tensors):
        return tree_flatten(module(*tree_unflatten(list(tensors), spec)))[0]

    assert gradcheck(outputs, tuple(leaves), check_batched_grad=True)
    assert gradgradcheck(outputs, tuple(leaves), check_batched_grad=True)


@pytest.mark.parametrize("name", INFOS)
def test_errors(name):
    info = INFOS[name]
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert errors
    for error in errors:
        sample = error.module_error_input
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        module_class = getattr(fastcell, name)
        if error.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                module_class(*args, **kwargs)
        else:
            module = module_class(*args, **kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)
