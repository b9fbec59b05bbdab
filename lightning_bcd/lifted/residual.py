"""Three-splitting block coordinate descent for residual networks.

    minimise   κ R(V_L; Y) + Σ r(W_l) + Σ s(V_l)
               + Σ γ/2 ‖V_l − V_{l-1} − σ(U_l)‖² + ρ/2 ‖U_l − V_{l-1} W_lᵀ − 1b_lᵀ‖²

where V_{l-1} is left out of the γ term of stages without a skip connection (the extension of [1] to residual
networks). With a skip around stage l + 1, V_l is also pulled to V_{l+1} − σ(U_{l+1}).

[1] Zeng, Lau, Lin, Yao. Global convergence of block coordinate descent in deep learning. ICML 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.algorithm import LiftedState
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.three_splitting import Sweep, ThreeSplitting
from lightning_bcd.prox.losses import Loss


@dataclass(frozen=True, kw_only=True)
class ResidualSplitting(ThreeSplitting):
    """Three-splitting BCD for chains with `Residual` stages (Zeng, Lau, Lin, Yao, ICML 2019).

    Arguments and guarantees are those of `ThreeSplitting`, which it equals on a chain without `Residual`.
    """

    skips: ClassVar[bool] = True

    def _sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Sweep:
        return ResidualSweep(self, chain, state, loss, comm)


class ResidualSweep(Sweep):
    """A sweep that knows skip connections."""

    def pull_weight(self, layer: int) -> float:
        """γ_l, and γ_{l+1} when there is a skip around stage l + 1."""
        return self.gamma[layer] + (self.gamma[layer + 1] if self.chain[layer + 1].residual else 0.0)

    def pull(self, layer: int, rows: slice, v_in: Tensor) -> tuple[float, Tensor]:
        """The two quadratics γ_l/2 ‖V − V_{l-1} − σ(U_l)‖² and γ_{l+1}/2 ‖V − (V_{l+1} − σ(U_{l+1}))‖² as one."""
        weight, centre = super().pull(layer, rows, v_in)
        if self.chain[layer].residual:
            centre = centre + v_in
        if self.chain[layer + 1].residual:
            above = self._above(layer, rows)
            weight += self.gamma[layer + 1]
            centre = centre.lerp(above, self.gamma[layer + 1] / weight)
        return weight, centre

    def update_v(self, layer: int, rows: slice, v_in: Tensor) -> Tensor:
        """Update V_l; the γ term of a skip around stage l + 1 is complete only now."""
        v = super().update_v(layer, rows, v_in)
        if self._closes_above(layer):
            self.coupling[layer + 1] += (self._above(layer, rows) - v).square_().sum()
        return v

    def settle(self, layer: int, a: Tensor, u: Tensor) -> None:
        """Add the γ term to the report, unless V_{l-1} is still to change."""
        if not self._closes_above(layer - 1):
            super().settle(layer, a, u)

    def _closes_above(self, layer: int) -> bool:
        last = layer == len(self.chain) - 1
        return layer >= 0 and not last and self.algorithm.order == "backward" and self.chain[layer + 1].residual

    def _above(self, layer: int, rows: slice) -> Tensor:
        """V_{l+1} − σ(U_{l+1})."""
        v, u = (self.state.read(name, layer + 1, rows) for name in ("v", "u"))
        return v - self.chain[layer + 1].activation(u)
