"""Checks of what callers give: every error names the argument, what it is and what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cells import ACTIVATIONS, Array, Cell, Options, Sizes, Weights
from .packing import Integers


def check_input(x: ArrayLike) -> Array:
    """x as an array (T, B, I) with T > 0."""
    array = np.asarray(x)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"x must have a floating dtype, got {array.dtype}")
    if array.ndim != 3:
        raise ValueError(f"x must have 3 dimensions (T, B, I), got shape {array.shape}")
    if array.shape[0] == 0:
        raise ValueError(f"x must have at least one step, got shape {array.shape}")
    return array


def check_weights(
    cell: Cell,
    weights: Sequence[ArrayLike],
    x: Array,
    num_layers: int,
    directions: int,
    bias: bool,
    skip_beside: bool,
) -> tuple[Sizes, list[Weights]]:
    """Sizes of the first layer, and the weights by name for each layer and direction."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    count = num_layers * directions
    plain = len(cell.weight_shapes(Sizes(1, 1, 0, bias))) + skip_beside
    accepted = [plain, plain + 1] if cell.projects else [plain]
    if len(weights) not in [count * n for n in accepted]:
        raise ValueError(
            f"weights must hold {' or '.join(str(count * n) for n in accepted)} arrays for "
            f"{cell.name} with {num_layers} layer(s), {directions} direction(s) and bias={bias}, "
            f"got {len(weights)}"
        )
    arrays = [np.asarray(weight) for weight in weights]
    per_layer = len(arrays) // count
    # weight_hh and, with a projection, weight_hr tell H and P; all else follows from them and x.
    projection = 0
    if per_layer > plain:
        projected = arrays[per_layer - 1 - (cell.own[1] > 0) - skip_beside]
        if projected.ndim != 2 or not projected.size:
            raise ValueError(
                "weight_hr_l0 must have shape (P, H) with H and P at least 1, "
                f"got {projected.shape}"
            )
        projection = projected.shape[0]
    recurrent = arrays[1]
    if not cell.recurrent:  # whose rows say nothing of H
        recurrent = recurrent[:1].T
    if recurrent.ndim != 2 or recurrent.shape[0] % cell.gates or not recurrent.size:
        raise ValueError(
            f"weight_hh_l0 must have shape ({cell.gates}*H, P) with H and P at least 1, "
            f"got {recurrent.shape}"
        )
    first = Sizes(x.shape[2], recurrent.shape[0] // cell.gates, projection, bias)
    by_name: list[Weights] = []
    for index in range(count):
        layer, direction = divmod(index, directions)
        sizes = first if layer == 0 else first._replace(input=directions * first.output)
        named: dict[str, Array] = {}
        own = arrays[index * per_layer : (index + 1) * per_layer]
        shapes = cell.weight_shapes(sizes)
        if skip_beside:
            shapes["weight_skip"] = (cell.gates * sizes.hidden, sizes.output)
        for (name, shape), weight in zip(shapes.items(), own, strict=True):
            full_name = f"{name}_l{layer}{'_reverse' if direction else ''}"
            named[name] = _check_array(full_name, weight, shape, x)
        by_name.append(named)
    return first, by_name


def check_states(
    cell: Cell,
    states: Sequence[ArrayLike] | None,
    x: Array,
    count: int,
    batch: int,
    sizes: Sizes,
    several: Sequence[int],
) -> list[Array]:
    """The initial states, each (L*D, B, size), or as many steps' below each other."""
    widths = cell.state_sizes(sizes)
    shapes = [(count, n * batch, size) for n, size in zip(several, widths, strict=False)]
    if states is None:
        return [np.zeros(shape, x.dtype) for shape in shapes]
    return _check_list("states", states, shapes, x)


def check_lengths(lengths: ArrayLike | None, steps: int, batch: int) -> Integers | None:
    """lengths (B,), integers in 0 .. T."""
    if lengths is None:
        return None
    array = np.asarray(lengths)
    if array.shape != (batch,):
        raise ValueError(f"lengths must have shape {(batch,)}, got {array.shape}")
    if batch and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"lengths must be integers, got {array.dtype}")
    if batch and (array.min() < 0 or array.max() > steps):
        raise ValueError(f"lengths must lie in 0 .. {steps}, got {array.tolist()}")
    return array


def check_dropout_masks(
    masks: ArrayLike | None, x: Array, shape: tuple[int, ...]
) -> Sequence[Array] | Array:
    """The masks (L-1, T, B, D*P), or none."""
    return [] if masks is None else _check_array("dropout_masks", np.asarray(masks), shape, x)


def check_options(cell: Cell, options: Options | None) -> Cell:
    """The cell with these options, or as it is."""
    if options is None:
        return cell
    if not cell.general:
        raise ValueError(f"{cell.name} has no options, got {options}")
    for name in options[:2]:
        if name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return cell.having(Options(*options))


def check_skip(skip: int, beside: bool) -> None:
    """skip is a number of steps; beside the last one it is another one."""
    if type(skip) is not int or skip < 1 + beside:
        least = "2 or more, with skip_beside" if beside else "1 or more"
        raise ValueError(f"skip must be an integer of {least}, got {skip!r}")


def check_reset(reset: ArrayLike | None, steps: int, batch: int) -> NDArray[np.bool_] | None:
    """reset (T, B), bools."""
    if reset is None:
        return None
    array = np.asarray(reset)
    if array.shape != (steps, batch):
        raise ValueError(f"reset must have shape {(steps, batch)}, got {array.shape}")
    if array.dtype != np.bool_:
        raise TypeError(f"reset must be bools, got {array.dtype}")
    return array


def check_recurrent_masks(
    masks: ArrayLike | None, cell: Cell, x: Array, shape: tuple[int, ...]
) -> Array | None:
    """The masks (L*D, B, P), if any."""
    if masks is None:
        return None
    if not cell.masks:
        raise ValueError(f"{cell.name} takes no recurrent_masks")
    return _check_array("recurrent_masks", np.asarray(masks), shape, x)


def check_holds(
    holds: Sequence[ArrayLike | None] | None,
    cell: Cell,
    x: Array,
    shape: tuple[int, int, int],
    sizes: Sizes,
) -> list[Array | None]:
    """Of each state the parts (L*D, T, B, H) that stay, or None: nothing does."""
    expected = cell.options[-2:]
    states = len(cell.state_sizes(sizes))
    given = [None] * states if holds is None else holds
    if len(given) != states:
        raise ValueError(f"holds must be a list of {states} array(s), got {len(given)}")
    parts: list[Array | None] = []
    for k, (array, p) in enumerate(zip(given, expected, strict=False)):
        if array is not None:
            whole = (*shape, sizes.hidden)
            parts.append(_check_array(f"holds[{k}]", np.asarray(array), whole, x))
        else:
            parts.append(np.full((*shape, sizes.hidden), p, x.dtype) if p else None)
    if sizes.projection and parts[0] is not None:
        raise ValueError("a projection leaves no h of H units that could be held")
    return parts


def check_grads(
    grad_output: ArrayLike | None,
    grad_states: Sequence[ArrayLike | None] | None,
    x: Array,
    output_shape: tuple[int, ...],
    state_shapes: Sequence[tuple[int, ...]],
) -> tuple[Array, list[Array]]:
    """The incoming gradients, zeros for those that are None."""
    if grad_output is None:
        grad_output = np.zeros(output_shape, x.dtype)
    if grad_states is None:
        grad_states = [None] * len(state_shapes)
    return (
        _check_array("grad_output", np.asarray(grad_output), output_shape, x),
        _check_list("grad_states", grad_states, state_shapes, x),
    )


def _check_list(
    name: str, given: Sequence[ArrayLike | None], shapes: Sequence[tuple[int, ...]], x: Array
) -> list[Array]:
    """One array for each of ``shapes``, zeros where None is given."""
    if isinstance(given, np.ndarray) or len(given) != len(shapes):
        what = "an array" if isinstance(given, np.ndarray) else f"{len(given)}"
        raise ValueError(f"{name} must be a list of {len(shapes)} array(s), got {what}")
    return [
        np.zeros(shape, x.dtype)
        if array is None
        else _check_array(f"{name}[{k}]", np.asarray(array), shape, x)
        for k, (array, shape) in enumerate(zip(given, shapes, strict=True))
    ]


def _check_array(name: str, array: Array, shape: tuple[int, ...], x: Array) -> Array:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if array.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {array.dtype}")
    return array
