"""Modules for lifted networks that torch does not have: skip connections, sign, absolute value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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


#: Names that `MLP` takes for its activation.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "Hardtanh": nn.Hardtanh,
    "ReLU6": nn.ReLU6,
    "Abs": Abs,
    "Sign": Sign,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "Softplus": nn.Softplus,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
}


class MLP(nn.Sequential):
    """A multi-layer perceptron as an `nn.Sequential` that lifted algorithms read: Flatten, then linear stages.

    Args:
        widths: Features of the input, of each hidden layer, and outputs.
        activation: Name of the activation after every layer but the last.
        bias: Whether layers have a bias.
        residual: Whether hidden layers of equal width get a skip connection.

    Raises:
        ValueError: If there are fewer than two widths, or the activation is unknown.
    """

    def __init__(
        self, widths: Sequence[int], activation: str = "ReLU", bias: bool = True, residual: bool = False
    ) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"Expected argument `widths` to be at least two positive integers, but got {list(widths)}. Give the "
                "input size, the hidden sizes and the number of outputs, e.g. [784, 600, 10]."
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Expected argument `activation` to be one of {list(ACTIVATIONS)}, but got {activation!r}."
            )
        modules: list[nn.Module] = [nn.Flatten()]
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            stage: list[nn.Module] = [nn.Linear(fan_in, fan_out, bias=bias)]
            if index < len(widths) - 2:
                stage.append(ACTIVATIONS[activation]())
            modules += [Residual(*stage)] if residual and fan_in == fan_out else stage
        super().__init__(*modules)
