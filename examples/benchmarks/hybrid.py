"""Hybrid coordinate descent on the experiment of its paper (arXiv 2408.01374), against gradient descent.

A two-layer ReLU network, hidden weights W ~ N(0, 1), output weights fixed, uniform on [-1, 1]; 10 samples on the unit
sphere in 1,000 dimensions, targets N(0, 1), L = 1/(2n) sum (f - y)^2. Only W is trained. One epoch is one step.

python examples/benchmarks/hybrid.py
python examples/benchmarks/hybrid.py --deep
python examples/benchmarks/hybrid.py --widths 16 --seeds 1 --epochs 3 --inputs 50
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from meters import CLOCKS, now, print_table, use_clock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from lightning_bcd import HybridCoordinateDescent
from lightning_bcd.datamodules import DigitsDataModule, MNISTDataModule

SAMPLES = 10


class TwoLayer(nn.Module):
    """The network of the paper."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.hidden, self.relu = nn.Linear(inputs, width, bias=False), nn.ReLU()
        self.output = nn.Linear(width, 1, bias=False).requires_grad_(False)
        nn.init.normal_(self.hidden.weight)
        nn.init.uniform_(self.output.weight, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.relu(self.hidden(x)))[:, 0]


@dataclass
class Problem:
    """A network, its data and its loss."""

    net: nn.Module
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def __call__(self) -> Tensor:
        """Evaluate the loss, with its graph."""
        return self.loss(self.net(self.x), self.y)

    def fresh(self) -> Problem:
        """Copy the network, keep the data."""
        return Problem(copy.deepcopy(self.net), self.x, self.y, self.loss)


def paper(inputs: int, width: int, seed: int) -> Problem:
    """Draw data and weights."""
    torch.manual_seed(seed)
    x, y = F.normalize(torch.randn(SAMPLES, inputs), dim=1), torch.randn(SAMPLES)
    return Problem(TwoLayer(inputs, width), x, y, lambda f, y: (f - y).square().sum() / (2 * SAMPLES))


def smoothness(problem: Problem) -> float:
    """Largest eigenvalue of the Gauss-Newton matrix at the start, by power iteration in the space of outputs."""
    weights = {name: p for name, p in problem.net.named_parameters() if p.requires_grad}

    def outputs(trained: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(problem.net, trained, (problem.x,))

    _, pull = torch.func.vjp(outputs, weights)
    v, norm = torch.ones(SAMPLES), torch.tensor(1.0)
    for _ in range(30):
        v = torch.func.jvp(outputs, (weights,), (pull(v)[0],))[1] / SAMPLES
        norm = v.norm()
        v = v / norm
    return float(norm.detach())


@dataclass
class Run:
    """What one training run measured."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # from the start to the end of each epoch
    peak: int = 0  # bytes allocated above the weights and data in one later epoch, plus the weights


def train(problem: Problem, make: Callable[[nn.Module], Optimizer], epochs: int, *, memory: bool = False) -> Run:
    """Train for some epochs; the memory is measured in one more."""
    optimizer = make(problem.net)
    hybrid = isinstance(optimizer, HybridCoordinateDescent)

    def closure() -> Tensor:
        if hybrid:
            return problem()
        optimizer.zero_grad()
        loss = problem()
        loss.backward()
        return loss

    run, elapsed = Run(), 0.0
    for _ in range(epochs):
        start = now()
        loss = optimizer.step(closure)
        elapsed += now() - start
        run.losses.append(float(loss.detach()))
        run.seconds.append(elapsed)
    run.losses.append(float(problem().detach()))
    if memory:
        optimizer.zero_grad()
        weights = sum(p.numel() * p.element_size() for p in problem.net.parameters())
        run.peak = weights + peak_bytes(lambda: optimizer.step(closure))
    return run


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` has allocated at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def methods(problem: Problem, thresholds: list[float], top: float) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Name every method of the comparison."""

    def trained(net: nn.Module) -> list[nn.Parameter]:
        return [p for p in net.parameters() if p.requires_grad]

    def descent(net: nn.Module, lr: float) -> Optimizer:
        return torch.optim.SGD(trained(net), lr=lr)

    def hybrid(net: nn.Module, **arguments: Any) -> Optimizer:
        return HybridCoordinateDescent(trained(net), model=net, **arguments)

    rows: dict[str, Callable[[nn.Module], Optimizer]] = {
        f"gradient descent, step {lr}": partial(descent, lr=lr) for lr in (0.01, 0.1)
    }
    rows["gradient descent, step 1/L"] = partial(descent, lr=1 / smoothness(problem))
    rows |= {f"hybrid, dw = {dw:g}": partial(hybrid, dw=dw) for dw in thresholds}
    if thresholds:
        count = max(1, round(top * sum(p.numel() for p in trained(problem.net))))
        greedy = partial(hybrid, dw=max(thresholds), selection="greedy", top_k=count)
        rows[f"hybrid, greedy, {top:.0%}, dw = {max(thresholds):g}"] = greedy
        rows[f"hybrid, local, dw = {max(thresholds):g}"] = partial(hybrid, dw=max(thresholds), search="local")
    return rows


def loss_at(run: Run, seconds: float) -> float:
    """Return the loss after the last epoch that ended within `seconds`."""
    return run.losses[sum(end <= seconds for end in run.seconds)]


def shallow(options: argparse.Namespace) -> None:
    """Print the tables of the paper's experiment: medians over seeds."""
    marks = sorted({e for e in (1, 2, 5, 10, 20, 50, options.epochs) if e <= options.epochs})
    for width in options.widths:
        runs: dict[str, list[Run]] = {}
        for seed in range(options.seeds):
            problem = paper(options.inputs, width, seed)
            for name, make in methods(problem, options.dw, options.top).items():
                # Gradient descent gets the seconds of the hybrid, too, for the loss at equal time.
                runs.setdefault(name, []).append(train(problem.fresh(), make, options.epochs, memory=seed == 0))
        descents = [name for name in runs if not name.startswith("hybrid")]
        hybrids = [found for name, found in runs.items() if name not in descents]
        limit = max(statistics.median(run.seconds[-1] for run in found) for found in hybrids)
        base = runs["gradient descent, step 0.1"]
        table = [
            [
                f"{width} neurons",
                *(f"loss, epoch {mark}" for mark in (0, *marks)),
                f"in {limit:.2g} s",
                "peak bytes (ratio)",
                "ms per epoch (ratio)",
            ]
        ]
        for name, found in runs.items():
            if name in descents:
                epochs = min(options.most, int(limit / found[0].seconds[-1] * options.epochs) + 1)
                problems = (paper(options.inputs, width, seed) for seed in range(options.seeds))
                reached = [train(problem, methods(problem, [], 0)[name], epochs).losses[-1] for problem in problems]
            else:
                reached = [loss_at(run, limit) for run in found]
            peak, seconds = found[0].peak, statistics.median(run.seconds[-1] for run in found)
            table.append(
                [
                    name,
                    *(f"{statistics.median(run.losses[mark] for run in found):.2g}" for mark in (0, *marks)),
                    f"{statistics.median(reached):.2g}",
                    f"{peak:,} ({peak / base[0].peak:.2f})",
                    f"{1e3 * seconds / options.epochs:.2f} "
                    f"({seconds / statistics.median(run.seconds[-1] for run in base):.1f})",
                ]
            )
        print_table(table)


def deep(options: argparse.Namespace) -> None:
    """Print the table of a deeper classifier on digits or MNIST: loss and accuracy on the training samples."""
    data = MNISTDataModule(options.data_dir) if options.data_dir else DigitsDataModule()
    data.prepare_data()
    data.setup("fit")
    samples = [data.train_dataloader().dataset[k] for k in range(options.samples)]
    x, y = torch.stack([torch.as_tensor(s[0]).flatten() for s in samples]), torch.tensor([int(s[1]) for s in samples])
    rows: dict[str, Callable[[nn.Module], Optimizer]] = {
        "gradient descent, step 0.1": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
        "gradient descent, step 1": lambda net: torch.optim.SGD(net.parameters(), lr=1.0),
        "Adam, 0.01": lambda net: torch.optim.Adam(net.parameters(), lr=0.01),
    }
    for selection in ("jacobi", "gauss_seidel"):
        for dw in options.dw:
            rows[f"hybrid, {selection}, dw = {dw:g}"] = partial(_deep_hybrid, dw=dw, selection=selection)
        local = partial(_deep_hybrid, dw=max(options.dw), selection=selection, search="local")
        rows[f"hybrid, {selection}, local, dw = {max(options.dw):g}"] = local
    table = [[f"{len(x)} samples", "loss, epoch 1", f"loss, epoch {options.epochs}", "accuracy", "ms per epoch"]]
    for name, make in rows.items():
        runs, accuracies = [], []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            widths = [x.shape[1], *options.hidden]
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            problem = Problem(nn.Sequential(*layers, nn.Linear(widths[-1], 10)), x, y, F.cross_entropy)
            runs.append(train(problem, make, options.epochs))
            accuracies.append(float((problem.net(x).argmax(dim=1) == y).float().mean()))
        table.append(
            [
                name,
                *(f"{statistics.median(run.losses[mark] for run in runs):.3g}" for mark in (1, options.epochs)),
                f"{statistics.median(accuracies):.3f}",
                f"{1e3 * statistics.median(run.seconds[-1] for run in runs) / options.epochs:.1f}",
            ]
        )
    print_table(table)


def _deep_hybrid(net: nn.Module, **arguments: Any) -> Optimizer:
    return HybridCoordinateDescent(net.parameters(), model=net, **arguments)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256, 1024], help="hidden neurons")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--dw", type=float, nargs="+", default=[0.001, 0.01, 0.1, 1.0])
    parser.add_argument("--top", type=float, default=0.01, help="share of the coordinates of the greedy selection")
    parser.add_argument("--most", type=int, default=20000, help="most epochs of gradient descent at equal time")
    parser.add_argument("--deep", action="store_true", help="a deeper classifier instead")
    parser.add_argument("--data-dir", help="folder of MNIST; scikit-learn's digits without")
    parser.add_argument("--samples", type=int, default=500, help="training samples of --deep")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 32], help="hidden layers of --deep")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu")
    options = parser.parse_args()
    use_clock(options.clock)
    (deep if options.deep else shallow)(options)


if __name__ == "__main__":
    main()
