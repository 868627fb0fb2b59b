"""What every call must satisfy before a kernel sees it, refused in torch's words.

The kernels take raw pointers, so nothing here may be skipped. The checks are ordered from the ones
that torch makes first, and they build no text unless they raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cells import CellSpec, weights_per_direction

# What fastcell has kernels for.
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_AUTOCAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}

# The names that torch's C++ side prints; the commonest ones only.
_SCALAR_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def scalar_name(dtype: torch.dtype) -> str:
    """The name that torch's own error messages give to ``dtype`` (``Float`` for torch.float32)."""
    return _SCALAR_NAMES.get(dtype, str(dtype))


def autocast_enabled() -> bool:
    """Whether autocast is on for any device: torch's layers then let any dtype of input pass."""
    return bool(torch._C._is_any_autocast_enabled())


def _explained(error: Exception, note: str) -> Exception:
    # torch's text stays as it is (callers match on it); the note says what it means.
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(note)
    return error


def check_tensors(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    steps: int,
    spec: CellSpec,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    directions: int,
    bias: bool,
) -> None:
    """Refuse tensors that do not belong together.

    The sizes of ``input`` (features last) and ``hx`` are the caller's to check.

    Raises:
        TypeError: a weight is not a tensor.
        RuntimeError: tensors on several devices, too few or too many weights, no time step, mixed
            dtypes, or a weight of another shape than the sizes ask for.
    """
    if hx is None:
        hx = ()
    device, dtype = input.device, input.dtype
    mixed = False
    for h in hx:
        if h.device != device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{device} and hidden tensor at {h.device}"
            )
        if h.dtype != dtype:
            mixed = True
    for w in weights:
        if w is None:
            # A module can hold None in a parameter's place.
            index = [v is None for v in weights].index(True)
            raise TypeError(f"expected Tensor as element {index} in argument 2, but got NoneType")
        if w.device != device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{device} and parameter tensor at {w.device}"
            )
        if w.dtype != dtype:
            mixed = True

    width = weights_per_direction(bias, proj_size > 0, parameters=spec.rows)
    if len(weights) != width * num_layers * directions:
        raise _explained(
            RuntimeError(
                "got an incorrect number of RNN parameters"
                if len(weights) % width
                else "Expected more weights in stacked_rnn"
            ),
            f"{num_layers} layers in {directions} directions take "
            f"{width * num_layers * directions} weights, got {len(weights)}",
        )
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if mixed and not _autocast_unites(input, hx, weights):
        _refuse_mixed(input, hx, weights)

    rows = spec.gates * hidden_size
    recurrent = rows if spec.recurrent else spec.parameters
    parameters = spec.rows
    out_size = proj_size or hidden_size
    features = input_size
    k = 0
    for _ in range(num_layers):
        for _ in range(directions):
            if (
                weights[k].shape != (rows, features)
                or weights[k + 1].shape != (recurrent, out_size)
                or (bias and (weights[k + 2].shape != (rows,) or weights[k + 3].shape != (rows,)))
                or (proj_size > 0 and weights[k + 2 + 2 * bias].shape != (out_size, hidden_size))
                or (parameters and weights[k + width - 1].shape != (parameters, hidden_size))
            ):
                _refuse_shapes(
                    weights[k : k + width], rows, recurrent, features, out_size, hidden_size, bias,
                    proj_size > 0, parameters,
                )  # fmt: skip
            k += width
        features = out_size * directions


def _autocast_unites(input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether autocast brings these tensors to one dtype; it leaves float64 and integers alone."""
    if not autocast_enabled() or input.is_meta or not torch.is_autocast_enabled(input.device.type):
        return False
    return {t.dtype for t in (input, *hx, *weights)} <= _AUTOCAST_DTYPES


def _refuse_mixed(input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    first = weights[0].dtype
    for name, tensor in (("input", input), *((f"hx[{i}]", h) for i, h in enumerate(hx))):
        if tensor.dtype != first:
            raise _explained(
                RuntimeError(
                    "mat1 and mat2 must have the same dtype, but got "
                    f"{scalar_name(tensor.dtype)} and {scalar_name(first)}"
                ),
                f"{name} is {tensor.dtype}, the weights are {first}",
            )
    for w in weights:
        if w.dtype != first:
            raise RuntimeError(
                "the weights must have one dtype, but got "
                f"{scalar_name(first)} and {scalar_name(w.dtype)}"
            )


def _refuse_shapes(
    weights: Sequence[Tensor],
    rows: int,
    recurrent: int,
    features: int,
    out_size: int,
    hidden_size: int,
    bias: bool,
    projected: bool,
    parameters: int,
) -> None:
    shapes = {"weight_ih": [rows, features], "weight_hh": [recurrent, out_size]}
    if bias:
        shapes |= {"bias_ih": [rows], "bias_hh": [rows]}
    if projected:
        shapes["weight_hr"] = [out_size, hidden_size]
    if parameters:
        shapes["the cell's own weight"] = [parameters, hidden_size]
    for (name, shape), w in zip(shapes.items(), weights, strict=True):
        if list(w.shape) != shape:
            raise RuntimeError(f"Expected {name} of size {shape}, got {list(w.shape)}")


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> int:
    """The number of time steps of packed data, after checking that ``batch_sizes`` describes it.

    Raises:
        RuntimeError: not a one-dimensional int64 tensor on the CPU, no step, an entry below one or
            above its predecessor, or a sum other than ``rows``.
    """
    if batch_sizes.dtype != torch.int64:
        raise RuntimeError(f"expected scalar type Long but found {scalar_name(batch_sizes.dtype)}")
    if batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes must be a one-dimensional CPU tensor, got "
            f"{list(batch_sizes.shape)} on {batch_sizes.device}"
        )
    sizes: list[int] = batch_sizes.tolist()
    if not sizes:
        return 0
    if sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(f"batch_sizes must be positive and must not increase, got {sizes}")
    if sum(sizes) != rows:
        raise RuntimeError(
            f"batch_sizes describe {sum(sizes)} rows of packed data, but there are {rows}"
        )
    return len(sizes)
