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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.algorithm import LiftedState, Report, Schedule, check_choice, per_layer, positive, precise
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.splitting import Penalised
from lightning_bcd.lifted.tikhonov_sweep import Numbers, Sweep, last_features
from lightning_bcd.prox.activations import ReLU
from lightning_bcd.prox.losses import Loss, SquaredLoss
from lightning_bcd.prox.penalties import Ridge

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

    def numbers(self, chain: Chain, state: LiftedState) -> Numbers:
        """What the hyperparameters are in the next sweep."""
        theta = self.theta(state.sweep + 1)
        return Numbers(
            theta=theta,
            pull=(1 - theta) ** 2 if self.proximal is None else self.proximal,
            damping=self.damping or 0.0,
            gamma=self.weights_of_terms(state.sweep, len(chain) - 1),
            penalties=self.weight_penalties(len(chain)),
            project=self.nonnegative == "project",
            iterations=self.iterations,
            chunk_rows=self.rows_per_chunk(state.x),
        )

    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update U, V and W once (Algorithm 1 of [1]), with `refit` U, W and V."""
        with precise(state.x.device):
            sweep = Sweep(self.numbers(chain, state), chain, state, loss, comm)
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

        chunks = state.rows(self.rows_per_chunk(state.x))
        features, weight = torch.cat([last_features(chain, state.x[rows]) for rows in chunks]), chain[-1].weight
        single = len(weight) == 1
        labels = (state.y[:, 0] > state.y.mean()) if single else state.y.argmax(1)
        svm = LinearSVC(C=self.svm_c, fit_intercept=False, random_state=0)
        svm.fit(features.cpu().numpy(), labels.cpu().numpy())
        found = torch.from_numpy(svm.coef_).to(weight)
        with torch.no_grad():
            if len(found) == 1 and not single:  # two classes: one separating plane
                found = torch.cat([-found, found])
            weight.zero_()
            weight[torch.arange(1) if single else torch.from_numpy(svm.classes_[-len(found) :])] = found
