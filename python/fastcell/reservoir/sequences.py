"""The forms in which sequences come, and in which results go back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Form(NamedTuple):
    """One sequence (T, I), a batch (B, T, I), or a list of B sequences (T_b, I)."""

    kind: str  # "one", "batch" or "list"
    tensors: bool

    def give(self, results: list[Any]) -> Any:
        """Results of each sequence, in this form."""
        if self.tensors:
            results = [torch.from_numpy(result) for result in results]
        if self.kind == "list":
            return results
        if self.kind == "one":
            return results[0]
        return torch.stack(results) if self.tensors else np.stack(results)


def split(X: Any) -> tuple[list[Any], Form]:
    """The sequences of X, not yet checked, and its form."""
    if isinstance(X, (list, tuple)) and len(X) and np.ndim(plain(X[0])) == 2:
        return [plain(x) for x in X], Form("list", isinstance(X[0], torch.Tensor))
    tensors = isinstance(X, torch.Tensor)
    if getattr(X, "ndim", 2) == 3:
        if len(X) == 0:
            raise ValueError(f"X must hold at least one sequence, got shape {tuple(X.shape)}")
        return list(plain(X)), Form("batch", tensors)
    return [plain(X)], Form("one", tensors)


def plain(x: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x
