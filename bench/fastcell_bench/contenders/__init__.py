"""The table of contenders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Where a contender lives ("module:Class") and what must be installed for it."""

    name: str
    factory: str
    requires: tuple[str, ...]


OURS = "fastcell"
_HERE = "fastcell_bench.contenders"

REGISTRY: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(OURS, f"{_HERE}.fastcell_layers:FastcellLayers", ("fastcell",)),
        Entry("torch", f"{_HERE}.torch_layers:TorchLayers", ("torch",)),
        Entry("numpy", f"{_HERE}.numpy_reference:NumpyReference", ("numpy", "fastcell")),
        Entry("onnxruntime", f"{_HERE}.onnx_runtime:OnnxRuntime", ("onnxruntime", "onnx")),
        Entry("openvino", f"{_HERE}.open_vino:OpenVino", ("openvino", "onnx")),
        Entry("keras", f"{_HERE}.keras_layers:KerasLayers", ("tensorflow", "keras")),
        Entry("jax", f"{_HERE}.jax_scan:JaxScan", ("jax", "jaxlib")),
    )
}
PEERS = tuple(name for name in REGISTRY if name != OURS)
JUDGE = Entry("judge", f"{_HERE}.torch_layers:TorchLayers", ("torch",))
