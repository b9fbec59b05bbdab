"""One-dimensional searches along single coordinates of the loss, many coordinates at once.

Changing the weight W_ij of a linear layer by t moves column i of its output Z = X Wᵀ + b by t times column j of its
input X. With G and H the gradient and curvature of the loss per sample and neuron, the loss along the coordinate is

    plain layer             φ(t) = t Σ_n G_ni x_nj + t²/2 Σ_n H_ni x_nj²                       (G, H at Z)
    layer with ReLU         φ(t) = Σ_n G_ni δ_n + ½ H_ni δ_n²,  δ_n = relu(z_ni + t x_nj) − relu(z_ni)   (at relu(Z))

The second is piecewise quadratic with at most one breakpoint t = −z_ni / x_nj per sample. A bias has x = 1. H is the
diagonal of the Gauss-Newton matrix: φ is the loss itself for a squared loss and no ReLU further on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_bcd.optim.piecewise import longest, positions, whole_rows

ROUNDS = 12  # doublings or halvings of a trial step
EVALUATIONS = ROUNDS + 3


class Search(Protocol):
    """Finds the minimiser along each of some coordinates of one parameter."""

    row: int  # coordinates that are best searched together
    coordinate_bytes: int  # working memory of one coordinate, at most
    costly: bool  # whether it pays to leave out coordinates

    def steps(self, index: slice | Tensor, gradient: Tensor) -> Tensor:
        """Return t (K) for the coordinates at the flat positions `index` with partial derivatives `gradient` (K)."""


class QuadraticSearch:
    """Exact minimiser −∂L / Σ_n H_ni x_nj² of a quadratic; the gradient step where the curvature is zero.

    Args:
        x: N × d inputs of the layer, d = 1 and ones for a bias.
        curvature: N × m, H at the output of the layer.
    """

    def __init__(self, x: Tensor, curvature: Tensor) -> None:
        self._squares, self._curvature = x.square(), curvature
        self._table: Tensor | None = None
        self.row, self.coordinate_bytes, self.costly = x.shape[1], 8 * x.element_size(), False

    def steps(self, index: slice | Tensor, gradient: Tensor) -> Tensor:
        """Return t, see `Search`."""
        rows = whole_rows(index, self.row)
        if rows is not None:
            curvature = (self._curvature[:, rows].T @ self._squares).reshape(-1)
        else:
            if self._table is None:
                self._table = (self._curvature.T @ self._squares).reshape(-1)
            curvature = self._table[index]
        bound = longest(curvature)
        return (-gradient / torch.where(curvature > 0, curvature, 1)).clamp_(-bound, bound)


class TrialSearch:
    """The search of the paper: trial steps from ±`width` on, doubled or halved while the loss falls.

    The vertex of the parabola through the loss and slope at 0 and the loss at the best trial is tried last. Trials of
    many coordinates are one evaluation of the closure under `torch.func.vmap`; a closure that vmap cannot take (it
    branches on the loss, say) is evaluated trial by trial.

    Args:
        parameter: The parameter searched.
        evaluate: Evaluates the closure under a torch function mode that may change what torch computes.
        value: The loss at the point.
        width: First trial step, above 0.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        evaluate: Callable[[IgnoreBackward], Tensor],
        value: float,
        width: float,
    ) -> None:
        self._parameter, self._evaluate, self._value, self._width = parameter, evaluate, value, width
        self._together = True
        self.row, self.coordinate_bytes, self.costly = 1, 4 * parameter.numel() * parameter.element_size(), True

    def steps(self, index: slice | Tensor, gradient: Tensor) -> Tensor:
        """Return t, see `Search`; 0 where no trial lowers the loss."""
        index = positions(index, gradient)
        t = torch.full_like(gradient, self._width)
        best, other = self._losses(index, t), self._losses(index, -t)
        t = torch.where(other < best, -t, t)
        best = torch.minimum(other, best)
        factor = torch.where(best < self._value, 2.0, 0.5).to(t.dtype)
        falling = torch.ones_like(t, dtype=torch.bool)
        last = t
        for _ in range(ROUNDS):
            # Halving goes on over the other sign, too: the slope at 0 says which one is right for small steps.
            last = torch.where((factor < 1) & (gradient != 0), -gradient.sign() * last.abs(), last) * factor
            loss = self._losses(index, last)
            better = falling & (loss < best)
            falling &= better | (best >= self._value)
            t, best = torch.where(better, last, t), torch.where(better, loss, best)
            if not bool(falling.any()):
                break
        rise = best - self._value - gradient * t
        vertex = torch.where(rise > 0, -gradient * t.square() / (2 * rise), t).to(t)
        loss = self._losses(index, vertex)
        t, best = torch.where(loss < best, vertex, t), torch.minimum(loss, best)
        return torch.where(best < self._value, t, 0)

    def _losses(self, index: Tensor, steps: Tensor) -> Tensor:
        def evaluate(index: Tensor, step: Tensor) -> Tensor:
            return self._evaluate(_Substitution(self._parameter, index, step))

        if self._together:
            try:
                losses: Tensor = torch.func.vmap(evaluate, randomness="same")(index, steps)
                return losses
            except RuntimeError:
                self._together = False  # if the closure is at fault, it raises again below
        return torch.stack([evaluate(*pair) for pair in zip(index, steps, strict=True)]).to(steps)


class IgnoreBackward(TorchFunctionMode):
    """Lets a closure that calls `loss.backward()` be evaluated for its loss alone.

    Args:
        instead: Called in place of every backward pass.
    """

    def __init__(self, instead: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` unless it is `Tensor.backward`."""
        return self.instead() if func is Tensor.backward else self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run any other function."""
        return func(*args, **kwargs)


_tensor: Any = Tensor
_GRADIENT_ACCESS = (_tensor.grad.__get__, _tensor.grad.__set__, _tensor.requires_grad.__get__)


class _Substitution(IgnoreBackward):
    """Shows torch functions the parameter with one entry moved; a linear layer by a rank-1 update of its output."""

    def __init__(self, parameter: nn.Parameter, index: Tensor, step: Tensor) -> None:
        super().__init__()
        self._parameter, self._index, self._step = parameter, index, step

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func is F.linear and len(args) > 1 and args[1] is self._parameter:
            output: Tensor = func(*args, **kwargs)
            row, column = self._index // args[0].shape[-1], self._index % args[0].shape[-1]
            place = torch.arange(output.shape[-1], device=output.device) == row
            return output + self._step * args[0].index_select(-1, column.reshape(1)) * place
        if func in _GRADIENT_ACCESS:
            return func(*args, **kwargs)
        return func(*(self._swap(each) for each in args), **{name: self._swap(each) for name, each in kwargs.items()})

    def _swap(self, each: Any) -> Any:
        if type(each) in (list, tuple):
            return type(each)(map(self._swap, each))
        if each is not self._parameter:
            return each
        position = torch.arange(self._parameter.numel(), device=self._parameter.device) == self._index
        return self._parameter + (self._step * position).reshape(self._parameter.shape)
