"""Losses of the last layer: R(v; y), a sum over samples, and its proximal operator.

    prox(v, t, y) = argmin_u  R(u; y) + ‖u − v‖² / (2 t)

Rows of v and y are samples. In the letters of the papers v is the centre c and τ = 1/t its weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class Loss(ABC):
    """A data-fit term R(v; y) = Σ_i R_i(v_i; y_i), summed over samples (rows), never averaged.

    Attributes:
        targets: How class labels become targets: `"one_hot"` (0 and 1) or `"sign"` (−1 and 1).
    """

    targets: ClassVar[Literal["one_hot", "sign"]]

    @abstractmethod
    def value(self, v: Tensor, y: Tensor) -> Tensor:
        """Return R(v; y) as a float64 scalar, accumulated in float64.

        Args:
            v: Predictions, N×K.
            y: Targets, N×K, encoded as `targets` says.
        """

    @abstractmethod
    def prox(self, v: Tensor, t: float, y: Tensor) -> Tensor:
        """Return argmin_u R(u; y) + ‖u − v‖² / (2 t), N×K.

        Args:
            v: The point to stay close to, N×K.
            t: Step size, above 0.
            y: Targets, N×K, encoded as `targets` says.
        """

    def encode(self, labels: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
        """Turn class indices into targets: one-hot, or 2·one_hot − 1 where `targets` is `"sign"`.

        With `"sign"` targets and a single output the labels 0 and 1 become −1 and 1.

        Args:
            labels: Class indices, N integers.
            num_outputs: Number of columns K.
            dtype: Data type of the targets.

        Returns:
            Targets, N×K.

        Raises:
            TypeError: If the labels are not integers.
            ValueError: If they are not a vector, or lie outside the classes.
        """
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"Expected argument `labels` to be integer class indices, but got {labels.dtype}. Call `.long()`."
            )
        if labels.ndim != 1:
            raise ValueError(
                f"Expected argument `labels` to be one class index per sample, but got shape {tuple(labels.shape)}. "
                "Pass encoded targets as they are."
            )
        binary = self.targets == "sign" and num_outputs == 1
        classes = 2 if binary else num_outputs
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(
                f"Expected argument `labels` to be in range({classes}), but got {int(labels.min())} to "
                f"{int(labels.max())}. Give the network one output per class."
            )
        one_hot = labels.unsqueeze(1) if binary else F.one_hot(labels.long(), num_outputs)
        return (2 * one_hot - 1).to(dtype) if self.targets == "sign" else one_hot.to(dtype)

    def check_targets(self, y: Tensor) -> None:
        """Check targets that are encoded already.

        Args:
            y: Targets, N×K.

        Raises:
            ValueError: If an entry is not finite, or not allowed by this loss.
        """
        if not bool(torch.isfinite(y).all()):
            raise ValueError("Expected argument `y` to be finite, but got NaN or infinity. Clean the targets.")


@dataclass(frozen=True)
class SquaredLoss(Loss):
    """R(v; y) = ½ ‖v − y‖²."""

    targets: ClassVar[Literal["one_hot", "sign"]] = "one_hot"

    def value(self, v: Tensor, y: Tensor) -> Tensor:
        """Return ½ ‖v − y‖²."""
        return 0.5 * (v - y).square_().sum(dtype=torch.float64)

    def prox(self, v: Tensor, t: float, y: Tensor) -> Tensor:
        """Return (v + t y) / (1 + t)."""
        return torch.add(v, y, alpha=t).div_(1 + t)


@dataclass(frozen=True, kw_only=True)
class CrossEntropyLoss(Loss):
    """R(v; y) = Σ_i ⟨y_i, logsumexp(v_i) − v_i⟩: softmax cross-entropy; rows of y are distributions.

    Args:
        solver: `"newton"` solves the scalar dual of each row to machine precision in a fixed number of steps.
            `"fista"` is the accelerated proximal gradient method of the published dlADMM and pdADMM codes (step 4, at
            most `max_iterations` steps, ends when the objective of all rows changes by less than 1e-3), for
            comparison with them: inexact, its step is too long to converge for t above about 3, and it waits for the
            device once per step.
        max_iterations: Most steps of `"fista"`; the published codes use 500 and 50.

    Raises:
        ValueError: If the solver is unknown or `max_iterations` is below 1.
    """

    targets: ClassVar[Literal["one_hot", "sign"]] = "one_hot"
    solver: Literal["newton", "fista"] = "newton"
    max_iterations: int = 500

    def __post_init__(self) -> None:
        if self.solver not in ("newton", "fista"):
            raise ValueError(
                f"Expected argument `solver` to be 'newton' or 'fista', but got {self.solver!r}. Choose one of them."
            )
        if self.max_iterations < 1:
            raise ValueError(
                f"Expected argument `max_iterations` to be at least 1, but got {self.max_iterations}. Use 500."
            )

    def value(self, v: Tensor, y: Tensor) -> Tensor:
        """Return Σ_i ⟨y_i, logsumexp(v_i) − v_i⟩."""
        return -F.log_softmax(v, dim=1).mul_(y).sum(dtype=torch.float64)

    def prox(self, v: Tensor, t: float, y: Tensor, *, start: Tensor | None = None) -> Tensor:
        """Return argmin_u R(u; y) + ‖u − v‖² / (2 t).

        Args:
            v: The point to stay close to, N×K.
            t: Step size, above 0.
            y: Targets, N×K, rows are distributions.
            start: First iterate of `"fista"`, the value before the update in the published codes; v if None.
                `"newton"` needs none.
        """
        if self.solver == "newton":
            return _cross_entropy_newton(v, t, y)
        return self._fista(v, t, y, v if start is None else start)

    def check_targets(self, y: Tensor) -> None:
        """Check that rows are non-negative and sum to 1 (to 1e-4)."""
        super().check_targets(y)
        if bool((y < 0).any()) or bool(((y.sum(dim=1) - 1).abs() > 1e-4).any()):
            raise ValueError(
                "Expected argument `y` to hold one distribution per row, but got negative entries or a row that does "
                "not sum to 1. Pass class indices or one-hot rows."
            )

    def _fista(self, v: Tensor, t: float, y: Tensor, start: Tensor) -> Tensor:
        """The last-layer update of the published codes; letters as there: η step, ζ iterate, z extrapolated point."""
        tau, eta, tolerance = 1 / t, 4.0, 1e-3
        zeta = z = start
        lam, objective = 1.0, math.inf
        for _ in range(self.max_iterations):
            previous = objective
            objective = float(self.value(z, y) + tau / 2 * (z - v).square_().sum(dtype=torch.float64))
            if abs(objective - previous) < tolerance:
                break
            lam_next = (1 + math.sqrt(1 + 4 * lam * lam)) / 2
            w = (1 - lam) / lam_next
            lam = lam_next
            zeta_next = (tau * v + z / eta - (torch.softmax(z, dim=1) - y)) / (tau + 1 / eta)
            z = (1 - w) * zeta_next + w * zeta
            zeta = zeta_next
        return z


@dataclass(frozen=True)
class LogisticLoss(Loss):
    """R(v; y) = Σ log(1 + exp(−y v)) over all entries, y = ±1: one-vs-all, or binary with one column."""

    targets: ClassVar[Literal["one_hot", "sign"]] = "sign"

    def value(self, v: Tensor, y: Tensor) -> Tensor:
        """Return Σ log(1 + exp(−y v))."""
        # Not F.softplus: above its threshold it is not smooth.
        return -F.logsigmoid(y * v).sum(dtype=torch.float64)

    def prox(self, v: Tensor, t: float, y: Tensor) -> Tensor:
        """Return the root of u = v + t y sigmoid(−y u), entry by entry.

        With m = y u and s = y v the equation m = s + t sigmoid(−m) has its inflection at m = 0, and m ↦ −m, s ↦ −s − t
        maps it to itself. On the side of the root Newton's method from 0 never passes the root, so it needs no
        safeguard; it moves by at least about 1 per step until it converges quadratically.
        """
        s = y * v
        positive = s > -t / 2
        s = torch.where(positive, s, -s - t)
        m = s.clamp(min=0)
        for _ in range(8 + math.ceil(math.log1p(t))):
            p, q = torch.sigmoid(m), torch.sigmoid(-m)
            m = m - (m - s - t * q) / (1 + t * p * q)
        return y * torch.where(positive, m, -m)

    def check_targets(self, y: Tensor) -> None:
        """Check that every entry is −1 or 1."""
        super().check_targets(y)
        _check_signs(y)


@dataclass(frozen=True)
class HingeLoss(Loss):
    """R(v; y) = Σ max(0, 1 − y v) over all entries, y = ±1: one-vs-all, or binary with one column."""

    targets: ClassVar[Literal["one_hot", "sign"]] = "sign"

    def value(self, v: Tensor, y: Tensor) -> Tensor:
        """Return Σ max(0, 1 − y v)."""
        return (1 - y * v).clamp_(min=0).sum(dtype=torch.float64)

    def prox(self, v: Tensor, t: float, y: Tensor) -> Tensor:
        """Return y max(s, min(s + t, 1)) with s = y v: three pieces, moved by t, moved to the margin, not moved."""
        s = y * v
        return torch.maximum(s, (s + t).clamp_(max=1)).mul_(y)

    def check_targets(self, y: Tensor) -> None:
        """Check that every entry is −1 or 1."""
        super().check_targets(y)
        _check_signs(y)


_LOSSES: dict[str, type[Loss]] = {
    "squared": SquaredLoss,
    "cross_entropy": CrossEntropyLoss,
    "logistic": LogisticLoss,
    "hinge": HingeLoss,
}


def resolve_loss(loss: str | Loss) -> Loss:
    """Return the loss of a name, or the object itself.

    Args:
        loss: `"squared"`, `"cross_entropy"`, `"logistic"`, `"hinge"`, or an object with `value` and `prox`.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the object lacks one of the two methods.
    """
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise ValueError(
                f"Expected argument `loss` to be one of {', '.join(_LOSSES)}, but got {loss!r}. Choose one of them."
            )
        return _LOSSES[loss]()
    missing = [name for name in ("value", "prox") if not callable(getattr(loss, name, None))]
    if missing or isinstance(loss, type):
        raise TypeError(
            f"Expected argument `loss` to be a name or an object with `value` and `prox`, but got {loss!r} without "
            f"{' and '.join(missing) or 'an instance'}. Derive from `lightning_bcd.prox.Loss`."
        )
    return loss


def _check_signs(y: Tensor) -> None:
    if not bool((y.abs() == 1).all()):
        raise ValueError(
            "Expected argument `y` to hold −1 and 1 only, but got other values. Pass class indices, or 2·one_hot − 1."
        )


def _cross_entropy_newton(v: Tensor, t: float, y: Tensor) -> Tensor:
    """Solve τ(u − v) + softmax(u) − y = 0 row by row, τ = 1/t, by its scalar dual.

    Given s = logsumexp(u), ℓ = u − s − log τ solves ℓ + exp(ℓ) = v + t y − log τ − s, entry by entry, and
    softmax(u) = τ exp(ℓ). So s is the root of log Σ τ exp(ℓ(s)), a decreasing function: Newton inside a bracket.
    """
    tau, log_tau, classes = 1 / t, -math.log(t), v.shape[1]
    centre = torch.add(v, y, alpha=t)
    shift, top = centre - log_tau, centre.amax(dim=1, keepdim=True)
    # At `low` the largest entry of the softmax exceeds 1, at `high` all are below 1/K; the 1 is room for rounding.
    low, high = top - t - 1, top - t / classes + math.log(classes) + 1
    s = torch.minimum(torch.maximum(torch.logsumexp(v, dim=1, keepdim=True), low), high)
    for _ in range(12):
        w = torch.exp(_log_omega(shift - s))
        total, slope = tau * w.sum(dim=1, keepdim=True), tau * (w / (1 + w)).sum(dim=1, keepdim=True)
        excess = torch.log(total)
        low, high = torch.where(excess > 0, s, low), torch.where(excess > 0, high, s)
        # The sum is convex: its own Newton step never passes the root from the left, that of the logarithm may cycle.
        newton = s + torch.where(excess > 0, total - 1, total * excess) / slope
        s = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    ell = _log_omega(shift - s)
    # The first is exact to rounding in u − v, which large τ multiplies; the second in u.
    return v + t * (y - tau * torch.exp(ell)) if tau > 1 else ell + s + log_tau


def _log_omega(a: Tensor) -> Tensor:
    """Solve ℓ + exp(ℓ) = a (exp(ℓ) is Wright's omega function).

    The left side is convex and the start lies above the root, so Newton's method falls monotonically to it.
    """
    ell = torch.where(a > 1, torch.log(a.clamp(min=1)), a)
    for _ in range(5):
        w = torch.exp(ell)
        ell = ell - (ell + w - a) / (1 + w)
    return ell
