"""Block coordinate descent against ordinary training: equal budgets, several seeds, a paired test.

The budget is counted in gradient evaluations: one forward and one backward pass over one mini-batch, which is also one
optimizer step. Both methods get the same number of them, on the same mini-batches in the same order, from the same
weights, with the same settings. Ordinary training is the case of one block of everything, in the same loop.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bcd.blocks import BlockSpec, LayerBlock, create_blocks_from_model
from lightning_bcd.coordinator import BlockCoordinateDescentCoordinator
from lightning_bcd.probe import GradientNormProbe
from lightning_bcd.scored_strategy import resolve_strategy
from lightning_bcd.strategy import BCDStrategy, CyclicStrategy

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Task:
    x: Tensor
    y: Tensor
    criterion: Criterion
    epochs: int
    batch_size: int
    optimizer_class: type[Optimizer]
    optimizer_kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    initial: float
    losses: list[float]
    update_norms: dict[str, list[float]]
    evaluations: int


def compare_training_methods(
    model: nn.Module,
    X_train: Tensor,
    y_train: Tensor,
    epochs: int = 50,
    lr: float = 0.01,
    verbose: bool = False,
    *,
    block_type: BlockSpec = "auto",
    strategy: str | BCDStrategy = "cyclic",
    steps_per_block: int = 1,
    optimizer_class: type[Optimizer] = torch.optim.Adam,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    criterion: Criterion | None = None,
    batch_size: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """Train copies of a model by block coordinate descent and as usual, at equal budgets, and compare.

    Each method takes epochs · ⌈N / batch_size⌉ gradient evaluations per seed. A seed fixes the weights (every
    module's `reset_parameters()` is called, frozen parameters excepted), the order of the mini-batches and
    dropout. The model and the global random state are left as they were.

    Args:
        model: Called as `model(x)`; copied, never trained itself.
        X_train: Inputs, shape (N, …).
        y_train: Targets. Floating point means regression: mean squared error, the shape of the model's output,
            where (N,) and (N, 1) count as the same. Integers mean classification: cross-entropy, classes
            0 … C − 1 of an output of shape (N, C, …).
        epochs: Passes over the data.
        lr: Learning rate of both methods.
        verbose: Whether to print a table at the end.
        block_type: See `create_blocks_from_model`; a list holds blocks of `model`.
        strategy: Name or object, see `resolve_strategy`. A name is seeded with each seed; an object is set up
            anew for each.
        steps_per_block: Optimizer steps before the block changes; visits go on across epochs.
        optimizer_class: Optimizer of both methods; BCD has one per block, which keeps its state.
        optimizer_kwargs: More arguments of the optimizer.
        criterion: Called as `criterion(output, y)`, returns a scalar; chosen by the type of `y_train` if None.
        batch_size: Samples per mini-batch; all if None.
        seeds: Different integers. The paired test needs at least two.
        tolerance: See `convergence_epoch`.

    Returns:
        A dictionary; `*` stands for `bcd` and `standard`. A loss is the criterion on the whole training set in
        evaluation mode.

            - `*_losses`, `*_losses_std`: mean and sample standard deviation (0 with one seed) over seeds, one
              number per epoch; `*_curves`: one such list of losses per seed.
            - `initial_loss`: the loss before training, mean over seeds, the same for both methods.
            - `*_convergence_epoch`: `convergence_epoch` of the mean curve.
            - `*_update_norms`: block name → ‖Δθ_block‖₂ of each epoch, in the units of the parameters, mean over
              seeds; 0 where the block was not trained.
            - `gradient_evaluations`: `{"bcd": n, "standard": n}`, per seed.
            - `final_loss_difference`: BCD minus standard, mean over seeds; `t_statistic`, `p_value`: paired
              two-sided t-test of it, NaN with one seed or when the difference is the same for all.
            - `seeds`: as given.

    Raises:
        ValueError: If an argument is out of range, data are empty, not finite or do not fit the model's output,
            the model cannot be divided into blocks, the optimizer evaluates several gradients per step
            (LBFGS), or a loss is not finite.
        TypeError: If data are not tensors or `y_train` has a type with no default criterion.
        ModuleNotFoundError: If there are several seeds and SciPy is not installed.

    Warns:
        UserWarning: If there are several seeds and nothing to re-initialise: all then start from equal weights.
    """
    _check_arguments(X_train, y_train, epochs, steps_per_block, batch_size, seeds, tolerance)
    names = {parameter: name for name, parameter in model.named_parameters()}
    partition = {
        block.name: [names[parameter] for parameter in block.parameters]
        for block in create_blocks_from_model(model, block_type)
    }
    device = next(iter(names)).device
    x, y = X_train.to(device), y_train.to(device)
    if criterion is None:
        criterion, y = _default_task(model, x, y)
    rows = min(batch_size or len(x), len(x))
    task = _Task(x, y, criterion, epochs, rows, optimizer_class, {"lr": lr, **(optimizer_kwargs or {})})
    bcd, standard, varied = [], [], len(seeds) == 1
    for seed in seeds:
        start = copy.deepcopy(model)
        with _random_state(device, seed):
            varied = _reinitialise(start) or varied
        rule = resolve_strategy(strategy, seed=seed)
        bcd.append(_train(task, start, partition, rule, steps_per_block, seed))
        standard.append(_train(task, start, partition, None, steps_per_block, seed))
    if not varied:
        message = "No trainable module of `model` has reset_parameters(): all seeds started from the weights given."
        warnings.warn(message, UserWarning, stacklevel=2)
    results = _summarise({"bcd": bcd, "standard": standard}, seeds, tolerance)
    if verbose:
        print(_table(results))
    return results


def convergence_epoch(initial_loss: float, losses: Sequence[float], tolerance: float = 0.01) -> int | None:
    """Return the first epoch from which on the loss stays close to its best.

    Close means loss ≤ best + tolerance · (initial_loss − best): at least 1 − tolerance of the best improvement.

    Args:
        initial_loss: Loss before training.
        losses: Loss after each epoch.
        tolerance: In [0, 1).

    Returns:
        The epoch, counted from 1; None if the last loss is not close, or there never was an improvement.
    """
    best = min((loss for loss in losses if math.isfinite(loss)), default=math.inf)
    if not best < initial_loss:
        return None
    limit = best + tolerance * (initial_loss - best)
    late = [epoch for epoch, loss in enumerate(losses, start=1) if not loss <= limit]
    first = late[-1] + 1 if late else 1
    return first if first <= len(losses) else None


def _train(
    task: _Task,
    start: nn.Module,
    partition: Mapping[str, Sequence[str]],
    strategy: BCDStrategy | None,
    steps_per_block: int,
    seed: int,
) -> _Run:
    """Train a copy of `start`; without a strategy all blocks are one."""
    model = copy.deepcopy(start)
    parameters = dict(model.named_parameters())
    blocks = [LayerBlock(name, [parameters[part] for part in parts]) for name, parts in partition.items()]
    trained = blocks if strategy is not None else [LayerBlock("all blocks", [p for b in blocks for p in b.parameters])]
    rule = strategy if strategy is not None else CyclicStrategy()
    rule.setup(len(trained), [block.num_parameters() for block in trained])
    coordinator = BlockCoordinateDescentCoordinator(trained, task.optimizer_class, task.optimizer_kwargs)
    if coordinator.optimizer.requires_closure:
        wanted, got = "an optimizer with one gradient evaluation per step", task.optimizer_class.__name__
        raise ValueError(_message("optimizer_class", wanted, got, "Use another one: the budgets could not be equal"))
    order = torch.Generator().manual_seed(seed)
    initial = _evaluate(task, model)
    losses: list[float] = []
    update_norms: dict[str, list[float]] = {name: [] for name in partition}
    steps = active = 0
    with _random_state(task.x.device, seed):
        for _ in range(task.epochs):
            before = [[p.detach().clone() for p in block.parameters] for block in blocks]
            model.train()
            for x, y in _batches(task, order):
                active = rule.next() if steps % steps_per_block == 0 else active
                steps += 1
                measure = steps % steps_per_block == 0 and rule.wants_scores()
                _step(coordinator, active, partial(_loss, task, model, x, y), rule if measure else None)
            for block, old in zip(blocks, before, strict=True):
                update_norms[block.name].append(_distance(block.parameters, old))
            losses.append(_evaluate(task, model))
    return _Run(initial, losses, update_norms, evaluations=steps)


def _loss(task: _Task, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return task.criterion(model(x), y)


def _step(
    coordinator: BlockCoordinateDescentCoordinator,
    active: int,
    loss: Callable[[], Tensor],
    observer: BCDStrategy | None,
) -> None:
    if observer is None:
        coordinator.step(active, closure=loss)
        return
    # The gradients of all blocks come from the backward pass that the step needs anyway: the budget stays equal.
    probe = GradientNormProbe(coordinator.blocks, active)

    def probed() -> Tensor:
        probe.arm()
        return loss()

    try:
        coordinator.step(active, closure=probed)
    finally:
        probe.disarm()
        for block in coordinator.blocks:
            block.unfreeze()
    observer.observe(probe.norms())


def _batches(task: _Task, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    if task.batch_size == len(task.x):
        yield task.x, task.y
        return
    rows = torch.randperm(len(task.x), generator=order).to(task.x.device)
    for part in torch.split(rows, task.batch_size):
        yield task.x[part], task.y[part]


@torch.no_grad()
def _evaluate(task: _Task, model: nn.Module) -> float:
    """Return the criterion over all samples: the mean over mini-batches, weighted by their sizes."""
    model.eval()
    parts = zip(torch.split(task.x, task.batch_size), torch.split(task.y, task.batch_size), strict=True)
    losses = [_loss(task, model, x, y).double() * len(x) for x, y in parts]
    return float(torch.stack(losses).sum()) / len(task.x)


def _distance(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> float:
    distances = [torch.dist(p.detach().double(), old.double()) for p, old in zip(parameters, before, strict=True)]
    return float(torch.linalg.vector_norm(torch.stack(distances)))


@contextmanager
def _random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generators a model on this device draws from, and put them back afterwards."""
    # torch.manual_seed would also reseed the devices that are not put back.
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    with torch.random.fork_rng(devices=[index] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield


def _reinitialise(model: nn.Module) -> bool:
    """Call `reset_parameters` where there is one; return whether a module with trainable parameters had it."""
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    found = False
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        # A module of which everything is frozen (pretrained) keeps its buffers too.
        if callable(reset) and any(p.requires_grad for p in module.parameters()):
            reset()
            found = True
    with torch.no_grad():
        for parameter, value in frozen:
            parameter.copy_(value)
    return found


def _default_task(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Criterion, Tensor]:
    """Choose the criterion by the type of the targets and make them fit the output's shape."""
    if y.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) and not y.is_floating_point():
        wanted, remedy = "floating point (regression) or integer (classification)", "Convert it, or pass `criterion`"
        raise TypeError(_message("y_train", wanted, y.dtype, remedy))
    with torch.no_grad(), _random_state(x.device, 0):
        output = copy.deepcopy(model).eval()(x[:1])
    if not isinstance(output, Tensor):
        raise TypeError(_message("model", "one that returns a tensor", type(output).__name__, "Pass `criterion`"))
    shape = tuple(output.shape[1:])
    if y.is_floating_point():
        if tuple(y.shape[1:]) != shape:
            # Broadcasting (N,) against (N, 1) would silently compare every sample with every other.
            if {tuple(y.shape[1:]), shape} != {(), (1,)}:
                raise ValueError(
                    _message("y_train", f"of shape (N, *{shape}), like the output", tuple(y.shape), "Reshape it")
                )
            y = y.reshape(len(y), *shape)
        return nn.functional.mse_loss, y.to(output.dtype)
    if len(shape) == 0 or tuple(y.shape[1:]) != shape[1:]:
        wanted = f"classes for an output of shape (N, *{shape})"
        raise ValueError(_message("y_train", wanted, f"shape {tuple(y.shape)}", "Use .float() for regression"))
    if not 0 <= int(y.min()) <= int(y.max()) < shape[0]:
        wanted, got = f"in 0 … {shape[0] - 1}, the classes of the output", f"{int(y.min())} … {int(y.max())}"
        raise ValueError(_message("y_train", wanted, got, "Renumber the classes or widen the last layer"))
    return nn.functional.cross_entropy, y.long()


def _message(name: str, wanted: str, got: object, remedy: str) -> str:
    return f"Expected argument `{name}` to be {wanted}, but got {got}. {remedy}."


def _check_arguments(
    x: Tensor,
    y: Tensor,
    epochs: int,
    steps_per_block: int,
    batch_size: int | None,
    seeds: Sequence[int],
    tolerance: float,
) -> None:
    for name, data in (("X_train", x), ("y_train", y)):
        if not isinstance(data, Tensor):
            raise TypeError(_message(name, "a tensor", type(data).__name__, "Convert it with torch.as_tensor"))
        if data.ndim == 0 or data.numel() == 0:
            raise ValueError(_message(name, "non-empty", f"shape {tuple(data.shape)}", "Pass one row per sample"))
        if bad := int((~torch.isfinite(data)).sum()):
            raise ValueError(_message(name, "finite", f"{bad} NaN or infinite value(s)", "Clean the data"))
    if len(x) != len(y):
        raise ValueError(_message("y_train", f"as long as `X_train` ({len(x)})", len(y), "Pass one target per sample"))
    for name, value in (("epochs", epochs), ("steps_per_block", steps_per_block), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(_message(name, "at least 1", value, "Choose a positive number"))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(_message("seeds", "one or more different integers", list(seeds), "Pass e.g. (0, 1, 2)"))
    if not 0 <= tolerance < 1:
        raise ValueError(_message("tolerance", "in [0, 1)", tolerance, "Use 0.01 for 1 %"))
    if len(seeds) > 1 and importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError(
            "The paired test over several seeds needs SciPy, which is not installed. Run: pip install "
            "'lightning-bcd[data]', or pass one seed."
        )


def _summarise(methods: Mapping[str, Sequence[_Run]], seeds: Sequence[int], tolerance: float) -> dict[str, Any]:
    first = methods["bcd"]
    initial = sum(run.initial for run in first) / len(first)
    results: dict[str, Any] = {"initial_loss": initial}
    for method, runs in methods.items():
        curves = torch.tensor([run.losses for run in runs], dtype=torch.float64)
        deviation = curves.std(0) if len(runs) > 1 else torch.zeros_like(curves[0])
        results[f"{method}_losses"] = curves.mean(0).tolist()
        results[f"{method}_losses_std"] = deviation.tolist()
        results[f"{method}_curves"] = [run.losses for run in runs]
        results[f"{method}_convergence_epoch"] = convergence_epoch(initial, results[f"{method}_losses"], tolerance)
        results[f"{method}_update_norms"] = {
            name: torch.tensor([run.update_norms[name] for run in runs], dtype=torch.float64).mean(0).tolist()
            for name in runs[0].update_norms
        }
    results["gradient_evaluations"] = {method: runs[0].evaluations for method, runs in methods.items()}
    final = [[run.losses[-1] for run in runs] for runs in methods.values()]
    results["final_loss_difference"] = results["bcd_losses"][-1] - results["standard_losses"][-1]
    results["t_statistic"], results["p_value"] = _paired_test(*final)
    results["seeds"] = list(seeds)
    return results


def _paired_test(first: list[float], second: list[float]) -> tuple[float, float]:
    if len({a - b for a, b in zip(first, second, strict=True)}) == 1:
        return math.nan, math.nan  # one seed, or no variance to compare with
    from scipy.stats import ttest_rel  # type: ignore[import-untyped]

    result = ttest_rel(first, second)
    return float(result.statistic), float(result.pvalue)


def _table(results: Mapping[str, Any]) -> str:
    rows = [("method", "final loss", "std", "converged at epoch", "gradient evaluations")]
    for method, evaluations in results["gradient_evaluations"].items():
        loss, deviation = results[f"{method}_losses"][-1], results[f"{method}_losses_std"][-1]
        epoch = results[f"{method}_convergence_epoch"]
        rows.append(
            (method, f"{loss:.4g}", f"{deviation:.2g}", "no" if epoch is None else str(epoch), str(evaluations))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"{len(results['seeds'])} seed(s), the same number of gradient evaluations for both methods and seeds")
    lines.append(f"bcd - standard: {results['final_loss_difference']:+.3g}, paired t-test p = {results['p_value']:.3g}")
    return "\n".join(lines)
