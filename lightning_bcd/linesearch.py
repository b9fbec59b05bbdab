"""Step lengths along a fixed direction of a quadratic.

Along −g a quadratic f with Hessian H has f(x − g/θ) = f − ‖g‖²/θ + κ‖g‖²/(2θ²), κ = ⟨g, Hg⟩/‖g‖². So the majoriser with
curvature θ lies above f at the trial point exactly when θ ≥ κ: a whole backtracking loop is one product, Hg.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StepRule = Literal["exact", "backtracking", "lipschitz"]
STEP_RULES = ("exact", "backtracking", "lipschitz")


def step_length(
    curvature: Tensor, rule: StepRule, *, start: float = 1.0, doublings: int | None = None, bound: Tensor | None = None
) -> Tensor:
    """Return 1/θ, the length of a gradient step on a quadratic; no host sync.

    Args:
        curvature: κ ≥ 0, a scalar.
        rule: `"exact"`: θ = κ, the minimiser along the gradient. `"backtracking"`: θ is the first of start, 2·start,
            4·start … that is at least κ, as a loop over trial points would find. `"lipschitz"`: θ = max(bound, κ).
        start: First trial of backtracking.
        doublings: Most doublings of backtracking; where more were needed the step is left out (length 0).
        bound: Largest eigenvalue of the Hessian, or an estimate.

    Returns:
        1/θ, or 0 where κ = 0: the gradient is zero.
    """
    if rule == "exact":
        theta = curvature
    elif rule == "lipschitz":
        assert bound is not None
        theta = torch.maximum(curvature, bound)
    else:
        count = (curvature / start).clamp_min(1).log2().ceil()
        # The logarithm is rounded: a power of two may come out one too high or too low.
        count = torch.where((count > 0) & (start * (count - 1).exp2() >= curvature), count - 1, count)
        count = torch.where(start * count.exp2() < curvature, count + 1, count)
        theta = start * count.exp2()
        if doublings is not None:
            theta = torch.where(count > doublings, torch.inf, theta)
    return torch.where(curvature > 0, 1 / theta, torch.zeros_like(theta))
