"""What the ADMM family shares: hyperparameters, the schedule of ρ, gradient steps that keep the products.

Every update works on the product M_l = A_{l-1} W_lᵀ + 1b_lᵀ, which is held: after a step on W, b or A it is moved along
by the product that gave the step its length. Within a sweep nothing is multiplied twice.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.algorithm import LiftedAlgorithm, LiftedState, Report, check_choice, precise, share_weights
from lightning_bcd.lifted.chain import Chain, Stage
from lightning_bcd.linalg import power_iteration
from lightning_bcd.linesearch import STEP_RULES, StepRule, step_length
from lightning_bcd.prox.losses import CrossEntropyLoss, Loss

#: Sweeps after which carried products are computed anew, so that rounding does not add up.
REFRESH_EVERY = 20
#: Factor of an eigenvalue that was estimated from below.
MARGIN = 1.05
RhoSchedule = Literal["constant", "published"] | Callable[[int, float], float]


@dataclass(frozen=True, kw_only=True)
class AlternatingDirections(LiftedAlgorithm):
    """Hyperparameters of the ADMM family; see the algorithms themselves.

    Args:
        preset: `"reference"` (published settings) or `"recommended"` (best found by experiment) fills the arguments
            left at None; without a preset they are the paper's problem.
        rho: ρ > 0, weight of the constraint that has a dual variable.
        nu: ν > 0, weight of the terms of hidden layers; ρ if None.
        rho_schedule: `"constant"`; `"published"`: ρ grows tenfold when the training loss of the network stalls, see the
            algorithm; or a function of (sweep, ρ) that returns ρ of this sweep. ν follows ρ where it is None.
        step: Length of gradient steps: `"exact"` along the gradient, `"backtracking"` from `search_start` as published,
            or `"lipschitz"`.
        search_start: First curvature that backtracking tries.
        init_output: Start of the output variable Z_L: `"forward"` pass, `"labels"` (+1 on the class, −1 elsewhere) or
            `"zeros"`.
        output_solver: Of the cross-entropy step: `"newton"` (exact) or `"fista"` (published, inexact).
        reduction: `"sum"` or `"mean"` over samples: with `"mean"` a penalty on weights does not depend on their number.

    Raises:
        ValueError: If an argument is out of range.
    """

    preset: Literal["reference", "recommended"] | None = None
    rho: float | None = None
    nu: float | None = None
    rho_schedule: RhoSchedule | None = None
    step: StepRule | None = None
    search_start: float | None = None
    init_output: Literal["forward", "labels", "zeros"] | None = None
    output_solver: Literal["newton", "fista"] | None = None
    reduction: Literal["sum", "mean"] | None = None

    temporaries: ClassVar[int] = 6
    #: Name of the variables that are inputs of layers.
    inputs: ClassVar[str] = "a"
    #: Settings of the published searches: doublings before a step is left out, iterations of FISTA, and ρ's maximum.
    doublings: ClassVar[int | None] = None
    fista_iterations: ClassVar[int] = 500
    largest_rho: ClassVar[float] = 1.0
    #: Stalls in a row after which the published schedule raises ρ.
    patience: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rho", "nu", "search_start"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"Expected argument `{name}` to be positive and finite, but got {value}.")
        check_choice("step", self.step, STEP_RULES)
        check_choice("init_output", self.init_output, ["forward", "labels", "zeros"])
        check_choice("output_solver", self.output_solver, ["newton", "fista"])
        check_choice("reduction", self.reduction, ["sum", "mean"])
        if not callable(self.rho_schedule):
            check_choice("rho_schedule", self.rho_schedule, ["constant", "published"])
        if self.offload or self.storage_dtype is not None:
            raise ValueError(
                f"Expected arguments `offload` and `storage_dtype` to be left out with {type(self).__name__}, but got "
                f"{self.offload} and {self.storage_dtype}: it works on whole matrices. Use fewer samples or processes "
                "that share them."
            )

    @property
    def descends(self) -> bool:
        """False: an augmented Lagrangian may rise when the dual variables move."""
        return False

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError unless all stages are linear modules without skip connections."""
        super().check(chain, loss)
        others = [stage.name for stage in chain if not stage.dense or stage.residual]
        if others:
            raise ValueError(
                f"Expected {type(self).__name__} to be given nn.Linear stages without skip connections, but stages "
                f"{others} are others. Use ThreeSplitting or ResidualSplitting for them."
            )
        if self.output_solver == "fista" and not isinstance(loss, CrossEntropyLoss):
            raise ValueError(
                f"Expected argument `output_solver` to be 'newton' with {type(loss).__name__}, but got 'fista', which "
                "is for the cross-entropy. Other losses have closed forms."
            )

    def start(
        self, chain: Chain, x: Tensor, y: Tensor, comm: Communicator, velocity: dict[str, Tensor] | None = None
    ) -> LiftedState:
        """Initialise the auxiliary variables by a forward pass, the output as `init_output` says."""
        state = super().start(chain, x, y, comm, velocity)
        output = state.variables["z"][-1]
        if self.init_output == "labels":
            output.copy_(torch.where(state.y > 0, 1.0, -1.0))
        elif self.init_output == "zeros":
            output.zero_()
        return state

    def temporary_rows(self, x: Tensor) -> int:
        """All rows: updates work on whole matrices."""
        return len(x)

    def resolve(self, loss: Loss) -> Loss:
        """The loss with the solver of the output step."""
        if self.output_solver == "fista":
            return CrossEntropyLoss(solver="fista", max_iterations=self.fista_iterations)
        return loss

    @staticmethod
    def solve_output(loss: Loss, centre: Tensor, tau: float, y: Tensor, old: Tensor) -> Tensor:
        """Return argmin_Z R(Z; Y) + τ/2 ‖Z − centre‖²; FISTA, which is inexact, starts at the old value."""
        if isinstance(loss, CrossEntropyLoss):
            return loss.prox(centre, 1 / tau, y, start=old)
        return loss.prox(centre, 1 / tau, y)

    def penalties(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> tuple[float, float]:
        """ρ and ν of this sweep."""
        assert self.rho is not None
        rho = self.rho
        if callable(self.rho_schedule):
            rho = float(self.rho_schedule(state.sweep, rho))
            if not 0 < rho < float("inf"):
                raise ValueError(
                    f"Expected argument `rho_schedule` to return a positive number, but got {rho} in sweep "
                    f"{state.sweep}."
                )
        elif self.rho_schedule == "published":
            rho = self._published(chain, state, loss, comm)
        return rho, rho if self.nu is None else self.nu

    def _published(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> float:
        """ρ after looking at the mean loss of a forward pass; its history is kept with the momentum of a run."""
        assert self.rho is not None
        share_weights(chain, comm)
        *_, (output, _) = chain.forward(state.x)
        total = loss.value(output, state.y)
        comm.sum([total])
        cost = float(total) / state.samples
        first = torch.tensor([self.rho, torch.inf, 0.0], dtype=torch.float64)
        rho, last, stalls = state.velocity.get("rho", first).tolist()
        stalls = stalls + 1 if self.stalls(cost, last) else 0.0
        if stalls == self.patience:
            rho, stalls = max(rho, min(10 * rho, self.largest_rho)), 0.0
        state.velocity["rho"] = torch.tensor([rho, cost, stalls], dtype=torch.float64)
        return float(rho)

    @staticmethod
    def stalls(cost: float, last: float) -> bool:
        """Whether the published schedule counts this cost as a stall."""
        return cost > last

    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update every block once."""
        with precise(state.x.device):
            loss = self.resolve(loss)
            rho, nu = self.penalties(chain, state, loss, comm)
            if not state.fresh and self.is_stale(state):
                self.refresh(chain, state)
            report = self.visit(chain, state, loss, comm, rho, nu)
            state.sweep += 1
            state.fresh = False
            return report

    def is_stale(self, state: LiftedState) -> bool:
        """Whether the held products are computed anew before this sweep."""
        return state.sweep % REFRESH_EVERY == 0

    def inputs_of(self, chain: Chain, state: LiftedState, layer: int) -> Tensor:
        """The input of a layer, N × d_{l-1}: a variable, or X for the first layer."""
        return state.variables[self.inputs][layer - 1] if layer else chain[0].prepare(state.x)

    def refresh(self, chain: Chain, state: LiftedState) -> None:
        """Compute the held products M_l = A_{l-1} W_lᵀ + 1b_lᵀ anew, of the layers that this process has."""
        for layer, stage in enumerate(chain):
            product = state.variables["m"][layer]
            if len(product):
                product.copy_(stage.forward(self.inputs_of(chain, state, layer)))

    @abstractmethod
    def visit(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator, rho: float, nu: float) -> Report:
        """One sweep with these ρ and ν."""


class Steps:
    """Gradient steps on W, b and A of a stage for ½‖T − M‖² with M = A Wᵀ + 1bᵀ held.

    Args:
        algorithm: The hyperparameters.
        comm: The processes that share the samples.
        samples: Number of samples of all processes.
        scale: Factor of the search start: ρ now over ρ at the beginning, for published schedules.
    """

    def __init__(self, algorithm: AlternatingDirections, comm: Communicator, samples: int, scale: float) -> None:
        self.rule: StepRule = algorithm.step or "exact"
        self.start = (algorithm.search_start or 1.0) * scale
        self.doublings = algorithm.doublings
        self.comm, self.samples = comm, samples

    def update_w(
        self, stage: Stage, product: Tensor, inputs: Tensor, target: Tensor, weight: float, ridge: float = 0.0
    ) -> None:
        """Take W − g/θ of weight/2 ‖T − AWᵀ − 1bᵀ‖² + ridge/2 ‖W‖², g = weight (M − T)ᵀA + ridge W; two products."""
        if not stage.weight.requires_grad:  # the user froze the stage
            return
        gradient = ((product - target).T @ inputs).mul_(weight)
        self.comm.sum([gradient])
        if ridge:
            gradient.add_(stage.weight, alpha=ridge)
        image = inputs @ gradient.T
        norm, curved = square(gradient), square(image)
        self.comm.sum([curved])
        bound = None
        if self.rule == "lipschitz":
            bound = weight * self._largest(inputs, shared=True) + ridge
        length = self._length(weight * curved + ridge * norm, norm, bound).to(gradient.dtype)
        stage.weight.sub_(gradient * length)
        product.sub_(image.mul_(length))

    def update_b(self, stage: Stage, product: Tensor, target: Tensor) -> None:
        """Set b to argmin ‖T − M‖², the mean of T − AWᵀ over all samples."""
        if stage.bias is None or not stage.bias.requires_grad:
            return
        move = (target - product).sum(0, dtype=torch.float64)
        self.comm.sum([move])
        move = (move / self.samples).to(product.dtype)
        stage.bias.add_(move)
        product.add_(move)

    def update_inputs(
        self,
        stage: Stage,
        product: Tensor,
        inputs: Tensor,
        target: Tensor,
        weight: float,
        other: Tensor,
        curvature: float,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Take A − g/τ of weight/2 ‖T − AWᵀ − 1bᵀ‖² + h(A), g = weight (M − T)W + ∇h(A); two products.

        `other` is ∇h(A), `curvature` the second derivative of h. `project` maps onto the set A is bound to.
        """
        gradient = torch.addmm(other, product - target, stage.weight, alpha=weight)
        if project is not None:
            self._project_inputs(stage, product, inputs, gradient, weight, curvature, project)
            return
        image = gradient @ stage.weight.T
        norm, curved = square(gradient), square(image)
        self.comm.sum([norm, curved])
        bound = None
        if self.rule == "lipschitz":
            bound = weight * self._largest(stage.weight, shared=False) + curvature
        length = self._length(weight * curved + curvature * norm, norm, bound).to(gradient.dtype)
        inputs.sub_(gradient.mul_(length))
        product.sub_(image.mul_(length))

    def _project_inputs(
        self,
        stage: Stage,
        product: Tensor,
        inputs: Tensor,
        gradient: Tensor,
        weight: float,
        curvature: float,
        project: Callable[[Tensor], Tensor],
    ) -> None:
        """A projected step with 1/τ from a bound of the curvature; left out where the bound turns out too small."""
        bound = MARGIN * (weight * self._largest(stage.weight, shared=False) + curvature)
        moved = project(inputs - gradient / bound)
        change = moved - inputs
        image = change @ stage.weight.T
        norm, curved = square(change), square(image)
        self.comm.sum([norm, curved])
        below = weight * curved + curvature * norm <= bound * norm
        inputs.copy_(torch.where(below, moved, inputs))
        product.add_(image.mul_(below))

    def _length(self, curved: Tensor, norm: Tensor, bound: Tensor | None) -> Tensor:
        curvature = torch.where(norm > 0, curved / norm, torch.zeros_like(norm))
        return step_length(curvature, self.rule, start=self.start, doublings=self.doublings, bound=bound)

    def _largest(self, matrix: Tensor, shared: bool) -> Tensor:
        """λ_max(MᵀM) from below by a few power iterations; the processes may share the rows of M."""

        def apply(vector: Tensor) -> Tensor:
            image = matrix.T @ (matrix @ vector)
            if shared:
                self.comm.sum([image])
            return image

        # No vector of the last sweep, which a checkpoint would have to carry: the diagonal is a good start too.
        start = matrix.square().sum(0)
        if shared:
            self.comm.sum([start])
        return power_iteration(apply, start, iterations=8)[0].double()


def square(t: Tensor) -> Tensor:
    """‖t‖² in float64."""
    return t.square().sum().double()
