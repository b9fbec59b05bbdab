"""Penalties and constraints h on weights and auxiliary variables, and their proximal operators.

    prox(v, t) = argmin_w  h(w) + ‖w − v‖² / (2 t)

For a constraint h is 0 inside the set and infinite outside, and the operator is the projection, whatever t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Penalty(ABC):
    """A penalty h(w) with a closed proximal operator.

    Attributes:
        convex: Whether h is convex; with another h descent holds, uniqueness does not.
    """

    convex: ClassVar[bool] = True

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """Return h(w) as a float64 scalar; for a constraint 0, or infinity where w violates it by more than rounding.

        Args:
            w: Any shape, unless the class says otherwise.
        """

    @abstractmethod
    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return argmin_w h(w) + ‖w − v‖² / (2 t), shaped like v; it may be v itself.

        Args:
            v: The point to stay close to.
            t: Step size, above 0; a tensor is broadcast over v (or over its groups).
        """


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """h(w) = 0."""

    def value(self, w: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros((), dtype=torch.float64, device=w.device)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return v itself."""
        return v


@dataclass(frozen=True)
class L1(Penalty):
    """h(w) = weight ‖w‖₁.

    Args:
        weight: At least 0.

    Raises:
        ValueError: If the weight is negative or not finite.
    """

    weight: float

    def __post_init__(self) -> None:
        _check_weight("weight", self.weight)

    def value(self, w: Tensor) -> Tensor:
        """Return weight ‖w‖₁."""
        return self.weight * w.abs().sum(dtype=torch.float64)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return v moved towards 0 by t · weight, at most to 0."""
        return _shrink(v, t * self.weight)


@dataclass(frozen=True)
class Ridge(Penalty):
    """h(w) = weight/2 ‖w‖².

    Args:
        weight: At least 0.

    Raises:
        ValueError: If the weight is negative or not finite.
    """

    weight: float

    def __post_init__(self) -> None:
        _check_weight("weight", self.weight)

    def value(self, w: Tensor) -> Tensor:
        """Return weight/2 Σ w²."""
        return self.weight / 2 * w.square().sum(dtype=torch.float64)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return v / (1 + t · weight)."""
        return v / (1 + t * self.weight)


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """h(w) = l1 ‖w‖₁ + l2/2 ‖w‖².

    Args:
        l1: Weight of the norm, at least 0.
        l2: Weight of half the squared norm, at least 0.

    Raises:
        ValueError: If a weight is negative or not finite.
    """

    l1: float
    l2: float

    def __post_init__(self) -> None:
        _check_weight("l1", self.l1)
        _check_weight("l2", self.l2)

    def value(self, w: Tensor) -> Tensor:
        """Return l1 ‖w‖₁ + l2/2 ‖w‖²."""
        return L1(self.l1).value(w) + Ridge(self.l2).value(w)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return v moved towards 0 by t · l1, then divided by 1 + t · l2."""
        return _shrink(v, t * self.l1) / (1 + t * self.l2)


@dataclass(frozen=True)
class NonNegative(Penalty):
    """The constraint w ≥ 0."""

    def value(self, w: Tensor) -> Tensor:
        """Return 0 if w ≥ 0, infinity otherwise."""
        return _indicator(w < -_slack(w, 1.0))

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return max(v, 0)."""
        return v.clamp(min=0)


@dataclass(frozen=True)
class Box(Penalty):
    """The constraint low ≤ w ≤ high.

    Args:
        low: Lower bound, may be −infinity.
        high: Upper bound, above `low`, may be infinity.

    Raises:
        ValueError: If `low` is not below `high`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_interval(self.low, self.high)

    def value(self, w: Tensor) -> Tensor:
        """Return 0 if low ≤ w ≤ high, infinity otherwise."""
        slack = _slack(w, *(abs(bound) for bound in (self.low, self.high) if math.isfinite(bound)))
        return _indicator((w < self.low - slack) | (w > self.high + slack))

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return v clipped to [low, high]."""
        return v.clamp(self.low, self.high)


@dataclass(frozen=True)
class Ball(Penalty):
    """The constraint ‖w‖ ≤ radius, in the Euclidean (Frobenius) norm of the whole tensor.

    Args:
        radius: Above 0.

    Raises:
        ValueError: If the radius is not positive and finite.
    """

    radius: float

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(
                f"Expected argument `radius` to be positive and finite, but got {self.radius}. Choose another value."
            )

    def value(self, w: Tensor) -> Tensor:
        """Return 0 if ‖w‖ is at most the radius, infinity otherwise."""
        return _indicator(w.norm() > self._limit(w))

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return v, shortened to the radius where it is longer."""
        norm = v.norm()
        return torch.where(norm > self._limit(v), v * (self.radius / norm), v)

    def _limit(self, w: Tensor) -> float:
        return self.radius * (1 + 8 * torch.finfo(w.dtype).eps)


@dataclass(frozen=True)
class GroupLasso(Penalty):
    """h(w) = weight Σ_g ‖w_g‖₂ over the rows or the columns of w; whole groups become 0.

    A tensor with more than two dimensions (a convolution) is grouped along its first (`dim=1`) or second (`dim=0`)
    dimension: output or input channels.

    Args:
        weight: At least 0.
        dim: The dimension the norms run along: 1 makes every row a group, 0 every column.

    Raises:
        ValueError: If the weight is negative or not finite, `dim` is not 0 or 1, or w has less than two dimensions.
    """

    weight: float
    dim: int = 1

    def __post_init__(self) -> None:
        _check_weight("weight", self.weight)
        if self.dim not in (0, 1):
            raise ValueError(
                f"Expected argument `dim` to be 1 (a group per row) or 0 (per column), but got {self.dim!r}. Use 1."
            )

    def value(self, w: Tensor) -> Tensor:
        """Return weight times the sum of the norms of the groups."""
        return self.weight * _norms(w, 1 - self.dim).sum(dtype=torch.float64)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return every group moved towards 0 by t · weight in norm, at most to 0."""
        norms = _norms(v, 1 - self.dim).clamp(min=torch.finfo(v.dtype).tiny)
        return v * (1 - t * self.weight / norms).clamp(min=0)


@dataclass(frozen=True)
class RowSparse(Penalty):
    """The constraint that at most `rows` rows of w differ from 0.

    Args:
        rows: At least 1.

    Raises:
        ValueError: If `rows` is below 1, or w has less than two dimensions.
    """

    convex: ClassVar[bool] = False
    rows: int

    def __post_init__(self) -> None:
        _check_count("rows", self.rows, 1)

    def value(self, w: Tensor) -> Tensor:
        """Return 0 if at most `rows` rows differ from 0, infinity otherwise."""
        return _indicator((_norms(w, 0) > 0).sum() > self.rows)

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return v with all but its `rows` rows of largest norm set to 0."""
        norms = _norms(v, 0)
        kept = norms.topk(min(self.rows, v.shape[0]), dim=0).indices
        return torch.where(torch.zeros_like(norms, dtype=torch.bool).scatter_(0, kept, True), v, 0.0)


@dataclass(frozen=True)
class UniformGrid(Penalty):
    """The constraint that every entry is one of `levels` equally spaced values from low to high (quantisation).

    Args:
        low: Smallest value.
        high: Largest value, above `low`.
        levels: Number of values, at least 2.

    Raises:
        ValueError: If `low` is not below `high`, a bound is not finite, or there are less than 2 levels.
    """

    convex: ClassVar[bool] = False
    low: float
    high: float
    levels: int

    def __post_init__(self) -> None:
        _check_interval(self.low, self.high)
        if not math.isfinite(self.high - self.low):
            raise ValueError(
                f"Expected arguments `low` and `high` to be finite, but got {self.low} and {self.high}. Bound the grid."
            )
        _check_count("levels", self.levels, 2)

    @property
    def spacing(self) -> float:
        """The distance of neighbouring values."""
        return (self.high - self.low) / (self.levels - 1)

    def value(self, w: Tensor) -> Tensor:
        """Return 0 if every entry lies on the grid, infinity otherwise."""
        return _indicator((w - self.prox(w, 1.0)).abs() > _slack(w, abs(self.low), abs(self.high)))

    def prox(self, v: Tensor, t: float | Tensor) -> Tensor:
        """Return the nearest grid value."""
        return ((v - self.low) / self.spacing).round_().clamp_(0, self.levels - 1).mul_(self.spacing).add_(self.low)


def _shrink(v: Tensor, by: float | Tensor) -> Tensor:
    return torch.sign(v) * (v.abs() - by).clamp_(min=0)


def _norms(w: Tensor, kept: int) -> Tensor:
    """Euclidean norms over all dimensions but `kept`, with those dimensions left at size 1."""
    if w.ndim < 2:
        raise ValueError(
            f"Expected argument `w` to have rows and columns, but got shape {tuple(w.shape)}. Leave biases out."
        )
    norms: Tensor = torch.linalg.vector_norm(w, dim=[d for d in range(w.ndim) if d != kept], keepdim=True)
    return norms


def _indicator(violated: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=violated.device)
    return zero.masked_fill(violated.any(), math.inf)


def _slack(w: Tensor, *magnitudes: float) -> float:
    """What rounding can add to numbers of this magnitude."""
    return 8 * torch.finfo(w.dtype).eps * max(magnitudes, default=1.0)


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(
            f"Expected argument `{name}` to be finite and at least 0, but got {weight}. Use 0 for no penalty."
        )


def _check_interval(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"Expected argument `low` to be below `high`, but got {low} and {high}. Swap or widen them.")


def _check_count(name: str, count: int, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ValueError(
            f"Expected argument `{name}` to be an integer of at least {least}, but got {count!r}. Change the value."
        )
