"""Non-negative quadratic problems that share one Hessian, one problem per row.

    minimise over u ≥ 0:   ½ uᵀH u − gᵀu + R(A u; y)

solved by the alternating direction method of multipliers on the copies w = u ≥ 0 and r = A u: one factorisation of
H + σ(I + AᵀA) serves all rows and all iterations, each of which is one product of the rows with a d × d matrix
(Boyd, Parikh, Chu, Peleato, Eckstein, Distributed optimization and statistical learning via the alternating direction
method of multipliers, 2011, Sections 3.4.3 and 5.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bcd.linalg import factor
from lightning_bcd.prox.losses import Loss

#: Over-relaxation of the iteration; 1.5 to 1.8 is usual.
RELAXATION = 1.6


class NonnegativeQuadratic:
    """argmin over u ≥ 0 of ½ uᵀH u − gᵀu + R(A u; y) for many rows g, y.

    Args:
        hessian: H, d × d, symmetric and positive definite, float64.
        dtype: Of the rows.
        loss: R; none if None.
        output: A, outputs × d, float64, with a loss.

    Raises:
        torch.linalg.LinAlgError: If H is singular or not finite.
    """

    def __init__(
        self, hessian: Tensor, dtype: torch.dtype, *, loss: Loss | None = None, output: Tensor | None = None
    ) -> None:
        self.loss, self.hessian = loss, hessian.to(dtype)
        self.output = None if output is None else output.to(dtype)
        # σ between the extreme curvatures makes the slowest of them converge as fast as the others.
        bounds = torch.linalg.eigvalsh(hessian)[[0, -1]].clamp_min(torch.finfo(torch.float64).tiny)
        self.sigma = float(bounds.log().mean().exp())
        shifted = hessian.clone()
        shifted.diagonal().add_(self.sigma)
        if output is not None:
            shifted += self.sigma * (output.T @ output)
        self.inverse = torch.cholesky_inverse(factor(shifted, "the Hessian of hidden activations")).to(dtype)

    def __call__(self, g: Tensor, start: Tensor, y: Tensor, iterations: int) -> Tensor:
        """Solve for rows.

        Args:
            g: n × d.
            start: Where to start, n × d, non-negative.
            y: Targets of R, n × outputs; not used without a loss.
            iterations: Number of them: the error falls geometrically.

        Returns:
            u, n × d, non-negative.
        """
        w, a = start, self.output
        # The multipliers of a solution: H u − g where u = 0, and zero elsewhere.
        dual = torch.addmm(g, w, self.hessian, beta=-1).clamp_min_(0).masked_fill_(w > 0, 0).div_(-self.sigma)
        r = slack = g.new_zeros(len(g), 0 if a is None else len(a))
        if a is not None:
            r = w @ a.T
            slack = torch.zeros_like(r)
        for _ in range(iterations):
            right = torch.add(g, w - dual, alpha=self.sigma)
            if a is not None:
                right.addmm_(r - slack, a, alpha=self.sigma)
            u = right @ self.inverse
            if a is not None:
                assert self.loss is not None
                image = torch.lerp(r, u @ a.T, RELAXATION)
                r = self.loss.prox(image + slack, 1 / self.sigma, y)
                slack = slack + image - r
            u = torch.lerp(w, u, RELAXATION)
            w = (u + dual).clamp_min_(0)
            dual = dual + u - w
        return w
