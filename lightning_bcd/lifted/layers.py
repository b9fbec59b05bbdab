"""Modules for lifted networks that torch does not have: skip and dense connections, sign, absolute value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
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


class DenseReLU(nn.Module):
    """A ReLU network whose layers read the outputs of several earlier layers; without biases.

        u_0 = x,   u_n = max(0, Σ_{m∈M_n} W_{n,m} u_m),   output V u_N

    The W_{n,m} of a layer lie side by side in one `nn.Linear`, in the order of M_n (Zhang and Brand, Convergent block
    coordinate descent for training Tikhonov regularized deep neural networks, NIPS 2017, Section 3).

    Args:
        widths: Features of the input, of each hidden layer, and outputs.
        connections: M_n: `"dense"`, all layers before n, the input is 0; `"chain"`, n − 1 alone; or a list of them,
            one per hidden layer, e.g. `[[0], [0, 1], [1, 2]]`.

    Raises:
        ValueError: If there are fewer than three widths, or a layer reads none, itself, or a later one.

    Example:
        >>> import torch
        >>> from lightning_bcd import DenseReLU
        >>> DenseReLU([4, 8, 8, 3])(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, widths: Sequence[int], connections: Literal["dense", "chain"] | Sequence[Sequence[int]] = "dense"
    ) -> None:
        super().__init__()
        if len(widths) < 3 or min(widths) < 1:
            raise ValueError(
                f"Expected argument `widths` to be at least three positive integers, but got {list(widths)}. Give the "
                "input size, the hidden sizes and the number of outputs, e.g. [784, 300, 300, 10]."
            )
        layers = range(1, len(widths) - 1)
        named = {"dense": [list(range(n)) for n in layers], "chain": [[n - 1] for n in layers]}
        self.sources = (
            named.get(connections, []) if isinstance(connections, str) else [list(sources) for sources in connections]
        )
        if len(self.sources) != len(layers) or not all(
            sources and sorted({m for m in sources if 0 <= m < layer}) == sources
            for layer, sources in zip(layers, self.sources, strict=True)
        ):
            raise ValueError(
                f"Expected argument `connections` to be 'dense', 'chain', or {len(layers)} lists of rising numbers, "
                f"each of layers before its own (0 is the input), but got {connections!r}. Give e.g. [[0], [0, 1]]."
            )
        self.hidden = nn.ModuleList(
            nn.Linear(sum(widths[m] for m in sources), widths[n], bias=False)
            for n, sources in zip(layers, self.sources, strict=True)
        )
        self.output = nn.Linear(widths[-2], widths[-1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return V u_N, N × outputs."""
        values = [x.flatten(1)]
        for sources, linear in zip(self.sources, self.hidden, strict=True):
            values.append(torch.relu(linear(torch.cat([values[m] for m in sources], dim=1))))
        out: Tensor = self.output(values[-1])
        return out
