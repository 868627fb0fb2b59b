"""The kernels: which instances there are of the templates beside this file.

Used when the extension is built (compile.py), and to make the emulated ones' table:

    python kernel_names.py --table > emulated_kernels.cpp
    python kernel_names.py --table persistent > emulated_kernels.cpp     (of those and of norms)
    python kernel_names.py --table trees > emulated_kernels.cpp          (those of trees alone)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

PASSES = ("forward", "backward")
CELLS = {
    "rnn_tanh": "RnnTanh",
    "rnn_relu": "RnnRelu",
    "lstm": "Lstm",
    "gru": "Gru",
    "leaky_tanh": "LeakyTanh",
    "leaky_relu": "LeakyRelu",
    "lstm_peephole": "LstmPeephole",
    "lstm_coupled": "LstmCoupled",
    "lstm_coupled_peephole": "LstmCoupledPeephole",
    "rnn_general": "RnnGeneral",
    "independent": "Independent",
    "lstm_general": "LstmGeneral",
    "lstm_peephole_general": "LstmPeepholeGeneral",
    "lstm_coupled_general": "LstmCoupledGeneral",
    "lstm_coupled_peephole_general": "LstmCoupledPeepholeGeneral",
    "gru_general": "GruGeneral",
    "gru_before": "GruBefore",
}
# Those with kernels for all steps at once: each more would add megabytes to the extension.
PERSISTENT = ("rnn_tanh", "rnn_relu", "lstm", "gru")
# With layer normalisation: products for all of them, and what is behind them.
NORMED = {
    "lstm": "NormedLstm",
    "lstm_peephole": "NormedLstmPeephole",
    "lstm_coupled": "NormedLstmCoupled",
    "lstm_coupled_peephole": "NormedLstmCoupledPeephole",
    "gru": "NormedGru",
}
NORMED_PRODUCTS = ("product", "project", "collect")
# How products are named in Python, what multiplies them, and where besides single steps they exist.
PRODUCTS = {
    "float64": ("Float64", ()),
    "float32": ("Float32", ("Grid", "Cluster")),
    "tf32": ("Tf32", ("Grid", "Cluster")),
    "bfloat16": ("Brain", ("Grid", "Cluster")),
    "float16": ("Half", ("Grid", "Cluster")),
}
# Over trees; of float and double.
TREES = ("TreeLstm", "TreeRnnTanh", "TreeRnnRelu")


def name(kind: str, cell: str, products: str, place: str) -> str:
    """The C++ expression of one kernel."""
    return (
        f"fastcell::cuda::{kind}<fastcell::cuda::{PRODUCTS[products][0]}, "
        f"fastcell::cells::{CELLS[cell]}, fastcell::cuda::{place}>"
    )


def exists(products: str, capability: int) -> bool:
    """Whether there are such tensor cores."""
    return products not in ("tf32", "bfloat16") or capability >= 80


def of_norms(capability: int) -> list[str]:
    """The kernels of layer normalisation."""
    found = []
    for products, (kind, _) in PRODUCTS.items():
        if not exists(products, capability):
            continue
        found += [f"fastcell::cuda::normed_{of}<fastcell::cuda::{kind}>" for of in NORMED_PRODUCTS]
        if products == "tf32":  # the rest is that of float32
            continue
        found += [
            f"fastcell::cuda::normed_{which}<fastcell::cuda::{kind}, fastcell::cells::{cell}>"
            for which in PASSES
            for cell in NORMED.values()
        ]
    return found


def names(capability: int) -> list[str]:
    """The kernels for an architecture, such as 90 for 9.0."""
    return [*of_sequences(capability, CELLS), *of_norms(capability), *of_trees()]


def of_trees() -> list[str]:
    found = []
    for real, products in (("float", "Float32"), ("double", "Float64")):
        found += [
            f"fastcell::cuda::tree_gather<{real}>",
            f"fastcell::cuda::row_products<fastcell::cuda::{products}>",
            *[
                f"fastcell::cuda::tree_{kind}<{real}, fastcell::cells::{cell}>"
                for kind in PASSES
                for cell in TREES
            ],
        ]
    return found


def of_sequences(capability: int, cells: Iterable[str]) -> list[str]:
    found = []
    for kind in PASSES:
        for cell in cells:
            for products, (_, places) in PRODUCTS.items():
                if not exists(products, capability):
                    continue
                for place in ("Step", *(places if cell in PERSISTENT else ())):
                    if place != "Cluster" or capability >= 90:
                        found.append(name(kind, cell, products, place))
    return found


def table(kernels: Iterable[str]) -> str:
    """C++ source of the emulated kernels' table."""
    call = "[](const void* p) {{ call({}, p); }}"
    rows = "\n".join(f'    {{"{k}", {call.format(k)}}},' for k in kernels)
    return f"""#include "kernels.cu"

#include "gpu_emulated.h"

namespace fastcell::cuda {{
namespace {{
template <class Parameter>
void call(void (*kernel)(Parameter), const void* p) {{
  kernel(*static_cast<const Parameter*>(p));
}}
const EmulatedKernel table[] = {{
{rows}
}};
}}  // namespace
const EmulatedKernel* emulated_kernels(int* count) {{
  *count = int(sizeof table / sizeof table[0]);
  return table;
}}
}}  // namespace fastcell::cuda
"""


if __name__ == "__main__":
    persistent = [*of_sequences(90, PERSISTENT), *of_norms(90)]
    parts = {"persistent": persistent, "trees": of_trees()}
    print(table(parts.get(sys.argv[-1], names(90))), end="")
