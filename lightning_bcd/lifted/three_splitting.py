"""Three-splitting block coordinate descent.

    minimise   κ R(V_L; Y) + Σ r(W_l) + Σ s(V_l) + Σ γ/2 ‖V_l − σ(U_l)‖² + ρ/2 ‖U_l − V_{l-1} W_lᵀ − 1b_lᵀ‖²

One sweep visits the layers from last to first and updates V_l, U_l, then W_l and b_l (Algorithm 2 of [1]), with the
newest values at once. Rows are samples: V_l and U_l are N × d_l, W_l is d_l × d_{l-1}, V_0 = X; σ of the last layer is
the identity. A layer is updated in one pass over chunks of rows; the weights follow from sums over the rows.

[1] Zeng, Lau, Lin, Yao. Global convergence of block coordinate descent in deep learning. ICML 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.acceleration import Accelerated
from lightning_bcd.lifted.algorithm import LiftedState, Report, Schedule, check_choice, precise
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.splitting import GROWING, Splitting
from lightning_bcd.linalg import LeastSquares, RowSolver, power_iteration
from lightning_bcd.prox.losses import Loss
from lightning_bcd.prox.penalties import NoPenalty

#: Proximal gradient steps on V where a penalty on V leaves no closed form.
PENALISED_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class ThreeSplitting(Splitting, Accelerated):
    """Three-splitting BCD (Zeng, Lau, Lin, Yao, ICML 2019, Algorithm 2).

    With γ, α > 0 and `update="proximal"` on linear layers every sub-problem is solved exactly and the objective never
    rises. The default arguments are the paper's problem; `preset="recommended"` trains better networks.

    Args:
        rho: ρ > 0 of the pre-activation terms: a number, one per stage, or a function of the sweep. 1 if None.
        update: `"proximal"` solves for V and W exactly where a stage is linear on flat inputs (the V-step of other
            operators is prox-linear); `"prox_linear"` takes gradient steps for V and W: no factorisation.
        order: `"backward"` from the last layer to the first (the paper), or `"forward"`.
        step: Length of gradient steps: `"exact"` along the gradient, or `"lipschitz"`.
        inner_iterations: Gradient steps per V-update of a prox-linear stage.

    The other arguments are those of `Splitting` and `Accelerated`.

    Raises:
        ValueError: If an argument is out of range.
    """

    rho: Schedule | None = None
    update: Literal["proximal", "prox_linear"] = "proximal"
    order: Literal["backward", "forward"] = "backward"
    step: Literal["exact", "lipschitz"] = "exact"
    inner_iterations: int = 1

    #: Whether residual stages are accepted.
    skips: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "gamma": 1.0,
            "rho": 1.0,
            "alpha": 1.0,
            "fit_weight": 1.0,
            "target_scale": 1.0,
            "bias_update": "exact",
            "reduction": "sum",
            "momentum": 0.0,
        },
        "reference": {"alpha": 5.0, "bias_update": "reference", "init": "reference"},
        "recommended": {
            "gamma": GROWING.gamma,
            "rho": GROWING.rho,
            "alpha": GROWING.alpha,
            "fit_weight": 10.0,
            "bias_update": "joint",
            "reduction": "mean",
            "init": "looks_linear",
            "restart_every": 1,
            "momentum": 0.9,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("update", self.update, ["proximal", "prox_linear"])
        check_choice("order", self.order, ["backward", "forward"])
        check_choice("step", self.step, ["exact", "lipschitz"])
        if self.inner_iterations < 1:
            raise ValueError(f"Expected argument `inner_iterations` to be at least 1, but got {self.inner_iterations}.")

    @property
    def descends(self) -> bool:
        """Whether the objective can never rise: constant γ, ρ; b after or with W; no restart, momentum or rounding."""
        steady = self.restart_every is None and not self.momentum and self.storage_dtype is None
        return self.constant and steady and self.bias_update != "reference"

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError for residual stages, or if hyperparameters do not suit the chain or the loss."""
        super().check(chain, loss)
        residual = [stage.name for stage in chain if stage.residual]
        if residual and not self.skips:
            raise ValueError(
                f"{type(self).__name__} has no skip connections, but the network has {residual}. Use ResidualSplitting."
            )

    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield V_l and U_l of a forward pass."""
        for u, v in self.forward_pass(chain, x):
            yield {"v": v, "u": u}

    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update every block once (Algorithm 2 of [1])."""
        with precise(state.x.device):
            if self.restarts(state):
                self.restart(chain, state)
            with self.heavy_ball(chain, state):
                report = self._sweep(chain, state, loss, comm).run()
            for stage, penalty in zip(list(chain)[:-1], self.weight_penalties(len(chain)), strict=False):
                # Back into constraints that the move left; the prox of other penalties does nothing with t = 0.
                if self.momentum and stage.weight.requires_grad and not isinstance(penalty, NoPenalty):
                    blocks = [penalty.prox(block, 0.0) for block in stage.blocks(stage.weight)]
                    stage.weight.copy_(torch.cat(blocks).view_as(stage.weight))
            return report

    def _sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Sweep:
        return Sweep(self, chain, state, loss, comm)

    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The displayed formula for this process's samples."""
        with precise(state.x.device):
            gamma, rho = (self.numbers(name, state.sweep, len(chain)) for name in ("gamma", "rho"))
            everything = slice(0, len(state.x))
            v_last = state.read("v", len(chain) - 1, everything)
            total = self.kappa * loss.value(v_last, state.y)
            for layer, stage in enumerate(chain):
                v_in, u, v = (
                    state.read(name, i, everything) for name, i in (("v", layer - 1), ("u", layer), ("v", layer))
                )
                skip = v_in if stage.residual else 0
                total = total + gamma[layer] / 2 * (v - skip - stage.activation(u)).double().square().sum()
                total = total + rho[layer] / 2 * (u - stage.forward(v_in)).double().square().sum()
                if self.activation_penalty is not None and layer < len(chain) - 1:
                    total = total + self.activation_penalty.value(v)
            return total / self.samples_of_mean(state) + self.penalties_on_weights(chain).sum()


class Sweep:
    """One sweep in progress: the numbers of this sweep and the sums collected on the way."""

    def __init__(
        self, algorithm: ThreeSplitting, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator
    ) -> None:
        self.algorithm, self.chain, self.state, self.loss, self.comm = algorithm, chain, state, loss, comm
        depth = len(chain)
        self.gamma = algorithm.numbers("gamma", state.sweep, depth)
        self.rho = algorithm.numbers("rho", state.sweep, depth)
        self.alpha = algorithm.numbers("alpha", state.sweep, depth)
        self.penalties = algorithm.weight_penalties(depth)
        # "mean" divides all terms over samples by N: only sub-problems of weights and the report notice.
        self.samples = algorithm.samples_of_mean(state)
        zeros = torch.zeros(3 * depth + 1, dtype=torch.float64, device=state.x.device)
        self.sums = zeros
        self.coupling, self.linear, self.on_v = zeros[:depth], zeros[depth : 2 * depth], zeros[2 * depth : 3 * depth]
        self.data_fit = zeros[-1:]
        # After a forward pass U_l is the product that a backward sweep needs.
        exact = algorithm.activation_penalty is None and state.variables["u"][0].dtype == state.x.dtype
        self.fresh = state.fresh and algorithm.order == "backward" and exact
        self.solver: RowSolver | None = None
        self.bound: Tensor | None = None

    def run(self) -> Report:
        """Visit the layers; the algorithm box of the paper."""
        layers = range(len(self.chain))
        for layer in layers if self.algorithm.order == "forward" else reversed(layers):
            self.prepare_v(layer)
            least_squares = self.least_squares(layer)
            for rows in self.state.rows(self.algorithm.rows_per_chunk(self.state.x)):
                v_in = self.state.read("v", layer - 1, rows)
                v = self.update_v(layer, rows, v_in)
                error = self.update_u(layer, rows, v, v_in)
                self.collect(layer, least_squares, v_in, error)
            self.update_w(layer, least_squares)
        self.state.sweep += 1
        self.state.fresh = False
        return self.report()

    # -- V ------------------------------------------------------------------------------------------------

    def update_v(self, layer: int, rows: slice, v_in: Tensor) -> Tensor:
        """V_l: proximal step of the loss on the last layer, else (γσ(U_l) + ρTW)(γI + ρWᵀW)⁻¹ with T = U_{l+1} − b."""
        if layer == len(self.chain) - 1:
            v = self.last_v(layer, rows, v_in)
            self.data_fit += self.algorithm.kappa * self.loss.value(v, self.state.y[rows])
            return self.keep_v(layer, rows, v)
        weight, centre = self.pull(layer, rows, v_in)
        target = self.state.read("u", layer + 1, rows)
        stage = self.chain[layer + 1]
        if self.solver is not None:
            t = target if stage.bias is None else target - stage.bias
            flat, square = self.solver(centre.flatten(1), t)
            v = flat.view_as(centre)
        else:
            v, square = self.descend_v(layer, self.state.read("v", layer, rows), weight, centre, target)
        if self.algorithm.order == "backward":
            self.linear[layer + 1] += square
        if self.algorithm.activation_penalty is not None:
            self.on_v[layer] += self.algorithm.activation_penalty.value(v)
        return self.keep_v(layer, rows, v)

    def keep_v(self, layer: int, rows: slice, v: Tensor) -> Tensor:
        """Store V_l and return it as it is stored."""
        v = self.state.as_stored("v", layer, v)
        self.state.write("v", layer, rows, v)
        return v

    def last_v(self, layer: int, rows: slice, v_in: Tensor) -> Tensor:
        """V_L = argmin κR(V; Y) + γ/2 ‖V − U_L‖² + α/2 ‖V − V_old‖²."""
        gamma, alpha = self.gamma[layer], self.alpha[layer]
        centre = self.state.read("u", layer, rows)
        if self.chain[layer].residual:
            centre = centre + v_in
        if alpha:
            centre = torch.lerp(centre, self.state.read("v", layer, rows), alpha / (gamma + alpha))
        return self.loss.prox(centre, self.algorithm.kappa / (gamma + alpha), self.state.y[rows])

    def pull(self, layer: int, rows: slice, v_in: Tensor) -> tuple[float, Tensor]:
        """Weight and centre of the quadratic that the activation terms put on V_l: γ and σ(U_l)."""
        return self.gamma[layer], self.chain[layer].activation(self.state.read("u", layer, rows))

    def prepare_v(self, layer: int) -> None:
        """Factor the system of V_l where it is solved, else bound its curvature where a step needs it."""
        self.solver, self.bound = None, None
        if layer == len(self.chain) - 1:
            return
        stage, algorithm = self.chain[layer + 1], self.algorithm
        penalised = algorithm.activation_penalty is not None
        if stage.dense and algorithm.update == "proximal" and not penalised:
            self.solver = RowSolver(stage.weight, self.pull_weight(layer), self.rho[layer + 1])
        elif penalised or algorithm.step == "lipschitz":
            cache, key = self.state.cache, f"direction_{layer + 1}"
            first = self.state.read("v", layer, slice(0, 1))
            norm, cache[key] = power_iteration(
                lambda x: stage.adjoint(x, stage.apply(x, stage.weight, None)),
                cache.get(key, torch.ones_like(first)),
                iterations=5,
            )
            self.bound = self.pull_weight(layer) + self.rho[layer + 1] * norm

    def pull_weight(self, layer: int) -> float:
        """The weight that `pull` returns."""
        return self.gamma[layer]

    def descend_v(self, layer: int, v: Tensor, weight: float, centre: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Proximal gradient steps on V_l, each sample with a step of its own; also ‖U_{l+1} − A(V) − b‖².

        Along the move D every step is shortened to θ/κ where the curvature κ = weight + ρ‖A(D)‖²/‖D‖² exceeds the
        bound θ it was made with, so that no sample's objective rises. A(D) also carries A(V) along: no further product.
        """
        stage, rho, penalty = self.chain[layer + 1], self.rho[layer + 1], self.algorithm.activation_penalty
        bound = self.bound
        error = stage.forward(v) - target
        solved = self.algorithm.update == "proximal" and stage.dense
        for _ in range(PENALISED_STEPS if solved else self.algorithm.inner_iterations):
            move = weight * (centre - v) - rho * stage.adjoint(v, error)
            if bound is not None:
                goal = v + move / bound
                move = (goal if penalty is None else penalty.prox(goal, 1 / bound)) - v
            image = stage.apply(move, stage.weight, None)
            curvature = weight + rho * _row_squares(image) / _row_squares(move).clamp_min(torch.finfo(v.dtype).tiny)
            length = 1 / curvature if bound is None else (bound / curvature).clamp_max(1)
            v = v + _per_row(length, move) * move
            error = error + _per_row(length, image) * image
        return v, error.square().sum()

    # -- U ------------------------------------------------------------------------------------------------

    def update_u(self, layer: int, rows: slice, v: Tensor, v_in: Tensor) -> Tensor:
        """U_l = argmin γ/2 ‖V_l − σ(U)‖² + ρ/2 ‖U − P_l‖² + α/2 ‖U − U_old‖² (no α at l = L); returns U_l − P_l."""
        stage, gamma, rho, alpha = self.chain[layer], self.gamma[layer], self.rho[layer], self.alpha[layer]
        product = self.state.read("u", layer, rows) if self.fresh else stage.forward(v_in)
        a = v - v_in if stage.residual else v
        if layer == len(self.chain) - 1:
            u = torch.lerp(a, product, rho / (gamma + rho))
        else:
            old = self.state.read("u", layer, rows)
            centre = torch.lerp(product, old, alpha / (rho + alpha)) if alpha else product
            u = stage.activation.solve(a, centre, (rho + alpha) / gamma, old=old)
        u = self.state.as_stored("u", layer, u)
        error = u - product  # before U is overwritten: after a forward pass it is the product
        self.state.write("u", layer, rows, u)
        self.settle(layer, a, u)
        return error

    def settle(self, layer: int, a: Tensor, u: Tensor) -> None:
        """Add ‖V_l − σ(U_l)‖² to the report."""
        self.coupling[layer] += (a - self.chain[layer].activation(u)).square_().sum()

    # -- W, b ---------------------------------------------------------------------------------------------

    def least_squares(self, layer: int) -> list[LeastSquares]:
        """Sums for the weights of a stage, one per group."""
        stage, state = self.chain[layer], self.state
        groups = stage.groups
        m, d = stage.weight.shape[0] // groups, stage.weight[0].numel()
        alone = self.comm.size == 1 and stage.dense and self.algorithm.update == "proximal"
        grams = [state.cache.get(f"gram_{g}") if layer == 0 else None for g in range(groups)]
        rows = len(state.x) if alone else None
        return [LeastSquares(d, m, state.x.device, rows=rows, gram=gram) for gram in grams]

    def collect(self, layer: int, least_squares: list[LeastSquares], v_in: Tensor, error: Tensor) -> None:
        """Add rows to the sums: of U_l − P_l on V_{l-1}, so that rounding touches the change of the weights only."""
        stage = self.chain[layer]
        inputs, outputs = stage.rows(v_in), stage.columns(error)
        groups = len(least_squares)
        for part, v, t in zip(least_squares, inputs.chunk(groups, 1), outputs.chunk(groups, 1), strict=True):
            part.add(v, t)

    def update_w(self, layer: int, least_squares: list[LeastSquares]) -> None:
        """W_l, b_l: least squares of U_l on V_{l-1} with proximal weight α, or one proximal gradient step."""
        stage, algorithm = self.chain[layer], self.algorithm
        self.comm.sum([total for part in least_squares for total in part.totals])
        blocks = stage.blocks(stage.weight)
        biases = [None] * len(blocks) if stage.bias is None else list(stage.bias.chunk(len(blocks)))
        options: dict[str, Any] = {
            "rho": self.rho[layer] / self.samples,
            "alpha": self.alpha[layer],
            "penalty": self.penalties[layer],
            "bias_update": algorithm.bias_update,
        }
        square = torch.zeros((), dtype=torch.float64, device=self.state.x.device)
        for index, (part, weight, bias) in enumerate(zip(least_squares, blocks, biases, strict=True)):
            zeros, b_zeros = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
            if not stage.weight.requires_grad:  # the user froze the stage
                change: tuple[Tensor, Tensor | None] = (zeros.double(), b_zeros)
            elif algorithm.update == "proximal":
                change = part.solve(zeros, b_zeros, shift=weight, **options)
            else:
                lipschitz = algorithm.step == "lipschitz"
                change = part.step(zeros, b_zeros, shift=weight, lipschitz=lipschitz, **options)
            weight, old = (weight.double() + change[0]).to(weight.dtype), weight.double()
            if bias is not None and change[1] is not None:
                b_old = bias.double().clone()
                bias.copy_(b_old + change[1])
                change = (change[0], bias.double() - b_old)
            square = square + part.residual_square(weight.double() - old, change[1])
            blocks = (*blocks[:index], weight, *blocks[index + 1 :])
            if layer == 0 and part.rows is None:
                self.state.cache[f"gram_{index}"] = part.gram
        # Not through views of the parameter: one with another memory format has none.
        stage.weight.copy_(torch.cat(blocks).view_as(stage.weight))
        # Reduced already: every process holds the whole sum, so one of them reports it.
        if layer == 0 or algorithm.order == "forward":
            self.linear[layer] += square / self.comm.size

    # -- the report ---------------------------------------------------------------------------------------

    def report(self) -> Report:
        """The terms of the objective after the sweep, summed over the processes."""
        self.comm.sum([self.sums])
        gamma, rho = self.sums.new_tensor([self.gamma, self.rho]) / (2 * self.samples)
        entries = self.sums.new_tensor([self.state.samples * u[0].numel() for u in self.state.variables["u"]])
        on_w = self.algorithm.penalties_on_weights(self.chain)
        return Report(
            data_fit=self.data_fit[0] / self.samples,
            coupling=list((gamma * self.coupling).unbind()),
            linear=list((rho * self.linear).unbind()),
            penalty=list((self.on_v / self.samples + on_w).unbind()),
            residuals={
                "activation": list((self.coupling / entries).sqrt().unbind()),
                "linear": list((self.linear / entries).sqrt().unbind()),
            },
        )


def _row_squares(t: Tensor) -> Tensor:
    return t.flatten(1).square().sum(1)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
