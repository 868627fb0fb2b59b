"""One call of a layer stack: autocast, dropout, and the path that the call takes.

Three ways through, chosen by ``route``:

* ``"kernel"``: plain tensors on a CPU or a GPU in eager mode go straight to the kernels, through an
  ``autograd.Function`` only when a gradient is wanted: an operator's dispatch would cost more than
  a small step.
* ``"operator"``: the same kernels behind operators, where torch must see one (torch.compile,
  torch.export, fake and meta tensors, dispatch modes, tensor subclasses, torch.func's vmap and
  first-order gradients).
* ``"composite"``: plain torch operations, where no kernel serves (forward-mode differentiation,
  nested gradients in torch.func, devices without kernels).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import (
    composite,
    normed_composite,
    operator_checks,
    operators,
    transforms,
    vmap,
)
from . import recompute as segments
from .all_states import layer_with_cells
from .autograd import differentiable
from .cells import NARROW_CELLS, options_of, spec_of
from .engines import engine_of, why_no_kernels
from .normed import engine as normed_engine
from .normed import split as split_norms
from .normed import stack as normed_stack
from .normed_composite import Call as NormedCall
from .operators import CONFIG_SCHEMA, PLAIN
from .plan import EXTRAS_SCHEMA, NO_EXTRAS, Config, Extras

_NARROW = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_NARROW)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state


def sequence(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    single_step: bool = False,
    recompute: bool = False,
    recurrent_dropout: float | Tensor = 0.0,
    reset: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A stack of recurrent layers over a sequence.

    Args:
        cell: a name that ``fastcell.cells.spec_of`` knows.
        input: (T, B, I); with ``batch_first`` (B, T, I); packed: (rows, I).
        hx: initial states, each (L*D, B, P or H); None for zeros.
        weights: flat, in torch's order.
        batch_sizes: of a PackedSequence, or of padded input the lengths of its samples, or None.
        single_step: the call is one step of a cell module; decides how autocast applies.
        recompute: keep little for the backward pass (``recompute.py``), where the kernels are
            called directly.
        recurrent_dropout: probability with which h_{t-1} is zeroed in the recurrent products, unit
            by unit and for all steps alike, if ``training``; or the factors of it, (L*D, B, P).
        reset: bool on the input's device, (T, B) or packed (rows,): before which steps a sample's
            states become zero.

    Returns:
        The output in the input's layout and the final states. The arguments are taken as checked:
        ``functional`` and the modules do that with torch's words.
    """
    result_dtype = None
    if torch._C._is_any_autocast_enabled():
        input, hx, weights, result_dtype = _autocast(cell, input, hx, weights, single_step)
    path = route(input, weights)
    # Where kernels do not compute with 16 bits.
    widened = input.dtype in _NARROW and (
        path == "composite" or input.dtype not in engine_of(input).DTYPES
    )
    narrow = widened and input.dtype is torch.bfloat16 and cell in NARROW_CELLS
    products = "bfloat16" if narrow else "exact"
    config = Config(cell, num_layers, bidirectional, bias, batch_first, products)
    if not training or num_layers == 1:
        dropout = 0.0
    if recompute and (path != "kernel" or not _wants_gradient(input, hx, weights)):
        recompute = False
    if recompute and batch_sizes is not None and input.dim() == 3:
        raise ValueError("recompute=True does not go with lengths on a GPU")
    extras = _extras(
        config, input, weights, batch_sizes, 0.0 if recompute else dropout, recurrent_dropout,
        reset, training,
    )  # fmt: skip
    if recompute and extras.seed is not None:
        raise ValueError("recompute=True does not go with zoneout, whose draws it would not repeat")
    if widened and (path != "kernel" or _wants_gradient(input, hx, weights)):
        # The forward kernel reads and writes 16 bits itself, but derivatives are float32.
        result_dtype = result_dtype or input.dtype
        input, hx, weights = _cast(torch.float32, input, hx, weights)

    output: Tensor
    states: Sequence[Tensor]
    if recompute:
        output, states = segments.sequence(config, input, hx, weights, batch_sizes, extras, dropout)
    elif path == "kernel":
        try:
            output, states = _direct(config, input, hx, weights, batch_sizes, extras)
        except RuntimeError:
            live = _unwrapped(input, hx, weights)
            if live is None:
                raise
            output, states = _direct(config, *live, batch_sizes, extras)
    elif path == "composite":
        output, states = composite.sequence(config, input, hx, weights, batch_sizes, extras)
    elif not torch.compiler.is_compiling() and transforms.gradient_levels() > 0:
        output, states = differentiable(config, input, hx, weights, batch_sizes, extras)
    else:
        output, states = torch.ops.fastcell.sequence(
            input, list(hx or ()), list(weights), batch_sizes, *extras, *config
        )
    if result_dtype is not None:
        return output.to(result_dtype), tuple([s.to(result_dtype) for s in states])
    return output, tuple(states)


def all_states(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    recurrent_dropout: float | Tensor,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """``sequence``, layer by layer, and all states in place of the output.

    h of all layers, each (T, B, D*P); if there is one, c of all layers, each (T, B, D*H); the final
    states.
    """
    outputs, cells, finals = [], [], []
    each, directions = len(weights) // num_layers, 2 if bidirectional else 1
    for layer in range(num_layers):
        if layer > 0 and training and dropout > 0:
            input = torch.nn.functional.dropout(input, dropout)
        part = slice(layer * directions, (layer + 1) * directions)
        own_hx = None if hx is None else [h[part] for h in hx]
        drops = recurrent_dropout
        options["recurrent_dropout"] = drops[part] if isinstance(drops, Tensor) else drops
        arguments = (input, own_hx, weights[layer * each : (layer + 1) * each], batch_sizes)
        if spec_of(cell).states == 1:
            input, states = sequence(
                cell, *arguments, num_layers=1, bidirectional=bidirectional,
                batch_first=batch_first, dropout=0.0, training=training, **options,
            )  # fmt: skip
        else:
            input, states, c = _with_cells(
                cell, *arguments, bidirectional, batch_first, training, **options
            )
            cells.append(c)
        outputs.append(input)
        finals.append(states)
    return outputs, cells, tuple([torch.cat(parts) for parts in zip(*finals, strict=True)])


def _with_cells(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    batch_first: bool,
    training: bool,
    *,
    bias: bool,
    recurrent_dropout: float | Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    result_dtype = None
    if torch._C._is_any_autocast_enabled():
        input, hx, weights, result_dtype = _autocast(cell, input, hx, weights, False)
    kernels = route(input, weights) == "kernel"
    if input.dtype in _NARROW:
        result_dtype = result_dtype or input.dtype
        if not kernels or input.dtype not in engine_of(input).DTYPES:
            input, hx, weights = _cast(torch.float32, input, hx, weights)
    config = Config(cell, 1, bidirectional, bias, batch_first)
    extras = _extras(config, input, weights, batch_sizes, 0.0, recurrent_dropout, reset, training)
    output, states, cells = layer_with_cells(
        config, input, hx, weights, batch_sizes, extras, kernels,
        _wants_gradient(input, hx, weights),
    )  # fmt: skip
    if result_dtype is not None:
        output, cells = output.to(result_dtype), cells.to(result_dtype)
        states = tuple([s.to(result_dtype) for s in states])
    return output, states, cells


def normed(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``normed_states``: the output and the final states."""
    arguments = cell, input, hx, weights, batch_sizes, reset
    outputs, _, states = normed_states(*arguments, every=False, **options)
    return outputs[-1], states


def normed_states(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    *,
    bias: bool,
    projected: bool,
    directions: int,
    batch_first: bool,
    dropout: float,
    every: bool,
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """A stack with layer normalisation: ``weights`` as ``normed.Norms``, in one flat list.

    Returns h of all layers, with ``every`` and of a cell that has one c of all layers, and the
    final states; as :func:`all_states`.
    """
    result_dtype = None
    if torch._C._is_any_autocast_enabled():
        input, hx, weights, result_dtype = _autocast(cell, input, hx, weights, False)
    dtypes = {t.dtype for t in (input, *(hx or ()), *weights)}
    devices = {t.device for t in (input, *(hx or ()), *weights)}
    if len(dtypes) > 1 or len(devices) > 1:
        raise RuntimeError(
            "input, initial states and weights must have one dtype and device, got "
            f"{sorted(map(str, dtypes))} on {sorted(map(str, devices))}"
        )
    layer = normed_engine(input)
    if layer is None and input.dtype in _NARROW:
        result_dtype = result_dtype or input.dtype
        input, hx, weights = _cast(torch.float32, input, hx, weights)
        layer = normed_engine(input)
    if layer is None:
        missing = why_no_kernels(input.device)
        if missing:
            _without_kernel(missing)
        layer = normed_composite.layer
    lengths = None
    if input.dim() == 3:
        lengths, batch_sizes = batch_sizes, None
    if batch_sizes is None:
        timed = input.transpose(0, 1) if batch_first else input
        steps, batch, features = timed.shape
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        sizes = (batch,) * steps
        if lengths is not None:  # whatever stands behind a sample's end
            alive = torch.arange(steps, device=input.device)[:, None] < lengths
            timed = timed.where(alive[:, :, None], 0)
        rows = timed.reshape(steps * batch, features)
    else:
        sizes, rows = tuple(batch_sizes.tolist()), input
    reset = None if reset is None else reset.reshape(-1)
    cells = every and spec_of(cell).states > 1
    call = NormedCall(cell, sizes, reset, False, lengths, input.dtype, cells)
    norms = split_norms(cell, weights, bias, projected)
    outputs, all_c, states = normed_stack(call, rows, hx, norms, directions, dropout, layer)

    def given(rows: Tensor) -> Tensor:
        """In the input's layout and dtype."""
        if batch_sizes is None:
            rows = rows.view(steps, batch, rows.shape[-1])
            rows = rows.transpose(0, 1) if batch_first else rows
        return rows if result_dtype is None else rows.to(result_dtype)

    finals = states if result_dtype is None else tuple([s.to(result_dtype) for s in states])
    wanted = outputs if every else outputs[-1:]
    return [given(o) for o in wanted], [given(c) for c in all_c], finals


def route(input: Tensor, weights: Sequence[Tensor]) -> str:
    """``"kernel"``, ``"operator"`` or ``"composite"``: the path that ``sequence`` takes.

    Warns, once for each, of a device or a dtype that has no kernels.
    """
    if not input.is_cpu:
        missing = why_no_kernels(input.device)
        if missing:
            return _without_kernel(missing)
    if input.dtype not in _DTYPES:
        return _without_kernel(f"dtype {input.dtype}")
    if torch.compiler.is_compiling():
        return "operator"
    if transforms.transformed():
        # The kernels' rules serve vmap, and one level of gradients inside of torch.func.
        return "operator" if transforms.gradient_levels() in (0, 1) else "composite"
    if _dispatch_modes() or _tracing() is not None or input.is_meta or type(input) not in PLAIN:
        return "operator"
    for w in weights:
        if type(w) not in PLAIN:
            return "operator"
    return "kernel"


def _direct(
    config: Config,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    extras: Extras,
) -> tuple[Tensor, Sequence[Tensor]]:
    if _wants_gradient(input, hx, weights):
        return differentiable(config, input, hx, weights, batch_sizes, extras)
    output, states, _ = engine_of(input).forward(
        config, input, hx, weights, batch_sizes, extras, keep=False
    )
    return output, states


def _unwrapped(
    input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor] | None, Sequence[Tensor]] | None:
    """The tensors inside of those that torch.func made and left behind; None if there are none.

    Such a tensor (a state that a function under ``grad`` stored, say) has no memory of its own.
    """
    tensors = [input, *(hx or ()), *weights]
    live = [torch._C._functorch.unwrap_if_dead(t) for t in tensors]
    if all([a is b for a, b in zip(tensors, live, strict=True)]):
        return None
    count = 1 + len(hx or ())
    return live[0], live[1:count] or None, live[count:]


_warned: set[str] = set()


def _without_kernel(what: str) -> str:
    if what not in _warned and not torch.compiler.is_compiling():
        _warned.add(what)
        warnings.warn(
            f"fastcell has no kernels for {what}: this layer runs step by step in plain torch "
            "operations, which is slow",
            stacklevel=5,
        )
    return "composite"


def _wants_gradient(input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for w in weights:
        if w.requires_grad:
            return True
    return input.requires_grad or (hx is not None and any([h.requires_grad for h in hx]))


def _cast(
    dtype: torch.dtype, input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor] | None, Sequence[Tensor]]:
    return (
        input.to(dtype),
        None if hx is None else [h.to(dtype) for h in hx],
        [w.to(dtype) for w in weights],
    )


def _autocast(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    single_step: bool,
) -> tuple[Tensor, Sequence[Tensor] | None, Sequence[Tensor], torch.dtype | None]:
    """The tensors as autocast has them, and the dtype of the results if it is another.

    The results' dtypes are those of torch.nn's layers. Where those compute in the autocast dtype
    but return the dtype of the state (GRU, LSTMCell, GRUCell), the arithmetic is not narrowed here.
    """
    tensors = (input, *(hx or ()), *weights)
    dtypes = {t.dtype for t in tensors}
    device = input.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        castable = False
    else:
        castable = all(d.is_floating_point and d is not torch.float64 for d in dtypes)
    if not castable:
        # Layers leave mixed dtypes to autocast: what it leaves alone, the kernels must not see.
        if len(dtypes) > 1:
            names = ", ".join(sorted(str(d) for d in dtypes))
            raise RuntimeError(
                f"input, initial states and weights must have the same dtype, got {names}, which "
                "autocast does not bring together"
            )
        return input, hx, weights, None
    narrow = torch.get_autocast_dtype(device)
    widest = functools.reduce(torch.promote_types, dtypes)
    spec = spec_of(cell)
    # On a GPU torch.nn narrows all of them.
    if device == "cuda" or (spec.autocast_cell if single_step else spec.autocast):
        return *_cast(narrow, input, hx, weights), None
    state = input if hx is None else hx[-1]
    result = torch.promote_types(state.dtype, narrow)
    return *_cast(widest, input, hx, weights), result


def _extras(
    config: Config,
    input: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    dropout: float,
    recurrent_dropout: float | Tensor,
    reset: Tensor | None,
    training: bool,
) -> Extras:
    """What a call draws, from torch's generator, and ``reset``."""
    recurrent = seed = None
    masks = _dropout_masks(config, input, weights, dropout) if dropout > 0 else None
    if isinstance(recurrent_dropout, Tensor):
        recurrent = recurrent_dropout
    elif training and recurrent_dropout > 0:
        h, *_ = composite.zero_states(config, input, weights, batch_sizes)
        recurrent = recurrent_factors(input, h.shape, recurrent_dropout)
    if training and any(options_of(config.cell).zoneout):
        seed = _seed(input)
    if masks is None and recurrent is None and reset is None and seed is None:
        return NO_EXTRAS
    return Extras(masks, recurrent, reset, seed)


def _dropout_masks(
    config: Config, input: Tensor, weights: Sequence[Tensor], dropout: float
) -> Tensor:
    """The factors between layers, (L-1, T, B, D*P) or packed (L-1, rows, D*P).

    Drawn layer by layer from torch's generator: the same numbers as torch.nn draws.
    """
    shape = list(input.shape[:-1])
    if config.batch_first and len(shape) == 2:
        shape.reverse()
    shape.append(weights[1].shape[1] * (2 if config.bidirectional else 1))
    if torch.compiler.is_compiling() or transforms.transformed() or dropout == 1:
        # Dropped ones: vmap's rules of randomness are then torch's.
        ones = input.new_ones(shape, dtype=_factors_dtype(input))
        return torch.stack(
            [torch.nn.functional.dropout(ones, dropout) for _ in range(config.num_layers - 1)]
        )
    masks = input.new_empty((config.num_layers - 1, *shape), dtype=_factors_dtype(input))
    for mask in masks:
        mask.bernoulli_(1 - dropout).div_(1 - dropout)
    return masks


def recurrent_factors(input: Tensor, shape: Sequence[int], probability: float) -> Tensor:
    """The factors of h_{t-1}, (L*D, B, P): one draw per sample and unit for all steps."""
    ones = input.new_ones(shape, dtype=_factors_dtype(input))
    return torch.nn.functional.dropout(ones, probability)


def _factors_dtype(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


def _seed(input: Tensor) -> Tensor:
    """From torch's generator, on the input's device."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device=input.device)


# --- the operator ---------------------------------------------------------------------------------

_library = torch.library.Library("fastcell", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "sequence(Tensor input, Tensor[] hx, Tensor[] weights, Tensor? batch_sizes, "
    f"{EXTRAS_SCHEMA}, {CONFIG_SCHEMA}) -> (Tensor, Tensor[])"
)


def _sequence(
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *extras_and_config: Any,
) -> tuple[Tensor, list[Tensor]]:
    """``fastcell::sequence``: output and final states; ``hx`` may be empty, for zeros.

    Implicitly composite: gradients and fake tensors follow from the calls made here. An exported
    program so decides when it runs, not when it was made, whether to keep what a gradient needs.
    """
    extras, config = _split(extras_and_config)
    arguments = (config, input, hx or None, weights, batch_sizes, extras)
    output: Tensor
    states: Sequence[Tensor]
    if operators.is_plain(input):
        # Without another operator in between, whose kernel would check.
        operator_checks.check(config, input, hx, weights, batch_sizes, extras)
    if transforms.transformed():
        output, states = composite.sequence(*arguments)
    elif _wants_gradient(input, hx, weights):
        output, states = differentiable(*arguments)
    else:
        output, states, _ = operators.forward(*arguments, keep=False)
    return output, list(states)


def _split(extras_and_config: Sequence[Any]) -> tuple[Extras, Config]:
    count = len(Extras._fields)
    return Extras(*extras_and_config[:count]), Config(*extras_and_config[count:])


# After a graph break Dynamo looks at every Python frame that runs, this one's included, and would
# warn of what it cannot trace in them.
_library.impl(  # type: ignore[no-untyped-call]
    "sequence", _disable_dynamo(_sequence), "CompositeImplicitAutograd"
)


@torch.library.register_vmap("fastcell::sequence", lib=_library)  # type: ignore[untyped-decorator]
def _sequence_vmap(
    info: Any,
    in_dims: Any,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    *extras_and_config: Any,
) -> Any:
    extras, config = _split(extras_and_config)
    count = len(extras)

    def call(
        config: Config, state_count: int, batch_sizes: Tensor | None, *tensors: Any
    ) -> Sequence[Tensor]:
        extras, (input, *rest) = tensors[:count], tensors[count:]
        output, states = torch.ops.fastcell.sequence(
            input, rest[:state_count], rest[state_count:], batch_sizes, *extras, *config
        )
        return output, *states

    flat_dims: list[Any] = [None, None, in_dims[3], *in_dims[4 : 4 + count], in_dims[0]]
    for dims, tensors in ((in_dims[1], hx), (in_dims[2], weights)):
        flat_dims += [None] * len(tensors) if dims is None else dims
    (output, *states), (output_dim, *state_dims) = vmap.forward(
        call, info.batch_size, flat_dims, config, len(hx), batch_sizes, *extras, input, *hx,
        *weights,
    )  # fmt: skip
    return (output, states), (output_dim, state_dims)
