"""Activations σ and the scalar sub-problem of lifted training, solved globally and element by element.

    solve(a, c, g) = argmin_u  (a − σ(u))² + g (u − c)²,     g > 0

In the letters of the papers a is the auxiliary variable V, c the pre-activation P and g = ρ/γ; the problem is not
convex. Piecewise linear activations compare one closed-form candidate per piece (Zeng, Lau, Lin, Yao, ICML 2019).
Smooth ones bracket the minimisers on a fixed grid and refine them by safeguarded Newton steps. Choices are made by
`torch.lerp` with weights 0 and 1: exact, and on a CPU many times faster than `torch.where`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Piece: TypeAlias = tuple[float, float, float, float]  # (low, high, slope, offset): σ(u) = slope · u + offset there

# Fine where exp(−|u|) bends σ, coarse up to where it vanishes next to 1 even times a million.
_GRID = (*(5 * k - 9.5 for k in range(-6, 0)), *(k / 2 for k in range(-19, 20)), *(5 * k + 9.5 for k in range(1, 7)))


@dataclass(frozen=True)
class Activation(ABC):
    """An elementwise activation σ. Constructors raise a ValueError for hyperparameters outside of their range."""

    differentiable: ClassVar[bool] = True  # σ has a useful derivative; a kink is no obstacle
    monotone: ClassVar[bool] = True  # σ never falls

    @abstractmethod
    def _value(self, u: Tensor, /) -> Tensor: ...

    @abstractmethod
    def _slope(self, u: Tensor, /) -> Tensor: ...

    @abstractmethod
    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor: ...

    def __call__(self, u: Tensor) -> Tensor:
        """Return σ(u), elementwise, bit for bit what the torch module computes."""
        return self._value(u)

    def derivative(self, u: Tensor) -> Tensor:
        """Return σ′(u), elementwise; at a kink the value autograd uses."""
        return self._slope(u)

    def solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None = None) -> Tensor:
        """Return a global minimiser of (a − σ(u))² + g (u − c)², elementwise.

        Args:
            a: The value σ(u) should take, any shape.
            c: The value u should stay close to, broadcast over a like g and old.
            g: Weight of the second term relative to the first, above 0.
            old: The value before the update. The result is never worse than it. Where the minimiser has a closed form
                it is not read.
        """
        # On a CPU the temporaries of a chunk stay in the cache; elsewhere chunks only bound the memory.
        chunk = 2**15 * torch.get_num_threads() if a.device.type == "cpu" else 2**24
        result = torch.empty_like(a, memory_format=torch.contiguous_format)
        columns: list[Iterable[Any]] = [
            torch.split(x.expand_as(a).reshape(-1), chunk) if isinstance(x, Tensor) else repeat(x)
            for x in (result, a, c, g, old)
        ]
        for part, *arguments in zip(*columns, strict=False):
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
            better = rise.lt_(0)
            best, value = torch.lerp(best, u, better), torch.lerp(value, other, better)
        return best


class PiecewiseLinear(Activation):
    """A continuous activation made of linear pieces."""

    @abstractmethod
    def _pieces(self) -> tuple[Piece, ...]:
        """Return the pieces from right to left, the order that settles ties."""

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        return self._best(a, c, g, [_solve_piece(a, c, g, *piece) for piece in self._pieces()])


class Identity(PiecewiseLinear):
    """σ(u) = u."""

    _value = staticmethod(torch.positive)
    _slope = staticmethod(torch.ones_like)

    def _pieces(self) -> tuple[Piece, ...]:
        return ((-math.inf, math.inf, 1.0, 0.0),)


class ReLU(PiecewiseLinear):
    """σ(u) = max(u, 0)."""

    _value = staticmethod(torch.relu)

    def _slope(self, u: Tensor, /) -> Tensor:
        return (u > 0).to(u.dtype)

    def _pieces(self) -> tuple[Piece, ...]:
        return (0.0, math.inf, 1.0, 0.0), (-math.inf, 0.0, 0.0, 0.0)

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        """Return max(x, 0) where c ≥ min(κ a, 0), else c, with x = (a + g c)/(1 + g) and κ = 1 − √((1 + g)/g).

        The two pieces are compared without their values: for c < 0 the value g/(1 + g) (a − c)² of x is at most the
        value a² of c exactly when c ≥ κ a, and x > 0 then. Ties go to x.
        """
        kappa = -1 / (g + (g * (1 + g)) ** 0.5)  # 1 − √(1 + 1/g) would cancel for large g
        x = torch.lerp(c, a, 1 / (1 + g)).relu_()
        return torch.lerp(c, x, (kappa * a).clamp_(max=0).le_(c))


@dataclass(frozen=True)
class LeakyReLU(PiecewiseLinear):
    """σ(u) = u for u > 0, else negative_slope · u; the slope is at least 0."""

    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        _check("negative_slope", 0 <= self.negative_slope < math.inf, "finite and at least 0", self.negative_slope)

    def _value(self, u: Tensor, /) -> Tensor:
        return F.leaky_relu(u, self.negative_slope)

    def _slope(self, u: Tensor, /) -> Tensor:
        return torch.ones_like(u).masked_fill_(u <= 0, self.negative_slope)

    def _pieces(self) -> tuple[Piece, ...]:
        return (0.0, math.inf, 1.0, 0.0), (-math.inf, 0.0, self.negative_slope, 0.0)


@dataclass(frozen=True)
class HardTanh(PiecewiseLinear):
    """σ(u) = min(max(u, min_val), max_val); both are finite and `min_val` is the smaller one."""

    min_val: float = -1.0
    max_val: float = 1.0

    def __post_init__(self) -> None:
        _check("min_val", math.isfinite(self.min_val), "finite", self.min_val)
        _check("max_val", self.min_val < self.max_val < math.inf, f"finite and above {self.min_val}", self.max_val)

    def _value(self, u: Tensor, /) -> Tensor:
        return F.hardtanh(u, self.min_val, self.max_val)

    def _slope(self, u: Tensor, /) -> Tensor:
        return ((u > self.min_val) & (u < self.max_val)).to(u.dtype)

    def _pieces(self) -> tuple[Piece, ...]:
        low, high = self.min_val, self.max_val
        return (high, math.inf, 0.0, high), (low, high, 1.0, 0.0), (-math.inf, low, 0.0, low)


@dataclass(frozen=True)
class ClippedReLU(HardTanh):
    """σ(u) = min(max(u, 0), max_val), ReLU6 by default; `max_val` is finite and above 0."""

    min_val: float = field(default=0.0, init=False)
    max_val: float = 6.0


class Abs(PiecewiseLinear):
    """The absolute value of u."""

    monotone = False
    _value = staticmethod(torch.abs)
    _slope = staticmethod(torch.sign)

    def _pieces(self) -> tuple[Piece, ...]:
        return (0.0, math.inf, 1.0, 0.0), (-math.inf, 0.0, -1.0, 0.0)


class Sign(Activation):
    """σ(u) = 1 for u ≥ 0, −1 for u < 0: binary networks, out of reach of gradient methods.

    On the open piece u < 0 a minimum need not be attained, so the solver looks at u ≤ −1e-6 there. The value before
    the update is a candidate, and stays when none is better.
    """

    differentiable = False
    margin: ClassVar[float] = 1e-6
    _slope = staticmethod(torch.zeros_like)

    def _value(self, u: Tensor, /) -> Tensor:
        return u.clone().ge_(0).mul_(2).sub_(1)

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        candidates = [c.clamp(min=0), c.clamp(max=-self.margin)]
        return self._best(a, c, g, candidates if old is None else [old, *candidates])


class SmoothActivation(Activation):
    """An activation with two derivatives, constant on the left of a grid, constant or u itself on the right of it.

    The halved slope of the objective, f′(u) = g (u − c) − σ′(u)(a − σ(u)), is cheap on a fixed grid, where σ and σ′ are
    known numbers. Its sign changes bracket the minimisers. Between two turning points of σ there are at most two of
    them, so the first and the last bracket miss none. Outside the grid the minimiser is c or has a closed form.
    """

    iterations: ClassVar[int] = 16
    linear_tail: ClassVar[bool] = True  # σ(u) = u on the right of the grid, else constant
    turns: ClassVar[tuple[int, ...]] = ()  # grid points at (GELU: next to) the turning points of σ

    def _grid(self) -> Sequence[float]:
        """Return at most 52 increasing points; outside of them the bends of σ are below rounding."""
        return _GRID

    @abstractmethod
    def _jet(self, u: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Return σ, σ′ and σ″, the last two without cancellation in the tails."""

    def _slope(self, u: Tensor, /) -> Tensor:
        return self._jet(u)[1]

    def _solve(self, a: Tensor, c: Tensor, g: float | Tensor, old: Tensor | None) -> Tensor:
        candidates = [c] if old is None else [old, c]
        if self.linear_tail:
            # Where softplus jumps, the end of the curved part can be the minimiser.
            end = self._grid()[-1]
            beyond = end * (1 + 2 * torch.finfo(a.dtype).eps)
            candidates += [torch.full_like(a, end), _solve_piece(a, c, g, beyond, math.inf, 1.0, 0.0)]
        refined = (self._newton(a, c, g, *bracket) for bracket in self._brackets(a, c, g))
        return self._best(a, c, g, [*candidates, *refined])

    def _brackets(self, a: Tensor, c: Tensor, g: float | Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (low, high, start) of the first and the last bracket between neighbouring turning points."""
        points = torch.tensor(self._grid(), dtype=torch.float64, device="cpu")
        table = torch.stack([points, *self._jet(points)[:2]], dim=1).tolist()
        inverse, pull = 1 / g, a / g
        words = [torch.zeros_like(a) for _ in range(0, len(table), 24)]  # 24 bits fit into a float32
        for k, (point, sigma, slope) in enumerate(table):
            falling = torch.add(c, pull, alpha=slope).gt_(point + slope * sigma * inverse)
            words[k // 24].add_(falling, alpha=1 << k % 24)
        falls = sum((word.long() << 24 * k for k, word in enumerate(words[1:], 1)), words[0].long())  # bit k: f′ < 0
        minima = falls & ~(falls >> 1)
        points, brackets = points.to(a), []
        for begin, stop in pairwise((0, *self.turns, len(table) - 1)):
            inside = minima & ((1 << stop) - (1 << begin))
            # Two roots can hide in a cell with equal signs: next to a turning point, or in the next two cells.
            filled = inside | (1 << (stop - 1))
            first, last = _highest_bit(filled & -filled), _highest_bit(inside | (1 << begin))
            before, after = ((falls << 2) >> first) & 3, (~falls >> (last + 2)) & 3
            low = points[(first - (before >> 1) - (before & (before >> 1))).clamp_(min=begin)]
            high = points[(last + 1 + (after & 1) + (after & (after >> 1))).clamp_(max=stop)]
            brackets += [(low, points[first + 1], low), (points[last], high, high)]
        return brackets

    def _newton(self, a: Tensor, c: Tensor, g: float | Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
        """Return a root of f′ in [low, high], f′(low) < 0 ≤ f′(high); steps that leave the bracket halve it instead."""
        for _ in range(self.iterations):
            sigma, slope, curvature = self._jet(u)
            first = (u - c).mul_(g).addcmul_(slope, sigma - a)
            second = slope.square().addcmul_(curvature, sigma - a).add_(g)
            newton = u - first / second.clamp_(min=torch.finfo(u.dtype).eps)
            falling = first.lt_(0)
            low, high = torch.lerp(low, u, falling), torch.lerp(u, high, falling)
            u = torch.clamp(newton, low, high)
            u = torch.lerp(torch.lerp(low, high, 0.5), u, newton.eq_(u))
        return u


def _logistic(u: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
    """Return s = 1/(1 + exp(−u)), s′ and s″; 1 − s would cancel where s is close to 1."""
    s, rest = torch.sigmoid(u), torch.sigmoid(-u)
    slope = s * rest
    return s, slope, slope * (rest - s)


class Sigmoid(SmoothActivation):
    """σ(u) = 1 / (1 + exp(−u))."""

    linear_tail = False
    _value = staticmethod(torch.sigmoid)
    _jet = staticmethod(_logistic)


class Tanh(SmoothActivation):
    """σ(u) = tanh(u)."""

    linear_tail = False
    _value = staticmethod(torch.tanh)

    def _grid(self) -> Sequence[float]:
        return [u / 2 for u in _GRID]

    def _jet(self, u: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        sigma, slope, curvature = _logistic(2 * u)
        return sigma.mul_(2).sub_(1), slope.mul_(4), curvature.mul_(8)


@dataclass(frozen=True)
class Softplus(SmoothActivation):
    """σ(u) = log(1 + exp(β u)) / β, and u where β u > threshold, like `torch.nn.Softplus`.

    Args:
        beta: Sharpness β, finite and above 0.
        threshold: Finite and above 0. σ falls by log(1 + exp(−threshold)) / β there.
    """

    beta: float = 1.0
    threshold: float = 20.0

    def __post_init__(self) -> None:
        for name in ("beta", "threshold"):
            _check(name, 0 < getattr(self, name) < math.inf, "positive and finite", getattr(self, name))

    def _grid(self) -> Sequence[float]:
        end = min(self.threshold, _GRID[-1])
        return [u / self.beta for u in (*(u for u in _GRID if u < end), end)]

    def _value(self, u: Tensor, /) -> Tensor:
        return F.softplus(u, self.beta, self.threshold)

    def _jet(self, u: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        slope, curvature, _ = _logistic(self.beta * u)
        linear = self.beta * u > self.threshold
        return self(u), slope.masked_fill_(linear, 1.0), curvature.mul_(self.beta).masked_fill_(linear, 0.0)


class SiLU(SmoothActivation):
    """σ(u) = u / (1 + exp(−u))."""

    monotone = False
    turns = (23,)
    _value = staticmethod(F.silu)

    def _grid(self) -> Sequence[float]:
        return sorted((*_GRID, -1.2784645427610738))

    def _jet(self, u: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        return _gated(u, *_logistic(u))


@dataclass(frozen=True)
class GELU(SmoothActivation):
    """σ(u) = u Φ(u), Φ the normal distribution function or, with `approximate="tanh"`, torch's approximation of it."""

    approximate: Literal["none", "tanh"] = "none"
    monotone = False
    turns = (24,)

    def __post_init__(self) -> None:
        _check("approximate", self.approximate in ("none", "tanh"), "'none' or 'tanh'", self.approximate)

    def _grid(self) -> Sequence[float]:
        return [0.345 * k - 0.7521 for k in range(-24, 28)]

    def _value(self, u: Tensor, /) -> Tensor:
        return F.gelu(u, approximate=self.approximate)

    def _jet(self, u: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        if self.approximate == "none":
            density = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
            return _gated(u, 0.5 * torch.erfc(u * -math.sqrt(0.5)), density, -u * density)
        k, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
        p, slope, curvature = _logistic(k * (u + cubic * u**3))
        inner = k * (1 + 3 * cubic * u * u)
        return _gated(u, p, slope * inner, curvature * inner.square() + slope * (6 * k * cubic * u))


def _gated(u: Tensor, p: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u p(u) and its first two derivatives, given p, p′ and p″."""
    return u * p, torch.addcmul(p, u, slope), torch.addcmul(2 * slope, u, curvature)


def _solve_piece(a: Tensor, c: Tensor, g: float | Tensor, *piece: float) -> Tensor:
    low, high, slope, offset = piece
    if slope == 0:
        return c.clamp(low, high)  # c itself: the formula would round it
    return (((a - offset) * slope + g * c) / (slope**2 + g)).clamp_(low, high)


def _highest_bit(bits: Tensor) -> Tensor:
    """Return the position of the highest bit of integers below 2⁵³, 0 if there is none."""
    return torch.frexp(bits.double()).exponent.long().sub_(1).clamp_(min=0)


def _check(name: str, valid: bool, wanted: str, got: object) -> None:
    if not valid:
        raise ValueError(f"Expected argument `{name}` to be {wanted}, but got {got!r}. Change the value.")
