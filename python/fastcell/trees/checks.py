"""What every call over trees must satisfy before a kernel sees it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .cells import SPECS, Config


def check_operands(config: Config, input: Tensor, weights: Sequence[Tensor], nodes: int) -> None:
    """Refuse tensors that do not belong together; dtypes may be autocast's to unite.

    Raises:
        ValueError: input of another rank, or another number of weights.
        RuntimeError: input of another size, a weight of another shape, tensors on several devices.
    """
    if input.dim() != 2:
        raise ValueError(f"Expected input to be 2D, (nodes, features), got {input.dim()}D instead")
    if input.shape[0] != nodes:
        raise RuntimeError(
            f"input has {input.shape[0]} rows, expected {nodes}, one for each node of the trees"
        )
    names = config.weight_shapes(0, 1)
    if len(weights) != len(names):
        raise ValueError(
            f"{config.cell} with bias={config.bias} takes {len(names)} weights, "
            f"{', '.join(names)}, got {len(weights)}"
        )
    if weights[0].dim() != 2 or weights[0].shape[0] % SPECS[config.cell].gates:
        raise RuntimeError(
            f"Expected weight_ih of size [{SPECS[config.cell].gates} * hidden_size, input_size], "
            f"got {list(weights[0].shape)}"
        )
    features, hidden = weights[0].shape[1], weights[0].shape[0] // SPECS[config.cell].gates
    if hidden < 1:
        raise RuntimeError("Expected at least one hidden unit, got none")
    if input.shape[1] != features:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[1]}, expected {features}"
        )
    shapes = config.weight_shapes(features, hidden)
    for (name, shape), weight in zip(shapes.items(), weights, strict=True):
        if weight.shape != shape:
            raise RuntimeError(f"Expected {name} of size {list(shape)}, got {list(weight.shape)}")
        if weight.device != input.device:
            raise RuntimeError(
                f"input and weights must be on one device, got {input.device} and {name} on "
                f"{weight.device}"
            )


def check_dtypes(input: Tensor, weights: Sequence[Tensor]) -> None:
    """Refuse tensors of several dtypes, or of one that is not floating (RuntimeError)."""
    for weight in weights:
        if weight.dtype is not input.dtype or not input.is_floating_point():
            raise RuntimeError(
                f"input and weights must have one floating dtype, got {input.dtype} and "
                f"{weight.dtype}"
            )
