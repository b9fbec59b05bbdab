"""One-dimensional searches along single coordinates of the loss, many coordinates at once.

Changing the weight W_ij of a linear layer by t moves column i of its output Z = X Wᵀ + b by t times column j of its
input X. With G and H the gradient and curvature of the loss per sample and neuron, the loss along the coordinate is

    plain layer             φ(t) = t Σ_n G_ni x_nj + t²/2 Σ_n H_ni x_nj²                       (G, H at Z)
    layer with ReLU         φ(t) = Σ_n G_ni δ_n + ½ H_ni δ_n²,  δ_n = relu(z_ni + t x_nj) − relu(z_ni)   (at relu(Z))

The second is piecewise quadratic with at most one breakpoint t = −z_ni / x_nj per sample. A bias has x = 1. H is the
diagonal of the Gauss-Newton matrix: φ is the loss itself for a squared loss and no ReLU further on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_bcd.optim.piecewise import PiecewiseSearch, longest, positions, whole_rows

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
