"""Two-splitting block coordinate descent.

    minimise   κ R(V_L; Y) + Σ r(W_l) + Σ s(V_l) + Σ γ/2 ‖V_l − σ(P_l)‖²,     P_l = V_{l-1} W_lᵀ + 1b_lᵀ

One sweep visits the layers from last to first and updates V_l, then W_l and b_l (Algorithm 1 of [1]), with the newest
values at once. Rows are samples: V_l is N × d_l, W_l is d_l × d_{l-1}, V_0 = X; σ of the last layer is the identity.
Where σ is the identity, sub-problems are solved exactly. Elsewhere steps replace ½ ‖E‖², E = σ(P) − V, by a bound

    ½ ‖E‖² + ⟨σ′(P) E, ΔP⟩ + L/2 ‖ΔP‖²     (for V the last term is L/2 ‖ΔV‖²)

and minimise. Steps that raise the sub-problem are undone, and L grows where it was too small for a bound.

[1] Zeng, Lau, Lin, Yao. Global convergence of block coordinate descent in deep learning. ICML 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.algorithm import LiftedState, Report, precise
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.splitting import Splitting
from lightning_bcd.linalg import BiasUpdate, LeastSquares, RowSolver, power_iteration
from lightning_bcd.prox.activations import Identity
from lightning_bcd.prox.losses import Loss
from lightning_bcd.prox.penalties import NoPenalty

#: Factors of L after a step that the bound held for, and after one it did not hold for.
RELAX, TIGHTEN = 0.8, 2.0
#: Limits of L for weights, in units of γ: steps that always fit, or never, would drive it to 0 or infinity.
LEAST, MOST = 1e-4, 1e6
#: Rises below this many standard deviations of rounding count as none: rounding must not decide what is kept.
SLACK = 4


@dataclass(frozen=True, kw_only=True)
class TwoSplitting(Splitting):
    """Two-splitting BCD (Zeng, Lau, Lin, Yao, ICML 2019, Algorithm 1).

    The objective never rises. `bias_update` matters where the activation is the identity; elsewhere W and b are
    updated together.

    Args:
        inner_iterations: Steps per sub-problem without a closed form.

    The other arguments are those of `Splitting`.

    Raises:
        ValueError: If an argument is out of range.
    """

    inner_iterations: int = 10

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "gamma": 1.0,
            "alpha": 1.0,
            "fit_weight": 1.0,
            "target_scale": 1.0,
            "bias_update": "exact",
            "reduction": "sum",
        },
        "reference": {"gamma": 1.0, "alpha": 1.0, "init": "reference"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_iterations < 1:
            raise ValueError(
                f"Expected argument `inner_iterations` to be at least 1, but got {self.inner_iterations}. Use 10."
            )

    @property
    def descends(self) -> bool:
        """Whether the objective can never rise: constant γ, and a bias that is updated after its weights."""
        return self.constant and self.bias_update != "reference"

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError for skip connections, activations without derivative or unsuitable hyperparameters."""
        super().check(chain, loss)
        if names := [stage.name for stage in chain if stage.residual]:
            raise ValueError(f"Expected no skip connections, but got Residual at {names}. Use ResidualSplitting.")
        if names := [stage.name for stage in chain if not stage.weight.requires_grad]:
            raise ValueError(f"Expected every stage to be trained, but {names} are frozen. Use ThreeSplitting.")
        if names := [stage.name for stage in chain if not stage.activation.differentiable]:
            raise ValueError(
                f"Expected activations that gradients pass, but got Sign after {names}. Use ThreeSplitting."
            )

    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield V_l of a forward pass."""
        for _, v in self.forward_pass(chain, x):
            yield {"v": v}

    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update every block once (Algorithm 1 of [1])."""
        with precise(state.x.device):
            return Sweep(self, chain, state, loss, comm).run()

    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The displayed formula for this process's samples."""
        with precise(state.x.device):
            everything, v = slice(0, len(state.x)), state.x
            total = torch.zeros((), dtype=torch.float64, device=v.device)
            for layer, gamma in enumerate(self.numbers("gamma", state.sweep, len(chain))):
                output = chain[layer].activation(chain[layer].forward(v))
                v = state.read("v", layer, everything)
                total += gamma / 2 * (v - output).double().square().sum()
                if self.activation_penalty is not None and layer < len(chain) - 1:
                    total += self.activation_penalty.value(v)
            total = (total + self.kappa * loss.value(v, state.y)) / self.samples_of_mean(state)
            return total + self.penalties_on_weights(chain).sum()


@dataclass
class Fit:
    """W_l (out × d) and b_l (zeros if there is none) on trial, and what a pass over the samples found with them."""

    weight: Tensor
    bias: Tensor
    sums: list[LeastSquares]  # per group, of V_l (σ the identity) or σ′(P_l) E on V_{l-1}
    misfit: Tensor  # ‖E‖²
    noise: Tensor  # variance of ½ ‖E‖² by rounding, in units of the machine epsilon


class Sweep:
    """One sweep in progress: the numbers of this sweep and the terms of the report."""

    def __init__(
        self, algorithm: TwoSplitting, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator
    ) -> None:
        self.algorithm, self.chain, self.state, self.loss, self.comm = algorithm, chain, state, loss, comm
        depth = len(chain)
        self.gamma, self.alpha = (algorithm.numbers(name, state.sweep, depth) for name in ("gamma", "alpha"))
        self.penalties, self.on_activations = algorithm.weight_penalties(depth), algorithm.activation_penalty
        # "mean" divides all terms over samples by N: only sub-problems of weights and the report notice.
        self.samples = algorithm.samples_of_mean(state)
        self.terms = torch.zeros(2 * depth + 1, dtype=torch.float64, device=state.x.device)
        self.coupling, self.on_v, self.data_fit = self.terms[:depth], self.terms[depth:-1], self.terms[-1:]

    def run(self) -> Report:
        """Visit the layers; the algorithm box of the paper."""
        for layer in reversed(range(len(self.chain))):
            self.prepare_v(layer)
            self.update_w(layer)
        self.state.sweep += 1
        self.state.fresh = False
        return self.report()

    # -- V ------------------------------------------------------------------------------------------------

    def prepare_v(self, layer: int) -> None:
        """Factor the system of V_l where it is solved, else estimate L = γ_{l+1} ‖A_{l+1}‖²."""
        self.solver: RowSolver | None = None
        if layer == len(self.chain) - 1:
            return
        stage, gamma = self.chain[layer + 1], self.gamma[layer + 1]
        if stage.dense and isinstance(stage.activation, Identity) and self.on_activations is None:
            self.solver = RowSolver(stage.weight, self.gamma[layer] + self.alpha[layer], gamma)
            return
        # One row is cheap: start afresh, from a vector that no structure of the weights is orthogonal to.
        shape = self.state.variables["v"][layer].shape[1:]
        start = torch.arange(1, 1 + shape.numel(), device=self.state.x.device).to(self.state.x.dtype).cos_()
        norm, _ = power_iteration(
            lambda v: stage.adjoint(v, stage.apply(v, stage.weight, None)), start.view(1, *shape), iterations=10
        )
        self.bound = gamma * norm

    def update_v(self, layer: int, rows: slice, product: Tensor) -> Tensor:
        """V_l: γ_l/2 ‖V − σ(P_l)‖² + α/2 ‖V − V_old‖² plus the loss (last layer), or s(V) and the γ term above."""
        old, y = self.state.read("v", layer, rows), self.state.y[rows]
        weight = self.gamma[layer] + self.alpha[layer]
        centre = torch.lerp(self.chain[layer].activation(product), old, self.alpha[layer] / weight)
        if layer == len(self.chain) - 1:
            v = self.loss.prox(centre, self.algorithm.kappa / weight, y)
            self.data_fit += self.algorithm.kappa * self.loss.value(v, y)
            v = self.state.as_stored("v", layer, v)
            self.state.write("v", layer, rows, v)
            return v
        target = self.state.read("v", layer + 1, rows)
        if self.solver is not None:
            bias = self.chain[layer + 1].bias
            v, square = self.solver(centre.flatten(1), target if bias is None else target - bias)
        else:
            v, square = self.descend_v(layer, old, weight, centre, target)
        self.coupling[layer + 1] += square
        if self.on_activations is not None:
            self.on_v[layer] += self.on_activations.value(v)
        v = self.state.as_stored("v", layer, v.view_as(old))
        self.state.write("v", layer, rows, v)
        return v

    def descend_v(self, layer: int, v: Tensor, weight: float, centre: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Proximal gradient steps on V_l, every sample with an L of its own; also ‖V_{l+1} − σ(A(V) + b)‖².

        A sample keeps its step only if the bound held: then its sub-problem fell, whatever the penalty is.
        """
        stage, gamma, penalty = self.chain[layer + 1], self.gamma[layer + 1], self.on_activations or NoPenalty()
        product = stage.forward(v)
        error = stage.activation(product) - target
        slack = SLACK * torch.finfo(v.dtype).eps
        bound = self.bound.expand(len(v)).view(-1, *[1] * (v.dim() - 1))
        for _ in range(self.algorithm.inner_iterations):
            slope = stage.activation.derivative(product) * error
            gradient = gamma * stage.adjoint(v, slope) + weight * (v - centre)
            new = penalty.prox(v - gradient / (bound + weight), 1 / (bound + weight))
            new_product = stage.forward(new)
            new_error = stage.activation(new_product) - target
            # ½‖E_new‖² − ½‖E‖² − ⟨σ′(P)E, ΔP⟩, as differences: next to a large error no digits are lost.
            rise = (new_error - error) * (new_error + error) / 2 - slope * (new_product - product)
            rise = _per_sample(rise, v) - slack * _per_sample(_noise(error, target), v).sqrt()
            fits = gamma * rise <= bound / 2 * _per_sample((new - v).square(), v)
            v, product, error = (
                torch.where(fits.view(-1, *[1] * (then.dim() - 1)), now, then)
                for now, then in ((new, v), (new_product, product), (new_error, error))
            )
            bound = torch.where(fits, RELAX, TIGHTEN) * bound
        return v, error.square().sum(dtype=torch.float64)

    # -- W, b ---------------------------------------------------------------------------------------------

    def update_w(self, layer: int) -> None:
        """W_l, b_l: γ/2 ‖V_l − σ(V_{l-1}Wᵀ + b)‖² + α/2 ‖W − W_old‖² + α/2 ‖b − b_old‖² + r(W), after V_l."""
        stage, cache = self.chain[layer], self.state.cache
        bias = stage.weight.new_zeros(len(stage.weight)) if stage.bias is None else stage.bias
        grams = [cache.get(f"gram_{g}") if layer == 0 else None for g in range(stage.groups)]
        fit = self.visit(layer, stage.weight.flatten(1), bias, grams, update=True)
        if isinstance(stage.activation, Identity):
            assert self.algorithm.bias_update is not None
            fit.weight, fit.bias = self.solve(layer, fit, fit.sums, self.algorithm.bias_update)
            groups = zip(fit.sums, fit.weight.chunk(stage.groups), fit.bias.chunk(stage.groups), strict=True)
            fit.misfit = torch.stack([sums.residual_square(w, b) for sums, w, b in groups]).sum()
        else:
            self.descend_w(layer, fit)
        stage.weight.copy_(fit.weight.view_as(stage.weight))
        bias.copy_(fit.bias)
        if layer == 0:
            cache.update({f"gram_{g}": sums.gram for g, sums in enumerate(fit.sums)})
            # Reduced already: every process holds the whole sum and reports its share.
            self.coupling[0] += fit.misfit / self.comm.size

    def visit(
        self, layer: int, weight: Tensor, bias: Tensor, grams: Sequence[Tensor | None], *, update: bool = False
    ) -> Fit:
        """Pass over the samples and collect sums with these weights, after updating V_l if asked to."""
        stage, m = self.chain[layer], len(weight) // len(grams)
        sums = [LeastSquares(weight.shape[1], m, weight.device, gram=gram) for gram in grams]
        fit = Fit(weight, bias, sums, *torch.zeros_like(self.terms[:2]).unbind())
        for rows in self.state.rows(self.algorithm.rows_per_chunk(self.state.x)):
            v_in = self.state.read("v", layer - 1, rows)
            product = stage.apply(v_in, weight.view_as(stage.weight), bias)
            v = self.update_v(layer, rows, product) if update else self.state.read("v", layer, rows)
            error = stage.activation(product) - v
            fit.misfit += error.square().sum(dtype=torch.float64)
            fit.noise += _noise(error, v).sum(dtype=torch.float64)
            goal = v if isinstance(stage.activation, Identity) else stage.activation.derivative(product) * error
            parts = (t.chunk(stage.groups, 1) for t in (stage.rows(v_in), stage.columns(goal)))
            for group, z, t in zip(sums, *parts, strict=True):
                group.add(z, t)
        self.comm.sum([fit.misfit, fit.noise, *(total for group in sums for total in group.totals)])
        return fit

    def solve(self, layer: int, at: Fit, sums: list[LeastSquares], bias_update: BiasUpdate) -> tuple[Tensor, Tensor]:
        """Least squares with proximal weight α around a fit, in its precision."""
        biases = [None] * len(sums) if self.chain[layer].bias is None else at.bias.chunk(len(sums))
        options: dict[str, Any] = {
            "rho": self.gamma[layer] / self.samples,
            "alpha": self.alpha[layer],
            "penalty": self.penalties[layer],
            "bias_update": bias_update,
        }
        groups = zip(sums, at.weight.chunk(len(sums)), biases, strict=True)
        solved = [group.solve(w, b, **options) for group, w, b in groups]
        b = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in solved])
        return torch.cat([w for w, _ in solved]).to(at.weight.dtype), b.to(at.bias.dtype)

    def descend_w(self, layer: int, fit: Fit) -> None:
        """Minimise the bound, a least squares problem, and keep what lowers the sub-problem of W_l and b_l.

        L is in units of γ and stays from sweep to sweep: 1 is right for the linear pieces of ReLU. The minimum of a
        bound (r convex) lies at least γL/2 ‖ΔP‖² below the start: where the sub-problem fell by less, L was too small.
        """
        gamma, alpha, penalty = self.gamma[layer] / self.samples, self.alpha[layer], self.penalties[layer]
        slack = SLACK * torch.finfo(fit.weight.dtype).eps
        stage, old, key = self.chain[layer], replace(fit), f"bound_{layer}"

        def value(at: Fit) -> Tensor:
            moves = torch.cat([(at.weight - old.weight).double().flatten(), (at.bias - old.bias).double()])
            return (
                gamma / 2 * at.misfit
                + alpha / 2 * moves.square().sum()
                + self.algorithm.penalty_of(stage, penalty, at.weight)
            )

        bound, lowest = self.state.cache.get(key, torch.ones_like(fit.misfit)), value(fit)
        for _ in range(self.algorithm.inner_iterations):
            weight, bias = self.solve(layer, fit, _bounds(fit, bound, old, alpha / gamma), "joint")
            trial = self.visit(layer, weight, bias, [group.gram for group in fit.sums])
            current = value(trial)
            limit = lowest + slack * (lowest + gamma * fit.noise.sqrt())
            keep, fits = current <= limit, current + gamma * bound / 2 * _shift(fit, trial) <= limit
            lowest = torch.where(keep, current, lowest)
            for name in ("weight", "bias", "misfit", "noise"):
                setattr(fit, name, torch.where(keep, getattr(trial, name), getattr(fit, name)))
            for group, new in zip(fit.sums, trial.sums, strict=True):
                group.cross = torch.where(keep, new.cross, group.cross)
                group.sum_u = torch.where(keep, new.sum_u, group.sum_u)
            bound = (torch.where(fits, RELAX, TIGHTEN) * bound).clamp(LEAST, MOST)
        self.state.cache[key] = bound

    # -- the report ---------------------------------------------------------------------------------------

    def report(self) -> Report:
        """The terms of the objective after the sweep, summed over the processes."""
        self.comm.sum([self.terms])
        gamma = self.terms.new_tensor(self.gamma) / (2 * self.samples)
        entries = self.terms.new_tensor([self.state.samples * v.shape[1:].numel() for v in self.state.variables["v"]])
        on_w = self.algorithm.penalties_on_weights(self.chain)
        return Report(
            data_fit=self.data_fit[0] / self.samples,
            coupling=list((gamma * self.coupling).unbind()),
            linear=list(torch.zeros_like(gamma).unbind()),
            penalty=list((self.on_v / self.samples + on_w).unbind()),
            residuals={"activation": list((self.coupling / entries).sqrt().unbind())},
        )


def _bounds(fit: Fit, bound: Tensor, old: Fit, pull: float) -> list[LeastSquares]:
    """The sums of L/2 ‖T − V_{l-1}Wᵀ − 1bᵀ‖², T = P − σ′(P) E / L, from those of σ′(P) E.

    `solve` keeps W close to the fit; what the proximal term to the old weights adds to that is linear: `pull` = α/γ.
    """
    moves = (m.double() for m in (fit.weight, fit.bias, fit.weight - old.weight, fit.bias - old.bias))
    parts = (m.chunk(len(fit.sums)) for m in moves)
    result = []
    for sums, w, b, w_moved, b_moved in zip(fit.sums, *parts, strict=True):
        part = LeastSquares(w.shape[1], w.shape[0], w.device, gram=bound * sums.gram)
        part.sum_v, part.count = bound * sums.sum_v, bound * sums.count
        part.cross = w @ part.gram + torch.outer(b, part.sum_v) - sums.cross - pull * w_moved
        part.sum_u = w @ part.sum_v + b * part.count - sums.sum_u - pull * b_moved
        result.append(part)
    return result


def _shift(fit: Fit, trial: Fit) -> Tensor:
    """‖ΔP‖² of two fits."""
    moves = ((trial.weight - fit.weight).double(), (trial.bias - fit.bias).double())
    squares = []
    for sums, w, b in zip(fit.sums, *(move.chunk(len(fit.sums)) for move in moves), strict=True):
        squares.append(((w @ sums.gram) * w).sum() + b @ (2 * (w @ sums.sum_v) + sums.count * b))
    return torch.stack(squares).sum()


def _noise(error: Tensor, value: Tensor) -> Tensor:
    """Variance of ½ (σ − V)² by the rounding of σ and V, entry by entry, in units of the machine epsilon."""
    square = error.square()
    return square * (square + value.square())


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Sums over all but the first dimension, shaped to broadcast over `like`."""
    return t.flatten(1).sum(1).view(-1, *[1] * (like.dim() - 1))
