"""Two-splitting block coordinate descent.

    minimise   κ R(V_L; Y) + Σ r(W_l) + Σ s(V_l) + Σ γ/2 ‖V_l − σ(P_l)‖²,     P_l = V_{l-1} W_lᵀ + 1b_lᵀ

One sweep visits the layers from last to first and updates V_l, then W_l and b_l (Algorithm 1 of [1]), with the newest
values at once. Rows are samples: V_l is N × d_l, W_l is d_l × d_{l-1}, V_0 = X; σ of the last layer is the identity.
σ sits inside the squares. Where it is the identity, sub-problems are solved exactly; elsewhere they descend on upper
bounds of ½ ‖E‖², E = σ(P) − V, that are quadratic in P:

    ½ ‖E‖² + ⟨σ′(P) E, ΔP⟩ + L/2 ‖ΔP‖²      (for V the last term is L/2 ‖ΔV‖²)

A step that raises a sub-problem is undone, and L grows with every step that the bound did not hold for.

[1] Zeng, Lau, Lin, Yao. Global convergence of block coordinate descent in deep learning. ICML 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_bcd.lifted.algorithm import Communicator, LiftedState, Report, precise
from lightning_bcd.lifted.chain import Chain, Stage
from lightning_bcd.lifted.splitting import Splitting
from lightning_bcd.linalg import BiasUpdate, LeastSquares, RowSolver, power_iteration
from lightning_bcd.prox.activations import Identity
from lightning_bcd.prox.losses import Loss
from lightning_bcd.prox.penalties import NoPenalty

#: Factors of L after a step that the bound held for, and after one it did not hold for.
RELAX, TIGHTEN = 0.8, 2.0


@dataclass(frozen=True, kw_only=True)
class TwoSplitting(Splitting):
    """Two-splitting BCD (Zeng, Lau, Lin, Yao, ICML 2019, Algorithm 1).

    The objective never rises. `bias_update` matters where the activation is the identity; elsewhere W and b are
    updated together. A penalty on activations has to treat every sample on its own.

    Args:
        inner_iterations: Most steps per sub-problem without a closed form.

    The other arguments are those of `Splitting`.

    Raises:
        ValueError: If an argument is out of range.
    """

    inner_iterations: int = 10

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"gamma": 1.0, "alpha": 1.0, "fit_weight": 1.0, "target_scale": 1.0, "bias_update": "exact"},
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
        residual = [stage.name for stage in chain if stage.residual]
        if residual:
            raise ValueError(
                f"Expected a network without skip connections, but got Residual at {residual}. Use ResidualSplitting."
            )
        flat = [stage.name for stage in chain if not stage.activation.differentiable]
        if flat:
            raise ValueError(
                f"Expected activations with a derivative, but got Sign after {flat}, which no gradient passes. Use "
                "ThreeSplitting."
            )

    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield V_l of a forward pass."""
        for layer, (_, v) in enumerate(chain.forward(x)):
            if self.activation_penalty is not None and layer < len(chain) - 1:
                v = self.activation_penalty.prox(v, 1.0)
            yield {"v": v}

    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update every block once (Algorithm 1 of [1])."""
        with precise(state.x.device):
            return Sweep(self, chain, state, loss, comm).run()

    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The displayed formula for this process's samples."""
        with precise(state.x.device):
            gamma, everything = self.numbers("gamma", state.sweep, len(chain)), slice(0, len(state.x))
            total = self.fit_weight * loss.value(state.read("v", len(chain) - 1, everything), state.y)
            for layer, stage in enumerate(chain):
                v_in, v = (state.read("v", i, everything) for i in (layer - 1, layer))
                total = total + gamma[layer] / 2 * (v - stage.activation(stage.forward(v_in))).double().square().sum()
                if self.activation_penalty is not None and layer < len(chain) - 1:
                    total = total + self.activation_penalty.value(v)
            weights = zip(self.weight_penalties(len(chain)), chain, strict=True)
            return (
                total / self.samples_of_mean(state) + torch.stack([r.value(stage.weight) for r, stage in weights]).sum()
            )


@dataclass
class Fit:
    """A trial of W_l (flattened to out × d) and b_l (zeros without a bias), and what a pass over the samples found.

    `parts` (one per group) hold the sums of Z = V_{l-1} with V_l where σ is the identity, else with σ′(P) E.
    """

    weight: Tensor
    bias: Tensor
    parts: list[LeastSquares]
    misfit: Tensor  # ‖V_l − σ(P_l)‖²


class Sweep:
    """One sweep in progress: the numbers of this sweep and the sums collected on the way."""

    def __init__(
        self, algorithm: TwoSplitting, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator
    ) -> None:
        self.algorithm, self.chain, self.state, self.loss, self.comm = algorithm, chain, state, loss, comm
        depth = len(chain)
        self.gamma, self.alpha = (algorithm.numbers(name, state.sweep, depth) for name in ("gamma", "alpha"))
        self.penalties, self.on_activations = algorithm.weight_penalties(depth), algorithm.activation_penalty
        assert algorithm.fit_weight is not None
        self.fit_weight = algorithm.fit_weight
        # "mean" divides all terms over samples by N: only sub-problems of weights and the report notice.
        self.samples = algorithm.samples_of_mean(state)
        self.sums = torch.zeros(2 * depth + 1, dtype=torch.float64, device=state.x.device)
        self.coupling, self.on_v, self.data_fit = self.sums[:depth], self.sums[depth:-1], self.sums[-1:]
        self.solver: RowSolver | None = None
        self.bound = self.sums[-1]

    def run(self) -> Report:
        """Visit the layers; the algorithm box of the paper."""
        for layer in reversed(range(len(self.chain))):
            self.prepare_v(layer)
            fit = self.fit(layer)
            for rows in self.chunks():
                v_in = self.state.read("v", layer - 1, rows)
                product = self.chain[layer].forward(v_in)
                v = self.update_v(layer, rows, product)
                self.collect(self.chain[layer], fit, v_in, product, v)
            self.update_w(layer, fit)
        self.state.sweep += 1
        return self.report()

    def chunks(self) -> Iterator[slice]:
        """Rows that are updated together."""
        return self.state.rows(self.algorithm.rows_per_chunk(self.state.x))

    # -- V ------------------------------------------------------------------------------------------------

    def prepare_v(self, layer: int) -> None:
        """Factor the system of V_l where it is solved, else estimate L = γ_{l+1} ‖A‖²."""
        self.solver = None
        if layer == len(self.chain) - 1:
            return
        stage, gamma = self.chain[layer + 1], self.gamma[layer + 1]
        if stage.dense and isinstance(stage.activation, Identity) and self.on_activations is None:
            self.solver = RowSolver(stage.weight, self.gamma[layer] + self.alpha[layer], gamma)
            return
        # One row is cheap: a start that no weights are orthogonal to by design, and no state from sweep to sweep.
        shape = self.state.variables["v"][layer].shape[1:]
        start = torch.arange(1.0, 1 + shape.numel(), dtype=self.state.x.dtype, device=self.state.x.device).cos()
        norm, _ = power_iteration(
            lambda v: stage.adjoint(v, stage.apply(v, stage.weight, None)), start.view(1, *shape), iterations=10
        )
        self.bound = gamma * norm

    def update_v(self, layer: int, rows: slice, product: Tensor) -> Tensor:
        """V_l: γ_l/2 ‖V − σ(P_l)‖² + α/2 ‖V − V_old‖² plus the loss (last layer), or the γ term of stage l + 1."""
        gamma, alpha, old = self.gamma[layer], self.alpha[layer], self.state.read("v", layer, rows)
        weight, centre = gamma + alpha, self.chain[layer].activation(product).lerp(old, alpha / (gamma + alpha))
        if layer == len(self.chain) - 1:
            v = self.loss.prox(centre, self.fit_weight / weight, self.state.y[rows])
            self.data_fit += self.fit_weight * self.loss.value(v, self.state.y[rows])
            return self.state.write("v", layer, rows, v)
        target = self.state.read("v", layer + 1, rows)
        if self.solver is not None:
            bias = self.chain[layer + 1].bias
            flat, square = self.solver(centre.flatten(1), target if bias is None else target - bias)
            v = flat.view_as(old)
        else:
            v, square = self.descend_v(layer, old, weight, centre, target)
        self.coupling[layer + 1] += square
        if self.on_activations is not None:
            self.on_v[layer] += self.on_activations.value(v)
        return self.state.write("v", layer, rows, v)

    def descend_v(self, layer: int, v: Tensor, weight: float, centre: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Proximal gradient steps on V_l, every sample with an L of its own; also ‖V_{l+1} − σ(A(V) + b)‖².

        A sample keeps its step only if the bound held: then its sub-problem fell, whatever the penalty is.
        """
        stage, gamma, penalty = self.chain[layer + 1], self.gamma[layer + 1], self.on_activations or NoPenalty()
        product = stage.forward(v)
        error = stage.activation(product) - target
        bound = self.bound.expand(len(v)).view(-1, *[1] * (v.dim() - 1))
        for _ in range(self.algorithm.inner_iterations):
            slope = stage.activation.derivative(product) * error
            gradient = gamma * stage.adjoint(v, slope) + weight * (v - centre)
            new = penalty.prox(v - gradient / (bound + weight), 1 / (bound + weight))
            new_product = stage.forward(new)
            new_error = stage.activation(new_product) - target
            # As differences, ½‖E_new‖² − ½‖E‖² − ⟨σ′E, ΔP⟩ loses no digits next to a large error.
            rise = (new_error - error) * (new_error + error) / 2 - slope * (new_product - product)
            fits = gamma * _per_sample(rise, bound) <= bound / 2 * _per_sample((new - v).square(), bound)
            wide = _per_sample(fits, product)
            v, product = torch.where(fits, new, v), torch.where(wide, new_product, product)
            error = torch.where(wide, new_error, error)
            bound = torch.where(fits, RELAX * bound, TIGHTEN * bound)
        return v, error.square().sum(dtype=torch.float64)

    # -- W, b ---------------------------------------------------------------------------------------------

    def fit(self, layer: int, like: Fit | None = None) -> Fit:
        """Empty sums for the stage's own weights; Gram matrices are those of another fit, or of earlier sweeps."""
        stage, device = self.chain[layer], self.state.x.device
        m, d = stage.weight.shape[0] // stage.groups, stage.weight[0].numel()
        cache: dict[str, Tensor] = self.state.cache if layer == 0 else {}
        grams = [part.gram for part in like.parts] if like else [cache.get(f"gram_{g}") for g in range(stage.groups)]
        # With fewer rows than features an exact solution needs no Gram matrix.
        small = self.comm.size == 1 and stage.dense and isinstance(stage.activation, Identity) and not cache
        rows = len(self.state.x) if small else None
        parts = [LeastSquares(d, m, device, rows=rows, gram=gram) for gram in grams]
        bias = stage.weight.new_zeros(m * stage.groups) if stage.bias is None else stage.bias
        return Fit(stage.weight.flatten(1), bias, parts, torch.zeros((), dtype=torch.float64, device=device))

    def collect(self, stage: Stage, fit: Fit, v_in: Tensor, product: Tensor, v: Tensor) -> None:
        """Add rows to the sums."""
        error = stage.activation(product) - v
        fit.misfit += error.square().sum(dtype=torch.float64)
        columns = v if isinstance(stage.activation, Identity) else stage.activation.derivative(product) * error
        inputs, outputs = (t.chunk(stage.groups, 1) for t in (stage.rows(v_in), stage.columns(columns)))
        for part, z, t in zip(fit.parts, inputs, outputs, strict=True):
            part.add(z, t)

    def reduce(self, fit: Fit) -> None:
        """Add the sums up over the processes."""
        self.comm.sum([fit.misfit, *(total for part in fit.parts for total in part.totals)])

    def update_w(self, layer: int, fit: Fit) -> None:
        """W_l, b_l: γ/2 ‖V_l − σ(V_{l-1}Wᵀ + b)‖² + α/2 ‖W − W_old‖² + α/2 ‖b − b_old‖² + r(W)."""
        stage = self.chain[layer]
        self.reduce(fit)
        if isinstance(stage.activation, Identity):
            assert self.algorithm.bias_update is not None
            fit.weight, fit.bias = self.solve(layer, fit.parts, self.algorithm.bias_update)
            pairs = zip(fit.parts, fit.weight.chunk(stage.groups), fit.bias.chunk(stage.groups), strict=True)
            fit.misfit = torch.stack([part.residual_square(w, b) for part, w, b in pairs]).sum()
        else:
            self.descend_w(layer, fit)
        stage.weight.copy_(fit.weight.view_as(stage.weight))
        if stage.bias is not None:
            stage.bias.copy_(fit.bias)
        if layer == 0:
            self.state.cache |= {f"gram_{g}": part.gram for g, part in enumerate(fit.parts) if part.rows is None}
            # Reduced already: every process holds the whole sum, so each reports its share.
            self.coupling[0] += fit.misfit / self.comm.size

    def solve(self, layer: int, parts: list[LeastSquares], bias_update: BiasUpdate) -> tuple[Tensor, Tensor]:
        """Least squares with proximal weight α to the stage's own weights, in their precision."""
        stage = self.chain[layer]
        weight, groups = stage.weight.flatten(1), stage.groups
        biases = [None] * groups if stage.bias is None else stage.bias.chunk(groups)
        options: dict[str, Any] = {
            "rho": self.gamma[layer] / self.samples,
            "alpha": self.alpha[layer],
            "penalty": self.penalties[layer],
            "bias_update": bias_update,
        }
        solved = [part.solve(w, b, **options) for part, w, b in zip(parts, weight.chunk(groups), biases, strict=True)]
        b = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in solved])
        return torch.cat([w for w, _ in solved]).to(weight.dtype), b.to(weight.dtype)

    def descend_w(self, layer: int, fit: Fit) -> None:
        """Minimise the upper bound, a least squares problem, and keep what lowers the sub-problem.

        L is in units of γ and stays from sweep to sweep: 1 is right for the linear pieces of ReLU.
        """
        stage, key = self.chain[layer], f"bound_{layer}"
        bound = self.state.cache.get(key, torch.ones_like(fit.misfit))
        value = self.value_w(layer, fit)
        for _ in range(self.algorithm.inner_iterations):
            trial = self.fit(layer, like=fit)
            trial.weight, trial.bias = self.solve(layer, self.upper_bound(layer, fit, bound), "joint")
            for rows in self.chunks():
                v_in, v = (self.state.read("v", i, rows) for i in (layer - 1, layer))
                product = stage.apply(v_in, trial.weight.view_as(stage.weight), trial.bias)
                self.collect(stage, trial, v_in, product, v)
            self.reduce(trial)
            new_value = self.value_w(layer, trial)
            lower = new_value <= value
            fits = trial.misfit <= fit.misfit + self.rise(layer, fit, trial, bound)
            value = torch.where(lower, new_value, value)
            for name in ("weight", "bias", "misfit"):
                setattr(fit, name, torch.where(lower, getattr(trial, name), getattr(fit, name)))
            for mine, new in zip(fit.parts, trial.parts, strict=True):
                mine.cross = torch.where(lower, new.cross, mine.cross)
                mine.sum_u = torch.where(lower, new.sum_u, mine.sum_u)
            bound = torch.where(fits, RELAX * bound, TIGHTEN * bound)
        self.state.cache[key] = bound

    def value_w(self, layer: int, fit: Fit) -> Tensor:
        """The sub-problem of W_l and b_l."""
        stage = self.chain[layer]
        move = (fit.weight - stage.weight.flatten(1)).double().square().sum()
        if stage.bias is not None:
            move = move + (fit.bias - stage.bias).double().square().sum()
        penalty = self.penalties[layer].value(fit.weight.view_as(stage.weight))
        return self.gamma[layer] / (2 * self.samples) * fit.misfit + self.alpha[layer] / 2 * move + penalty

    def upper_bound(self, layer: int, fit: Fit, bound: Tensor) -> list[LeastSquares]:
        """The sums of L/2 ‖T − ZWᵀ − 1bᵀ‖² with T = P − σ′(P) E / L, from those of σ′(P) E."""
        parts = []
        groups = self.chain[layer].groups
        for sums, w, b in zip(
            fit.parts, fit.weight.double().chunk(groups), fit.bias.double().chunk(groups), strict=True
        ):
            part = LeastSquares(sums.cross.shape[1], len(w), w.device, gram=bound * sums.gram)
            part.sum_v, part.count = bound * sums.sum_v, bound * sums.count
            part.cross = bound * (w @ sums.gram + torch.outer(b, sums.sum_v)) - sums.cross
            part.sum_u = bound * (w @ sums.sum_v + b * sums.count) - sums.sum_u
            parts.append(part)
        return parts

    def rise(self, layer: int, fit: Fit, trial: Fit, bound: Tensor) -> Tensor:
        """2⟨σ′(P) E, ΔP⟩ + L ‖ΔP‖²: what the misfit grows by at most where the bound holds."""
        groups, total = self.chain[layer].groups, torch.zeros_like(bound)
        moves = ((trial.weight - fit.weight).double(), (trial.bias - fit.bias).double())
        for sums, w, b in zip(fit.parts, *(move.chunk(groups) for move in moves), strict=True):
            shift = w @ sums.sum_v
            square = ((w @ sums.gram) * w).sum() + b @ (2 * shift + sums.count * b)
            total = total + 2 * ((sums.cross * w).sum() + sums.sum_u @ b) + bound * square
        return total

    # -- the report ---------------------------------------------------------------------------------------

    def report(self) -> Report:
        """The terms of the objective after the sweep, summed over the processes."""
        self.comm.sum([self.sums])
        gamma = self.sums.new_tensor(self.gamma) / (2 * self.samples)
        entries = self.sums.new_tensor([self.state.samples * v.shape[1:].numel() for v in self.state.variables["v"]])
        on_w = torch.stack([r.value(stage.weight) for r, stage in zip(self.penalties, self.chain, strict=True)])
        return Report(
            data_fit=self.data_fit[0] / self.samples,
            coupling=list((gamma * self.coupling).unbind()),
            linear=list(torch.zeros_like(gamma).unbind()),
            penalty=list((self.on_v / self.samples + on_w).unbind()),
            residuals={"activation": list((self.coupling / entries).sqrt().unbind())},
        )


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Sums over all but the first dimension, shaped to broadcast over `like`."""
    return t.flatten(1).sum(1, dtype=t.dtype).view(-1, *[1] * (like.dim() - 1))
