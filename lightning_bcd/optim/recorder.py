"""Records one evaluation of a closure, and makes of it the line searches of the linear layers.

Gradient and curvature of the loss at the output of a layer come from the graph of the closure's loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_bcd.optim.piecewise import PiecewiseSearch
from lightning_bcd.optim.searches import QuadraticSearch, Search


@dataclass
class _Use:
    """One call of a linear layer: its input, and the tensor at which gradient and curvature are taken."""

    layer: nn.Linear
    x: Tensor
    at: Tensor
    handed_on: Tensor
    rectified: bool = False


@dataclass
class _Call:
    """One call of the model."""

    output: Any = None
    uses: list[_Use] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Records one evaluation of the closure: losses, and inputs and outputs of the linear layers of the model.

    Backward passes inside keep the graph, so that curvature can be computed afterwards.

    Args:
        model: The module that the closure calls, or None.
        parameters: Only layers with one of these are recorded.
        through_relu: Whether to take gradient and curvature behind a ReLU that follows a layer.
    """

    def __init__(
        self, model: nn.Module | None, parameters: Iterable[nn.Parameter], *, through_relu: bool = True
    ) -> None:
        super().__init__()
        self._model, self._wanted, self._through_relu = model, set(parameters), through_relu
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._losses: list[Tensor] = []

    def __enter__(self) -> Recorder:
        if self._model is not None:
            self._handles.append(self._model.register_forward_pre_hook(lambda *_: self._calls.append(_Call())))
            for module in self._model.modules():
                if isinstance(module, nn.Linear) and not self._wanted.isdisjoint(module._parameters.values()):
                    self._handles.append(module.register_forward_hook(self._note_linear))
                elif isinstance(module, nn.ReLU) and self._through_relu:
                    self._handles.append(module.register_forward_hook(self._note_relu))
            self._handles.append(self._model.register_forward_hook(self._note_output))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`; a backward pass is noted and keeps its graph."""
        kwargs = kwargs or {}
        if func is Tensor.backward:
            weight = args[1] if len(args) > 1 else kwargs.get("gradient")
            self._losses.append(args[0] if weight is None else (args[0] * weight).sum())
            args, kwargs = args[:2], {**kwargs, "retain_graph": True}
        return func(*args, **kwargs)

    def _note_linear(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._calls or not output.requires_grad:
            return output
        assert isinstance(layer, nn.Linear)
        handed_on = output.clone()  # an activation may work in place
        self._calls[-1].uses.append(_Use(layer, inputs[0].detach(), output, handed_on))
        return handed_on

    def _note_relu(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for use in self._calls[-1].uses if self._calls else []:
            if use.handed_on is inputs[0] and not use.rectified:
                use.at, use.rectified = output, True

    def _note_output(self, _: nn.Module, inputs: Any, output: Any) -> None:
        self._calls[-1].output = output

    def differentiate(
        self, loss: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[dict[nn.Parameter, Tensor], dict[Tensor, LayerSearch]]:
        """Return gradients, to be overwritten at will, and the searches of linear layers; frees the graph.

        Args:
            loss: What the closure returned. If the closure called backward, `.grad` is taken as the gradient.
            parameters: The parameters to differentiate by; those without gradient are left out.

        Raises:
            ValueError: If the loss has no graph, the closure did not call the model, or this returns no tensor.
        """
        if self._model is not None and not self._calls:
            raise ValueError(
                f"Expected argument `model` to be the module that the closure calls, but {type(self._model).__name__} "
                "was not called. Pass the network itself, not a module around it."
            )
        with torch.enable_grad():
            total = torch.stack([each.reshape(()) for each in self._losses]).sum() if self._losses else loss
        if not total.requires_grad:
            raise ValueError(
                "Expected the closure to return the loss with its graph, but got a tensor without. Leave out "
                "`detach()`, or call `loss.backward()` in the closure."
            )
        uses = [use for call in self._calls for use in call.uses]
        spots = list(dict.fromkeys(use.at for use in uses))
        curvature: dict[Tensor, Tensor] = {}
        for call in self._calls:
            inside = [use.at for use in call.uses]
            if inside:
                curvature |= zip(inside, _gauss_newton_diagonal(total, call.output, inside), strict=True)
        wanted = [] if self._losses else list(parameters)
        sources = [*spots, *wanted]
        found = torch.autograd.grad(total, sources, allow_unused=True) if sources else ()
        held = [] if self._model is None else [m._parameters.values() for m in self._model.modules()]
        owners = Counter(parameter for parameters in held for parameter in parameters if parameter is not None)
        layers = _layer_searches(uses, dict(zip(spots, found, strict=False)), curvature, owners)
        given = zip(wanted, found[len(spots) :], strict=True) if wanted else ((p, p.grad) for p in parameters)
        gradients: dict[nn.Parameter, Tensor] = {}
        taken: set[int] = set()
        for parameter, gradient in given:
            if gradient is not None:
                # autograd may return one tensor twice, or a view that repeats a number.
                own = bool(wanted) and gradient.is_contiguous() and gradient.data_ptr() not in taken
                gradients[parameter] = gradient if own else gradient.clone(memory_format=torch.contiguous_format)
                taken.add(gradient.data_ptr())
        self._calls, self._losses = [], []
        return gradients, layers


def _gauss_newton_diagonal(total: Tensor, output: Any, spots: Sequence[Tensor]) -> list[Tensor]:
    """Return Σ_r (∂ s_rᵀf / ∂spot)² for each spot; Σ_r s_r s_rᵀ is the Hessian of the loss at each row f of the output.

    One backward pass per column of the output.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            f"Expected argument `model` to return one tensor, but got {type(output).__name__}. Pass the part of the "
            "model that returns the predictions."
        )
    columns = output.shape[-1] if output.dim() > 1 else 1
    result = [torch.zeros_like(spot) for spot in spots]
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(total, output, create_graph=True, allow_unused=True)
        if gradient is None or not gradient.requires_grad:
            return result
        sums = gradient.reshape(-1, columns).sum(dim=0)
        rows = [torch.autograd.grad(each, output, retain_graph=True, allow_unused=True)[0] for each in sums]
    if any(row is None for row in rows):
        return result
    hessian = torch.stack([row.reshape(-1, columns) for row in rows], dim=1)
    hessian = hessian.to(torch.promote_types(hessian.dtype, torch.float32))  # autocast: no eigh in less
    if columns == 1:
        roots = hessian.clamp_min(0).sqrt()
    else:
        # The Hessian of a sample that is fitted all but perfectly underflows inside eigh: scaled to 1.
        scale = hessian.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(hessian.dtype).tiny)
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / (2 * scale))
        roots = vectors * (values.clamp_min(0)[:, None, :] * scale).sqrt()
    for root in roots.unbind(dim=2):
        pull = root.reshape(output.shape).to(output.dtype)
        parts = torch.autograd.grad(output, spots, pull, retain_graph=True, allow_unused=True)
        for diagonal, part in zip(result, parts, strict=True):
            if part is not None:
                diagonal.addcmul_(part, part)
    return result


@dataclass
class LayerSearch:
    """The searches along the weights and along the biases of one linear layer.

    Args:
        layer: The layer.
        x: N × d inputs.
        gradient: N × m, G.
        curvature: N × m, H.
        rectified: Whether G and H are taken behind a ReLU.
    """

    layer: nn.Linear
    x: Tensor
    gradient: Tensor
    curvature: Tensor
    rectified: bool

    def along(self, parameter: Tensor) -> Search:
        """Return the search along the weight or bias, valid as long as the layer does not change."""
        x = self.x if parameter is self.layer.weight else self.x.new_ones(len(self.x), 1)
        if not self.rectified:
            return QuadraticSearch(x, self.curvature)
        z = F.linear(self.x, self.layer.weight, self.layer.bias).detach()
        return PiecewiseSearch(x, z, self.gradient, self.curvature)


def _layer_searches(
    uses: Sequence[_Use],
    gradient: dict[Tensor, Tensor | None],
    curvature: dict[Tensor, Tensor],
    owners: Counter[nn.Parameter],
) -> dict[Tensor, LayerSearch]:
    searches: dict[Tensor, LayerSearch] = {}
    for layer in dict.fromkeys(use.layer for use in uses):
        mine = [use for use in uses if use.layer is layer]
        gradients = [use.at.new_zeros(use.at.shape) if (g := gradient[use.at]) is None else g for use in mine]
        collected = ([use.x for use in mine], gradients, [curvature[use.at] for use in mine])
        x, g, h = (torch.cat([_rows(each, layer.weight) for each in tensors]) for tensors in collected)
        search = LayerSearch(layer, x, g, h, all(use.rectified for use in mine))
        # A weight that several modules share is none of theirs; what a parametrisation holds is no weight.
        own = (p for p in layer._parameters.values() if p is not None and owners[p] == 1)
        searches |= dict.fromkeys(own, search)
    return searches


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1]).to(like.dtype)
