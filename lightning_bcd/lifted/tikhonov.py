"""Tikhonov block coordinate descent for ReLU networks with dense connections.

    minimise   R(U_N Vᵀ; Y) + Σ_n γ_n/2 ‖U_n − Σ_{m∈M_n} U_m W_{n,m}ᵀ‖² + Σ r(W_n) + r(V),    U_n ≥ 0,    U_0 = X

Three blocks in turn, all U together, then V, then W, each with a proximal term of weight c_t and then relaxed:

    z ← z + θ_t (z* − z),    z* = argmin f(z) + c_t/2 ‖z − z_old‖²,    θ_t = 1/t²,    c_t = (1 − θ_t)²

(Algorithm 1 of [1]). f is convex in each block. The activations of one sample solve a non-negative quadratic problem
whose Hessian is the same for all samples; V and W solve least squares on blocks of one Gram matrix of [X, U_1, … U_N].
Rows are samples: U_n is N × d_n, W_n = [W_{n,m}]_m is d_n × Σ d_m, V is outputs × d_N.

[1] Zhang, Brand. Convergent block coordinate descent for training Tikhonov regularized deep neural networks. NIPS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.algorithm import LiftedState, Report, Schedule, check_choice, per_layer, positive, precise
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.nonnegative import NonnegativeQuadratic
from lightning_bcd.lifted.splitting import Penalised
from lightning_bcd.linalg import LeastSquares, factor
from lightning_bcd.prox.activations import ReLU
from lightning_bcd.prox.losses import Loss, SquaredLoss
from lightning_bcd.prox.penalties import Penalty, Ridge

#: θ_t of the relaxation, by name; t = 1, 2, …
RELAXATIONS: dict[str, Callable[[int], float]] = {"1/t^2": lambda t: t**-2, "1/t": lambda t: 1 / t}
#: Matrices as wide as [X, U_1, …, V] of a chunk's rows, and as wide as the output of all rows, alive at once at most.
TEMPORARIES, OUTPUTS = 12, 8


def _harmonic(t: int) -> float:
    """θ_t of the recommended preset: the steps do not add up to a finite number, as those of 1/t² do."""
    return 0.4 / t


Relaxation = Literal["1/t^2", "1/t"] | float | Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class TikhonovBCD(Penalised):
    """Tikhonov BCD (Zhang and Brand, NIPS 2017, Algorithm 1).

    For `DenseReLU`, or chains of `nn.Linear` and ReLU without biases.

    Args:
        preset: `"reference"` (the settings of a published re-implementation) or `"recommended"` (found by experiment)
            fills the arguments left at None; without a preset they are the paper's problem.
        gamma: γ > 0: a number, one per hidden layer, or a function of (sweep, layers). 1 if None.
        relaxation: θ_t in (0, 1]: `"1/t^2"` (the paper; all later steps together are 0.645), `"1/t"`, a constant, or a
            function of t = 1, 2, …
        proximal: c ≥ 0 of every sweep; c_t = (1 − θ_t)² if None.
        damping: δ ≥ 0 adds δ/2 ‖·‖² to every sub-problem, which is then not one of the objective. 0 if None.
        nonnegative: Solution of the quadratic problem of U: `"exact"`, `iterations` steps of an alternating direction
            method, or `"project"`: the solution without the constraint, negative entries set to 0 (squared loss only).
        iterations: Of `"exact"`, and of V with losses that are not squared.
        weight_penalty: r: one `Penalty` for all W_n and V, or one per layer. `Ball` and `RowSparse` are the
            constraints of the paper; after a relaxation `RowSparse` is applied again.
        refit: Fit V to the activations of a forward pass instead of U_N, without proximal term and relaxation:
            before the first sweep, and after W in every sweep (squared loss only). False if None.
        classifier: `"svm"`: when training ends, V is replaced by scikit-learn's LinearSVC on the last features.
        svm_c: C of the LinearSVC. 1 if None.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If `classifier="svm"` and scikit-learn is not installed.
    """

    preset: Literal["reference", "recommended"] | None = None
    gamma: Schedule | None = None
    relaxation: Relaxation | None = None
    proximal: float | None = None
    damping: float | None = None
    nonnegative: Literal["exact", "project"] | None = None
    iterations: int = 50
    refit: bool | None = None
    classifier: Literal["svm"] | None = None
    svm_c: float | None = None

    several_inputs: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "gamma": 1.0,
            "relaxation": "1/t^2",
            "damping": 0.0,
            "nonnegative": "exact",
            "refit": False,
            "svm_c": 1.0,
        },
        "reference": {"damping": 1.0, "nonnegative": "project"},
        "recommended": {
            "gamma": 1e-4,
            "relaxation": _harmonic,
            "proximal": 0.0,
            "nonnegative": "project",
            "refit": True,
            "weight_penalty": Ridge(0.3),
            "init": "he",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("nonnegative", self.nonnegative, ["exact", "project"])
        check_choice("refit", self.refit, [True, False])
        check_choice("classifier", self.classifier, [None, "svm"])
        if isinstance(self.relaxation, str):
            check_choice("relaxation", self.relaxation, list(RELAXATIONS))
        elif not callable(self.relaxation):
            self.theta(1)
        for name in ("proximal", "damping"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"Expected argument `{name}` to be finite and at least 0, but got {value}. Use 0.")
        if self.iterations < 1:
            raise ValueError(f"Expected argument `iterations` to be at least 1, but got {self.iterations}. Use 50.")
        if not 0 < (self.svm_c or 0) < math.inf:
            raise ValueError(f"Expected argument `svm_c` to be positive and finite, but got {self.svm_c}. Use 1.")
        if self.classifier is not None and find_spec("sklearn") is None:
            raise ModuleNotFoundError(
                "Expected scikit-learn to be installed with TikhonovBCD(classifier='svm'). Run: pip install "
                "scikit-learn."
            )
        if not callable(self.gamma) and isinstance(self.gamma, int | float):
            positive("gamma", per_layer("gamma", self.gamma, 0, 1))

    @property
    def needs_full_batch(self) -> bool:
        """Whether the last layer is fitted to all samples, which a batch of few would not be."""
        return self.classifier is not None or bool(self.refit)

    @property
    def descends(self) -> bool:
        """False: the inner iterations end before the last digit."""
        return False

    def theta(self, t: int) -> float:
        """θ_t."""
        rule = RELAXATIONS.get(self.relaxation) if isinstance(self.relaxation, str) else self.relaxation
        assert rule is not None
        value = float(rule(t) if callable(rule) else rule)
        if not 0 < value <= 1:
            raise ValueError(
                f"Expected argument `relaxation` to give numbers in (0, 1], but got {value} for t = {t}. Use e.g. 0.5."
            )
        return value

    def weights_of_terms(self, sweep: int, layers: int) -> list[float]:
        """γ_n of every hidden layer."""
        assert self.gamma is not None
        values = per_layer("gamma", self.gamma, sweep, layers)
        positive("gamma", values)
        return values

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError unless the network is hidden ReLU layers without biases and a linear output."""
        super().check(chain, loss)
        wrong = [
            stage.name
            for index, stage in enumerate(chain)
            if not stage.dense
            or stage.residual
            or stage.bias is not None
            or (index < len(chain) - 1 and not isinstance(stage.activation, ReLU))
        ]
        if wrong or len(chain) < 2:
            raise ValueError(
                "Expected TikhonovBCD to be given hidden nn.Linear and ReLU layers without biases and a linear output, "
                f"but got {len(chain)} stages, of which {wrong} are others. Use DenseReLU, or MLP(..., bias=False)."
            )
        self.weights_of_terms(0, len(chain) - 1)
        self.weight_penalties(len(chain))
        closed = {"nonnegative": ("project", "exact"), "refit": (True, False)}
        for name, (value, instead) in closed.items():
            if getattr(self, name) == value and not isinstance(loss, SquaredLoss):
                raise ValueError(
                    f"Expected argument `{name}` to be {instead!r} with {type(loss).__name__}, but got {value!r}, "
                    "which needs a closed form. Use loss='squared'."
                )

    def temporary_bytes(self, chain: Chain, x: Tensor) -> int:
        """Bytes that a sweep over x takes beside the auxiliary variables, at most (sums over samples left out)."""
        columns = x[0].numel() + sum(len(stage.weight) for stage in chain)
        outputs = len(chain[-1].weight)
        return (TEMPORARIES * self.temporary_rows(x) * columns + OUTPUTS * len(x) * outputs) * x.dtype.itemsize

    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield U_n of a forward pass."""
        for layer, (_, u) in enumerate(chain.forward(x)):
            yield {"u": u} if layer < len(chain) - 1 else {}

    def start(
        self, chain: Chain, x: Tensor, y: Tensor, comm: Communicator, velocity: dict[str, Tensor] | None = None
    ) -> LiftedState:
        """Initialise U by a forward pass.

        Raises:
            ValueError: If several processes share the samples that an SVM needs.
        """
        if self.classifier is not None and comm.size > 1:
            raise ValueError(
                f"Expected argument `classifier` to be None with {comm.size} processes, but got 'svm': it needs all "
                "samples in one place. Refit the last layer after training."
            )
        return super().start(chain, x, y, comm, velocity)

    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update U, V and W once (Algorithm 1 of [1]), with `refit` U, W and V."""
        with precise(state.x.device):
            sweep = Sweep(self, chain, state, loss, comm)
            if self.refit and state.fresh:
                sweep.refit_v()
            sweep.update_u()
            if not self.refit:
                sweep.update_v()
            sweep.update_w()
            if self.refit:
                sweep.refit_v()
            state.sweep += 1
            state.fresh = False
            return sweep.report()

    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The displayed formula for this process's samples."""
        with precise(state.x.device):
            u, last = state.variables["u"], len(chain) - 1
            values = [state.x, *(t.to(state.x.device, state.x.dtype) for t in u)]
            total = loss.value(values[-1] @ chain[last].weight.T, state.y)
            for layer, gamma in enumerate(self.weights_of_terms(state.sweep, last)):
                error = values[layer + 1] - chain[layer].forward(chain[layer].join(values[: layer + 1]))
                total = total + gamma / 2 * error.double().square().sum()
            return total + self.penalties_on_weights(chain).sum()

    def finish(self, chain: Chain, state: LiftedState, comm: Communicator) -> None:
        """Replace V by LinearSVC on the features of a forward pass, with `classifier="svm"`."""
        if self.classifier != "svm":
            return
        from sklearn.svm import LinearSVC

        *_, (_, features), (output, _) = chain.forward(state.x)
        single = output.shape[1] == 1
        labels = (state.y[:, 0] > state.y.mean()) if single else state.y.argmax(1)
        svm = LinearSVC(C=self.svm_c, fit_intercept=False, random_state=0)
        svm.fit(features.cpu().numpy(), labels.cpu().numpy())
        found, weight = torch.from_numpy(svm.coef_).to(output), chain[-1].weight
        with torch.no_grad():
            if len(found) == 1 and not single:  # two classes: one separating plane
                found = torch.cat([-found, found])
            weight.zero_()
            weight[torch.arange(1) if single else torch.from_numpy(svm.classes_[-len(found) :])] = found


class Sweep:
    """One sweep in progress: the numbers of this sweep and the sums of its pass over the samples."""

    def __init__(
        self, algorithm: TikhonovBCD, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator
    ) -> None:
        self.algorithm, self.chain, self.state, self.loss, self.comm = algorithm, chain, state, loss, comm
        self.theta = algorithm.theta(state.sweep + 1)
        self.pull = (1 - self.theta) ** 2 if algorithm.proximal is None else algorithm.proximal
        self.damping = algorithm.damping or 0.0
        self.hidden = list(chain)[:-1]
        self.gamma = algorithm.weights_of_terms(state.sweep, len(self.hidden))
        self.penalties = algorithm.weight_penalties(len(chain))
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
        gamma = e.new_tensor(self.gamma).repeat_interleave(repeats.to(e.device))
        hessian = e[:, start:].T @ (gamma[:, None] * e[:, start:])
        hessian.diagonal().add_(self.pull + self.damping)
        of_x = -(e[:, start:].T @ (gamma[:, None] * e[:, :start]))
        of_last = slice(last.start - start, last.stop - start)
        output = e.new_zeros(len(v), len(e))
        output[:, of_last] = v
        dtype = self.state.x.dtype
        if self.squared:
            hessian[of_last, of_last] += v.T @ v
        if self.algorithm.nonnegative == "project":
            inverse = torch.cholesky_inverse(factor(hessian, "the Hessian of hidden activations")).to(dtype)
        elif self.squared:
            solver = NonnegativeQuadratic(hessian, dtype)
        else:
            solver = NonnegativeQuadratic(hessian, dtype, loss=self.loss, output=output)
        of_x, output = of_x.to(dtype), output.to(dtype)
        for rows in self.state.rows(self.algorithm.rows_per_chunk(self.state.x)):
            x, *parts = self.rows(rows)
            y, old = self.state.y[rows], torch.cat(parts, dim=1)
            g = torch.addmm(old, x, of_x.T, beta=self.pull)
            if self.squared:
                g.addmm_(y, output)
            if self.algorithm.nonnegative == "project":
                new = (g @ inverse).clamp_min_(0)
            else:
                new = solver(g, old, y, self.algorithm.iterations)
            new = old.lerp_(new, self.theta)
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
        moved = weight.lerp(new.to(weight.dtype), self.theta)
        weight.copy_(moved if penalty.convex else penalty.prox(moved, 1.0))

    def update_w(self) -> None:
        """W_n: γ_n/2 ‖U_n − Ũ_n Wᵀ‖² + r(W), Ũ_n what layer n reads."""
        for layer, (stage, gamma) in enumerate(zip(self.hidden, self.gamma, strict=True)):
            targets, inputs, penalty = self.columns[layer + 1], self.inputs(layer), self.penalties[layer]
            if stage.weight.requires_grad:
                problem = self.part(targets, inputs, self.damping / gamma)
                new, _ = problem.solve(stage.weight, None, rho=gamma, alpha=self.pull, penalty=penalty)
                self.relax(stage.weight, new, penalty)
            square = self.part(targets, inputs, 0.0).residual_square(stage.weight, None)
            self.linear.append(gamma / 2 * square)

    def update_v(self) -> None:
        """V: R(U_N Vᵀ; Y) + r(V)."""
        stage, penalty = self.chain[-1], self.penalties[-1]
        if not stage.weight.requires_grad:
            return
        problem = self.part(None, self.columns[-1], self.damping)
        if self.squared:
            new, _ = problem.solve(stage.weight, None, rho=1.0, alpha=self.pull, penalty=penalty)
        else:
            new = self.split_v(stage.weight, penalty)
        self.relax(stage.weight, new, penalty)

    def refit_v(self) -> None:
        """V: ½ ‖Y − F Vᵀ‖² + r(V), F the last hidden activations of a forward pass."""
        stage, state = self.chain[-1], self.state
        if not stage.weight.requires_grad:
            return
        problem = LeastSquares(stage.weight.shape[1], len(stage.weight), state.x.device)
        for rows in state.rows(self.algorithm.rows_per_chunk(state.x)):
            *_, (_, features), _ = self.chain.forward(state.x[rows])
            problem.add(features, state.y[rows])
        self.comm.sum(problem.totals)
        problem.gram.diagonal().add_(self.damping)
        try:
            new, _ = problem.solve(stage.weight, None, rho=1.0, alpha=0.0, penalty=self.penalties[-1])
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
        problem = self.part(None, self.columns[-1], self.damping)
        for _ in range(self.algorithm.iterations):
            problem.cross = ((s - slack).T @ u).double()
            self.comm.sum([problem.cross])
            solved, _ = problem.solve(old, None, rho=1.0, alpha=self.pull, penalty=penalty, keep_factor=True)
            weight = solved.to(old.dtype)
            image = u @ weight.T
            s = self.loss.prox(image + slack, 1.0, self.state.y)
            slack = slack + image - s
        after = self.value_of_v(u @ weight.T, weight, old, penalty)
        return torch.where(after <= before, weight, old)

    def value_of_v(self, image: Tensor, weight: Tensor, old: Tensor, penalty: Penalty) -> Tensor:
        """The sub-problem of V."""
        fit = self.loss.value(image, self.state.y)
        self.comm.sum([fit])
        near = self.pull / 2 * (weight - old).double().square().sum()
        return fit + near + self.damping / 2 * weight.double().square().sum() + penalty.value(weight)

    def report(self) -> Report:
        """The terms of the objective after the sweep."""
        fit = torch.zeros((), dtype=torch.float64, device=self.state.x.device)
        for rows in self.state.rows(self.algorithm.rows_per_chunk(self.state.x)):
            u = self.state.read("u", len(self.hidden) - 1, rows)
            fit += self.loss.value(u @ self.chain[-1].weight.T, self.state.y[rows])
        self.comm.sum([fit])
        zero = torch.zeros_like(fit)
        entries = [self.state.samples * len(stage.weight) for stage in self.hidden]
        squares = zip(self.linear, self.gamma, entries, strict=True)
        return Report(
            data_fit=fit,
            coupling=[zero] * len(self.chain),
            linear=[*self.linear, zero],
            penalty=list(self.algorithm.penalties_on_weights(self.chain).unbind()),
            residuals={"linear": [*((2 * term / (gamma * n)).sqrt() for term, gamma, n in squares), zero]},
        )
