"""The extension's interface, kept by hand; tests/test_stubs.py holds it against the module.

Everything that is called "pointer" here is an address as an int, 0 for none. The extension trusts
its callers: addresses, sizes and strides (in elements) are not checked. ``fastcell.cpu`` is the one
place that calls the kernels, ``fastcell.packing`` the one that packs.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

def isa() -> str:
    """The instruction set in use: the highest of ``isas()``, or ``FASTCELL_ISA``.

    Raises RuntimeError if ``FASTCELL_ISA`` names one that this build or this CPU lacks.
    """

def estimate_quotients(wanted: bool | None = None) -> bool:
    """Whether AVX-512 kernels divide by an estimate and a correction: where division is slow.

    Returns what held before; ``wanted`` sets it, for all threads: for tests alone.
    """

def dot_products(wanted: bool | None = None) -> bool:
    """Whether AVX-512 kernels use the dot products of BF16 and VNNI: where the CPU has them.

    Returns what held before; ``wanted`` sets it, for all threads: for tests alone.
    """

def isas() -> list[str]:
    """The instruction sets that this build and this CPU have, lowest first."""

def drop(from_: int, to: int, count: int, float64: bool, seed: int, probability: float, /) -> None:
    """Dropout by a seed: each element is zeroed with that probability, the others are scaled."""

def ragged_order(batch: int, lengths: int, order: int, offsets: int, /) -> None:
    """Fill the tensors of csrc/cpu/ragged_rows.h at these addresses."""

def ragged_rows(
    steps: int,
    batch: int,
    lengths: int,
    batch_first: bool,
    order: int,
    rank: int,
    sizes: int,
    rows: int,
    /,
) -> None:
    """Fill the tensors of csrc/cpu/ragged_rows.h at these addresses."""

def fingerprint(tensors: Sequence[tuple[int, int, int]], whole: bool) -> int:
    """A checksum over (pointer, elements, bytes of one) each: of all, or for large a sample."""

def address(array: NDArray[Any]) -> int:
    """The pointer to an array's first element."""

def tanh(x: int, y: int, count: int, float64: bool) -> None:
    """The kernels' tanh of ``count`` elements from pointer ``x`` to pointer ``y``."""

def sigmoid(x: int, y: int, count: int, float64: bool) -> None:
    """The kernels' logistic sigmoid, as ``tanh``."""

def measure_fma_peak(threads: int, seconds: float) -> float:
    """float32 operations per second of independent FMA chains on all threads together."""

def measure_read_bandwidth(bytes_per_thread: int, threads: int, seconds: float) -> float:
    """Bytes per second read by all threads together, each from its own array of that size."""

class Stack:
    """A configuration of layers with the kernels that run it."""

    def __init__(
        self,
        cell: str,
        dtype: str,
        products: str,
        input: int,
        hidden: int,
        proj: int,
        layers: int,
        directions: int,
        bias: bool,
        options: Sequence[Any],
        delay: int = 0,
    ) -> None:
        """``cell``: a key of ``fastcell.cells.CELLS``; ``proj``: 0 for no projection.

        ``options``: ``fastcell.cells.Options``; ``delay``: of a link to h of so many steps before,
        besides the one of length one; 0 for none.

        ``dtype``: ``"float32"`` or ``"float64"``; ``products``: as in ``fastcell.plan.Config``.

        Raises ValueError for a name or a size that no stack has.
        """

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""

    @property
    def reserve_row_elements(self) -> int:
        """Elements that a forward call keeps per row (t, b) for its backward call."""

    def pack(self, weights: Sequence[int], packed: int, threads: int, /) -> None:
        """Lay out the weights (pointers, flat, in torch's order) at ``packed``.

        Raises ValueError for a wrong number of weights.
        """

    def explain(
        self,
        steps: int,
        batch: int,
        rows: int,
        offsets: int,
        threads: int,
        wavefront: bool,
        barriers: bool = True,
    ) -> tuple[int, int, int, int]:
        """How a forward call would be shared out; ``barriers``: if threads may wait at each step.

        (direction groups, batch groups, threads per group, layer groups); their product is the
        number of threads. A backward call, and one with dropout masks, has no layer groups.
        """

    def cells_at(self, rows: int, /) -> list[tuple[int, int]]:
        """Where one layer's kept numbers have c of all rows: (first, width) per direction."""

    def force_schedule(
        self, direction_groups: int, batch_groups: int, unit_threads: int, layer_groups: int, /
    ) -> None:
        """Share out every call so from now on; zeros: as the model chooses. For tests."""

    def forward_workspace(
        self,
        steps: int,
        batch: int,
        rows: int,
        keep: bool,
        masks: bool,
        recurrent: bool,
        narrow: bool,
        threads: int,
        /,
    ) -> int:
        """Bytes that ``forward`` needs at ``workspace``; ``narrow``: for input of 16 bits."""

    def backward_workspace(
        self,
        steps: int,
        batch: int,
        rows: int,
        masks: bool,
        recurrent: bool,
        threads: int,
        /,
    ) -> int:
        """Bytes that ``backward`` needs at ``workspace``."""

    def forward(
        self,
        steps: int,
        batch: int,
        rows: int,
        offsets: int,
        padding: tuple[int, int, int],
        x: int,
        x_step: int,
        x_row: int,
        h0: int,
        c0: int,
        y: int,
        cells: int,
        h_final: int,
        c_final: int,
        extras: Sequence[int],
        packed: int,
        reserve: int,
        workspace: int,
        storage: str,
        threads: int,
        /,
    ) -> None:
        """Run the stack; with ``reserve`` keep what ``backward`` needs.

        ``offsets`` (steps + 1): of ragged samples, the first row of each step. ``padding``: with
        lengths, (address of the samples' order, all samples, all steps), else zeros. ``cells``:
        where c of all steps goes, of one layer, if nothing is kept. ``extras``: addresses of
        ``fastcell.plan.Extras``.

        ``storage`` of x and y: ``"same"`` as the stack's dtype, ``"bfloat16"`` or ``"float16"``.
        """

    def backward(
        self,
        steps: int,
        batch: int,
        rows: int,
        offsets: int,
        padding: tuple[int, int, int],
        x: int,
        x_step: int,
        x_row: int,
        d_x: int,
        d_y: int,
        d_y_step: int,
        d_y_row: int,
        h0: int,
        c0: int,
        d_h_final: int,
        d_c_final: int,
        d_h0: int,
        d_c0: int,
        extras: Sequence[int],
        weights: Sequence[int],
        d_weights: Sequence[int],
        reserve: int,
        workspace: int,
        d_x_step: int,
        d_x_row: int,
        accumulate: bool,
        d_cells: int,
        threads: int,
        /,
    ) -> None:
        """Write the gradients whose pointers are given.

        Raises ValueError for a wrong number of weights.
        """

class Linear:
    """A linear layer, y = W x + b, of a stream."""

    def __init__(self, float64: bool, in_features: int, out_features: int) -> None: ...
    @property
    def packed_bytes(self) -> int:
        """Bytes that ``pack`` writes."""

    def pack(self, weight: int, bias: int, packed: int, /) -> None:
        """Write weight (out, in) and bias (out), or 0 for none, as the kernels read them."""

class Stream:
    """Layers that are fed block by block; the caller keeps the memory alive."""

    def __init__(
        self,
        stages: Sequence[Stack | Linear | str],
        features: int,
        float64: bool,
        batch: int,
        batch_first: bool,
        threads: int,
    ) -> None:
        """``stages``: what a block goes through in turn, activations by their names.

        Raises ValueError for stages that do not fit together.
        """

    @property
    def current(self) -> int:
        """Which of the two buffers of each state holds it now."""

    def workspace_bytes(self, steps: int, /) -> int:
        """Bytes needed at ``workspace`` for blocks of up to ``steps`` steps."""

    def bind(
        self,
        memory: Sequence[tuple[int, Sequence[tuple[int, int]]]],
        workspace: int,
        most_steps: int,
        output: int,
        owners: Any,
        /,
    ) -> None:
        """Set the memory: of each stage packed weights and two buffers (L, B, features) per state;
        workspace, output (T, B, features). ``owners`` of it are kept."""

    def run(self, x: int, steps: int, x_step: int, x_row: int, /) -> None:
        """Run a block; the states move to the other buffers.

        Raises ValueError for no step, or more steps than ``bind`` was told.
        """

    def remember(self, array: Any, heard: Any, steps: int, /) -> None:
        """What a block like ``array``, of so many steps, gives to the function that ``again`` made,
        until ``bind`` is called."""

    def again(self) -> object:
        """A function that runs a NumPy array, if it is like the remembered one, and returns what
        is remembered with it; else None, and nothing was done."""

def has_exchange_api(capsule: Any) -> bool:
    """Whether this is DLPack's exchange API in a version that ``remembered_call`` can use."""

def remembered_call(
    stack: Stack,
    exchange_api: Any,
    attributes: dict[str, Any],
    absent: Sequence[str],
    weights: Sequence[tuple[str, Any]],
    none: Sequence[str],
    steps: int,
    batch: int,
    batch_first: bool,
    single_step: bool,
    threads: int,
    surroundings: tuple[
        Sequence[tuple[dict[str, Any], str]],
        Sequence[Callable[[], Any]],
        Callable[[], int],
        Callable[[], bool],
    ],
    python: tuple[
        Callable[[Any], Any],
        Callable[[int], tuple[int, Any]],
        Callable[[Any, list[Any]], Any],
        Callable[..., Any] | None,
        Callable[..., Any],
    ],
    packed: Any,
    templates: Sequence[Any],
    reserve: Any,
    served: list[bool],
) -> object:
    """A module's call at one shape, likely to come again; ``fastcell.remembered`` makes them.

    ``attributes``: those of the module that must still be the same objects; ``absent``: those that
    it must not have; ``none``: parameters that it must not have; ``single_step``: of a cell.
    ``surroundings``: entries of dictionaries that must be the same objects, functions that must
    return nothing true, those that tell the number of threads and whether gradients are on.
    ``python``: makes a tensor like another; memory of the thread, as address and owner; packs the
    weights for an input; puts a call into a graph (None: calls with gradients are not remembered);
    runs backward what the kernels alone cannot. ``templates``, ``reserve``: tensors like the
    results, and what backward needs; ``served``: empty, until a call has been this one.

    Returns a function of the module's ``__dict__``, an input and a tuple of states or None. That
    returns (output, tuple of final states), or a cell's states, or None, and has done nothing, if
    anything but numbers has changed.

    Raises ValueError if ``has_exchange_api`` does not hold, or for a wrong number of weights or
    results.
    """

def cuda_architectures() -> list[str]:
    """What this build has CUDA kernels for, such as ``sm_90a``; empty without CUDA."""

def cuda_runtime_version() -> int:
    """Of the CUDA runtime inside, 12090 for 12.9; 0 without CUDA."""

def cuda_report() -> str:
    """What the compiler said of the CUDA kernels, by architecture, as JSON; ``{}`` without CUDA."""

def cuda_images() -> list[tuple[str, bytes]]:
    """(architecture, machine code or PTX) of every CUDA module inside, unpacked."""

def cuda_cell(name: str) -> tuple[int, int, int, int, int, bool, int]:
    """(gates, apart, states, saved, parameters, recurrent, second): csrc/cells/README.md."""

def cuda_limits(device: int) -> dict[str, int]:
    """``capability`` (90 for 9.0), ``multiprocessors``, ``shared_per_block`` in bytes,
    ``cooperative`` launches, and blocks of the largest cluster, ``max_cluster``.

    Raises RuntimeError without a driver or such a device.
    """

class CudaNormedPlan:
    """How a layer with layer normalisation runs on a GPU: csrc/cuda/normed_run.h."""

    def __init__(
        self,
        device: int,
        cell: str,
        products: str,
        backward: bool,
        steps: int,
        batch: int,
        hidden: int,
        projection: int,
    ) -> None:
        """Of one direction and pass; ``projection``: numbers of h, or 0 without one.

        Raises ValueError for a cell without kernels, RuntimeError without a driver or such a
        device.
        """

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """Samples, numbers along k and columns of the recurrent product and of the projection, if
        there is one, with their padding.
        """

    def run(
        self,
        stream: int,
        reverse: bool,
        sizes: Sequence[int],
        weights: int,
        projection: int,
        pointers: Sequence[int],
    ) -> None:
        """All steps, of ``sizes`` samples each. ``pointers``: csrc/cuda/normed_bindings.cpp."""

class CudaPlan:
    """How a layer runs on a GPU: csrc/cuda/plan.h."""

    def __init__(
        self,
        device: int,
        cell: str,
        products: str,
        backward: bool,
        steps: int,
        batch: int,
        hidden: int,
        output: int,
        directions: int,
        projected: bool,
        wanted: str,
    ) -> None:
        """The plan that is expected to be fastest; with ``wanted`` the fastest in that place.

        Raises ValueError if there is none, RuntimeError without a driver or such a device.
        """

    @property
    def place(self) -> str:
        """``"step"``, ``"grid"`` or ``"cluster"``."""

    @property
    def rows(self) -> int:
        """Samples of a block."""

    @property
    def units(self) -> int:
        """Hidden units of a block."""

    @property
    def unit_blocks(self) -> int:
        """Blocks that share the hidden units."""

    @property
    def tiles(self) -> int:
        """Parts of the batch, of ``rows`` samples each."""

    @property
    def tiles_at_once(self) -> int:
        """Of one launch."""

    @property
    def at_once(self) -> int:
        """Layers like this that the device holds at once, in whole; 0 if it does not hold one."""

    @property
    def time(self) -> float:
        """Nanoseconds that the model expects for all steps."""

    @property
    def width(self) -> int:
        """Numbers along k of the recurrent product, with padding."""

    @property
    def projected_width(self) -> int:
        """The same of the projection; 0 without one."""

    @property
    def stride(self) -> int:
        """Numbers between rows of what blocks exchange."""

    @property
    def projected_stride(self) -> int:
        """The same where a projection takes them."""

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""

    @property
    def kernel(self) -> str:
        """The kernel's name as a C++ expression."""

    def run(
        self,
        stream: int,
        sides: Sequence[Sequence[int]],
        flags: int,
        offsets: int,
        lengths: int,
        reset: int,
        seed: int,
        options: Sequence[Any],
        layer: int,
        gate_stride: int,
        y: int,
        d_y: int,
        keep: bool,
        finish: bool,
        status: int,
        patience: int,
        begin: int,
        end: int,
    ) -> None:
        """Launch some steps, as the pass counts them, on a stream.

        Pointers are those of csrc/cuda/sweep.h.

        Raises RuntimeError if a launch fails.
        """

def cuda_tree(
    device: int,
    cell: str,
    real: str,
    backward: bool,
    again: bool,
    levels: int,
    level_offsets: int,
    level_edges: int,
    hidden: int,
    positions: int,
    sums: bool,
    widths: Sequence[int],
    pointers: Sequence[int],
    weights: int,
    edge_weights: int,
    stream: int,
) -> None:
    """Launch all levels of trees on a stream, the numbers being those of csrc/cuda/tree_run.h.

    ``real``: ``"float32"`` or ``"float64"``; ``widths``: of ``seen``, ``edge_seen``, ``products``
    and ``d_products``; ``pointers``: the addresses of csrc/cuda/tree_level.h, TreeLevel, in order.

    Raises ValueError for a cell or numbers without kernels, RuntimeError if a launch fails.
    """

def tree_levels(
    nodes: int,
    parents: int,
    number: bool,
    positions: int,
    order: int,
    level_offsets: int,
    child_offsets: int,
    children: int,
) -> tuple[int, int, int, str, int]:
    """Sort the nodes of trees into levels: csrc/cpu/tree_levels.h.

    ``parents``: (nodes,) in -1 .. nodes - 1; ``positions``: read, or with ``number`` written. Room
    for nodes + 1 numbers at both offsets, for ``nodes`` at the others.

    (levels, most children, highest position, fault, node): ``fault`` is ``""``, ``"cycle"`` or
    ``"same position"``, ``node`` where it is.
    """

class Tree:
    """A recursive cell at its sizes, with the kernels that run it."""

    def __init__(self, cell: str, dtype: str, input: int, hidden: int, arity: int) -> None:
        """``cell``: a key of ``fastcell.trees.cells.SPECS``; ``arity``: 0 for sums over children.

        Raises ValueError for a name or a size that there is not.
        """

    @property
    def kept_elements(self) -> int:
        """Elements that a forward call keeps per node for its backward call."""

    def forward_workspace(self, nodes: int, keep: bool, /) -> int:
        """Bytes that ``forward`` needs at ``workspace``."""

    def backward_workspace(self, nodes: int, threads: int, /) -> int:
        """Bytes that ``backward`` needs at ``workspace``."""

    def forward(
        self,
        forest: Sequence[int],
        nodes: int,
        levels: int,
        x: int,
        weights: Sequence[int],
        h: int,
        c: int,
        kept: int,
        workspace: int,
        threads: int,
        /,
    ) -> None:
        """Run the trees; with ``kept`` keep what ``backward`` needs.

        ``forest``: the pointers of Forest in csrc/common/tree.h, in order; ``weights``: of w_ih,
        w_hh, b_ih, b_hh, the last two 0 without biases. Raises ValueError for other numbers.
        """

    def backward(
        self,
        forest: Sequence[int],
        nodes: int,
        levels: int,
        x: int,
        weights: Sequence[int],
        h: int,
        c: int,
        kept: int,
        gradients: Sequence[int],
        workspace: int,
        threads: int,
        /,
    ) -> None:
        """Write the gradients whose pointers are given.

        ``gradients``: of h and c (0: zero), then of x, w_ih, w_hh as (positions, rows, hidden), and
        of either bias (0: not asked for). Raises ValueError for other numbers of them.
        """

def reservoir_lanes(float64: bool) -> int:
    """Units of a slice of a reservoir's matrices: lanes of a vector."""

class Reservoir:
    """Fixed sparse leaky units with their weights, laid out as csrc/cpu/reservoir_call.h says."""

    def __init__(
        self,
        float64: bool,
        units: int,
        inputs: int,
        offsets: int,
        columns: int,
        values: int,
        input_weights: int,
        bias: int,
        alpha: int,
    ) -> None:
        """Pointers to what stays the caller's to keep alive."""

    def force_schedule(self, batch_groups: int, unit_threads: int, /) -> None:
        """Share out every call so from now on; zeros: as the sizes suggest. For tests."""

    def workspace_bytes(self, samples: int, threads: int, /) -> int:
        """Bytes that ``run`` needs at ``workspace``."""

    def run(
        self,
        lengths: Sequence[int],
        x: Sequence[int],
        states: Sequence[int],
        state: int,
        workspace: int,
        threads: int,
        /,
    ) -> None:
        """Run all samples, from the states (samples, units) at ``state``, to be replaced.

        Pointers of each sample: ``x`` (length, inputs), ``states`` (length, units), or no list.

        Raises ValueError for lengths that rise, or lists of another number.
        """

class Normed:
    """A layer of one direction with layer normalisation: csrc/common/normed.h."""

    def __init__(
        self,
        cell: str,
        float64: bool,
        features: int,
        hidden: int,
        output: int,
        projected: bool,
        reverse: bool,
    ) -> None:
        """``cell``: a name of ``fastcell.cells``. Raises ValueError without a kernel of it."""

    @property
    def kept_elements(self) -> int:
        """Elements that a forward call keeps per row for its backward call."""

    @property
    def cells_at(self) -> int:
        """Where an LSTM's c begins in those."""

    def workspace(
        self, steps: int, batch: int, rows: int, keep: bool, backward: bool, threads: int, /
    ) -> int:
        """Bytes that ``run`` needs; ``keep``: whether it keeps anything for a backward call."""

    def run(
        self,
        steps: int,
        batch: int,
        rows: int,
        pointers: Sequence[int],
        gradients: Sequence[int],
        threads: int,
        /,
    ) -> None:
        """Run forward; with ``gradients`` backward. The order of both: csrc/normed_bindings.cpp."""
