"""Swap the recurrent layers of a model that exists already, and swap them back.

A module is swapped by changing its class. Identity then takes care of everything that refers to it:
parameters in an optimizer, hooks, parametrizations, tied weights, the same module at two places of
the model, names, the training flag, wrappers such as DistributedDataParallel and compiled models
(which compile anew). A new object would have to imitate all of that, and nobody could tell the
wrappers about it. The change is sound because both classes keep the same attributes: they come from
the same base class, torch.nn.RNNBase or RNNCellBase, which reads and writes them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from .cell_modules import GRUCell, IndRNNCell, LeakyRNNCell, LSTMCell, RNNCell
from .checks import KERNEL_DTYPES
from .engines import why_no_kernels
from .modules import GRU, LSTM, RNN, IndRNN, LeakyRNN

__all__ = ["Finding", "convert", "revert", "survey"]

log = logging.getLogger("fastcell")

_M = TypeVar("_M", bound=Module)

_FASTCELL: dict[type[Module], type[Module]] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
}
_TORCH = {ours: theirs for theirs, ours in _FASTCELL.items()}
_OWN = (IndRNN, LeakyRNN, IndRNNCell, LeakyRNNCell)  # what torch.nn does not have
_NAMES = frozenset(theirs.__name__ for theirs in _FASTCELL)

_QUANTIZATION = "torch.ao.nn."

# Set on a module that convert() has swapped, so that revert() leaves alone what was built as
# fastcell's. It lives among the attributes: copies and pickles carry it.
_MARK = "_fastcell_converted"


@dataclass(frozen=True)
class Finding:
    """One recurrent module of a model.

    Attributes:
        name: where it is, as in ``model.named_modules()`` (the first of its places).
        module: the module itself.
        state: ``"torch"`` (convert will swap it), ``"converted"`` (revert will swap it back),
            ``"fastcell"`` (built as fastcell's) or ``"left"`` (convert leaves it alone).
        reason: why it is left alone; empty otherwise.
    """

    name: str
    module: Module
    state: str
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.name or '(the model itself)'}: {type(self.module).__name__}, {self.state}"
        return f"{text}: {self.reason}" if self.reason else text


def convert(model: _M) -> _M:
    """Make fastcell's layers of every torch.nn.RNN, LSTM, GRU and cell in ``model``, in place.

    The modules stay the same objects with the same parameters: an optimizer made before still
    trains them, and hooks, parametrizations, shared modules and ``state_dict`` are untouched.

    What is left alone is named, with the reason, in one ``UserWarning``: subclasses, quantized and
    scripted layers, modules whose ``forward`` was replaced, and those on a device or of a dtype for
    which fastcell has no kernel. :func:`survey` tells the same without changing anything. The
    layers that were swapped are logged to the logger ``fastcell`` at level INFO.

    Args:
        model: any module, also a recurrent layer itself.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no torch.nn.Module.
    """
    swapped: dict[type[Module], type[Module]] = {}
    left = []
    for finding in survey(model):
        if finding.state == "torch":
            _swap(finding.module, _FASTCELL, swapped)
            finding.module.__dict__[_MARK] = True
            log.info("converted %s", finding.name or "the model itself")
        elif finding.state == "left":
            left.append(finding)
    if left:
        lines = "".join([f"\n  {finding}" for finding in left])
        warnings.warn(f"fastcell.convert left {len(left)} module(s) alone:{lines}", stacklevel=2)
    return model


def revert(model: _M) -> _M:
    """Undo :func:`convert`, in place: its modules are torch.nn's again.

    Layers that were built as fastcell's stay as they are.

    Args:
        model: any module, also a recurrent layer itself.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no torch.nn.Module.
    """
    swapped: dict[type[Module], type[Module]] = {}
    for finding in survey(model):
        if finding.state == "converted":
            _swap(finding.module, _TORCH, swapped)
            del finding.module.__dict__[_MARK]
            log.info("reverted %s", finding.name or "the model itself")
    return model


def survey(model: Module) -> list[Finding]:
    """Every recurrent module in ``model``: what it is, and what convert() would do with it.

    Raises:
        TypeError: ``model`` is no torch.nn.Module.
    """
    if not isinstance(model, Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return list(_findings(model))


def _findings(model: Module) -> Iterator[Finding]:
    inside = ""  # a layer for quantization is told once, not piece by piece
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        kind = _class(module)
        if kind in _TORCH or kind in _OWN:
            yield Finding(name, module, "converted" if _MARK in module.__dict__ else "fastcell")
        elif kind in _FASTCELL:
            reason = _reason(module)
            yield Finding(name, module, "left" if reason else "torch", reason)
        elif reason := _foreign(module):
            yield Finding(name, module, "left", reason)
            if kind.__module__.startswith(_QUANTIZATION):
                inside = name + "."


def _class(module: Module) -> type[Module]:
    """The class that a module was built with; a parametrization derives one from it."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _reason(module: Module) -> str:
    """Why a layer of torch.nn itself is left alone, or nothing."""
    if "forward" in module.__dict__:
        return "its forward was replaced on this object, and would still be torch.nn's"
    for tensor in module.parameters():
        missing = why_no_kernels(tensor.device)
        if missing:
            return f"fastcell has no kernels for {missing}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"fastcell has no kernels for {tensor.dtype}"
    return ""


def _foreign(module: Module) -> str:
    """Why a module that is recurrent, but not torch.nn's own, is left alone, or nothing."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        if getattr(module, "original_name", "") in _NAMES:
            return "it is compiled by TorchScript: convert the model before scripting it"
        return ""
    for theirs, ours in _FASTCELL.items():
        if isinstance(module, theirs):
            return (
                f"{kind.__module__}.{kind.__qualname__} is a subclass of torch.nn.{theirs.__name__}"
                f" and may rely on it: derive it from fastcell.{ours.__name__} instead"
            )
        if isinstance(module, ours):
            return ""
    if kind.__module__.startswith(_QUANTIZATION) and kind.__name__ in _NAMES:
        return "it is a layer for quantization"
    return ""


def _swap(
    module: Module,
    table: dict[type[Module], type[Module]],
    swapped: dict[type[Module], type[Module]],
) -> None:
    old = type(module)
    new = table.get(old)
    if new is None:
        # A parametrized module has a class of its own that derives from the layer's and holds a
        # property for each parametrized tensor; copies of the module share it.
        if old not in swapped:
            body = {k: v for k, v in vars(old).items() if k not in ("__dict__", "__weakref__")}
            swapped[old] = type(old.__name__, (table[old.__bases__[0]],), body)
        new = swapped[old]
    module.__class__ = new
    module.__dict__.pop("_remembered", None)  # torch.nn's could neither use nor pickle it
