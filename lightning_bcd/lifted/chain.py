"""A network read as a chain of stages v ↦ σ(A(v) + b): what the lifted algorithms train.

The parameters of the stages are the network's own: training the chain trains the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bcd.lifted.layers import Abs, DenseReLU, Residual, Sign
from lightning_bcd.prox import activations as sigma
from lightning_bcd.prox.activations import Activation

#: From modules to the scalar functions the sub-problems know.
ACTIVATIONS: dict[type[nn.Module], Callable[..., Activation]] = {
    nn.Identity: lambda _: sigma.Identity(),
    nn.ReLU: lambda _: sigma.ReLU(),
    nn.ReLU6: lambda _: sigma.ClippedReLU(max_val=6.0),
    nn.LeakyReLU: lambda m: sigma.LeakyReLU(negative_slope=m.negative_slope),
    nn.Hardtanh: lambda m: (
        sigma.ClippedReLU(max_val=m.max_val) if m.min_val == 0 else sigma.HardTanh(min_val=m.min_val, max_val=m.max_val)
    ),
    nn.Sigmoid: lambda _: sigma.Sigmoid(),
    nn.Tanh: lambda _: sigma.Tanh(),
    nn.Softplus: lambda m: sigma.Softplus(beta=m.beta, threshold=m.threshold),
    nn.GELU: lambda m: sigma.GELU(approximate=m.approximate),
    nn.SiLU: lambda _: sigma.SiLU(),
    Sign: lambda _: sigma.Sign(),
    Abs: lambda _: sigma.Abs(),
}
#: Why a module cannot be lifted, and what to use instead.
REMEDIES: dict[type[nn.Module], str] = {
    nn.MaxPool2d: "It is not linear. Use nn.AvgPool2d, or a strided nn.Conv2d.",
    nn.BatchNorm1d: "It ties the samples of a batch together. Remove it; a bias and the initialisation take its place.",
    nn.BatchNorm2d: "It ties the samples of a batch together. Remove it; a bias and the initialisation take its place.",
    nn.LayerNorm: "It is not linear. Remove it.",
    nn.Dropout: "It is random: the sub-problems would change between updates. Remove it; use a ridge penalty.",
    nn.Softmax: "Leave the outputs as they are and use loss='cross_entropy'.",
    nn.LogSoftmax: "Leave the outputs as they are and use loss='cross_entropy'.",
}
FIXED = (nn.Flatten, nn.AvgPool2d)


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage: fixed linear maps, then a linear operator with parameters, then an activation.

    Attributes:
        name: Name of the operator inside the network.
        operator: The `nn.Linear` or `nn.Conv2d`.
        activation: σ; the identity on the last stage.
        before: Fixed linear maps in front of the operator (Flatten, AvgPool2d).
        after: Fixed linear maps between operator and activation.
        residual: Whether the stage's input is added to its output.
        sources: The stages whose outputs, side by side, are the input; 0 is the network's input, 1 the output of the
            first stage. None: the stage before alone.
    """

    name: str
    operator: nn.Linear | nn.Conv2d
    activation: Activation
    before: Sequence[nn.Module] = ()
    after: Sequence[nn.Module] = ()
    residual: bool = False
    sources: tuple[int, ...] | None = None

    @property
    def dense(self) -> bool:
        """Whether the stage is v ↦ v Wᵀ + b on the flattened input, so that its sub-problems are solved exactly."""
        return (
            isinstance(self.operator, nn.Linear)
            and not self.after
            and all(isinstance(m, nn.Flatten) for m in self.before)
        )

    @property
    def weight(self) -> Tensor:
        """W."""
        return self.operator.weight

    @property
    def bias(self) -> Tensor | None:
        """b, or None."""
        return self.operator.bias

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """The input of the stage among the network's input and the outputs of the stages before."""
        return values[-1] if self.sources is None else torch.cat([values[m].flatten(1) for m in self.sources], dim=1)

    def prepare(self, v: Tensor) -> Tensor:
        """Apply the fixed maps in front of the operator."""
        for module in self.before:
            v = module(v)
        return v

    def apply(self, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A(v) with other parameters than the stage's own."""
        v = self.prepare(v)
        if isinstance(self.operator, nn.Linear):
            u = F.linear(v, weight, bias)
        else:
            u = self.operator._conv_forward(v, weight, bias)
        for module in self.after:
            u = module(u)
        return u

    def forward(self, v: Tensor) -> Tensor:
        """P = A(v) + b."""
        return self.apply(v, self.weight, self.bias)

    def blocks(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A weight as matrices that are solved for on their own, out × (in · kernel): one per group."""
        return weight.flatten(1).chunk(self.groups)

    def adjoint(self, v: Tensor, t: Tensor) -> Tensor:
        """Aᵀt, shaped like v."""
        if self.dense:
            return (t @ self.weight).view_as(v)
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            out = self.apply(leaf, self.weight.detach(), None)
        return torch.autograd.grad(out, leaf, t)[0]

    def rows(self, v: Tensor) -> Tensor:
        """The matrix Z with A(v) = Z Wᵀ, rows = samples (times positions for a convolution), W flattened to out × d.

        With groups, Z has the inputs of all groups side by side.
        """
        v = self.prepare(v)
        if isinstance(self.operator, nn.Linear):
            return v
        conv = self.operator
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(v, conv._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        if self.pools:
            reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            size = [(n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, conv.stride, strict=True)]
            patches = patches.view(*patches.shape[:2], *size)
            for pool in self.pools:
                patches = pool(patches)
            patches = patches.flatten(2)
        return patches.transpose(1, 2).flatten(0, 1)

    def columns(self, u: Tensor) -> Tensor:
        """The matrix of A(v) that belongs to `rows(v)`, as many columns as there are outputs or channels."""
        if isinstance(self.operator, nn.Linear):
            return u.flatten(1)
        return u.reshape(len(u), self.operator.out_channels, -1).transpose(1, 2).flatten(0, 1)

    @property
    def pools(self) -> list[nn.Module]:
        """Average pooling between operator and activation."""
        return [m for m in self.after if isinstance(m, nn.AvgPool2d)]

    @property
    def groups(self) -> int:
        """Groups of inputs and outputs that do not mix."""
        return 1 if isinstance(self.operator, nn.Linear) else self.operator.groups


class Chain:
    """The stages of a network, first to last.

    Reads `DenseReLU`, or nested `nn.Sequential` of `nn.Linear`, `nn.Conv2d`, `nn.Flatten`, `nn.AvgPool2d`, activations
    and `Residual`. Fixed linear maps join the operator behind them (or, at the end of a stage, the one before).

    Args:
        network: The network; its parameters are shared, not copied.

    Attributes:
        stages: The stages.

    Raises:
        ValueError: If a module cannot be lifted, or the network does not end with a linear module.
    """

    def __init__(self, network: nn.Module) -> None:
        self.stages: list[Stage] = []
        _Reader(self.stages).read(network)
        if not self.stages:
            raise ValueError(
                f"Expected argument `network` to hold nn.Linear or nn.Conv2d modules, but got {type(network).__name__} "
                "without any. Give an nn.Sequential of them."
            )
        last = self.stages[-1]
        if not isinstance(last.activation, sigma.Identity):
            raise ValueError(
                f"Expected argument `network` to end with a linear module, but got {type(last.activation).__name__} "
                f"after '{last.name}'. Remove it: the loss acts on the outputs themselves."
            )

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, index: int) -> Stage:
        return self.stages[index]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def hidden_parameters(self) -> list[Tensor]:
        """Weights and biases of all stages but the last."""
        return [p for stage in self.stages[:-1] for p in (stage.weight, stage.bias) if p is not None]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (U_l, V_l) of a forward pass, stage by stage; the last V equals the output."""
        values, several = [x], any(stage.sources is not None for stage in self.stages)
        for stage in self.stages:
            v = stage.join(values)
            u = stage.forward(v)
            out = stage.activation(u)
            out = v + out if stage.residual else out
            values = [*values, out] if several else [out]  # what nobody reads again is not kept
            yield u, out

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError that names the stage if one sample of x does not fit through the chain."""
        values = [x[:1]]
        for stage in self.stages:
            v = stage.join(values)
            shape = tuple(v.shape[1:])
            try:
                u = stage.forward(v)
                values.append(v + stage.activation(u) if stage.residual else stage.activation(u))
            except RuntimeError as error:
                raise ValueError(
                    f"Expected samples that fit stage '{stage.name}' ({stage.operator}), but got shape {shape} there. "
                    f"Check the input shape, or add nn.Flatten ({error})."
                ) from error
            if isinstance(stage.operator, nn.Linear) and len(stage.prepare(x[:0].new_zeros(1, *shape)).shape) != 2:
                raise ValueError(
                    f"Expected the input of '{stage.name}' to be a matrix (samples × features), but a sample has shape "
                    f"{shape}. Add nn.Flatten in front of it."
                )
            if stage.residual and tuple(u.shape[1:]) != shape:
                raise ValueError(
                    f"Expected Residual stage '{stage.name}' to keep the shape {shape}, but it gives "
                    f"{tuple(u.shape[1:])}. Wrap stages of equal width only."
                )


class _Reader:
    """Collects stages while walking over modules in order."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.before: list[nn.Module] = []
        self.operator: nn.Linear | nn.Conv2d | None = None
        self.name = ""
        self.after: list[nn.Module] = []
        self.seen: set[nn.Parameter] = set()

    def read(self, network: nn.Module) -> None:
        self._walk(network, "")
        self._close(sigma.Identity())
        if self.before and self.stages:
            raise ValueError(
                f"Expected the network to end with a linear module, but {type(self.before[-1]).__name__} follows the "
                "last activation. Put it in front of a linear module."
            )

    def _walk(self, module: nn.Module, name: str) -> None:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            # Not named_children, which leaves out the second use of a module.
            for key, child in zip(module._modules, module, strict=True):
                self._walk(child, f"{name}.{key}" if name else key)
        elif isinstance(module, Residual):
            self._read_residual(module, name)
        elif isinstance(module, DenseReLU):
            self._read_dense(module, name)
        elif type(module) in (nn.Linear, nn.Conv2d) and not any(True for _ in module.children()):
            assert isinstance(module, nn.Linear | nn.Conv2d)
            self._close(sigma.Identity())
            self._see(module, name)
            self.operator, self.name = module, name
        elif isinstance(module, FIXED):
            # What follows an operator directly may still be followed by its activation.
            pool = module if isinstance(module, nn.AvgPool2d) else None
            if self.operator is not None and pool and (pool.padding not in (0, (0, 0)) or pool.divisor_override):
                raise ValueError(
                    f"Expected average pooling '{name}' behind a linear module to have padding=0 and no "
                    f"divisor_override, but got {pool}. Put an activation between them, or pad in the convolution."
                )
            (self.before if self.operator is None else self.after).append(module)
        elif type(module) in ACTIVATIONS:
            if self.operator is None:
                if isinstance(module, nn.Identity):
                    return
                raise ValueError(
                    f"Expected a linear module before activation '{name}' ({type(module).__name__}). Put nn.Linear or "
                    "nn.Conv2d between two activations."
                )
            self._close(ACTIVATIONS[type(module)](module))
        else:
            remedy = next((text for kind, text in REMEDIES.items() if isinstance(module, kind)), None)
            raise ValueError(
                f"Cannot lift module '{name or 'network'}' ({type(module).__name__}). "
                + (remedy or "Use Sequential, Linear, Conv2d, Flatten, AvgPool2d, Residual and activations.")
            )

    def _see(self, module: nn.Module, name: str) -> None:
        parameters = set(module.parameters())
        if parameters & self.seen:
            raise ValueError(f"Expected every parameter once, but '{name}' is used twice. Give each stage its own.")
        self.seen |= parameters

    def _close(self, activation: Activation, residual: bool = False) -> None:
        if self.operator is None:
            return
        # A final flatten or pool after the last operator, or before the next one, is the same linear map.
        self.stages.append(Stage(self.name, self.operator, activation, tuple(self.before), tuple(self.after), residual))
        self.operator, self.before, self.after = None, [], []

    def _read_dense(self, module: DenseReLU, name: str) -> None:
        if name or self.stages:
            raise ValueError(f"Expected DenseReLU '{name}' to be the whole network, but there are modules around it.")
        for index, (sources, linear) in enumerate(zip(module.sources, module.hidden, strict=True)):
            assert isinstance(linear, nn.Linear)
            joined = None if sources == [index] else tuple(sources)
            before = () if index else (nn.Flatten(),)
            self.stages.append(Stage(f"hidden.{index}", linear, sigma.ReLU(), before, sources=joined))
        self.operator, self.name = module.output, "output"

    def _read_residual(self, module: Residual, name: str) -> None:
        self._close(sigma.Identity())
        if self.before:
            raise ValueError(f"Expected Residual '{name}' to follow a stage directly. Move the map before it inside.")
        inner: list[Stage] = []
        _Reader(inner).read(module.stage)
        if len(inner) != 1 or inner[0].before or inner[0].after:
            raise ValueError(
                f"Expected Residual '{name}' to wrap one linear module and its activation, but it holds {len(inner)} "
                "stage(s) with or without fixed maps. Wrap each stage in a Residual of its own."
            )
        stage = inner[0]
        self._see(stage.operator, name)
        self.stages.append(Stage(f"{name}.stage.{stage.name}", stage.operator, stage.activation, (), (), residual=True))
