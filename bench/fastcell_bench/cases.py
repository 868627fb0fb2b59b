"""What is timed: one recurrent layer stack at one shape, in inference or in training.

Counts follow from the equations, not from any implementation:

* a step of one direction costs `2*G*H*(I + H)` FLOPs per sample (a multiply-add is two), where G is
  the number of gates (RNN 1, GRU 3, LSTM 4); the elementwise work is not counted;
* training costs three times as much: the forward, the gradients of the data, those of the weights;
* a forward must read the input weights once and the recurrent weights once per step; training reads
  them once more on the way back (the gradients of the weights are whole-sequence products).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

INFERENCE = "inference"
TRAINING = "training"
MODES = (INFERENCE, TRAINING)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "RNN_RELU": 1}
ITEM_BYTES = {"float32": 4, "float64": 8}
LARGEST_SIZE = 1 << 31

# T, B, I, H: one step, short to large at batch 1, then growing batches.
TABLE_SHAPES = (
    (1, 1, 128, 128),
    (100, 1, 128, 128),
    (100, 1, 256, 256),
    (100, 1, 512, 512),
    (100, 8, 256, 256),
    (100, 32, 256, 256),
    (100, 64, 512, 512),
)
TABLE_CELLS = ("LSTM", "GRU", "RNN")
TABLE = tuple((cell, *shape) for cell in TABLE_CELLS for shape in TABLE_SHAPES)
QUICK = (
    *((cell, *shape) for cell in TABLE_CELLS for shape in TABLE_SHAPES[:2]),
    ("LSTM", 100, 8, 256, 256),
)


@dataclass(frozen=True)
class Case:
    """One row: `cell` over T steps, batch B, I inputs, H hidden units, in `mode` and `dtype`.

    `ragged` gives the samples different lengths, from T down to a quarter of it.
    Raises ValueError for an unknown cell, mode or dtype and for a size outside 1..2^31-1.
    """

    cell: str
    T: int
    B: int
    I: int  # noqa: E741 - the equations' own name
    H: int
    mode: str = INFERENCE
    dtype: str = "float32"
    layers: int = 1
    bidirectional: bool = False
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.cell not in GATES:
            raise ValueError(f"unknown cell {self.cell!r}; known: {', '.join(GATES)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known: {', '.join(MODES)}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(ITEM_BYTES)}")
        for name in ("T", "B", "I", "H", "layers"):
            value = getattr(self, name)
            if not 1 <= value < LARGEST_SIZE:
                raise ValueError(f"{name} is {value}, but must be between 1 and {LARGEST_SIZE - 1}")

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def training(self) -> bool:
        return self.mode == TRAINING

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def lengths(self) -> list[int]:
        """Steps of each sample, longest first (B,)."""
        if not self.ragged or self.B == 1:
            return [self.T] * self.B
        shortest = max(1, self.T // 4)
        return [self.T - (self.T - shortest) * b // (self.B - 1) for b in range(self.B)]

    @property
    def layer_inputs(self) -> list[int]:
        """The width of each layer's input (layers,)."""
        return [self.I] + [self.directions * self.H] * (self.layers - 1)

    @property
    def flops(self) -> int:
        """FLOPs of one call: see the head of this file."""
        rows = sum(self.lengths)
        forward = sum(
            2 * rows * self.gates * self.H * (width + self.H) * self.directions
            for width in self.layer_inputs
        )
        return 3 * forward if self.training else forward

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of one recurrent weight matrix (G*H, H), what a step has to read."""
        return self.gates * self.H * self.H * self.item_bytes

    @property
    def weight_traffic(self) -> int:
        """Bytes of weights that one call must read at least: see the head of this file."""
        once = sum(
            self.gates * self.H * width * self.item_bytes * self.directions
            for width in self.layer_inputs
        )
        per_step = self.recurrent_bytes * self.directions * self.layers
        forward = once + self.T * per_step
        return 2 * forward if self.training else forward

    @property
    def shape(self) -> str:
        """CELL:T:B:I:H, as the command line takes it."""
        return f"{self.cell}:{self.T}:{self.B}:{self.I}:{self.H}"

    @property
    def label(self) -> str:
        """The shape and whatever is unusual about it, for a reader."""
        extras = [f"{self.layers} layers"] if self.layers > 1 else []
        extras += ["bidirectional"] if self.bidirectional else []
        extras += ["ragged"] if self.ragged else []
        return " ".join([self.shape, *extras])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Case:
        return Case(**{field.name: values[field.name] for field in fields(Case)})


def parse_shape(text: str) -> tuple[str, int, int, int, int]:
    """`LSTM:100:8:256:256` to its parts. Raises ValueError, saying what is wrong."""
    parts = text.split(":")
    if len(parts) != 5:
        raise ValueError(f"shape {text!r} is not CELL:T:B:I:H, for example LSTM:100:8:256:256")
    cell = parts[0].upper().replace("-", "_")
    try:
        T, B, I, H = (int(part) for part in parts[1:])  # noqa: E741
    except ValueError:
        raise ValueError(f"shape {text!r}: T, B, I and H must be whole numbers") from None
    try:
        Case(cell, T, B, I, H)
    except ValueError as error:
        raise ValueError(f"shape {text!r}: {error}") from None
    return cell, T, B, I, H


def parse_rows(text: str, count: int) -> list[int]:
    """`1,4-6` to zero-based row numbers [0, 3, 4, 5]; `count` rows exist. Raises ValueError."""
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise ValueError(f"rows {text!r} is not a list like 1,4-6") from None
        if not 1 <= low <= high <= count:
            raise ValueError(f"rows {text!r}: the table has rows 1 to {count}")
        chosen += [row - 1 for row in range(low, high + 1) if row - 1 not in chosen]
    return chosen
