"""pdADMM and pdADMM-G: layers that train in parallel.

    minimise   R(Z_L; Y) + Σ μ/2 ‖W_l‖² + Σ ν/2 ‖Z_l − M_l‖² + Σ_{l<L} ν/2 ‖Q_l − σ(Z_l)‖²
               + Σ_{l<L} ⟨U_l, P_{l+1} − Q_l⟩ + ρ/2 ‖P_{l+1} − Q_l‖²,       M_l = P_l W_lᵀ + 1b_lᵀ,  P_1 = X

Layer l has an input P_l and an output Q_l of its own, coupled by P_{l+1} = Q_l with dual variable U_l. One sweep
updates P, W, b, Z, Q, U, each for all layers from what the others were (Algorithm 1 of [1]): layers on different
devices work at the same time and exchange P and Q with their neighbours only. Rows are samples.

[1] Wang, Chai, Cheng, Zhao. Toward Model Parallelism for Deep Neural Network based on Gradient-free ADMM Framework.
    ICDM 2020.
[2] Wang, Li, Chai, Wang, Cheng, Zhao. Towards Quantized Model Parallelism for Graph-Augmented MLPs Based on
    Gradient-Free ADMM Framework. IEEE Transactions on Neural Networks and Learning Systems, 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Codec, Communicator
from lightning_bcd.lifted.admm import AlternatingDirections, Steps, square
from lightning_bcd.lifted.algorithm import LiftedState, Report, check_choice
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox.activations import ReLU
from lightning_bcd.prox.losses import Loss


@dataclass(frozen=True, kw_only=True)
class PDADMM(AlternatingDirections):
    """pdADMM (Wang, Chai, Cheng, Zhao, ICDM 2020, Algorithm 1).

    The augmented Lagrangian falls from some sweep on for ρ > 4ν (with ReLU; Theorem 1 of [2]). Work per sweep:
    2 M_1 + 4 Σ_{l≥2} M_l FLOPs with M_l = 2 d_l d_{l-1} N. `rho_schedule="published"`: when the training loss has not
    fallen by 0.001 twice in a row, ρ ← min(10 ρ, 1).

    Args:
        z_rule: `"exact"`: Z_l minimises its sub-problem. `"reference"`: of its two candidates (ReLU only) the one that
            is better without the proximal term is taken, as published.

    The other arguments are those of `AlternatingDirections`.
    """

    z_rule: Literal["exact", "reference"] = "exact"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "rho": 1e-3,
            "rho_schedule": "constant",
            "step": "exact",
            "search_start": 20.0,
            "init_output": "forward",
            "output_solver": "newton",
            "reduction": "sum",
        },
        "reference": {
            "rho_schedule": "published",
            "step": "backtracking",
            "init_output": "zeros",
            "output_solver": "fista",
        },
        "recommended": {"rho": 0.1, "init_output": "zeros"},
    }
    layer_parallel: ClassVar[bool] = True
    inputs: ClassVar[str] = "p"
    doublings: ClassVar[int | None] = 10
    fista_iterations: ClassVar[int] = 50
    patience: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("z_rule", self.z_rule, ["exact", "reference"])

    @property
    def ridge(self) -> float:
        """μ."""
        return 0.0

    def layer_of(self, name: str, index: int) -> int:
        """The layer that updates a variable: P of a boundary belongs to the layer above it."""
        return index + 1 if name == "p" else index

    def readers(self, name: str, index: int) -> Sequence[int]:
        """The layers that read a variable: both of a boundary read P, Q and U."""
        return [index] if name in "zm" else [index, index + 1]

    @staticmethod
    def stalls(cost: float, last: float) -> bool:
        """Whether the mean training loss has not fallen by 0.001."""
        return cost > last - 1e-3

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError if the chain or the loss does not suit the algorithm."""
        super().check(chain, loss)
        others = [stage.name for stage in chain if not isinstance(stage.activation, ReLU)][:-1]
        if self.z_rule == "reference" and others:
            raise ValueError(
                f"Expected ReLU in all hidden stages with z_rule='reference', but stages {others} have others. Use "
                "z_rule='exact'."
            )

    def snap(self, name: str, value: Tensor, state: LiftedState) -> Tensor:
        """The value that P or Q may take: itself here, the nearest point of a grid in variants."""
        return value

    def projection(self, name: str, state: LiftedState) -> Callable[[Tensor], Tensor] | None:
        """`snap` of a variable that may not take every value; None of one that may."""
        return None

    def codec(self, name: str, state: LiftedState) -> Codec | None:
        """How P or Q travel between processes; as they are if None."""
        return None

    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield Z_l and the product M_l, of hidden stages P_{l+1}, Q_l and U_l = 0, for a forward pass."""
        last = len(chain) - 1
        for layer, (z, q) in enumerate(chain.forward(x)):
            yield {"z": z, "m": z} | ({} if layer == last else {"p": q, "q": q, "u": torch.zeros_like(q)})

    def visit(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator, rho: float, nu: float) -> Report:
        """P, W, b, Z, Q, U of the layers of this process (Algorithm 1 of [1])."""
        sweep = Sweep(self, chain, state, loss, comm, rho, nu)
        layers = comm.layers(len(chain))
        first, top = layers[0], layers[-1]
        below = first - 1 if first else None
        above = top if top < len(chain) - 1 else None
        for layer in layers[1:]:
            sweep.update_p(layer)
        comm.wait()  # for Q of the layer below, since the last sweep
        if first:
            sweep.update_p(first)
        comm.pass_down(sweep.at("p", below), sweep.at("p", above), self.codec("p", state))
        for layer in layers:
            sweep.update_w(layer)
            sweep.update_b(layer)
            sweep.update_z(layer)
        comm.wait()
        for layer in layers:
            if layer < len(chain) - 1:
                sweep.update_q(layer)
                sweep.update_u(layer)
        # Both sides of a boundary compute U: it never travels.
        then = None if below is None else partial(sweep.update_u, below)
        comm.pass_up(sweep.at("q", above), sweep.at("q", below), self.codec("q", state), then)
        return sweep.report(layers)

    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The displayed formula for this process's samples, with ρ of the constructor."""
        assert self.rho is not None
        rho, nu = self.rho, self.rho if self.nu is None else self.nu
        z, p, q, u = (state.variables[name] for name in "zpqu")
        samples = state.samples if self.reduction == "mean" else 1
        total = loss.value(z[-1], state.y)
        for layer, stage in enumerate(chain):
            error = z[layer] - stage.forward(self.inputs_of(chain, state, layer))
            total = total + nu / 2 * error.double().square().sum()
            if layer < len(chain) - 1:
                gap = p[layer] - q[layer]
                total = total + nu / 2 * (q[layer] - stage.activation(z[layer])).double().square().sum()
                total = total + (u[layer] * gap).double().sum() + rho / 2 * gap.double().square().sum()
        weights = torch.stack([stage.weight.double().square().sum() for stage in chain])
        return total / samples + self.ridge / 2 * weights.sum()


@dataclass(frozen=True, kw_only=True)
class PDADMMG(PDADMM):
    """pdADMM-G (Wang, Li, Chai, Wang, Cheng, Zhao, TNNLS 2022): pdADMM with a ridge penalty, for graph-augmented MLPs.

    Its input are the features and their averages over neighbourhoods, see `graph_augment`.

    Args:
        mu: μ ≥ 0, ridge penalty on weights.

    The other arguments are those of `PDADMM`.

    Raises:
        ValueError: If an argument is out of range.
    """

    mu: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"Expected argument `mu` to be finite and not negative, but got {self.mu}.")

    @property
    def ridge(self) -> float:
        """μ."""
        return self.mu


class Sweep:
    """One sweep in progress. Boundary l lies above layer l: P_{l+1}, Q_l and U_l have index l."""

    def __init__(
        self, algorithm: PDADMM, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator, rho: float, nu: float
    ) -> None:
        self.algorithm, self.chain, self.state, self.loss = algorithm, chain, state, loss
        self.comm, self.rho, self.nu = comm, rho, nu
        self.z, self.m, self.p, self.q, self.u = (state.variables[name] for name in "zmpqu")
        self.last = len(chain) - 1
        self.samples = state.samples if algorithm.reduction == "mean" else 1
        assert algorithm.rho is not None
        self.steps = Steps(algorithm, comm, state.samples, scale=1.0)

    def update_p(self, layer: int) -> None:
        """P_l ← P_l − g/τ, g = ν (M_l − Z_l)W_l + U_{l-1} + ρ (P_l − Q_{l-1})."""
        below = layer - 1
        p, q, u = self.p[below], self.q[below], self.u[below]
        pull = torch.sub(p, q).mul_(self.rho).add_(u)
        project = self.algorithm.projection("p", self.state)
        options = (self.z[layer], self.nu, pull, self.rho, project)
        self.steps.update_inputs(self.chain[layer], self.m[layer], p, *options)

    def update_w(self, layer: int) -> None:
        """W_l ← W_l − g/θ, g = ν (M_l − Z_l)ᵀP_l + μ W_l."""
        inputs = self.algorithm.inputs_of(self.chain, self.state, layer)
        ridge = self.algorithm.ridge * self.samples
        self.steps.update_w(self.chain[layer], self.m[layer], inputs, self.z[layer], self.nu, ridge)

    def update_b(self, layer: int) -> None:
        """b_l = mean over samples of Z_l − P_l W_lᵀ."""
        self.steps.update_b(self.chain[layer], self.m[layer], self.z[layer])

    def update_z(self, layer: int) -> None:
        """Z_l = argmin ν/2 (‖Z − M_l‖² + ‖Q_l − σ(Z)‖² + ‖Z − Z_old‖²), Z_L = argmin R(Z; Y) + ν/2 ‖Z − M_L‖²."""
        z, m = self.z[layer], self.m[layer]
        if layer == self.last:
            z.copy_(self.algorithm.solve_output(self.loss, m, self.nu, self.state.y, z))
        elif self.algorithm.z_rule == "reference":
            z.copy_(_published_z(z, m, self.q[layer]))
        else:
            z.copy_(self.chain[layer].activation.solve(self.q[layer], torch.lerp(m, z, 0.5), 2.0, old=z))

    def update_q(self, layer: int) -> None:
        """Q_l = (ρ P_{l+1} + U_l + ν σ(Z_l)) / (ρ + ν)."""
        total = self.chain[layer].activation(self.z[layer]).mul(self.nu)
        total.add_(self.u[layer]).add_(self.p[layer], alpha=self.rho).div_(self.rho + self.nu)
        self.q[layer].copy_(self.algorithm.snap("q", total, self.state))

    def update_u(self, layer: int) -> None:
        """U_l ← U_l + ρ (P_{l+1} − Q_l)."""
        self.u[layer].add_(self.p[layer] - self.q[layer], alpha=self.rho)

    def at(self, name: str, boundary: int | None) -> Tensor | None:
        """P or Q of a boundary; None where there is none."""
        return None if boundary is None else self.state.variables[name][boundary]

    def report(self, layers: range) -> Report:
        """The terms of the augmented Lagrangian after the sweep."""
        depth = len(self.chain)
        sums = torch.zeros(4 * depth + 1, dtype=torch.float64, device=self.state.x.device)
        linear, coupling, dual, gaps = sums[:-1].view(4, depth)
        for layer in layers:
            linear[layer] = square(self.z[layer] - self.m[layer])
            if layer == self.last:
                sums[-1] = self.loss.value(self.z[layer], self.state.y)
                continue
            gap = self.p[layer] - self.q[layer]
            coupling[layer] = square(self.q[layer] - self.chain[layer].activation(self.z[layer]))
            gaps[layer] = square(gap)
            dual[layer] = (self.u[layer] * gap).sum()
        self.comm.sum([sums])
        penalty = torch.zeros_like(linear)
        for layer in layers:
            penalty[layer] = self.algorithm.ridge / 2 * square(self.chain[layer].weight)
        self.comm.combine([sums, penalty])
        entries = sums.new_tensor([self.state.samples * stage.weight.shape[0] for stage in self.chain])
        half = 1 / (2 * self.samples)
        return Report(
            data_fit=sums[-1] / self.samples,
            coupling=list((self.nu * half * coupling).unbind()),
            linear=list((self.nu * half * linear).unbind()),
            penalty=list(penalty.unbind()),
            dual=list((dual / self.samples + self.rho * half * gaps).unbind()),
            residuals={
                "activation": list((coupling / entries).sqrt().unbind()),
                "linear": list((linear / entries).sqrt().unbind()),
                "consensus": list((gaps / entries).sqrt().unbind()),
            },
        )


def _published_z(z: Tensor, m: Tensor, q: Tensor) -> Tensor:
    """The better of min((m + z)/2, 0) and max((m + z + q)/3, 0), judged without the proximal term."""
    low, high = ((m + z) / 2).clamp_max_(0), ((m + z + q) / 3).clamp_min_(0)
    value = (low - m).square() + q.square() - (high - m).square() - (q - high).square()
    return torch.where(value < 0, low, high)
