"""Activations σ and the scalar sub-problem of lifted training, solved globally and element by element.

    solve(a, c, g) = argmin_u  (a − σ(u))² + g (u − c)²,     g > 0

In the letters of the papers a is the auxiliary variable V, c the pre-activation P and g = ρ/γ; the problem is not
convex. Piecewise linear activations compare one closed-form candidate per piece (Zeng, Lau, Lin, Yao, ICML 2019).
Smooth ones bracket the minimisers on a fixed grid and refine them by safeguarded Newton steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, repeat
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(ABC):
    """An elementwise activation σ; calling it returns σ(u), bit for bit what the torch module computes.

    Attributes:
        differentiable: Whether σ has a useful derivative (a kink is no obstacle).
        monotone: Whether σ never falls.
    """

    differentiable: ClassVar[bool] = True
    monotone: ClassVar[bool] = True

    @abstractmethod
    def _value(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor: ...

    def __call__(self, u: Tensor) -> Tensor:
        """Return σ(u), elementwise."""
        return self._value(u)

    def derivative(self, u: Tensor) -> Tensor:
        """Return σ′(u), elementwise; at a kink the value autograd uses."""
        return self._slope(u)

    def solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None = None) -> Tensor:
        """Return a global minimiser of (a − σ(u))² + g (u − c)², elementwise.

        Args:
            a: The value σ(u) should take, any shape.
            c: The value u should stay close to, shaped like a.
            g: Weight of the second term relative to the first, above 0; a tensor is broadcast over a.
            old: The value before the update, shaped like a. The result is never worse than it. Where the minimiser
                has a closed form it is not read.
        """
        # On a CPU the temporaries of a chunk stay in the cache; elsewhere chunks only bound the memory.
        chunk = 2**15 * torch.get_num_threads() if a.device.type == "cpu" else 2**24
        if a.numel() <= chunk:
            return self._solve(a, c, g, old)
        result = torch.empty_like(a, memory_format=torch.contiguous_format)
        columns: list[Iterable[Any]] = [
            x.expand_as(a).reshape(-1).split(chunk) if isinstance(x, Tensor) else repeat(x) for x in (a, c, g, old)
        ]
        for part, *arguments in zip(result.view(-1).split(chunk), *columns, strict=False):
            part.copy_(self._solve(*arguments))
        return result

    def _best(self, a: Tensor, c: Tensor, g: float | Tensor, candidates: Sequence[Tensor]) -> Tensor:
        """Return the candidate of lowest value, elementwise, the first in a tie.

        Differences of values are computed in factored form: next to large squares plain values would hide them.
        """
        best, value = candidates[0], self(candidates[0])
        for u in candidates[1:]:
            other = self(u)
            rise = (value - other).mul_((a - other).add_(a - value))
            rise += (u - best).mul_((u - c).add_(best - c)).mul_(g)
            better = rise < 0
            best, value = torch.where(better, u, best), torch.where(better, other, value)
        return best


class Piece(NamedTuple):
    """σ(u) = slope · u + offset for low ≤ u ≤ high."""

    low: float
    high: float
    slope: float
    offset: float = 0.0

    def argmin(self, a: Tensor, c: Tensor, g: float | Tensor) -> Tensor:
        """Return the minimiser of (a − σ(u))² + g (u − c)² on the piece."""
        if self.slope == 0:
            return c.clamp(self.low, self.high)  # c itself: the formula would round it
        return (((a - self.offset) * self.slope + g * c) / (self.slope**2 + g)).clamp_(self.low, self.high)


class PiecewiseLinear(Activation):
    """A continuous activation made of linear pieces."""

    @property
    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces from right to left, the order that settles ties."""

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        return self._best(a, c, g, [piece.argmin(a, c, g) for piece in self.pieces])


@dataclass(frozen=True)
class Identity(PiecewiseLinear):
    """σ(u) = u."""

    pieces = (Piece(-math.inf, math.inf, 1.0),)
    _value = staticmethod(torch.positive)
    _slope = staticmethod(torch.ones_like)


@dataclass(frozen=True)
class ReLU(PiecewiseLinear):
    """σ(u) = max(u, 0)."""

    pieces = (Piece(0.0, math.inf, 1.0), Piece(-math.inf, 0.0, 0.0))
    _value = staticmethod(F.relu)

    def _slope(self, u: Tensor) -> Tensor:
        return (u > 0).to(u.dtype)

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        """Return max(x, 0) where c ≥ min(κ a, 0), else c, with x = (a + g c)/(1 + g) and κ = 1 − √((1 + g)/g).

        The two pieces are compared without their values: for c < 0 the value g/(1 + g) (a − c)² of x is at most the
        value a² of c exactly when c ≥ κ a, and x > 0 then. Ties go to x.
        """
        kappa = -1 / (g + (g * (1 + g)) ** 0.5)  # 1 − √(1 + 1/g) would cancel for large g
        threshold = (kappa * a).clamp_(max=0)
        return torch.where(c >= threshold, torch.lerp(c, a, 1 / (1 + g)).relu_(), c)


@dataclass(frozen=True)
class LeakyReLU(PiecewiseLinear):
    """σ(u) = u for u > 0, else negative_slope · u.

    Args:
        negative_slope: At least 0.

    Raises:
        ValueError: If the slope is negative or not finite.
    """

    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        _check("negative_slope", 0 <= self.negative_slope < math.inf, "finite and at least 0", self.negative_slope)

    def _value(self, u: Tensor) -> Tensor:
        return F.leaky_relu(u, self.negative_slope)

    def _slope(self, u: Tensor) -> Tensor:
        return torch.ones_like(u).masked_fill_(u <= 0, self.negative_slope)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces u and negative_slope · u."""
        return Piece(0.0, math.inf, 1.0), Piece(-math.inf, 0.0, self.negative_slope)


@dataclass(frozen=True)
class HardTanh(PiecewiseLinear):
    """σ(u) = min(max(u, min_val), max_val).

    Args:
        min_val: Smallest value.
        max_val: Largest value, above `min_val`.

    Raises:
        ValueError: If `max_val` is not above `min_val`, or one is not finite.
    """

    min_val: float = -1.0
    max_val: float = 1.0

    def __post_init__(self) -> None:
        _check("min_val", math.isfinite(self.min_val), "finite", self.min_val)
        _check("max_val", self.min_val < self.max_val < math.inf, f"finite and above {self.min_val}", self.max_val)

    def _value(self, u: Tensor) -> Tensor:
        return F.hardtanh(u, self.min_val, self.max_val)

    def _slope(self, u: Tensor) -> Tensor:
        return ((u > self.min_val) & (u < self.max_val)).to(u.dtype)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces max_val, u and min_val."""
        low, high = self.min_val, self.max_val
        return Piece(high, math.inf, 0.0, high), Piece(low, high, 1.0), Piece(-math.inf, low, 0.0, low)


@dataclass(frozen=True)
class ClippedReLU(HardTanh):
    """σ(u) = min(max(u, 0), max_val): ReLU6 by default; `max_val` is positive and finite."""

    min_val: float = field(default=0.0, init=False)
    max_val: float = 6.0


@dataclass(frozen=True)
class Abs(PiecewiseLinear):
    """σ(u) = |u|."""

    monotone = False
    pieces = (Piece(0.0, math.inf, 1.0), Piece(-math.inf, 0.0, -1.0))
    _value = staticmethod(torch.abs)
    _slope = staticmethod(torch.sign)


@dataclass(frozen=True)
class Sign(Activation):
    """σ(u) = 1 for u ≥ 0, −1 for u < 0: binary networks, out of reach of gradient methods.

    On the open piece u < 0 a minimum need not be attained, so the solver looks at u ≤ −1e-6 there. The value before
    the update is a candidate, and stays when none is better.
    """

    differentiable = False
    margin: ClassVar[float] = 1e-6
    _slope = staticmethod(torch.zeros_like)

    def _value(self, u: Tensor) -> Tensor:
        return (u >= 0).to(u.dtype).mul_(2).sub_(1)

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        candidates = [c.clamp(min=0), c.clamp(max=-self.margin)]
        return self._best(a, c, g, candidates if old is None else [old, *candidates])


class SmoothActivation(Activation):
    """An activation with two derivatives, constant on the left of a grid, constant or u itself on the right of it.

    The halved slope of the objective, f′(u) = g (u − c) − σ′(u)(a − σ(u)), is cheap on a fixed grid, where σ and σ′ are
    known numbers. Its sign changes bracket the minimisers. Between two turning points of σ there are at most two of
    them, so the first and the last bracket miss none. Outside the grid the minimiser is c or has a closed form.
    """

    iterations: ClassVar[int] = 12
    linear_tail: ClassVar[bool] = True  # σ(u) = u on the right of the grid, else constant
    turns: ClassVar[tuple[int, ...]] = ()  # grid positions of the turning points of σ

    @property
    @abstractmethod
    def grid(self) -> tuple[float, ...]:
        """At most 52 increasing points; outside of them the bends of σ are below rounding."""

    @abstractmethod
    def _jet(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return σ, σ′ and σ″, the last two without cancellation in the tails."""

    def _slope(self, u: Tensor) -> Tensor:
        return self._jet(u)[1]

    @cached_property
    def _table(self) -> list[tuple[float, float, float]]:
        sigma, slope, _ = self._jet(torch.tensor(self.grid, dtype=torch.float64, device="cpu"))
        return list(zip(self.grid, sigma.tolist(), slope.tolist(), strict=True))

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        candidates = [c] if old is None else [old, c]
        if self.linear_tail:
            # The end itself belongs to the curved part, where σ may differ (softplus jumps).
            beyond = self.grid[-1] * (1 + 2 * torch.finfo(a.dtype).eps)
            candidates.append(Piece(beyond, math.inf, 1.0).argmin(a, c, g))
        candidates += [self._newton(a, c, g, *bracket) for bracket in self._brackets(a, c, g)]
        return self._best(a, c, g, candidates)

    def _brackets(self, a: Tensor, c: Tensor, g: float | Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (low, high, start) of the first and the last bracket between neighbouring turning points."""
        inverse = 1 / g
        pull = a * inverse
        falls = torch.zeros(a.shape, dtype=torch.int64, device=a.device)  # bit k: f′ < 0 at point k of the grid
        for k, (point, sigma, slope) in enumerate(self._table):
            falls.add_(torch.add(c, pull, alpha=slope) > point + slope * sigma * inverse, alpha=1 << k)
        minima = falls & ~(falls >> 1)
        points = torch.tensor(self.grid, dtype=a.dtype, device=a.device)
        end, brackets = len(points) - 1, []
        for begin, stop in pairwise((0, *self.turns, end + 1)):
            inside = minima & ((1 << stop) - (1 << begin))
            # Two roots can hide in the neighbouring cell, where both ends have the same sign: add that cell.
            first, last = _highest_bit(inside & -inside), _highest_bit(inside)
            low = points[(first - (falls << 1 >> first & 1)).clamp_(min=0)]
            brackets.append((low, points[(first + 1).clamp_(max=end)], low))
            high = points[(last + 2 - (falls >> last + 2 & 1)).clamp_(max=end)]
            brackets.append((points[last], high, high))
        return brackets

    def _newton(self, a: Tensor, c: Tensor, g: float | Tensor, low: Tensor, high: Tensor, start: Tensor) -> Tensor:
        """Return a root of f′ in [low, high], f′(low) < 0 ≤ f′(high); steps that leave the bracket halve it instead."""
        u = start
        for _ in range(self.iterations):
            sigma, slope, curvature = self._jet(u)
            gap = a - sigma
            first = (u - c).mul_(g).sub_(slope * gap)
            second = slope.square().sub_(curvature * gap).add_(g)
            falling = first < 0
            low, high = torch.where(falling, u, low), torch.where(falling, high, u)
            u = u - first / second
            u = torch.where((u > low) & (u < high), u, torch.lerp(low, high, 0.5))
        return u


# Fine where exp(−|u|) bends σ, coarse up to where it vanishes next to 1 even times a million.
_GRID = (*(-40.0 + 3 * k for k in range(10)), *(0.75 * k for k in range(-13, 14)), *(13.0 + 3 * k for k in range(10)))


@dataclass(frozen=True)
class Sigmoid(SmoothActivation):
    """σ(u) = 1 / (1 + exp(−u))."""

    linear_tail = False
    grid = _GRID
    _value = staticmethod(torch.sigmoid)

    def _jet(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _logistic(u)


@dataclass(frozen=True)
class Tanh(SmoothActivation):
    """σ(u) = tanh(u)."""

    linear_tail = False
    grid = tuple(u / 2 for u in _GRID)
    _value = staticmethod(torch.tanh)

    def _jet(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, slope, curvature = _logistic(2 * u)
        return self(u), slope.mul_(4), curvature.mul_(8)


@dataclass(frozen=True)
class Softplus(SmoothActivation):
    """σ(u) = log(1 + exp(β u)) / β, and u where β u > threshold, like `torch.nn.Softplus`.

    Args:
        beta: Sharpness β, above 0.
        threshold: Above 0. σ falls by log(1 + exp(−threshold)) / β there.

    Raises:
        ValueError: If an argument is not positive and finite.
    """

    beta: float = 1.0
    threshold: float = 20.0

    def __post_init__(self) -> None:
        _check("beta", 0 < self.beta < math.inf, "positive and finite", self.beta)
        _check("threshold", 0 < self.threshold < math.inf, "positive and finite", self.threshold)

    @property
    def grid(self) -> tuple[float, ...]:
        """From −40/β to the threshold."""
        end = min(self.threshold, _GRID[-1])
        return tuple(u / self.beta for u in (*(u for u in _GRID if u < end), end))

    def _value(self, u: Tensor) -> Tensor:
        return F.softplus(u, self.beta, self.threshold)

    def _jet(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope, curvature, _ = _logistic(self.beta * u)
        linear = self.beta * u > self.threshold
        return self(u), slope.masked_fill_(linear, 1.0), curvature.mul_(self.beta).masked_fill_(linear, 0.0)


class _Gated(SmoothActivation):
    """σ(u) = u p(u), p a distribution function: σ falls to its only turning point, then rises."""

    monotone = False

    @abstractmethod
    def _gate(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, p′ and p″."""

    def _jet(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, slope, curvature = self._gate(u)
        return self(u), torch.addcmul(gate, u, slope), torch.addcmul(2 * slope, u, curvature)


@dataclass(frozen=True)
class SiLU(_Gated):
    """σ(u) = u / (1 + exp(−u))."""

    grid = tuple(sorted((*_GRID, -1.2784645427610738)))
    turns = (22,)
    _value = staticmethod(F.silu)

    def _gate(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _logistic(u)


@dataclass(frozen=True)
class GELU(_Gated):
    """σ(u) = u Φ(u), Φ the standard normal distribution function.

    Args:
        approximate: `"none"`, or `"tanh"` for Φ(u) ≈ ½ (1 + tanh(√(2/π) (u + 0.044715 u³))), like `torch.nn.GELU`.

    Raises:
        ValueError: If `approximate` is neither.
    """

    approximate: Literal["none", "tanh"] = "none"
    grid = tuple(0.345 * k - 0.7517915246935645 for k in range(-24, 28))
    turns = (24,)

    def __post_init__(self) -> None:
        _check("approximate", self.approximate in ("none", "tanh"), "'none' or 'tanh'", self.approximate)

    def _value(self, u: Tensor) -> Tensor:
        return F.gelu(u, approximate=self.approximate)

    def _gate(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.approximate == "none":
            density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
            return 0.5 * torch.erfc(u * -math.sqrt(0.5)), density, -u * density
        k, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
        p, slope, curvature = _logistic(k * (u + cubic * u**3))
        inner = k * (1 + 3 * cubic * u * u)
        return p, slope * inner, curvature * inner.square() + slope * (6 * k * cubic * u)


def _logistic(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s = 1/(1 + exp(−u)), s′ and s″; 1 − s would cancel where s is close to 1."""
    s, rest = torch.sigmoid(u), torch.sigmoid(-u)
    slope = s * rest
    return s, slope, slope * (rest - s)


def _highest_bit(bits: Tensor) -> Tensor:
    """Return the position of the highest bit of integers below 2⁵³, 0 if there is none."""
    return torch.frexp(bits.double()).exponent.long().sub_(1).clamp_(min=0)


def _check(name: str, valid: bool, wanted: str, got: object) -> None:
    if not valid:
        raise ValueError(f"Expected argument `{name}` to be {wanted}, but got {got!r}. Change the value.")
