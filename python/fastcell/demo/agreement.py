"""Do the two libraries compute the same thing? Two questions, each with its own tolerance.

**The same step.** From the same weights, state and window, both libraries compute the loss and
every gradient, and torch computes them once more in float64, which here counts as exact. Only
rounding separates each library from that, so fastcell may be ``FACTOR`` times as far from it as
torch is, or as far as sums of that length can round, whichever is more. This is asked of the
fresh weights, of the trained ones, and several times between: a wrong gradient fails it.

**The same curves.** Left to themselves, two float32 trainings drift apart even where every step is
right: rounding grows from step to step as in any chaotic system, and Adam divides by a running
gradient that may be near zero. So no bound derived from rounding holds for whole curves. Measured
at the default settings: torch.nn.LSTM against itself, with one element of each weight started one
unit in the last place higher, agrees to 5e-7 nats for 120 steps; then the distance grows tenfold
every 40 steps or so, up to about 0.01 nats a step, where it stays. What must hold is that the
curves could not be told apart by looking: means over ``SMOOTH`` consecutive steps differ by no more
than ``ERRORS`` standard errors of such a mean, the usual bound for the largest of some forty. (In
that measurement the largest was 0.2; fastcell.LSTM beside torch.nn.LSTM came to 0.55.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import CharacterModel, State, cast

FACTOR = 4.0  # two bits
SMOOTH = 20  # at least, in each mean, unless there are fewer steps at all
ERRORS = 3.0
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class StepCheck:
    """Distance of one training step in float32 from the same step in float64.

    Attributes:
        worst: what came nearest to its tolerance, or passed it: "loss" or a parameter's name.
        torch, fastcell: relative error of ``worst`` (of a gradient, in the 2-norm).
        tolerance: the relative error allowed to fastcell there.
    """

    worst: str
    torch: float
    fastcell: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.severity <= 1  # false for NaN

    @property
    def severity(self) -> float:
        """Error over tolerance."""
        return self.fastcell / max(self.tolerance, TINY)


def nearest_to_failure(check: StepCheck | CurveCheck) -> float:
    """A key for ``max``: the severity, and NaN above all."""
    return math.inf if math.isnan(check.severity) else check.severity


def rounding(terms: int) -> float:
    """What a sum of ``terms`` float32 products may lose, relatively."""
    return 4 * math.ceil(math.log2(max(2, terms))) * torch.finfo(torch.float32).eps


def loss_and_gradients(
    model: CharacterModel, ids: Tensor, targets: Tensor, state: State | None
) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter, in float64, by name."""
    parameters = dict(model.named_parameters())
    loss, _ = model.loss(ids, targets, state)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    values = {"loss": loss.detach().double()}
    values.update((name, g.double()) for name, g in zip(parameters, gradients, strict=True))
    return values


def check_step(
    torch_model: CharacterModel,
    fastcell_model: CharacterModel,
    ids: Tensor,
    targets: Tensor,
    state: State | None,
) -> StepCheck:
    """Compare one step of both libraries from the weights of ``torch_model``; changes neither."""
    twin = copy.deepcopy(fastcell_model)
    twin.load_state_dict(torch_model.state_dict())
    exact = loss_and_gradients(
        copy.deepcopy(torch_model).double(), ids, targets, cast(state, torch.float64)
    )
    theirs = loss_and_gradients(torch_model, ids, targets, state)
    ours = loss_and_gradients(twin, ids, targets, state)
    config = torch_model.config
    width = config.hidden + max(config.embedding, config.hidden)
    floor = rounding(config.layers * ids.shape[0] * width)
    checks = []
    for name, value in exact.items():
        size = value.norm().item() or 1.0
        their_error = (theirs[name] - value).norm().item() / size
        our_error = (ours[name] - value).norm().item() / size
        checks.append(StepCheck(name, their_error, our_error, max(FACTOR * their_error, floor)))
    return max(checks, key=nearest_to_failure)


@dataclass(frozen=True)
class CurveCheck:
    """How far apart two smoothed training curves are.

    Attributes:
        smooth: steps in each mean.
        difference: distance in nats of the two means that came nearest to their tolerance.
        tolerance: the distance allowed there.
    """

    smooth: int
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.severity <= 1  # false for NaN

    @property
    def severity(self) -> float:
        """Difference over tolerance."""
        return self.difference / max(self.tolerance, TINY)


def check_curves(torch_losses: Sequence[float], fastcell_losses: Sequence[float]) -> CurveCheck:
    """Compare two training curves over the same batches, in consecutive stretches."""
    theirs = torch.tensor(torch_losses, dtype=torch.float64)
    ours = torch.tensor(fastcell_losses, dtype=torch.float64)
    stretches = max(1, theirs.numel() // SMOOTH)
    checks = []
    for a, b in zip(theirs.tensor_split(stretches), ours.tensor_split(stretches), strict=True):
        # Half the mean square of neighbours' differences: the noise of single batches without the
        # downward trend that the stretch also has.
        noise = (a.diff().square().mean() / 2).sqrt() if a.numel() > 1 else torch.zeros(())
        error = (noise / math.sqrt(a.numel())).item()
        difference = (a.mean() - b.mean()).abs().item()
        tolerance = max(ERRORS * error, rounding(a.numel()) * a.mean().abs().item())
        checks.append(CurveCheck(a.numel(), difference, tolerance))
    return max(checks, key=nearest_to_failure)
