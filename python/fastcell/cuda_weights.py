"""Weights as the CUDA kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cuda_layer import Layer

_CHUNK_BYTES = 64
_GROUP = 8


def pack(weight: Tensor, width: int, columns: int, products: str) -> Tensor:
    """(groups, units, k) as the kernels read it: [units / 8][k chunk][group][8][64 bytes].

    ``width`` and ``columns``: k and units with their padding.
    """
    groups, units, k = weight.shape
    chunk = _CHUNK_BYTES // weight.element_size()
    weight = torch.nn.functional.pad(weight, (0, width - k, 0, columns - units))
    if products == "tf32":
        weight = round_tf32(weight)
    return (
        weight.view(groups, columns // _GROUP, _GROUP, width // chunk, chunk)
        .permute(1, 3, 0, 2, 4)
        .contiguous()
    )


def round_tf32(x: Tensor) -> Tensor:
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


def by_unit(weight: Tensor, gates: int) -> Tensor:
    """(gates * H, P) -> (1, P, k): k runs over blocks of 8 units, in them gates, in them units."""
    hidden, output = weight.shape[0] // gates, weight.shape[1]
    padded = -(-hidden // _GROUP) * _GROUP
    blocks = torch.nn.functional.pad(
        weight.view(gates, hidden, output), (0, 0, 0, padded - hidden)
    ).view(gates, padded // _GROUP, _GROUP, output)
    return blocks.permute(3, 1, 0, 2).reshape(1, output, gates * padded)


def biases_of(layer: Layer, w: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """(what is added to the input terms, what to the recurrent terms that stay apart)."""
    if not layer.bias:
        return None, None
    b_ih, b_hh = w[2].to(layer.real), w[3].to(layer.real)
    if layer.apart == 0:
        return b_ih + b_hh, None
    together = (layer.gates - layer.apart) * layer.hidden
    return torch.cat((b_ih[:together] + b_hh[:together], b_ih[together:])), b_hh[together:].clone()


def parameters_of(layer: Layer, w: Sequence[Tensor]) -> Tensor | None:
    """The cell's own vectors, in the dtype of its maths."""
    return w[layer.parameters_at].to(layer.real) if layer.parameters else None


def by_direction(layer: Layer, index: int, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The weights of layer ``index``, direction by direction."""
    each = layer.weights_each
    at = index * layer.directions
    return [weights[(at + d) * each : (at + d + 1) * each] for d in range(layer.directions)]
