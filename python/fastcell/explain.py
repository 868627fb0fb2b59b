"""``fastcell.explain()``: which engine and path a call will take, said before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _core, cpu, cuda, ops, transforms
from .cell_modules import GRUCell, IndRNNCell, LSTMCell, RNNCell
from .cells import NARROW_CELLS, cell_of, spec_of, with_delay
from .cpu_time import row_offsets
from .engines import ENGINES, engine_of, why_no_kernels
from .modules import GRU, LSTM, RNN, IndRNN
from .packing import packed_bytes
from .plan import Config, bound_stack
from .quantized import QuantizedCell, QuantizedLayer
from .trees import cuda as tree_cuda
from .trees import ops as tree_ops
from .trees.cells import SPECS
from .trees.modules import TreeLSTM, TreeRNN

_LAYERS = (RNN, IndRNN, LSTM, GRU)
# How a step with layer normalisation is shared out.
_NORMED = {
    "cpu": "the hidden units for products, then the samples for norms, two barriers per step",
    "cuda": "in each step a launch of each product, and one of a block per sample",
}
_CELLS = (RNNCell, LSTMCell, GRUCell, IndRNNCell)
_QUANTIZED = (QuantizedLayer, QuantizedCell)

_REASONS = {
    "kernel": "plain tensors in eager mode",
    "operator": "torch must see one operator here (torch.compile or export, torch.func, a meta or "
    "fake tensor, a dispatch mode or a tensor subclass); the same kernels run behind it",
}


@dataclass(frozen=True)
class Explanation:
    """What a call of a layer will do.

    Attributes:
        layer: the class of the layer.
        engine: ``"cpu"``, ``"cuda"``: fastcell's kernels; ``"torch"``: plain torch operations, step
            by step; ``"meta"``: shapes only.
        path: ``"kernel"``: straight to the kernels; ``"operator"``: the same kernels behind a
            registered operator; ``"composite"``: torch operations.
        reason: why that path.
        device, dtype: of the input and the parameters.
        autocast: dtype to which autocast rounds them for the call, or None.
        arithmetic: dtype in which is computed.
        products: what the forward pass multiplies: ``"exact"`` (that dtype), ``"bfloat16"`` or
            ``"int8"``; sums have that dtype in any case. On a GPU the dtype or ``"tf32"``.
        gradients: whether what a backward pass needs is kept.
        isa: instruction set of the kernels, on a GPU its architecture; None without kernels.
        threads: threads that the call may use, on a CPU.
        schedule: how they, or a GPU's thread blocks, share the work; None if no input was given.
        packed_bytes: size of the weights in the kernels' layout, None without kernels.
        packed: whether they are held in that layout already.
    """

    layer: str
    engine: str
    path: str
    reason: str
    device: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    arithmetic: torch.dtype
    products: str
    gradients: bool
    isa: str | None
    threads: int
    schedule: str | None
    packed_bytes: int | None
    packed: bool

    def __str__(self) -> str:
        tensors = f"{_name(self.dtype)} on {self.device}"
        if self.autocast is not None:
            tensors += f", rounded to {_name(self.autocast)} by autocast"
        if self.arithmetic not in (self.dtype, self.autocast):
            tensors += f", computed in {_name(self.arithmetic)}"
        if self.engine == "cuda":
            tensors += f" with products of {self.products}"
        elif self.products != "exact":
            how = "dot products" if self.isa == "avx512" and _core.dot_products() else "widening"
            tensors += f" with products of {self.products} (by {how})"
        weights = "not packed"
        if self.packed_bytes is not None:
            when = "already packed" if self.packed else "packed by the first call"
            narrow = self.arithmetic is not (self.autocast or self.dtype)
            if self.autocast is not None or (narrow and self.gradients):
                when = "converted and packed by every call"
            weights = f"{self.packed_bytes:,} bytes, {when}"
        elif self.engine == "cpu":  # over trees
            weights = "packed by every call"
        if self.engine == "cuda":
            weights = "brought into the kernels' order by every call"
        shared = f": {self.schedule}" if self.schedule else ""
        rows = {
            "engine": f"{self.engine}, ISA {self.isa}" if self.isa else self.engine,
            "path": f"{self.path}: {self.reason}",
            "tensors": tensors,
            "gradients": "kept for a backward pass" if self.gradients else "not asked for",
            **(
                {"blocks": self.schedule or "depend on the input"}
                if self.engine == "cuda"
                else {"threads": f"{self.threads}{shared}"}
            ),
            "weights": weights,
        }
        return "\n".join([self.layer, *(f"  {name:<10} {text}" for name, text in rows.items())])


@dataclass(frozen=True)
class _Extent:
    steps: int
    batch: int
    rows: int
    offsets: Tensor | None


def explain(module: torch.nn.Module, input: Tensor | PackedSequence | None = None) -> Explanation:
    """Say how ``module(input)`` would run here and now; runs nothing.

    "Now" counts: the number of threads, ``torch.no_grad()``, autocast and transforms around this
    call are those that the module's own call would meet.

    Args:
        module: a fastcell layer or cell, also a quantized one, or one over trees.
        input: what the module would be called with; without it, the schedule stays unknown and the
            path is that of a plain tensor on the parameters' device.

    Raises:
        TypeError: ``module`` is no fastcell layer.
        ValueError: the input's rank fits no call of the layer.
        RuntimeError: the weights do not fit each other or the input.
    """
    if isinstance(module, (TreeLSTM, TreeRNN)):
        return _explain_trees(module, input)
    if not isinstance(module, (*_LAYERS, *_CELLS, *_QUANTIZED)):
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        hint = "; fastcell.convert(model) swaps torch.nn's layers for fastcell's"
        raise TypeError(
            f"explain() takes a fastcell layer or cell, got {name}"
            + (hint if isinstance(module, torch.nn.Module) else "")
        )
    config, weights = _config(module), _weights(module)
    data = input.data if isinstance(input, PackedSequence) else input
    if data is not None:
        stand_in = data
    elif isinstance(module, _QUANTIZED):
        stand_in = torch.empty(0)
    else:
        stand_in = weights[0]
    path = _path(stand_in, weights)
    device = stand_in.device.type

    dtype = stand_in.dtype
    autocast = _autocast_dtype(config.cell, dtype, device, isinstance(module, _CELLS))
    arithmetic = autocast or dtype
    engine, isa, schedule, packed = "torch", None, None, None
    normed = bool(getattr(module, "layer_norm", False))
    gradients = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*weights, *(() if data is None else (data,)))
    )
    if path != "composite" and device == "meta":
        engine = "meta"
    elif path != "composite" and engine_of(stand_in) is cuda:
        engine = "cuda"
        config = config._replace(products=cuda.products_of(arithmetic, stand_in.device.index or 0))
        if input is not None:
            at = _extent(module, input)
            isa, schedule = cuda.explain(
                config,
                arithmetic,
                weights,
                at.steps,
                at.batch,
                stand_in.device,
                gradients,
                at.offsets is not None,
            )
        if arithmetic in (torch.bfloat16, torch.float16):
            arithmetic = torch.float32
    elif path != "composite":
        engine, isa = "cpu", _core.isa()
        narrow = arithmetic is torch.bfloat16 and config.cell in NARROW_CELLS and not normed
        if config.products == "exact" and narrow:
            config = config._replace(products="bfloat16")
        if arithmetic in (torch.bfloat16, torch.float16):
            arithmetic = torch.float32
        features = module.input_size if data is None else data.shape[-1]
        probe = torch.empty(features, dtype=arithmetic, device="meta")
        stack = bound_stack(config, probe, weights)
        packed = int(stack.packed_bytes)
        if input is not None:
            at = _extent(module, input)
            offsets = 0 if at.offsets is None else at.offsets.data_ptr()
            threads = torch.get_num_threads()
            masks = module.training and config.num_layers > 1 and getattr(module, "dropout", 0) > 0
            schedule = _schedule(
                *stack.explain(at.steps, at.batch, at.rows, offsets, threads, not masks)
            )
    if normed and schedule is not None:
        schedule = _NORMED[engine]
    if normed:
        packed = None  # by every call
    return Explanation(
        layer=f"fastcell.{module}",
        engine=engine,
        path=path,
        reason=_REASONS.get(path) or _why_composite(stand_in.device),
        device=str(stand_in.device),
        dtype=dtype,
        autocast=autocast,
        arithmetic=arithmetic,
        products=config.products,
        gradients=gradients,
        isa=isa,
        threads=torch.get_num_threads(),
        schedule=schedule,
        packed_bytes=packed,
        packed=packed is not None
        and autocast is None
        and not (gradients and arithmetic is not dtype)
        and packed_bytes(weights) > 0,
    )


def _explain_trees(
    module: TreeLSTM | TreeRNN, input: Tensor | PackedSequence | None
) -> Explanation:
    """Of a layer over trees: its weights are packed by every call; the trees decide on threads."""
    weights = list(module.parameters())
    stand_in = weights[0] if input is None or isinstance(input, PackedSequence) else input
    device, dtype = stand_in.device, stand_in.dtype
    missing = tree_ops.no_kernels_for(device)
    path = "composite" if missing or transforms.transformed() else ops.route(stand_in, weights)
    like = SPECS[module.config.cell].like
    autocast = _autocast_dtype(like, dtype, device.type, False)
    arithmetic = autocast or dtype
    if arithmetic in (torch.bfloat16, torch.float16):
        arithmetic = torch.float32
    engine, isa = "torch" if path == "composite" else device.type, None
    products, schedule = "exact", "the hidden units and the nodes of a level, one barrier per level"
    if engine == "cpu":
        isa = _core.isa()
    if engine != "torch" and tree_ops.ENGINES[device.type] is tree_cuda:
        engine, isa = "cuda", tree_cuda.architecture(device)
        products, schedule = _name(arithmetic), "a few launches per level"
    reason = (
        f"no kernels for {missing}" if missing else "a transform of torch.func, or forward mode"
    )
    return Explanation(
        layer=f"fastcell.{module}",
        engine=engine,
        path=path,
        reason=_REASONS.get(path, reason),
        device=str(device),
        dtype=dtype,
        autocast=autocast,
        arithmetic=arithmetic,
        products=products,
        gradients=torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, stand_in)),
        isa=isa,
        threads=torch.get_num_threads(),
        schedule=schedule,
        packed_bytes=None,
        packed=False,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(module: torch.nn.Module) -> Config:
    if isinstance(module, _QUANTIZED):
        return module.config()
    if isinstance(module, _LAYERS):
        cell = cell_of(module)
        return Config(
            with_delay(cell, module.skip) if _delayed(module) else cell,
            module.num_layers,
            module.bidirectional,
            module.bias,
            module.batch_first,
        )
    cell = getattr(module, "_cell", "")
    if not cell and isinstance(module, RNNCell):
        cell = f"rnn_{module.nonlinearity}"
    elif not cell:
        cell = "lstm" if isinstance(module, LSTMCell) else "gru"
    has_bias = any(getattr(module, name) is not None for name in ("bias_ih", "bias_hh"))
    return Config(cell, 1, False, has_bias, False)


def _delayed(module: torch.nn.RNNBase) -> bool:
    """Whether the kernels of cells with a delay run it."""
    if not module.skip_beside or module.recompute:
        return False
    return ENGINES.get(next(module.parameters()).device.type) is cpu


def _weights(module: torch.nn.Module) -> list[Tensor]:
    """The tensors that a call would hand to the kernels."""
    if isinstance(module, _QUANTIZED):
        return module.weights()
    if isinstance(module, _LAYERS):
        weights = cast(list[Tensor], list(module._flat_weights))
        # What a norm has of its own, or a delay that no kernel knows, is not the cell's.
        names = module._flat_weights_names
        own = ("norm_",) if _delayed(module) else ("weight_skip", "norm_")
        return [w for w, n in zip(weights, names, strict=True) if not n.startswith(own)]
    of_cell: list[Any] = [module.weight_ih, module.weight_hh]
    biases = [b for b in (module.bias_ih, module.bias_hh) if b is not None]
    # A cell may lack one of the two: zeros of the same shape stand in for it.
    of_cell += biases * 2 if len(biases) == 1 else biases
    spec = spec_of(getattr(module, "_cell", "rnn_tanh"))
    return cast(
        list[Tensor], of_cell + ([getattr(module, spec.parameters_name)] if spec.rows else [])
    )


def _path(input: Tensor, weights: list[Tensor]) -> str:
    # Asked here first: route() would warn, once in a process, and that belongs to a real call.
    if why_no_kernels(input.device):
        return "composite"
    return ops.route(input, weights)


def _why_composite(device: torch.device) -> str:
    missing = why_no_kernels(device)
    if missing:
        return f"no kernels for {missing}"
    return "forward-mode differentiation or nested torch.func transforms"


def _autocast_dtype(
    cell: str, dtype: torch.dtype, device: str, single_step: bool
) -> torch.dtype | None:
    if device == "meta" or not torch.is_autocast_enabled(device) or dtype is torch.float64:
        return None
    applies = spec_of(cell).autocast_cell if single_step else spec_of(cell).autocast
    return torch.get_autocast_dtype(device) if applies or device == "cuda" else None


def _extent(module: torch.nn.Module, input: Tensor | PackedSequence) -> _Extent:
    if isinstance(input, PackedSequence):
        offsets = row_offsets(input.batch_sizes)
        batch = int(input.batch_sizes[0])
        return _Extent(len(offsets) - 1, batch, input.data.shape[0], offsets)
    is_cell = isinstance(module, (*_CELLS, QuantizedCell))
    ranks = (1, 2) if is_cell else (2, 3)
    if input.dim() not in ranks:
        raise ValueError(f"input must have {ranks[0]} or {ranks[1]} dimensions, not {input.dim()}")
    sizes = list(input.shape[:-1])
    if is_cell:
        steps, batch = 1, sizes[0] if sizes else 1
    elif len(sizes) == 1:
        steps, batch = sizes[0], 1
    else:
        steps, batch = reversed(sizes) if module.batch_first else sizes
    return _Extent(steps, batch, steps * batch, None)


def _schedule(
    direction_groups: int, batch_groups: int, unit_threads: int, layer_groups: int
) -> str:
    parts = []
    if layer_groups > 1:
        parts.append(f"the layers in {layer_groups} groups, one after another as a wavefront")
    if direction_groups > 1:
        parts.append("both directions at once")
    if batch_groups > 1:
        parts.append(f"the batch in {batch_groups} parts, no barrier")
    if unit_threads > 1:
        parts.append(f"the hidden units over {unit_threads} threads, one barrier per step")
    return ", ".join(parts) or "one does all (the call is small, or no more are allowed)"
