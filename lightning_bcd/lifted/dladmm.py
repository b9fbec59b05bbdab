"""dlADMM: deep learning by the alternating direction method of multipliers.

    minimise   R(Z_L; Y) + Σ_{l<L} ν/2 ‖Z_l − P_l‖² + ν/2 ‖A_l − σ(Z_l)‖²
               + ⟨U, Z_L − P_L⟩ + ρ/2 ‖Z_L − P_L‖²,          P_l = A_{l-1} W_lᵀ + 1b_lᵀ,  A_0 = X

One sweep goes backward over the layers and forward again, with the newest values at once; then the dual variable U of
the output constraint moves (Algorithm 1 of [1]). Rows are samples: Z_l and A_l are N × d_l, W_l is d_l × d_{l-1}.

[1] Wang, Yu, Chen, Zhao. ADMM for efficient deep learning with global convergence. KDD 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.acceleration import Accelerated
from lightning_bcd.lifted.admm import AlternatingDirections, Steps, square
from lightning_bcd.lifted.algorithm import LiftedState, Report, check_choice, precise
from lightning_bcd.lifted.chain import Chain, Stage
from lightning_bcd.prox.losses import Loss

#: Below it the square of a gradient counts as zero.
TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class DLADMM(AlternatingDirections, Accelerated):
    """dlADMM (Wang, Yu, Chen, Zhao, KDD 2019, Algorithm 1).

    Work per sweep: 4 M_1 + 8 Σ_{l≥2} M_l FLOPs with M_l = 2 d_l d_{l-1} N; the products A_{l-1} W_lᵀ are held, so that
    only gradients and curvatures are multiplied. `rho_schedule="published"`: after three rises of the training loss in
    a row ρ ← min(10 ρ, 0.1), and the search start grows with it.

    Args:
        direction: Of the step on W: `"gradient"`, or `"conjugate"`: conjugate to the last step (Polak-Ribière), with b
            moved along to the best value for every W. The same products, and the same guarantee: the step ends at the
            minimum along a direction of descent. Needs `step="exact"`.

    The other arguments are those of `AlternatingDirections` and `Accelerated`. A restart, Σ M_l FLOPs, keeps U.

    Raises:
        ValueError: If an argument is out of range.
    """

    direction: Literal["gradient", "conjugate"] | None = None

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "rho": 1e-6,
            "rho_schedule": "constant",
            "step": "exact",
            "search_start": 1.0,
            "init_output": "forward",
            "output_solver": "newton",
            "reduction": "sum",
            "direction": "gradient",
            "momentum": 0.0,
        },
        "reference": {
            "rho_schedule": "published",
            "step": "backtracking",
            "init_output": "labels",
            "output_solver": "fista",
        },
        "recommended": {
            "rho": 0.01,
            "direction": "conjugate",
            "init": "looks_linear",
            "restart_every": 1,
            "momentum": 0.9,
        },
    }
    largest_rho: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("direction", self.direction, ["gradient", "conjugate"])
        if self.direction == "conjugate" and self.step != "exact":
            raise ValueError(
                f"Expected argument `step` to be 'exact' with direction='conjugate', but got {self.step!r}: other "
                "lengths do not keep directions conjugate. Leave it out."
            )

    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield Z_l, the product M_l, and A_l of hidden stages or U of the last, for a forward pass."""
        last = len(chain) - 1
        for layer, (z, a) in enumerate(chain.forward(x)):
            yield {"z": z, "m": z} | ({"u": torch.zeros_like(z)} if layer == last else {"a": a})

    def restart(self, chain: Chain, state: LiftedState) -> None:
        """Set the auxiliary variables to those of a forward pass again, all but U."""
        dual = [u.clone() for u in state.variables.get("u", [])]
        super().restart(chain, state)
        for u, kept in zip(state.variables["u"], dual, strict=False):
            u.copy_(kept)

    def is_stale(self, state: LiftedState) -> bool:
        """Momentum has moved the weights after the last sweep."""
        return bool(self.momentum) or super().is_stale(state)

    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update every block once; restart before, move on after it."""
        if self.restarts(state):
            self.restart(chain, state)
        with precise(state.x.device), self.heavy_ball(chain, state):
            return super().sweep(chain, state, loss, comm)

    def visit(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator, rho: float, nu: float) -> Report:
        """Backward, forward, dual (Algorithm 1 of [1])."""
        sweep = Sweep(self, chain, state, loss, comm, rho, nu)
        last = len(chain) - 1
        sweep.update_z_last()
        sweep.update_b(last)
        sweep.update_w(last)
        for layer in reversed(range(last)):
            sweep.update_a(layer)
            sweep.update_z(layer)
            sweep.update_b(layer)
            sweep.update_w(layer)
        for layer in range(last):
            sweep.update_w(layer)
            sweep.update_b(layer)
            sweep.update_z(layer)
            sweep.update_a(layer)
        sweep.update_w(last)
        sweep.update_b(last)
        sweep.update_z_last()
        sweep.update_u()
        return sweep.report()

    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The displayed formula for this process's samples, with ρ of the constructor."""
        assert self.rho is not None
        rho, nu = self.rho, self.rho if self.nu is None else self.nu
        values, last = state.variables, len(chain) - 1
        total = loss.value(values["z"][last], state.y)
        for layer, stage in enumerate(chain):
            error = values["z"][layer] - stage.forward(self.inputs_of(chain, state, layer))
            total = total + (rho if layer == last else nu) / 2 * error.double().square().sum()
            if layer == last:
                total = total + (values["u"][0] * error).double().sum()
            else:
                gap = values["a"][layer] - stage.activation(values["z"][layer])
                total = total + nu / 2 * gap.double().square().sum()
        return total / (state.samples if self.reduction == "mean" else 1)


class Sweep:
    """One sweep in progress. The product M_l is a variable; everything else is read from the state."""

    def __init__(
        self,
        algorithm: DLADMM,
        chain: Chain,
        state: LiftedState,
        loss: Loss,
        comm: Communicator,
        rho: float,
        nu: float,
    ) -> None:
        self.algorithm, self.chain, self.state, self.loss, self.comm = algorithm, chain, state, loss, comm
        self.rho, self.nu = rho, nu
        self.z, self.m, self.a = (state.variables[name] for name in ("z", "m", "a"))
        self.dual = state.variables["u"][0]
        self.last = len(chain) - 1
        self.samples = state.samples if algorithm.reduction == "mean" else 1
        self.direction = algorithm.direction
        assert algorithm.rho is not None
        self.steps = Steps(algorithm, comm, state.samples, scale=rho / algorithm.rho)

    def target(self, layer: int) -> tuple[Tensor, float]:
        """What P_l should be, and the weight of that term: Z_l, for the last layer Z_L + U/ρ."""
        if layer == self.last:
            return torch.add(self.z[layer], self.dual, alpha=1 / self.rho), self.rho
        return self.z[layer], self.nu

    def update_z_last(self) -> None:
        """Z_L = argmin R(Z; Y) + ρ/2 ‖Z − P_L + U/ρ‖²."""
        centre = torch.sub(self.m[-1], self.dual, alpha=1 / self.rho)
        self.z[-1].copy_(self.algorithm.solve_output(self.loss, centre, self.rho, self.state.y, self.z[-1]))

    def update_z(self, layer: int) -> None:
        """Z_l = argmin ν/2 ‖Z − P_l‖² + ν/2 ‖A_l − σ(Z)‖²."""
        z = self.z[layer]
        z.copy_(self.chain[layer].activation.solve(self.a[layer], self.m[layer], 1.0, old=z))

    def update_b(self, layer: int) -> None:
        """b_l = mean over samples of the target less A_{l-1} W_lᵀ."""
        self.steps.update_b(self.chain[layer], self.m[layer], self.target(layer)[0])

    def update_w(self, layer: int) -> None:
        """W_l ← W_l − g/θ, g = weight (P_l − target)ᵀA_{l-1}, or a step conjugate to the last one."""
        target, weight = self.target(layer)
        stage, inputs = self.chain[layer], self.algorithm.inputs_of(self.chain, self.state, layer)
        if self.direction == "gradient":
            self.steps.update_w(stage, self.m[layer], inputs, target, weight)
        elif stage.weight.requires_grad:
            self.update_w_conjugate(stage, layer, inputs, target)

    def update_w_conjugate(self, stage: Stage, layer: int, inputs: Tensor, target: Tensor) -> None:
        """Minimise ‖target − A Wᵀ − 1bᵀ‖² over b and along W − s D, D = g + β⁺ D_old, s ≥ 0.

        b is eliminated: g and the curvature are those of centred inputs, where the mean of ReLU features, their largest
        direction by far, does not shorten the step. β⁺ = max(0, ⟨g, g − g_old⟩ / ‖g_old‖²) (Nocedal and Wright,
        Numerical Optimization, 5.45); D = g where D would not be a direction of descent.
        """
        product, samples = self.m[layer], self.state.samples
        error, center = product - target, inputs.new_zeros(inputs.shape[1])
        shift = error.new_zeros(error.shape[1])
        if stage.bias is not None:
            sums = [error.sum(0), inputs.sum(0)]
            self.comm.sum(sums)
            shift, center = (total / samples for total in sums)
            error.sub_(shift)
        gradient = error.T @ inputs
        self.comm.sum([gradient])
        velocity, names = self.state.velocity, (f"gradient{layer}", f"direction{layer}")
        direction = gradient
        if names[0] in velocity:
            old, last = (velocity[name] for name in names)
            change, norm = (gradient * (gradient - old)).sum(), old.square().sum()
            beta = torch.where(norm > TINY, (change / norm).clamp_min(0), torch.zeros_like(norm))
            direction = gradient + last * beta
            direction = torch.where((gradient * direction).sum() > 0, direction, gradient)
        velocity.update(zip(names, (gradient, direction), strict=True))
        moved = direction @ center
        image = (inputs @ direction.T).sub_(moved)
        curved = square(image)
        self.comm.sum([curved])
        slope = (gradient * direction).sum().double()
        length = torch.where(curved > 0, slope / curved, torch.zeros_like(slope)).to(gradient.dtype)
        stage.weight.sub_(direction * length)
        product.sub_(image.mul_(length)).sub_(shift)
        if stage.bias is not None:
            stage.bias.add_(moved * length).sub_(shift)

    def update_a(self, layer: int) -> None:
        """A_l ← A_l − g/τ, g = weight (P_{l+1} − target)W_{l+1} + ν(A_l − σ(Z_l))."""
        above, a = layer + 1, self.a[layer]
        target, weight = self.target(above)
        pull = (a - self.chain[layer].activation(self.z[layer])).mul_(self.nu)
        self.steps.update_inputs(self.chain[above], self.m[above], a, target, weight, pull, self.nu)

    def update_u(self) -> None:
        """U ← U + ρ (Z_L − P_L)."""
        self.dual.add_(self.z[-1] - self.m[-1], alpha=self.rho)

    def report(self) -> Report:
        """The terms of the augmented Lagrangian after the sweep."""
        errors = [z - m for z, m in zip(self.z, self.m, strict=True)]
        gaps = [a - stage.activation(z) for stage, a, z in zip(self.chain, self.a, self.z, strict=False)]
        sums = torch.stack(
            [
                self.loss.value(self.z[-1], self.state.y).double(),
                (self.dual * errors[-1]).sum().double(),
                *(square(error) for error in errors),
                *(square(gap) for gap in gaps),
            ]
        )
        self.comm.sum([sums])
        linear, coupling = sums[2 : 3 + self.last], torch.cat([sums[3 + self.last :], sums.new_zeros(1)])
        weights = sums.new_tensor([self.nu] * self.last + [self.rho]) / (2 * self.samples)
        entries = sums.new_tensor([self.state.samples * z.shape[1] for z in self.z])
        zeros = [sums.new_zeros(())] * len(self.z)
        return Report(
            data_fit=sums[0] / self.samples,
            coupling=list((weights * coupling).unbind()),
            linear=list((weights * linear).unbind()),
            penalty=zeros,
            dual=[*zeros[:-1], sums[1] / self.samples],
            residuals={
                "activation": list((coupling / entries).sqrt().unbind()),
                "linear": list((linear / entries).sqrt().unbind()),
            },
        )
