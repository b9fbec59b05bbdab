"""Hybrid coordinate descent: every coordinate takes a gradient step or an exact one-dimensional search.

    x*_j = x_j − ∂L/∂x_j                 if |∂L/∂x_j| ≥ dw
    x*_j = argmin_t L(x + t e_j) + x_j   else
    x ← x + α (x* − x)

All targets x*_j come from the same point (Jacobi), so they are independent of each other [1].

[1] Hsiao, Dutta. Hybrid coordinate descent for efficient neural network learning using line search and gradient
descent. arXiv 2408.01374, 2024.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bcd.optim.recorder import LayerSearch, Recorder
from lightning_bcd.optim.searches import EVALUATIONS, IgnoreBackward, Search, TrialSearch

Alpha: TypeAlias = float | Literal["backtracking", "1/n"]
Selection: TypeAlias = Literal["jacobi", "gauss_seidel", "greedy"]
_Params: TypeAlias = Iterable[nn.Parameter] | Iterable[dict[str, Any]] | Iterable[tuple[str, nn.Parameter]]

TRIALS = 40  # evaluations of one backtracking, at most


class HybridCoordinateDescent(Optimizer):
    """Gradient step on steep coordinates, line search on flat ones, all from one point.

    `step(closure)` needs a closure that returns the loss with its graph; whether it calls `backward` is free. The
    closure is evaluated once per block of coordinates for the gradient, and as a rule two or three times more for α.
    It must give the same loss for the same parameters: switch dropout off.

    Args:
        params: Parameters or parameter groups; a group may set its own `dw`.
        dw: Coordinates with `|∂L/∂x_j| ≥ dw` take the gradient step, at least 0; `math.inf` searches all. In units of
            the gradient; without `model` also the first trial step of the search.
        alpha: Length of the common step. `"backtracking"`: the loss never rises. `"1/n"`: n is the number of
            coordinates that got a target (the rule of the paper). A number: that.
        model: The module that the closure calls; its `nn.Linear` layers are searched by rank-1 updates of their
            output, without evaluations of the closure. It returns one tensor, whose rows the loss treats alone.
            `search="global"` sees `nn.ReLU` modules, not `F.relu`; nothing else may read what such a module reads.
            Parameters of other modules, and weights that several modules share, are searched by evaluations.
        selection: `"jacobi"`: all coordinates at once. `"gauss_seidel"`: one parameter group after the other
            (one parameter after the other if there is one group), each from the point the last one reached.
            `"greedy"`: the `top_k` coordinates of largest gradient.
        top_k: Coordinates per step of the greedy selection.
        chunk_bytes: Bound on the working memory of the searches, in bytes. The searches without evaluations stay
            below the bytes of the parameters, too (512 KiB if that is more), and on a CPU below 8 MiB. One
            coordinate, or one row of a layer that is not before a ReLU, is searched even if it takes more.
        search: For layers before a ReLU. `"global"`: the best of all pieces of the loss along the coordinate,
            O(N log N) for N samples. `"local"`: the vertex of the piece the point lies on, one product for all
            weights of the layer.

    Raises:
        ValueError: If an argument is out of range, or no parameter belongs to `model`.
    """

    requires_closure = True

    def __init__(
        self,
        params: _Params,
        dw: float = 1.0,
        alpha: Alpha = "backtracking",
        model: nn.Module | None = None,
        selection: Selection = "jacobi",
        top_k: int | None = None,
        chunk_bytes: int = 2**26,
        search: Literal["global", "local"] = "global",
    ) -> None:
        fixed = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < math.inf
        _check("alpha", fixed or alpha in ("backtracking", "1/n"), "'backtracking', '1/n' or a positive number", alpha)
        _check("model", model is None or isinstance(model, nn.Module), "the module that the closure calls", model)
        choices = ("jacobi", "gauss_seidel", "greedy")
        _check("selection", selection in choices, "'jacobi', 'gauss_seidel' or 'greedy'", selection)
        if selection == "greedy":
            _check("top_k", _is_count(top_k), "a number of coordinates for selection='greedy'", top_k)
        else:
            _check("top_k", top_k is None, f"None with selection={selection!r}", top_k, "Leave it out")
        _check("chunk_bytes", _is_count(chunk_bytes), "a positive number of bytes", chunk_bytes)
        _check("search", search in ("global", "local"), "'global' or 'local'", search)
        self.alpha, self.selection, self.top_k, self.chunk_bytes = alpha, selection, top_k, chunk_bytes
        self.model, self.search = model, search
        self._warned = False
        super().__init__(params, {"dw": dw})
        held = set() if model is None else set(model.parameters())
        if model is not None and held.isdisjoint(p for group in self.param_groups for p in group["params"]):
            raise ValueError(
                f"Expected argument `model` to hold parameters of the optimizer, but got {type(model).__name__} with "
                "none of them. Pass the module whose parameters are trained."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may have a `dw` of its own.

        Raises:
            ValueError: If `dw` is negative or not a number, or a parameter is complex.
        """
        dw = param_group.get("dw", self.defaults["dw"])
        number = isinstance(dw, (int, float)) and not isinstance(dw, bool)
        _check("dw", number and dw >= 0, "at least 0", dw)
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            real = parameter.is_floating_point()
            _check("params", real, "real", parameter.dtype, "Train real and imaginary parts as two parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters and return the loss before it, detached.

        If an evaluation of the closure raises, all parameters have the values they had before the step.

        Args:
            closure: Evaluates the model and returns the loss, a scalar tensor with its graph. It may call
                `zero_grad` and `backward`; then `.grad` is what counts as gradient (clipped, say).

        Raises:
            ValueError: If there is no closure or more than one process, the loss is not finite or has no graph, or
                the closure does not call `model`.
        """
        if closure is None:
            raise ValueError(
                "Expected argument `closure` to be a function that returns the loss, but got None. Call "
                "`optimizer.step(closure)`."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            _check("closure", ranks == 1, "evaluated by one process", f"{ranks} processes", "Train on one device")
        blocks = self._blocks()
        if not blocks:
            return closure()
        # Within a block nothing moves before the evaluations for its targets are made.
        before = {p: p.clone() for block in blocks for p in block} if len(blocks) > 1 else {}
        try:
            losses = [self._update(block, closure) for block in blocks]
        except BaseException:
            _restore(before)
            raise
        return losses[0]

    def _blocks(self) -> list[list[nn.Parameter]]:
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        if self.selection != "gauss_seidel":
            groups = [[p for group in groups for p in group]]
        elif len(groups) == 1:
            groups = [[p] for p in groups[0]]
        return [group for group in groups if group]

    def _update(self, block: list[nn.Parameter], closure: Callable[[], Any], uphill: bool = True) -> Tensor:
        """Move one block; without `uphill`, targets on the rising side of the point are left out."""
        with Recorder(self.model, block, through_relu=self.search == "global") as record, torch.enable_grad():
            loss: Tensor = closure()
        value = _value_of(loss)
        gradients, layers = record.differentiate(loss, block)
        loss = loss.detach()  # lets go of the graph
        directions, slope, count = self._directions(gradients, layers, closure, value, uphill)
        del layers  # and the inputs of every layer with it
        if not math.isfinite(slope):
            raise ValueError(
                f"Expected a finite gradient, but the slope of the loss along the targets is {slope}. Look for "
                "operations with an infinite derivative (sqrt or log at 0), or restart with a smaller dw."
            )
        if self.alpha != "backtracking":
            alpha = 1 / max(count, 1) if self.alpha == "1/n" else float(self.alpha)
            for parameter, direction in directions.items():
                parameter.add_(direction, alpha=alpha)
        elif slope < 0:
            self._backtrack(directions, closure, value, slope, torch.finfo(loss.dtype).eps * abs(value))
        elif slope > 0 and uphill:
            # The loss is not convex along coordinates, and their minima lie beyond a hill.
            del gradients, directions
            return self._update(block, closure, uphill=False)
        return loss

    # -- targets --------------------------------------------------------------------------------------------

    def _directions(
        self,
        gradients: dict[nn.Parameter, Tensor],
        layers: dict[Tensor, LayerSearch],
        closure: Callable[[], Any],
        value: float,
        uphill: bool,
    ) -> tuple[dict[nn.Parameter, Tensor], float, int]:
        """Turn gradients into x* − x, in place; return it, the slope of the loss along it and the number of targets."""
        widths = {p: float(group["dw"]) for group in self.param_groups for p in group["params"]}
        chosen = self._largest(gradients) if self.selection == "greedy" else {}
        # As much as the copy that backtracking makes later, so that the peak stays; on a CPU, what caches hold.
        bound = max(2**19, sum(map(_bytes, gradients.values())))
        slopes, count = [], 0
        for parameter, gradient in gradients.items():
            flat, dw = gradient.view(-1), widths[parameter]
            if parameter in layers:
                search: Search = layers[parameter].along(parameter)
                room = min(self.chunk_bytes, bound, 2**23 if flat.is_cpu else bound)
            else:
                search, room = self._trials(parameter, closure, value, dw), self.chunk_bytes
            size = max(1, room // search.coordinate_bytes)
            size = size // search.row * search.row or (size if search.costly else search.row)
            for index, derivatives in _chunks(flat, chosen.get(parameter), size):
                steps = _targets(search, index, derivatives, dw)
                if not uphill:
                    steps.masked_fill_(steps * derivatives > 0, 0)
                slopes.append(torch.dot(steps, derivatives))
                flat[index] = steps
                count += len(steps)
        total = float(torch.stack([slope.to(slopes[0]) for slope in slopes]).sum()) if slopes else 0.0
        return gradients, total, count

    def _largest(self, gradients: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Return the flat positions of the `top_k` largest entries, per parameter."""
        assert self.top_k is not None
        tops = [_top(gradient.view(-1).abs(), self.top_k) for gradient in gradients.values()]
        if len(tops) < 2:
            return dict(zip(gradients, (where for _, where in tops), strict=True))
        device = tops[0][0].device
        values = torch.cat([top.to(device) for top, _ in tops])
        kept = torch.zeros_like(values, dtype=torch.bool)
        kept[_top(values, self.top_k)[1]] = True
        parts = torch.split(kept, [len(top) for top, _ in tops])
        picked = [where[part.to(where.device)] for (_, where), part in zip(tops, parts, strict=True)]
        return dict(zip(gradients, picked, strict=True))

    def _trials(self, parameter: nn.Parameter, closure: Callable[[], Any], value: float, dw: float) -> TrialSearch:
        def evaluate(mode: IgnoreBackward) -> Tensor:
            if not self._warned:
                self._warned = True
                remedy = "Pass `model=`, the network that the closure calls: its nn.Linear layers then need none."
                if self.model is not None:
                    remedy = "Only nn.Linear layers of `model` need none; give the others to another optimizer."
                warnings.warn(
                    f"HybridCoordinateDescent searches coordinate by coordinate with up to {EVALUATIONS} evaluations "
                    f"of the closure for each (first, a parameter of {parameter.numel()} entries). {remedy}",
                    stacklevel=2,
                )
            return self._evaluate(closure, mode)

        return TrialSearch(parameter, evaluate, value, dw if 0 < dw < math.inf else 1.0)

    # -- the common step ------------------------------------------------------------------------------------

    def _evaluate(self, closure: Callable[[], Any], mode: IgnoreBackward) -> Tensor:
        """Return the loss; the gradients stay what they are."""
        gradients = [(p, p.grad) for group in self.param_groups for p in group["params"]]

        def restore() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient

        for parameter, _ in gradients:
            parameter.grad = None  # out of reach of `zero_grad`
        mode.instead = restore
        try:
            with mode:
                loss: Tensor = closure()
        finally:
            restore()
        return loss.detach()

    def _backtrack(
        self,
        directions: dict[nn.Parameter, Tensor],
        closure: Callable[[], Any],
        value: float,
        slope: float,
        rounding: float,
    ) -> None:
        """Move by the best α tried: first twice the last one, then vertices of parabolas, until the loss falls.

        Where even the slope promises less than the rounding of the loss, it stops and nothing moves.
        """
        memory = self.state[next(iter(directions))]
        before = {parameter: parameter.clone() for parameter in directions}
        tried, best, alpha = min(1.0, 2 * memory.get("alpha", 0.5)), value, 0.0

        def place(alpha: float) -> None:
            for parameter, direction in directions.items():
                torch.add(before[parameter], direction, alpha=alpha, out=parameter)

        try:
            for _ in range(TRIALS):
                place(tried)
                loss = float(self._evaluate(closure, IgnoreBackward()))
                if alpha > 0:  # that was a second look, at the vertex
                    alpha = tried if loss < best else alpha
                    break
                bend = loss - value - slope * tried
                vertex = -slope * tried**2 / (2 * bend) if bend > 0 else math.inf
                if loss < value:
                    best, alpha = loss, tried
                    vertex = min(1.0, max(0.1 * tried, min(10 * tried, vertex)))
                    if 0.8 * tried <= vertex <= 1.25 * tried:
                        break
                else:
                    vertex = max(0.1 * tried, min(0.5 * tried, vertex)) if math.isfinite(loss) else 0.1 * tried
                    if -slope * vertex <= rounding:
                        break
                tried = vertex
        except BaseException:
            _restore(before)
            raise
        if alpha == 0:
            _restore(before)
        elif alpha != tried:
            place(alpha)
        memory["alpha"] = alpha or tried


def _restore(before: dict[nn.Parameter, Tensor]) -> None:
    for parameter, values in before.items():
        parameter.copy_(values)


def _targets(search: Search, index: slice | Tensor, derivatives: Tensor, dw: float) -> Tensor:
    """Return x* − x of some coordinates: searched where |∂L| < dw, else the gradient step."""
    if dw == math.inf:
        return search.steps(index, derivatives)
    searched = derivatives.abs() < dw
    if not search.costly:
        return torch.where(searched, search.steps(index, derivatives), -derivatives)
    steps, where = -derivatives, searched.nonzero()[:, 0]
    if len(where) == len(steps):
        return search.steps(index, derivatives)
    if len(where):
        positions = index[where] if isinstance(index, Tensor) else where + index.start
        steps[where] = search.steps(positions, derivatives[where])
    return steps


def _chunks(flat: Tensor, chosen: Tensor | None, size: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield flat positions and the entries there; entries that are not chosen become 0."""
    if chosen is not None:
        entries = flat[chosen]
        flat.zero_()
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size], entries[start : start + size]
        return
    for start in range(0, len(flat), size):
        index = slice(start, min(start + size, len(flat)))
        yield index, flat[index]


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values, NaN among them, and where they are, in no order."""
    count, every = min(count, len(values)), len(values) // 2**14
    where = None
    if values.is_cpu and every > 1:  # topk is slow there: leave out what is too small, going by a sample
        sample = values[::every]
        few = min(len(sample), 32 + 3 * count // (2 * every))
        where = values.less(sample.topk(few).values[-1]).logical_not_().nonzero()[:, 0]
    if where is None or len(where) < count:
        top = values.topk(count, sorted=False)
        return top.values, top.indices
    top = values[where].topk(count, sorted=False)
    return top.values, where[top.indices]


def _value_of(loss: Any) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(
            f"Expected the closure to return the loss as a scalar tensor, but got {got}. Return the mean over samples, "
            "say."
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(
            f"Expected the closure to return a finite loss, but got {value}. The parameters are those before the step. "
            "Look at the data, or lower `alpha` ('backtracking' keeps the loss from rising)."
        )
    return value


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _check(name: str, valid: bool, wanted: str, got: object, remedy: str = "Change the value") -> None:
    if not valid:
        raise ValueError(f"Expected argument `{name}` to be {wanted}, but got {got!r}. {remedy}.")
