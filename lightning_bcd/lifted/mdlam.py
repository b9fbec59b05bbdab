"""mDLAM: deep learning by monotone accelerated alternating minimisation under an inequality constraint.

    minimise   R(Z_L; Y) + Σ μ/2 ‖W_l‖² + Σ_{l<L} ν/2 ‖Z_l − P_l‖² + ρ/2 ‖Z_L − P_L‖²,   P_l = A_{l-1} W_lᵀ + 1b_lᵀ
    subject to   σ(Z_l) − ε ≤ A_l ≤ σ(Z_l) + ε,  l < L,      A_0 = X

One sweep goes forward over the layers and updates W_l, b_l, Z_l, A_l with the newest values at once (Algorithm 1 of
[1]). Updates of W_l and A_l start from points that are extrapolated as Nesterov does; one that raised the objective is
done again from the plain point. Z_l and b_l are minimised over exactly: where they start has no effect. There are no
dual variables. Rows are samples: Z_l and A_l are N × d_l, W_l is d_l × d_{l-1}.

As Z_l = P_l wherever the constraint allows, hidden weights feel the labels through ε alone: each time it shrinks, Z_l
has to follow A_l. This is the paper's algorithm; the published code never extrapolates (it subtracts a value from
itself), does not update b_2 and counts the ridge twice.

[1] Wang, Li, Zhao. Accelerated gradient-free neural network training by multi-convex alternating optimization.
Neurocomputing 487, 2022 (arXiv 1811.04187).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.admm import AlternatingDirections, Steps, square
from lightning_bcd.lifted.algorithm import LiftedState, Report, Schedule, per_layer, positive
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.linalg import power_iteration
from lightning_bcd.linesearch import step_length
from lightning_bcd.prox import activations as sigma
from lightning_bcd.prox.activations import Activation
from lightning_bcd.prox.losses import Loss


@dataclass(frozen=True, kw_only=True)
class MDLAM(AlternatingDirections):
    """mDLAM (Wang, Li, Zhao, Neurocomputing 2022, Algorithm 1).

    The objective never rises while ε is constant. Activations must be monotone.

    Work per sweep: 5 Σ M_l + 5 Σ_{l≥2} M_l FLOPs with M_l = 2 d_l d_{l-1} N, 2 Σ M_l + 2 Σ_{l≥2} M_l without momentum:
    the products A_{l-1} W_lᵀ are held, and the tests of the objective multiply nothing.

    Args:
        mu: μ ≥ 0, ridge on the weights.
        epsilon: ε > 0, half the width of the constraint at the first sweep: a number, one per stage (that of the last
            is not used), or a function of (sweep, stages).
        epsilon_decay: Factor of ε after every sweep, in (0, 1]; 1 keeps it.
        epsilon_min: ε does not decay below this.
        momentum: Extrapolate W_l and A_l.

    The other arguments are those of `AlternatingDirections`. For A_l, whose step is projected, `step` looks at the
    largest curvature, not at that along the gradient: `"exact"` and `"lipschitz"` are the same.
    """

    mu: float | None = None
    epsilon: Schedule | None = None
    epsilon_decay: float | None = None
    epsilon_min: float | None = None
    momentum: bool | None = None

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "rho": 1e-3,
            "rho_schedule": "constant",
            "mu": 0.05,
            "epsilon": 100.0,
            "epsilon_decay": 0.5,
            "epsilon_min": 1e-3,
            "momentum": True,
            "step": "exact",
            "search_start": 1.0,
            "init_output": "forward",
            "output_solver": "newton",
            "reduction": "sum",
        },
        "reference": {"momentum": False, "step": "backtracking", "init_output": "labels", "output_solver": "fista"},
        "recommended": {"mu": 0.01, "init": "he", "init_output": "labels"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        mu, decay, least = self.mu or 0.0, self.epsilon_decay or 0.0, self.epsilon_min or 0.0
        for name, value, valid, wanted in (
            ("mu", mu, 0 <= mu < math.inf, "finite and at least 0"),
            ("epsilon_decay", decay, 0 < decay <= 1, "above 0 and at most 1, which keeps ε"),
            ("epsilon_min", least, 0 < least < math.inf, "positive and finite"),
        ):
            if not valid:
                raise ValueError(f"Expected argument `{name}` to be {wanted}, but got {value}. Change the value.")

    @property
    def descends(self) -> bool:
        """Whether ε and ρ are constant and the output step is exact: a shrinking ε moves Z_l, whatever that costs."""
        constant = self.epsilon_decay == 1 and not callable(self.epsilon) and self.rho_schedule == "constant"
        return constant and self.output_solver == "newton"

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError unless all stages are linear modules with monotone activations."""
        super().check(chain, loss)
        self.widths(0, len(chain))
        for stage in chain:
            if not stage.activation.monotone:
                raise ValueError(
                    f"Expected activations of MDLAM to be monotone, but stage '{stage.name}' has "
                    f"{type(stage.activation).__name__}: the Z that its constraint allows are no interval. Use e.g. "
                    "nn.ReLU, nn.LeakyReLU, nn.Tanh or nn.Softplus, or another algorithm."
                )

    def widths(self, sweep: int, depth: int) -> list[float]:
        """ε of every stage in a sweep."""
        assert self.epsilon is not None
        start = per_layer("epsilon", self.epsilon, sweep, depth)
        positive("epsilon", start)
        decay, least = self.epsilon_decay or 1.0, self.epsilon_min or 0.0
        return [max(width * decay**sweep, min(width, least)) for width in start]

    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield Z_l, the product M_l, and of hidden stages A_l and its last move, for a forward pass."""
        for layer, (z, a) in enumerate(chain.forward(x)):
            hidden = {} if layer == len(chain) - 1 else {"a": a}
            moves = {"move": torch.zeros_like(a)} if hidden and self.momentum else {}
            yield {"z": z, "m": z} | hidden | moves

    def visit(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator, rho: float, nu: float) -> Report:
        """Forward over the layers (Algorithm 1 of [1])."""
        sweep = Sweep(self, chain, state, loss, comm, rho, nu)
        last = len(chain) - 1
        if not state.fresh:
            sweep.narrow()
        for layer in range(last):
            sweep.update_w(layer)
            sweep.update_b(layer)
            sweep.update_z(layer)
            sweep.update_a(layer)
        sweep.update_w(last)
        sweep.update_b(last)
        sweep.update_z_last()
        return sweep.report()

    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The displayed formula for this process's samples, with ρ of the constructor; the constraint is not in it."""
        assert self.rho is not None
        rho, nu = self.rho, self.rho if self.nu is None else self.nu
        values, last = state.variables["z"], len(chain) - 1
        total = loss.value(values[last], state.y)
        for layer, stage in enumerate(chain):
            error = values[layer] - stage.forward(self.inputs_of(chain, state, layer))
            total = total + (rho if layer == last else nu) / 2 * square(error)
        ridge = (self.mu or 0.0) / 2 * torch.stack([square(stage.weight) for stage in chain]).sum()
        return total / (state.samples if self.reduction == "mean" else 1) + ridge


class Sweep:
    """One sweep in progress. The product M_l is a variable; everything else is read from the state."""

    def __init__(
        self, algorithm: MDLAM, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator, rho: float, nu: float
    ) -> None:
        self.algorithm, self.chain, self.state, self.loss, self.comm = algorithm, chain, state, loss, comm
        self.z, self.m, self.a = (state.variables[name] for name in ("z", "m", "a"))
        self.last = len(chain) - 1
        self.weights = [nu] * self.last + [rho]
        self.samples = state.samples if algorithm.reduction == "mean" else 1
        self.mu = algorithm.mu or 0.0
        self.epsilon = algorithm.widths(state.sweep, len(chain))
        self.before = algorithm.widths(max(state.sweep - 1, 0), len(chain))
        assert algorithm.rho is not None
        self.steps = Steps(algorithm, comm, state.samples, scale=rho / algorithm.rho)
        self.omega = self.extrapolation() if algorithm.momentum else None

    def extrapolation(self) -> Tensor:
        """ω = (t_{k-1} − 1)/t_k, t_k = (1 + √(1 + 4 t_{k-1}²))/2, t_0 = 1 (Algorithm 1 of [1])."""
        velocity = self.state.velocity
        last = velocity.get("t", self.state.x.new_ones((), dtype=torch.float64))
        velocity["t"] = (1 + (1 + 4 * last.square()).sqrt()) / 2
        return (last - 1) / velocity["t"]

    def bounds(self, layer: int) -> tuple[Tensor, Tensor]:
        """σ(Z_l) − ε and σ(Z_l) + ε."""
        value = self.chain[layer].activation(self.z[layer])
        return value - self.epsilon[layer], value + self.epsilon[layer]

    def narrow(self) -> None:
        """Bring A_l within ε of some σ(Z) where ε shrank; Z_l itself follows A_l in its own update."""
        for layer in range(self.last):
            if self.epsilon[layer] < self.before[layer]:
                a, above = self.a[layer], layer + 1
                moved = reach(self.chain[layer].activation, a, self.epsilon[layer])
                self.m[above].addmm_(moved - a, self.chain[above].weight.T)
                a.copy_(moved)

    def update_w(self, layer: int) -> None:
        """W_l ← Ŵ − g/θ, g = weight (P_l(Ŵ) − Z_l)ᵀA_{l-1} + μ Ŵ, Ŵ = W_l + ω (W_l − its last value)."""
        stage = self.chain[layer]
        if not stage.weight.requires_grad:  # the user froze the stage
            return
        inputs, ridge = self.algorithm.inputs_of(self.chain, self.state, layer), self.mu * self.samples

        def step() -> None:
            self.steps.update_w(stage, self.m[layer], inputs, self.z[layer], self.weights[layer], ridge)

        if self.omega is None:
            step()
        else:
            velocity, old = self.state.velocity, stage.weight.clone()
            move = velocity.get(str(layer), torch.zeros_like(old)) * self.omega
            self.accelerate(stage.weight, layer, move, inputs @ move.T, step, ridge)
            velocity[str(layer)] = stage.weight - old

    def update_b(self, layer: int) -> None:
        """b_l = mean over samples of Z_l − A_{l-1} W_lᵀ."""
        self.steps.update_b(self.chain[layer], self.m[layer], self.z[layer])

    def update_z(self, layer: int) -> None:
        """Z_l = P_l projected on the Z with |A_l − σ(Z)| ≤ ε, an interval for every entry."""
        a, epsilon = self.a[layer], self.epsilon[layer]
        least, greatest = preimage(self.chain[layer].activation, a - epsilon, a + epsilon)
        self.z[layer].copy_(torch.clamp(self.m[layer], least, greatest))

    def update_a(self, layer: int) -> None:
        """A_l ← projection of Â − g/τ on the constraint, g = weight (P_{l+1}(Â) − Z_{l+1})W_{l+1}, Â like Ŵ."""
        a, weight, rho, steps = self.a[layer], self.chain[layer + 1].weight, self.weights[layer + 1], self.steps
        low, high = self.bounds(layer)
        # Not the curvature along g, as for W_l: a projection changes the direction.
        start = weight.square().sum(0)
        largest = rho * power_iteration(lambda v: weight.T @ (weight @ v), start, iterations=8)[0].double()
        length = rho * step_length(largest, steps.rule, start=steps.start, doublings=steps.doublings, bound=largest)

        def step() -> None:
            self.descend(layer, low, high, length)

        if self.omega is None:
            step()
        else:
            old, last = a.clone(), self.state.variables["move"][layer]
            move = torch.clamp(a + last * self.omega, low, high) - a
            self.accelerate(a, layer + 1, move, move @ weight.T, step)
            last.copy_(a - old)

    def descend(self, layer: int, low: Tensor, high: Tensor, length: Tensor) -> None:
        """A projected gradient step on A_l that never raises the objective; two products.

        Where the majoriser with curvature τ lies above f at the projected point B, the best point between A and B is B
        itself. Where it does not (the estimate of λ_max comes from below), going less far replaces a larger τ.
        """
        a, product, weight = self.a[layer], self.m[layer + 1], self.chain[layer + 1].weight
        error = product - self.z[layer + 1]
        target = torch.addmm(a, error, weight * -length.to(weight.dtype)).clamp_(low, high)
        image = (target - a) @ weight.T
        sums = torch.stack([-(error * image).sum(dtype=torch.float64), square(image)])
        self.comm.sum([sums])
        share = torch.where(sums[1] > 0, sums[0] / sums[1], 0.0).clamp(0, 1).to(a.dtype)
        a.copy_(torch.lerp(a, target, share).clamp_(low, high))
        product.add_(image.mul_(share))

    def accelerate(
        self, block: Tensor, layer: int, move: Tensor, image: Tensor, step: Callable[[], None], ridge: float = 0.0
    ) -> None:
        """Step from W_l or A_{l-1} plus `move`; where that raised the objective, from the block itself.

        `image` is what `move` adds to the product M_l, `step` one on the block, in place, that moves M_l along; `ridge`
        is the weight of ½ ‖block‖².
        """
        product, goal = self.m[layer], self.z[layer]
        old, fast = (block.clone(), product.clone()), []
        block.add_(move)
        product.add_(image)
        step()
        for tensor, plain in zip((block, product), old, strict=True):
            fast.append(tensor.clone())
            tensor.copy_(plain)
        step()
        # In factored form: the difference of two sums would hide a small change.
        rise = ((fast[1] - old[1]) * (fast[1] + old[1] - 2 * goal)).sum(dtype=torch.float64) * self.weights[layer]
        self.comm.sum([rise])
        if ridge:
            rise = rise + ridge * ((fast[0] - old[0]) * (fast[0] + old[0])).sum(dtype=torch.float64)
        for tensor, moved in zip((block, product), fast, strict=True):
            tensor.copy_(torch.where(rise <= 0, moved, tensor))

    def update_z_last(self) -> None:
        """Z_L = argmin R(Z; Y) + ρ/2 ‖Z − P_L‖²."""
        z, weight = self.z[-1], self.weights[-1]
        z.copy_(self.algorithm.solve_output(self.loss, self.m[-1], weight, self.state.y, z))

    def report(self) -> Report:
        """The terms of the objective after the sweep; `activation` is the root mean square of A_l − σ(Z_l)."""
        gaps = [a - stage.activation(z) for stage, a, z in zip(self.chain, self.a, self.z, strict=False)]
        sums = torch.stack(
            [
                self.loss.value(self.z[-1], self.state.y).double(),
                *(square(z - m) for z, m in zip(self.z, self.m, strict=True)),
                *(square(gap) for gap in gaps),
            ]
        )
        self.comm.sum([sums])
        linear, gap = sums[1 : 2 + self.last], torch.cat([sums[2 + self.last :], sums.new_zeros(1)])
        entries = sums.new_tensor([self.state.samples * z.shape[1] for z in self.z])
        return Report(
            data_fit=sums[0] / self.samples,
            coupling=[sums.new_zeros(())] * len(self.z),
            linear=list((sums.new_tensor(self.weights) / (2 * self.samples) * linear).unbind()),
            penalty=[self.mu / 2 * square(stage.weight) for stage in self.chain],
            residuals={
                "activation": list((gap / entries).sqrt().unbind()),
                "linear": list((linear / entries).sqrt().unbind()),
            },
        )


def preimage(activation: Activation, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least u with σ(u) ≥ low and the greatest with σ(u) ≤ high, entry by entry; σ is monotone.

    A bound is infinite where it excludes nothing.
    """
    if isinstance(activation, sigma.Sign):
        margin = activation.margin  # rounding must not exclude a side
        return torch.where(low > margin - 1, 0.0, -math.inf), torch.where(high < 1 - margin, -margin, math.inf)
    bottom, top, inverse = _invert(activation)
    # Where σ only tends to its limits their inverse is infinite; rounding must not demand it.
    eps = torch.finfo(low.dtype).eps
    least, greatest = (inverse(value.clamp(bottom + eps, top - eps)) for value in (low, high))
    return torch.where(low > bottom, least, -math.inf), torch.where(high < top, greatest, math.inf)


def reach(activation: Activation, a: Tensor, epsilon: float) -> Tensor:
    """Return the value closest to a that is within ε of some σ(u), entry by entry."""
    if isinstance(activation, sigma.Sign):
        return a.clamp(activation(a) - epsilon, activation(a) + epsilon)
    bottom, top, _ = _invert(activation)
    return a.clamp(bottom - epsilon, top + epsilon)


def _invert(activation: Activation) -> tuple[float, float, Callable[[Tensor], Tensor]]:
    """Infimum and supremum of σ, and its inverse between them."""
    match activation:
        case sigma.LeakyReLU(negative_slope=slope) if slope > 0:
            return -math.inf, math.inf, lambda v: torch.where(v > 0, v, v / slope)
        case sigma.Identity():
            return -math.inf, math.inf, torch.positive
        case sigma.ReLU() | sigma.LeakyReLU():
            return 0.0, math.inf, torch.positive
        case sigma.HardTanh(min_val=bottom, max_val=top):
            return bottom, top, torch.positive
        case sigma.Sigmoid():
            return 0.0, 1.0, torch.logit
        case sigma.Tanh():
            return -1.0, 1.0, torch.atanh
        case sigma.Softplus(beta=beta, threshold=end):
            return 0.0, math.inf, lambda v: torch.where(beta * v > end, v, v + (-torch.expm1(-beta * v)).log() / beta)
    raise ValueError(f"Expected argument `activation` to have a known inverse, but got {type(activation).__name__}.")
