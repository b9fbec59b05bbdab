"""Modules for lifted networks that torch does not have: skip connections, sign, absolute value."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """A skip connection around one stage of equal width: x + σ(W x + b).

    Args:
        *modules: The stage: one linear module, then its activation (none for the last stage).

    Raises:
        ValueError: If no module is given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bcd import Residual
        >>> Residual(nn.Linear(4, 4), nn.ReLU())(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        if not modules:
            raise ValueError("Expected at least one module in Residual, but got none. Give a stage, e.g. nn.Linear.")
        self.stage = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + stage(x)."""
        out: Tensor = x + self.stage(x)
        return out


class Sign(nn.Module):
    """+1 where the input is not negative, −1 elsewhere: binary networks. Its gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sign, with sign(0) = +1."""
        return (x >= 0).to(x.dtype) * 2 - 1


class Abs(nn.Module):
    """Absolute value."""

    def forward(self, x: Tensor) -> Tensor:
        """Return |x|."""
        return x.abs()
