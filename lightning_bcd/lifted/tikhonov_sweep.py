"""The block updates of Tikhonov BCD: all U together, V, W, from one Gram matrix of [X, U_1, … U_N].

The problem, its letters and its source are in `lightning_bcd.lifted.tikhonov`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.algorithm import LiftedState, Report
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.nonnegative import NonnegativeQuadratic
from lightning_bcd.lifted.splitting import Penalised
from lightning_bcd.linalg import LeastSquares, factor
from lightning_bcd.prox.losses import Loss, SquaredLoss
from lightning_bcd.prox.penalties import Penalty


@dataclass(frozen=True)
class Numbers:
    """What the hyperparameters of the algorithm are in one sweep.

    Attributes:
        theta: θ_t.
        pull: c_t.
        damping: δ.
        gamma: γ_n of every hidden layer.
        penalties: r of every layer.
        project: Whether U is projected instead of solved for.
        iterations: Inner ones.
        chunk_rows: Samples that are updated together.
    """

    theta: float
    pull: float
    damping: float
    gamma: list[float]
    penalties: list[Penalty]
    project: bool
    iterations: int
    chunk_rows: int


def last_features(chain: Chain, x: Tensor) -> Tensor:
    """The last hidden activations of a forward pass."""
    *_, (_, features), _ = chain.forward(x)
    return features


class Sweep:
    """One sweep in progress: its numbers and the sums of its pass over the samples."""

    def __init__(self, numbers: Numbers, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> None:
        self.numbers, self.chain, self.state, self.loss, self.comm = numbers, chain, state, loss, comm
        self.hidden = list(chain)[:-1]
        self.squared = isinstance(loss, SquaredLoss)
        widths = [chain[0].weight.shape[1], *(len(stage.weight) for stage in self.hidden)]
        ends = list(accumulate(widths))
        #: Columns of X, U_1, … in [X, U_1, … U_N].
        self.columns = [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]
        self.sums = LeastSquares(ends[-1], len(chain[-1].weight), state.x.device)
        self.linear: list[Tensor] = []

    def inputs(self, layer: int) -> Tensor:
        """Columns of [X, U_1, …] that a hidden layer reads, in the order of its weight."""
        sources = self.hidden[layer].sources or (layer,)
        every = torch.arange(self.sums.gram.shape[1], device=self.sums.gram.device)
        return torch.cat([every[self.columns[m]] for m in sources])

    def rows(self, rows: slice) -> list[Tensor]:
        """X and U_n of some samples."""
        x = self.chain[0].prepare(self.state.x[rows])
        return [x, *(self.state.read("u", layer, rows) for layer in range(len(self.hidden)))]

    def residual_map(self) -> Tensor:
        """The matrix E with rows (U_n − Σ U_m W_{n,m}ᵀ)_n = [X, U_1, … U_N] Eᵀ, float64."""
        size, start = self.sums.gram.shape[1], self.columns[1].start
        e = torch.eye(size, dtype=torch.float64, device=self.sums.gram.device)[start:]
        for layer, stage in enumerate(self.hidden):
            of_layer = e[self.columns[layer + 1].start - start : self.columns[layer + 1].stop - start]
            of_layer[:, self.inputs(layer)] = -stage.weight.double()
        return e

    def update_u(self) -> None:
        """All U: u ≥ 0 of ½ uᵀH u − gᵀu (+ R), H = BᵀΓB + (c + δ) I + VᵀV; collects the Gram matrix on the way."""
        e, v = self.residual_map(), self.chain[-1].weight.double()
        start, last = self.columns[1].start, self.columns[-1]
        repeats = torch.tensor([len(stage.weight) for stage in self.hidden])
        gamma = e.new_tensor(self.numbers.gamma).repeat_interleave(repeats.to(e.device))
        hessian = e[:, start:].T @ (gamma[:, None] * e[:, start:])
        hessian.diagonal().add_(self.numbers.pull + self.numbers.damping)
        of_x = -(e[:, start:].T @ (gamma[:, None] * e[:, :start]))
        of_last = slice(last.start - start, last.stop - start)
        output = e.new_zeros(len(v), len(e))
        output[:, of_last] = v
        dtype = self.state.x.dtype
        if self.squared:
            hessian[of_last, of_last] += v.T @ v
        if self.numbers.project:
            inverse = torch.cholesky_inverse(factor(hessian, "the Hessian of hidden activations")).to(dtype)
        elif self.squared:
            solver = NonnegativeQuadratic(hessian, dtype)
        else:
            solver = NonnegativeQuadratic(hessian, dtype, loss=self.loss, output=output)
        of_x, output = of_x.to(dtype), output.to(dtype)
        for rows in self.state.rows(self.numbers.chunk_rows):
            x, *parts = self.rows(rows)
            y, old = self.state.y[rows], torch.cat(parts, dim=1)
            g = torch.addmm(old, x, of_x.T, beta=self.numbers.pull)
            if self.squared:
                g.addmm_(y, output)
            new = (g @ inverse).clamp_min_(0) if self.numbers.project else solver(g, old, y, self.numbers.iterations)
            new = old.lerp_(new, self.numbers.theta)
            for layer, part in enumerate(torch.split(new, [p.shape[1] for p in parts], dim=1)):
                self.state.write("u", layer, rows, part)
            self.sums.add(torch.cat([x, new], dim=1), y)
        self.comm.sum(self.sums.totals)

    def part(self, targets: slice | None, inputs: Tensor | slice, damping: float) -> LeastSquares:
        """Least squares of columns of [X, U_1, …], or of Y, on others, from the Gram matrix."""
        gram, device = self.sums.gram, self.state.x.device
        cross = self.sums.cross[:, inputs] if targets is None else gram[targets][:, inputs]
        block = gram[inputs][:, inputs].clone()
        block.diagonal().add_(damping)
        part = LeastSquares(cross.shape[1], len(cross), device, gram=block)
        part.cross = cross.clone()
        part.square = self.sums.square if targets is None else gram.diagonal()[targets].sum()
        part.rounding = self.sums.rounding
        return part

    def relax(self, weight: Tensor, new: Tensor, penalty: Penalty) -> None:
        """W ← W + θ (W* − W); back into a set that is not convex."""
        moved = weight.lerp(new.to(weight.dtype), self.numbers.theta)
        weight.copy_(moved if penalty.convex else penalty.prox(moved, 1.0))

    def update_w(self) -> None:
        """W_n: γ_n/2 ‖U_n − Ũ_n Wᵀ‖² + r(W), Ũ_n what layer n reads."""
        for layer, (stage, gamma) in enumerate(zip(self.hidden, self.numbers.gamma, strict=True)):
            targets, inputs, penalty = self.columns[layer + 1], self.inputs(layer), self.numbers.penalties[layer]
            if stage.weight.requires_grad:
                problem = self.part(targets, inputs, self.numbers.damping / gamma)
                new, _ = problem.solve(stage.weight, None, rho=gamma, alpha=self.numbers.pull, penalty=penalty)
                self.relax(stage.weight, new, penalty)
            square = self.part(targets, inputs, 0.0).residual_square(stage.weight, None)
            self.linear.append(gamma / 2 * square)

    def update_v(self) -> None:
        """V: R(U_N Vᵀ; Y) + r(V)."""
        stage, penalty = self.chain[-1], self.numbers.penalties[-1]
        if not stage.weight.requires_grad:
            return
        problem = self.part(None, self.columns[-1], self.numbers.damping)
        if self.squared:
            new, _ = problem.solve(stage.weight, None, rho=1.0, alpha=self.numbers.pull, penalty=penalty)
        else:
            new = self.split_v(stage.weight, penalty)
        self.relax(stage.weight, new, penalty)

    def refit_v(self) -> None:
        """V: ½ ‖Y − F Vᵀ‖² + r(V), F the last hidden activations of a forward pass."""
        stage, state = self.chain[-1], self.state
        if not stage.weight.requires_grad:
            return
        problem = LeastSquares(stage.weight.shape[1], len(stage.weight), state.x.device)
        for rows in state.rows(self.numbers.chunk_rows):
            problem.add(last_features(self.chain, state.x[rows]), state.y[rows])
        self.comm.sum(problem.totals)
        problem.gram.diagonal().add_(self.numbers.damping)
        try:
            new, _ = problem.solve(stage.weight, None, rho=1.0, alpha=0.0, penalty=self.numbers.penalties[-1])
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                "Expected the last hidden activations of a forward pass to be finite and linearly independent for "
                "`refit`, but they are not. Use `weight_penalty=Ridge(...)` or `damping`, or look for NaN in the data "
                "and for layers whose activations are all zero."
            ) from error
        stage.weight.copy_(new)

    def split_v(self, old: Tensor, penalty: Penalty) -> Tensor:
        """V with another loss, by an alternating direction method on S = U_N Vᵀ; no worse than the old V."""
        weight, u = old, self.state.variables["u"][-1].to(old)
        s, slack = u @ old.T, u.new_zeros(len(u), len(old))
        before = self.value_of_v(s, old, old, penalty)
        problem = self.part(None, self.columns[-1], self.numbers.damping)
        for _ in range(self.numbers.iterations):
            problem.cross = ((s - slack).T @ u).double()
            self.comm.sum([problem.cross])
            solved, _ = problem.solve(old, None, rho=1.0, alpha=self.numbers.pull, penalty=penalty, keep_factor=True)
            weight = solved.to(old.dtype)
            image = u @ weight.T
            s = self.loss.prox(image + slack, 1.0, self.state.y)
            slack = slack + image - s
        after = self.value_of_v(image, weight, old, penalty)
        return torch.where(after <= before, weight, old)

    def value_of_v(self, image: Tensor, weight: Tensor, old: Tensor, penalty: Penalty) -> Tensor:
        """The sub-problem of V."""
        fit = self.loss.value(image, self.state.y)
        self.comm.sum([fit])
        near = self.numbers.pull / 2 * (weight - old).double().square().sum()
        return fit + near + self.numbers.damping / 2 * weight.double().square().sum() + penalty.value(weight)

    def report(self) -> Report:
        """The terms of the objective after the sweep."""
        fit = torch.zeros((), dtype=torch.float64, device=self.state.x.device)
        for rows in self.state.rows(self.numbers.chunk_rows):
            u = self.state.read("u", len(self.hidden) - 1, rows)
            fit += self.loss.value(u @ self.chain[-1].weight.T, self.state.y[rows])
        self.comm.sum([fit])
        zero = torch.zeros_like(fit)
        entries = [self.state.samples * len(stage.weight) for stage in self.hidden]
        penalised = zip(self.chain, self.numbers.penalties, strict=True)
        squares = zip(self.linear, self.numbers.gamma, entries, strict=True)
        return Report(
            data_fit=fit,
            coupling=[zero] * len(self.chain),
            linear=[*self.linear, zero],
            penalty=[Penalised.penalty_of(stage, r, stage.weight) for stage, r in penalised],
            residuals={"linear": [*((2 * term / (gamma * n)).sqrt() for term, gamma, n in squares), zero]},
        )
