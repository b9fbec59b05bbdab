"""Regularised least squares for layers: sums over samples, one small factorisation, many rows.

Data of N rows is touched by products in its own precision only; sums over samples, Gram matrices, factorisations and
solves are float64. They are d × d: this costs nothing, and an explicit float32 inverse there was measured to leave
residuals a thousand times larger.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_bcd.gram import gram
from lightning_bcd.prox.penalties import NoPenalty, Penalty, Ridge

BiasUpdate = Literal["exact", "reference", "joint"]
BIAS_UPDATES = ("exact", "reference", "joint")
#: Added to the diagonal, relative to its mean, until a factorisation succeeds.
JITTERS = (0.0, 1e-14, 1e-12, 1e-10, 1e-8)
#: Chunks whose products are added up in the precision of the data before they join the float64 sums.
PARTIAL_CHUNKS = 8


def factor(matrix: Tensor, name: str = "matrix", *, positive: bool = False) -> Tensor:
    """Cholesky factor of a symmetric matrix, with growing jitter when it is singular to rounding.

    Args:
        matrix: d × d, symmetric, positive semi-definite, float64.
        name: What it is, for the message.
        positive: The caller added a positive multiple of the identity. The factorisation is then not checked, so
            that nobody waits for a GPU; data that is not finite shows up as an objective that is not.

    Returns:
        The lower factor.

    Raises:
        torch.linalg.LinAlgError: If it is not finite, or stays singular with a jitter of 1e-8 of its mean diagonal.
    """
    factorised: Tensor
    factorised, info = torch.linalg.cholesky_ex(matrix)
    if positive and matrix.is_cuda:
        return factorised
    mean = matrix.diagonal().mean()
    for jitter in JITTERS:
        if jitter:
            shifted = matrix.clone()
            shifted.diagonal().add_(jitter * mean)
            factorised, info = torch.linalg.cholesky_ex(shifted)
        if not info.item():
            break
    if not bool(torch.isfinite(factorised).all()):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"Expected {name} to be finite, but it holds NaN or infinity. Check the data for such values, or use "
            "smaller targets or a larger `alpha`."
        )
    if info.item():
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"Expected {name} to have full rank, but it is singular: its features are linearly dependent. Use "
            "`alpha` > 0 or a ridge penalty, which make the solution unique."
        )
    return factorised


class LeastSquares:
    """Least squares of U on V with a proximal term, fed by rows, solved on the smaller side.

        minimise over W, b:   ρ/2 ‖U − V Wᵀ − 1bᵀ‖² + α/2 ‖W − W_old‖² + α/2 ‖b − b_old‖² + r(W)

    `add` takes rows of V (n × d) and U (n × m) and keeps the sums VᵀV, UᵀV, Vᵀ1, Uᵀ1, ‖U‖² in float64, or, with
    fewer rows than features, the rows themselves. `totals` are those sums, to be added up over ranks.

    Args:
        d: Features of V.
        m: Columns of U.
        device: Where the sums live.
        rows: Number of rows that will come, if known; below d the N × N side is solved where that is possible.
        gram: VᵀV where it is known already (the input of the first layer never changes).

    Raises:
        ValueError: If V has no features or U no columns.
    """

    def __init__(
        self, d: int, m: int, device: torch.device, *, rows: int | None = None, gram: Tensor | None = None
    ) -> None:
        if d < 1 or m < 1 or rows == 0:
            raise ValueError(
                f"Expected at least one row, feature and output, but got rows={rows}, d={d} and m={m}. Give data."
            )

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.known_gram = gram is not None
        self.gram = gram if gram is not None else zeros(d, d)
        self.cross, self.sum_v, self.sum_u = zeros(m, d), zeros(d), zeros(m)
        self.count, self.square = zeros(), zeros()
        self.partial: list[Tensor] = []  # cross and Gram matrix of the last chunks, in the precision of the data
        self.chunks = 0
        self.rounding = 0.0
        self.lower: Tensor | None = None  # see `keep_factor`
        few = rows is not None and rows < d and not self.known_gram
        self.rows: list[tuple[Tensor, Tensor]] | None = [] if few else None

    @property
    def totals(self) -> list[Tensor]:
        """The sums over samples; adding them up over ranks gives one process's result."""
        self._flush()
        known = [] if self.known_gram else [self.gram]
        return [*known, self.cross, self.sum_v, self.sum_u, self.count, self.square]

    def add(self, v: Tensor, u: Tensor) -> None:
        """Take rows of V and U."""
        self.sum_v += v.sum(0)
        self.sum_u += u.sum(0)
        self.count += len(v)
        self.square += u.square().sum()
        self.rounding = torch.finfo(v.dtype).eps / 4
        if self.rows is not None:
            self.rows.append((v, u))
            return
        products = [u.T @ v if not self.partial else torch.addmm(self.partial[0], u.T, v, out=self.partial[0])]
        if not self.known_gram:
            products.append(gram(v) if not self.partial else self.partial[1].add_(gram(v)))
        self.partial = products
        self.chunks += 1
        if self.chunks % PARTIAL_CHUNKS == 0:
            self._flush()

    def _flush(self) -> None:
        for total, partial in zip((self.cross, self.gram), self.partial, strict=False):
            total += partial
        self.partial = []

    def solve(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        rho: float,
        alpha: float,
        penalty: Penalty | None = None,
        bias_update: BiasUpdate = "exact",
        shift: Tensor | None = None,
        iterations: int = 100,
        keep_factor: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new W and b in float64.

        Args:
            weight: W_old, m × d.
            bias: b_old, m entries, or None.
            rho: ρ.
            alpha: α.
            penalty: r; ridge is solved in closed form, others by accelerated proximal gradient on the Gram matrix.
            bias_update: `"exact"`: W with b_old, then b with the new W. `"joint"`: the minimiser in W and b together.
                `"reference"`: b with the old W, as in published code; the objective may then rise.
            shift: r acts on W + shift. With U replaced by its residual and W_old = 0 the solution is a change of the
                weights, and rounding of the sums touches the change only.
            iterations: Proximal gradient steps.
            keep_factor: Keep the factor for the next call, which has the same V, ρ, α and penalty, and another U.

        Raises:
            torch.linalg.LinAlgError: If the system is singular or not finite.
        """
        ridge = penalty.weight if isinstance(penalty, Ridge) else 0.0
        closed = penalty is None or isinstance(penalty, NoPenalty | Ridge)
        w_old, b_old = weight.double(), None if bias is None else bias.double()
        pull = alpha * w_old if shift is None else alpha * w_old - ridge * shift.double()
        joint = b_old is not None and bias_update == "joint"
        if self.rows is not None and closed and alpha + ridge > 0 and (alpha > 0 or not joint):
            w = self._solve_small(pull, b_old, rho, alpha, ridge, joint)
        else:
            matrix, right = self._system(b_old, rho, alpha, joint)
            if closed:
                lower = self.lower
                if lower is None:
                    # A Gram matrix of float32 products may be indefinite by its rounding: that much is added.
                    matrix.diagonal().add_(alpha + ridge + self.rounding * matrix.diagonal().sum())
                    lower = factor(matrix, "VᵀV of a layer", positive=alpha + ridge > 0)
                self.lower = lower if keep_factor else None
                w = torch.cholesky_solve((pull + right).T, lower).T
            else:
                assert penalty is not None
                w = _proximal_gradient(matrix, right, w_old, alpha, Shifted(penalty, shift), iterations)
        return w, self._bias(w_old if bias_update == "reference" else w, b_old, rho, alpha)

    def step(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        rho: float,
        alpha: float,
        penalty: Penalty | None = None,
        bias_update: BiasUpdate = "exact",
        shift: Tensor | None = None,
        lipschitz: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return W after one proximal gradient step, and b as in `solve`; no factorisation.

        The step length is the exact one along the gradient, 1/κ with κ = ⟨gA, g⟩/‖g‖² + α. With a penalty that is not
        smooth, or `lipschitz`, it is 1/(λ_max(A) + α), and the move is shortened where the estimate of λ_max was too
        small, so that the objective cannot rise.
        """
        w_old, b_old = weight.double(), None if bias is None else bias.double()
        joint = b_old is not None and bias_update == "joint"
        matrix, right = self._system(b_old, rho, alpha, joint)
        ridge = penalty.weight if isinstance(penalty, Ridge) else 0.0
        gradient = w_old @ matrix - right + ridge * (w_old if shift is None else w_old + shift)
        smooth = penalty is None or isinstance(penalty, NoPenalty | Ridge)
        if smooth and not lipschitz:
            w = w_old - gradient / _curvature(gradient, matrix, alpha + ridge)
        else:
            # A shortened move would leave a set that is not convex: there the step needs a bound that always holds.
            convex = penalty is None or penalty.convex
            # The gradient leans towards the largest eigenvectors: a good start.
            largest = (
                power_iteration(lambda vector: matrix @ vector, gradient.square().sum(0), iterations=8)[0]
                if convex
                else torch.minimum(matrix.norm(), matrix.abs().sum(1).max())
            )
            bound = largest + alpha + ridge
            target = w_old - gradient / bound
            if not smooth:
                assert penalty is not None
                target = Shifted(penalty, shift).prox(target, 1 / bound)
            move = target - w_old
            share = (bound / _curvature(move, matrix, alpha + ridge)).clamp_max(1) if convex else 1
            w = w_old + move * share
        return w, self._bias(w_old if bias_update == "reference" else w, b_old, rho, alpha)

    def _bias(self, w: Tensor, b_old: Tensor | None, rho: float, alpha: float) -> Tensor | None:
        if b_old is None:
            return None
        return (alpha * b_old + rho * (self.sum_u - w @ self.sum_v)) / (rho * self.count + alpha)

    def _system(self, b: Tensor | None, rho: float, alpha: float, joint: bool) -> tuple[Tensor, Tensor]:
        """ρVᵀV and ρ(U − 1bᵀ)ᵀV, with b eliminated if `joint`."""
        self._flush()
        if self.rows:
            self.cross += sum(u.T @ v for v, u in self.rows)
            self.gram += sum(gram(v) for v, _ in self.rows)
            self.rows = None
        if b is None:
            return rho * self.gram, rho * self.cross
        if not joint:
            return rho * self.gram, rho * (self.cross - torch.outer(b, self.sum_v))
        w = rho / (rho * self.count + alpha)
        offset = w * self.sum_u + b * (alpha / (rho * self.count + alpha))
        matrix = rho * (self.gram - w * torch.outer(self.sum_v, self.sum_v))
        return matrix, rho * (self.cross - torch.outer(offset, self.sum_v))

    def _solve_small(
        self, pull: Tensor, b: Tensor | None, rho: float, alpha: float, ridge: float, joint: bool
    ) -> Tensor:
        # Θ = Θ₀ + (U − ZΘ₀)ᵀ (Z D⁻¹ Zᵀ + I/ρ)⁻¹ Z D⁻¹ with Z = V, or (V, 1) when b is solved for at the same time.
        assert self.rows is not None
        v = torch.cat([v for v, _ in self.rows]).double()
        u = torch.cat([u for _, u in self.rows]).double()
        start = pull / (alpha + ridge)
        residual = u - v @ start.T if b is None else u - v @ start.T - b
        kernel = v @ v.T / (alpha + ridge)
        if joint:
            kernel += 1 / alpha
        kernel.diagonal().add_(1 / rho)
        lower = factor(kernel, "VVᵀ of a layer", positive=True)
        return start + torch.cholesky_solve(residual, lower).T @ v / (alpha + ridge)

    def residual_square(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """‖U − V Wᵀ − 1bᵀ‖² from the sums, without a product over the samples."""
        w = weight.double()
        if self.rows is not None:
            errors = [u.double() - v.double() @ w.T - (0 if bias is None else bias) for v, u in self.rows]
            return torch.stack([e.square().sum() for e in errors]).sum()
        self._flush()
        square = self.square + ((w @ self.gram - 2 * self.cross) * w).sum()
        if bias is not None:
            b = bias.double()
            square = square + b @ (self.count * b + 2 * (w @ self.sum_v - self.sum_u))
        return square.clamp_min(0)


def _curvature(direction: Tensor, matrix: Tensor, shift: float) -> Tensor:
    """⟨DA, D⟩/‖D‖² + shift; the shift alone for a zero direction."""
    square = direction.square().sum().clamp_min(torch.finfo(direction.dtype).tiny)
    return ((direction @ matrix) * direction).sum() / square + shift + torch.finfo(direction.dtype).tiny


class Shifted:
    """The penalty w ↦ r(w + shift)."""

    def __init__(self, penalty: Penalty, shift: Tensor | None) -> None:
        self.penalty, self.shift = penalty, 0.0 if shift is None else shift.double()

    def value(self, w: Tensor) -> Tensor:
        """Return r(w + shift)."""
        return self.penalty.value(w + self.shift)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return argmin_w r(w + shift) + ‖w − v‖² / (2t)."""
        return self.penalty.prox(v + self.shift, t) - self.shift


def _proximal_gradient(
    matrix: Tensor, right: Tensor, w_old: Tensor, alpha: float, penalty: Shifted, iterations: int
) -> Tensor:
    """Accelerated proximal gradient with restart on ½⟨WA, W⟩ − ⟨B, W⟩ + α/2‖W − W_old‖² + r(W); not above the start."""

    def value(w: Tensor) -> Tensor:
        return ((0.5 * w @ matrix - right) * w).sum() + alpha / 2 * (w - w_old).square().sum() + penalty.value(w)

    # These norms bound the largest eigenvalue from above: every step without momentum descends.
    step = 1 / (torch.minimum(matrix.norm(), matrix.abs().sum(1).max()) + alpha).clamp_min(1e-300)
    w, look, momentum = w_old, w_old, torch.ones((), dtype=w_old.dtype, device=w_old.device)
    for _ in range(iterations):
        new = penalty.prox(look - step * (look @ matrix - right + alpha * (look - w_old)), step)
        # Restart when the momentum points uphill (O'Donoghue, Candès 2015); values would be compared at rounding level.
        uphill = ((look - new) * (new - w)).sum() > 0
        faster = torch.where(uphill, torch.ones_like(momentum), (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        look = new + torch.where(uphill, torch.zeros_like(momentum), (momentum - 1) / faster) * (new - w)
        w, momentum = new, faster
    # Where the start was the minimiser rounding may tell otherwise. A start outside a constraint is infinite.
    return torch.where(value(w) <= value(w_old), w, w_old)


class RowSolver:
    """argmin_V γ/2 ‖V − S‖² + ρ/2 ‖T − V Wᵀ‖² for many rows with one small factorisation.

    A wide layer (m < d) is solved on its output side in the form V = S + (T − S Wᵀ) K that cancels nothing,
    K = ((γ/ρ)I + W Wᵀ)⁻¹W; others as V = (γS + ρTW)(γI + ρWᵀW)⁻¹ with the small matrix inverted in float64.

    Args:
        weight: W, m × d.
        gamma: γ > 0.
        rho: ρ > 0.
    """

    def __init__(self, weight: Tensor, gamma: float, rho: float) -> None:
        m, d = weight.shape
        w = weight.double()
        self.gamma, self.rho, self.weight, self.thin = gamma, rho, weight, m < d
        if self.thin:
            small = w @ w.T
            small.diagonal().add_(gamma / rho)
            lower = factor(small, "W Wᵀ of a layer", positive=True)
            self.matrix = torch.cholesky_solve(w, lower).to(weight.dtype)
            self.remainder = ((gamma / rho) * torch.cholesky_inverse(lower)).to(weight.dtype)
        else:
            hessian = rho * (w.T @ w)
            hessian.diagonal().add_(gamma)
            self.matrix = torch.cholesky_inverse(factor(hessian, "WᵀW of a layer", positive=True)).to(weight.dtype)

    def __call__(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for rows.

        Args:
            s: S, n × d.
            t: T, n × m.

        Returns:
            V, n × d, and ‖T − V Wᵀ‖² as a float64 scalar, found without a product over d × m × n.
        """
        if self.thin:
            difference = torch.addmm(t, s, self.weight.T, alpha=-1)
            residual = (difference @ self.remainder).square().sum().double()
            return torch.addmm(s, difference, self.matrix), residual
        right = torch.addmm(s, t, self.weight, beta=self.gamma, alpha=self.rho)
        v = right @ self.matrix
        # ρTW = right − γS and ρVWᵀW = right − γV: ‖T − VWᵀ‖² = ‖T‖² − 2⟨TW, V⟩ + ⟨VWᵀW, V⟩ needs no product.
        inner = right.sub_(torch.sub(s, v, alpha=0.5), alpha=2 * self.gamma).mul_(v).sum().double()
        return v, (t.square().sum().double() - inner / self.rho).clamp_min(0)


def power_iteration(apply: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Estimate the largest eigenvalue of a symmetric positive semi-definite operator, from below.

    Args:
        apply: The operator on tensors shaped like `start`.
        start: Where to start; the vector of the last call (a warm start makes few iterations enough).
        iterations: Applications of the operator.

    Returns:
        The Rayleigh quotient and the normalised vector to start from next time.
    """
    tiny = torch.finfo(start.dtype).tiny
    vector = start / start.norm().clamp_min(tiny)
    value = vector.new_zeros(())
    for _ in range(iterations):
        image = apply(vector)
        value = (vector * image).sum()
        # An operator that is zero now may not be later: keep the direction.
        vector = torch.where(value > 0, image / image.norm().clamp_min(tiny), vector)
    return value, vector
