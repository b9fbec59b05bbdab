"""What the penalty splittings of Zeng et al. share: hyperparameters and presets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_bcd.lifted.algorithm import LiftedAlgorithm, LiftedState, Schedule, check_choice, per_layer, positive
from lightning_bcd.lifted.chain import Chain, Stage
from lightning_bcd.linalg import BIAS_UPDATES, BiasUpdate
from lightning_bcd.prox.losses import Loss, SquaredLoss
from lightning_bcd.prox.penalties import GroupLasso, NoPenalty, Penalty, RowSparse


@dataclass(frozen=True, kw_only=True)
class Growing:
    """Penalties that grow from the first stage to the last, so that targets reach the first stage in one sweep.

    V_l follows the stage above it when ρ_{l+1}‖W‖² is large beside γ_l, and U_l follows V_l when γ_l is large beside
    ρ_l. With constant ratios every sweep is close to a Gauss-Newton step for all stages. γ_L = 1.

    Args:
        activation: γ_l / ρ_l.
        linear: ρ_{l+1} / γ_l.
        last: ρ_L / γ_{L-1}.
        proximal: α_l / ρ_l.
    """

    activation: float
    linear: float
    last: float
    proximal: float

    def gamma(self, sweep: int, depth: int) -> list[float]:
        """γ of every stage."""
        values = [1.0]
        for stage in range(depth - 1):
            values.append(values[-1] / self.activation / (self.last if stage == 0 else self.linear))
        return values[::-1]

    def rho(self, sweep: int, depth: int) -> list[float]:
        """ρ of every stage."""
        return [value / self.activation for value in self.gamma(sweep, depth)]

    def alpha(self, sweep: int, depth: int) -> list[float]:
        """α of every stage."""
        return [value * self.proximal for value in self.rho(sweep, depth)]


#: Ratios of the recommended preset.
GROWING = Growing(activation=6.0, linear=6.0, last=3000.0, proximal=0.003)


@dataclass(frozen=True, kw_only=True)
class Penalised(LiftedAlgorithm):
    """An algorithm with penalties or constraints on the weights.

    Args:
        weight_penalty: r(W): one `Penalty` for all stages, or one per stage.
    """

    weight_penalty: Penalty | Sequence[Penalty] | None = None

    def weight_penalties(self, depth: int) -> list[Penalty]:
        """One penalty per stage."""
        given = self.weight_penalty
        if given is None or isinstance(given, Penalty):
            return [given or NoPenalty()] * depth
        if len(given) != depth:
            raise ValueError(
                f"Expected argument `weight_penalty` to be one penalty or {depth}, one per stage, but got "
                f"{len(given)}. Use NoPenalty() for stages without."
            )
        return list(given)

    @staticmethod
    def penalty_of(stage: Stage, penalty: Penalty, weight: Tensor) -> Tensor:
        """r(W) of a stage."""
        return torch.stack([penalty.value(block) for block in stage.blocks(weight)]).sum()

    def penalties_on_weights(self, chain: Chain) -> Tensor:
        """r(W_l) of every stage."""
        pairs = zip(chain, self.weight_penalties(len(chain)), strict=True)
        return torch.stack([self.penalty_of(stage, penalty, stage.weight) for stage, penalty in pairs])


@dataclass(frozen=True, kw_only=True)
class Splitting(Penalised):
    """Hyperparameters of a penalty splitting; see the algorithms themselves.

    Args:
        preset: `"reference"` (published settings) or `"recommended"` (best found by experiment) fills the arguments
            left at None; without a preset they are the paper's problem.
        gamma: γ > 0 of the activation terms: a number, one per stage, or a function of the sweep. 1 if None.
        alpha: α ≥ 0, proximal weight. 1 if None.
        fit_weight: κ > 0, factor of the loss. 1 if None.
        target_scale: Factor of the targets (squared loss only). 1 if None.
        weight_penalty: r(W): one `Penalty` for all stages, or one per stage. A convolution counts as the matrix
            out × (in · kernel), one per group.
        activation_penalty: s(V) of the hidden activations: convex, on every entry alone.
        bias_update: `"exact"` (after W), `"joint"` (with W) or `"reference"` (with the old W). `"exact"` if None.
        reduction: `"sum"` or `"mean"` over samples. With `"mean"` all terms over samples are divided by N, so that
            `alpha` and penalties on weights do not depend on it. `"sum"` if None.

    Raises:
        ValueError: If an argument is out of range.
    """

    preset: Literal["reference", "recommended"] | None = None
    gamma: Schedule | None = None
    alpha: Schedule | None = None
    fit_weight: float | None = None
    target_scale: float | None = None
    activation_penalty: Penalty | None = None
    bias_update: BiasUpdate | None = None
    reduction: Literal["sum", "mean"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.activation_penalty
        if given is not None and (isinstance(given, GroupLasso | RowSparse) or not given.convex):
            raise ValueError(
                f"Expected argument `activation_penalty` to be convex and act on every entry alone, but got {given}. "
                "Use L1, Ridge, ElasticNet, NonNegative or Box."
            )
        check_choice("bias_update", self.bias_update, BIAS_UPDATES)
        check_choice("reduction", self.reduction, ["sum", "mean"])
        for name in ("fit_weight", "target_scale"):
            positive(name, per_layer(name, getattr(self, name), 0, 1))
        for name in ("gamma", "rho", "alpha"):
            value = getattr(self, name, None)
            if isinstance(value, int | float):
                self._validate(name, per_layer(name, value, 0, 1))

    def _validate(self, name: str, values: list[float]) -> list[float]:
        if name != "alpha":
            positive(name, values)
        return values

    def numbers(self, name: str, sweep: int, depth: int) -> list[float]:
        """One value of `gamma`, `rho` or `alpha` per stage in this sweep."""
        return self._validate(name, per_layer(name, getattr(self, name), sweep, depth))

    def scale_targets(self, y: Tensor) -> Tensor:
        """`target_scale` times y."""
        assert self.target_scale is not None
        return y if self.target_scale == 1 else y * self.target_scale

    @property
    def kappa(self) -> float:
        """κ, the factor of the loss."""
        assert self.fit_weight is not None
        return self.fit_weight

    def forward_pass(self, chain: Chain, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (U_l, V_l) of a forward pass, hidden V_l inside the set of a constraint."""
        for layer, (u, v) in enumerate(chain.forward(x)):
            if self.activation_penalty is not None and layer < len(chain) - 1:
                v = self.activation_penalty.prox(v, 1.0)
            yield u, v

    def samples_of_mean(self, state: LiftedState) -> float:
        """What terms over samples are divided by."""
        return float(state.samples) if self.reduction == "mean" else 1.0

    @property
    def constant(self) -> bool:
        """Whether the objective is the same in every sweep."""
        return not any(callable(getattr(self, name, None)) for name in ("gamma", "rho"))

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError if the chain, the loss or the number of hyperparameters does not suit the algorithm."""
        super().check(chain, loss)
        for name in ("gamma", "rho", "alpha"):
            if hasattr(self, name):
                self.numbers(name, 0, len(chain))
        self.weight_penalties(len(chain))
        if self.target_scale != 1 and not isinstance(loss, SquaredLoss):
            raise ValueError(
                f"Expected argument `target_scale` to be 1 with {type(loss).__name__}, but got {self.target_scale}. "
                "Only targets of the squared loss have a scale; use fit_weight instead."
            )
