"""Packed weights: the layout the kernels read, made once per version of the weights.

An entry of the cache belongs to a tuple of weight tensors; it is used again only while every tensor
is the same object, at the same address and the same version, and a fingerprint is unchanged. The
version counter sees every tracked in-place write (an optimizer's step, ``load_state_dict``); the
fingerprint sees what bypasses it (writes through ``.data`` or a NumPy view). It is a hash of all
elements where that costs little beside the call: for weights of up to 4,096 elements, and for
calls of at least ``_MANY_ROWS`` rows. Smaller calls of larger layers look at a sample: a write to a
part of a weight (an element, a row) that bypasses the counter can then go unnoticed;
``clear_packed_weights()`` after it.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _core
from .cells import spec_of
from .plan import Config, Plan, plan_for

_MAX_ENTRIES = 256
_MAX_BYTES = 1 << 30
_MANY_ROWS = 4096  # (t, b) of a call, from which on hashing all weights takes 2 % of it at most


class _Entry:
    __slots__ = (
        "call", "contents", "packed", "plan", "pointers", "refs", "sample", "versions", "whole",
    )  # fmt: skip

    def __init__(
        self,
        call: tuple[Config, torch.dtype, int],
        plan: Plan,
        weights: Sequence[Tensor],
        packed: Tensor,
        whole: bool,
        on_death: Any,
    ) -> None:
        self.call = call
        self.plan = plan
        self.packed = packed
        self.refs = [weakref.ref(w, on_death) for w in weights]
        self.versions = [w._version for w in weights]
        self.pointers = [w.data_ptr() for w in weights]
        self.contents = [(w.data_ptr(), w.numel(), w.element_size()) for w in weights]
        self.sample = _core.fingerprint(self.contents, False)
        self.whole = _core.fingerprint(self.contents, True) if whole else None

    def serves(self, weights: Sequence[Tensor], whole: bool) -> bool:
        return (
            self.versions == [w._version for w in weights]
            and self.pointers == [w.data_ptr() for w in weights]
            and all([w.is_contiguous() and not w.is_neg() for w in weights])
            and _core.fingerprint(self.contents, whole) == (self.whole if whole else self.sample)
        )


# By the identities of the weights; an entry goes when the first of its weights does.
_entries: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()
_lock = threading.Lock()
generation = 0  # how often the cache was cleared; who keeps a packed copy elsewhere looks here


def packed_weights(
    config: Config, input: Tensor, weights: Sequence[Tensor], threads: int
) -> tuple[Plan, Tensor]:
    """The plan of a call and the packed form of its weights, made now or taken from the cache.

    Raises RuntimeError or ValueError if the weights' shapes do not belong together.
    """
    key = tuple(map(id, weights))
    call = (config, input.dtype, input.shape[-1])
    entry = _entries.get(key)
    whole = input.numel() >= _MANY_ROWS * call[2]
    if entry is not None and entry.call == call and entry.serves(weights, whole):
        return entry.plan, entry.packed
    copies = [dense(w) for w in weights]
    plan = plan_for(config, input, copies)
    packed = pack(config, plan, copies, threads)
    # No entry for a copy, which dies with this call, nor for tensors made under inference mode:
    # they have no version counter to tell a change.
    if all([d is w and not w.is_inference() for d, w in zip(copies, weights, strict=True)]):
        forget = lambda _: _entries.pop(key, None)  # noqa: E731
        _remember(key, _Entry(call, plan, weights, packed, whole, forget))
    return plan, packed


def dense(t: Tensor) -> Tensor:
    """A tensor whose memory the kernels can read, row after row: ``t`` itself, or a copy."""
    # A view can also only say that its numbers are negated.
    return (t.resolve_neg() if t.is_neg() else t).contiguous()


def pack(config: Config, plan: Plan, weights: Sequence[Tensor], threads: int) -> Tensor:
    """A packed copy of contiguous weights on the CPU."""
    packed = torch.empty(plan.stack.packed_bytes, dtype=torch.uint8, device="cpu")
    each = len(weights) // (config.num_layers * (2 if config.bidirectional else 1))
    spec = spec_of(config.cell)
    vectors = None if not spec.parameters else each - 1 if spec.recurrent else 1
    weights = [_as_multiplied(config, w, i % each != vectors) for i, w in enumerate(weights)]
    plan.stack.pack([w.data_ptr() for w in weights], packed.data_ptr(), threads)
    return packed


def _as_multiplied(config: Config, weight: Tensor, multiplied: bool) -> Tensor:
    """A weight in the dtype that the products take: matrices may be narrow, others are not."""
    if weight.dtype is torch.int8 or weight.dtype is torch.float64:
        return weight
    if config.products == "bfloat16" and weight.dim() == 2 and multiplied:
        return weight.to(torch.bfloat16)
    return weight.float()


def _remember(key: tuple[int, ...], entry: _Entry) -> None:
    with _lock:
        _entries[key] = entry
        _entries.move_to_end(key)
        held = sum(e.packed.numel() for e in list(_entries.values()))
        while len(_entries) > 1 and (len(_entries) > _MAX_ENTRIES or held > _MAX_BYTES):
            held -= _entries.popitem(last=False)[1].packed.numel()


def packed_for(config: Config, input: Tensor, weights: Sequence[Tensor]) -> Tensor | None:
    """The packed form of these weights for such a call, if the cache holds it."""
    entry = _entries.get(tuple(map(id, weights)))
    if entry is None or entry.call != (config, input.dtype, input.shape[-1]):
        return None
    return entry.packed if entry.serves(weights, False) else None


def packed_bytes(weights: Sequence[Tensor]) -> int:
    """Bytes held in the cache for these weights; 0 if they are not packed."""
    entry = _entries.get(tuple(map(id, weights)))
    return entry.packed.numel() if entry is not None and entry.serves(weights, False) else 0


def clear_packed_weights() -> None:
    """Forgets every packed copy; the next call packs anew."""
    global generation
    with _lock:
        generation += 1
        _entries.clear()
