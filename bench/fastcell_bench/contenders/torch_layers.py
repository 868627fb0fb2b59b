"""torch.nn's layers, and the frame in which fastcell's run too: the same calls, other classes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from fastcell_bench.cases import Case
from fastcell_bench.contenders.contract import Call, Contender
from fastcell_bench.problem import Array, Problem


class TorchLayers(Contender):
    """`module(x)` under no_grad; in training the module and `torch.autograd.grad` to everything."""

    library: ModuleType = torch.nn

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self._algorithm = ""

    @property
    def version(self) -> str:
        return str(torch.__version__)

    def algorithm(self, case: Case) -> str:
        return self._algorithm

    def prepare(self, case: Case, problem: Problem) -> Call:
        module = self._module(case, problem)
        padded = torch.from_numpy(problem.input).requires_grad_(case.training)
        if case.ragged:
            packed = pack_padded_sequence(padded.detach(), torch.from_numpy(problem.lengths))
            values = packed.data.requires_grad_(case.training)
            x: Any = PackedSequence(values, packed.batch_sizes)
            gradient = pack_padded_sequence(
                torch.from_numpy(problem.output_gradient), torch.from_numpy(problem.lengths)
            ).data
        else:
            values, x = padded, padded
            gradient = torch.from_numpy(problem.output_gradient)

        torch.set_grad_enabled(case.training)
        self._algorithm = self._describe(module, x)
        if not case.training:
            return lambda: (module(x), None)

        wanted = [values, *module.parameters()]
        names = ["input", *(name for name, _ in module.named_parameters())]

        def step() -> tuple[Any, Any]:
            output, state = module(x)
            data = output.data if case.ragged else output
            gradients = torch.autograd.grad(data, wanted, gradient)
            return (output, state), dict(zip(names, gradients, strict=True))

        return step

    def results(self, case: Case, raw: Any) -> dict[str, Array]:
        (output, state), gradients = raw
        states = state if case.cell == "LSTM" else (state,)
        found = {"output": output.data if case.ragged else output}
        found.update(zip(("h_n", "c_n"), states, strict=False))
        found.update({f"grad_{name}": value for name, value in (gradients or {}).items()})
        return {name: value.detach().numpy() for name, value in found.items()}

    def _module(self, case: Case, problem: Problem) -> torch.nn.Module:
        kind = getattr(self.library, "RNN" if case.cell == "RNN_RELU" else case.cell)
        extras = {"nonlinearity": "relu"} if case.cell == "RNN_RELU" else {}
        module: torch.nn.Module = kind(
            case.I,
            case.H,
            num_layers=case.layers,
            bidirectional=case.bidirectional,
            dtype=getattr(torch, case.dtype),
            **extras,
        )
        module.load_state_dict(
            {name: torch.from_numpy(value) for name, value in problem.weights.items()}
        )
        return module.train(case.training)

    def _describe(self, module: torch.nn.Module, x: Any) -> str:
        """oneDNN's layer or torch's own loop over steps: seen in one call, not guessed."""
        with _Operators() as seen:
            module(x)
        onednn = any("mkldnn_rnn_layer" in name for name in seen.names)
        return "torch.nn, oneDNN layer" if onednn else "torch.nn, loop over steps (ATen)"


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of the operators that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))
