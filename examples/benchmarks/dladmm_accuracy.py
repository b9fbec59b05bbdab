"""Accuracy and time of dlADMM on MNIST and Fashion-MNIST, beside Adam, with controls.

Rows:

- `recommended`: `DLADMM(preset="recommended")`, full batches.
- `reference`: the published settings, ρ = 1e-6, W, b ~ 0.1 N(0, 1).
- `frozen`: hidden layers stay as `recommended` initialises them; only the last layer is solved, by ridge regression on
  its features.
- `adam`: Adam on the cross-entropy, learning rate 1e-3, batch 256.

Every row goes into a JSON file of its own in `--output`, so that rows can be run apart; it is written anew after every
sweep that is evaluated. The table is made of all files there. Training time excludes evaluation and is processor time.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meters import print_table
from torch import Tensor, nn

from lightning_bcd import DLADMM, MLP, FashionMNISTDataModule, MNISTDataModule
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.linalg import LeastSquares
from lightning_bcd.prox import CrossEntropyLoss

DATASETS = {"mnist": MNISTDataModule, "fashion-mnist": FashionMNISTDataModule}
LABELS = {
    "recommended": "dlADMM, recommended",
    "reference": "dlADMM, published settings",
    "frozen": "frozen features, last layer by ridge",
    "adam": "Adam",
}
CLASSES = 10
LEVELS = (0.9, 0.94, 0.96)
#: Ridge of the last layer per training image, chosen on 10,000 training images that were left out.
RIDGE = 1e-5


class Run:
    """A network in training: seconds, accuracy, and how far its layers moved; the file it is written to."""

    def __init__(self, options: argparse.Namespace, row: str) -> None:
        data = DATASETS[options.dataset](options.data_dir, val_fraction=0, flatten=True)
        data.setup()
        self.x, self.labels = data.train_set[: options.samples]
        self.test = data.test_set[:]
        torch.manual_seed(options.seed)
        self.network = MLP([self.x.shape[1], *options.hidden, CLASSES])
        self.file = options.output / f"{options.dataset}-{row}-{options.seed}.json"
        self.found = {"dataset": options.dataset, "row": row, "seed": options.seed, "samples": len(self.x)}
        self.found |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0

    @property
    def weights(self) -> list[Tensor]:
        """W of every layer."""
        return [module.weight.detach() for module in self.network.modules() if isinstance(module, nn.Linear)]

    def begin(self) -> None:
        """Measure from here."""
        self.start = [weight.clone() for weight in self.weights]
        self.since = time.process_time()

    @torch.no_grad()
    def record(self, epoch: int, every: int, **values: float) -> None:
        """Stop the clock, evaluate if it is time, go on."""
        self.seconds += time.process_time() - self.since
        if epoch <= 2 or epoch % every == 0:
            x, y = self.test
            accuracy = float((self.network(x).argmax(1) == y).float().mean())
            moved = [float((w - s).norm() / w.norm()) for w, s in zip(self.weights, self.start, strict=True)]
            point = {"epoch": epoch, "seconds": self.seconds, "accuracy": accuracy, "moved": moved}
            self.curve.append(point | values)
            self.file.write_text(json.dumps(self.found | {"curve": self.curve}))
        self.since = time.process_time()


def dladmm(run: Run, algorithm: DLADMM, options: argparse.Namespace) -> None:
    """Train by dlADMM."""
    loss, chain = CrossEntropyLoss(), Chain(run.network)
    algorithm.initialise(chain, run.x, Alone())
    run.begin()
    state = algorithm.start(chain, run.x, loss.encode(run.labels, CLASSES, run.x.dtype), Alone())
    for sweep in range(1, options.sweeps + 1):
        report = algorithm.sweep(chain, state, loss, Alone())
        run.record(sweep, options.every, objective=float(report.objective), data_fit=float(report.data_fit))


def recommended(run: Run, options: argparse.Namespace) -> None:
    """The best settings found."""
    dladmm(run, DLADMM(preset="recommended"), options)


@torch.no_grad()
def reference(run: Run, options: argparse.Namespace) -> None:
    """The published settings."""
    for parameter in run.network.parameters():
        nn.init.normal_(parameter, std=0.1)
    dladmm(run, DLADMM(preset="reference"), options)


@torch.no_grad()
def frozen(run: Run, options: argparse.Namespace) -> None:
    """Solve for the last layer alone."""
    chain = Chain(run.network)
    DLADMM(preset="recommended").initialise(chain, run.x, Alone())
    run.begin()
    last = chain[-1]
    problem = LeastSquares(last.weight.shape[1], CLASSES, run.x.device)
    targets = nn.functional.one_hot(run.labels, CLASSES).float()
    for rows, wanted in zip(run.x.split(2048), targets.split(2048), strict=True):
        *_, (_, features), _ = chain.forward(rows)
        problem.add(features, wanted)
    zero = torch.zeros_like(last.weight)
    w, b = problem.solve(zero, last.bias, rho=1.0, alpha=RIDGE * len(run.x), bias_update="joint")
    assert last.bias is not None
    assert b is not None
    last.weight.copy_(w)
    last.bias.copy_(b)
    run.record(1, 1)


def adam(run: Run, options: argparse.Namespace) -> None:
    """Train by back-propagation."""
    for module in run.network.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    run.begin()
    optimizer = torch.optim.Adam(run.network.parameters(), lr=1e-3)
    for epoch in range(1, options.epochs + 1):
        for rows in torch.randperm(len(run.x)).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(run.network(run.x[rows]), run.labels[rows]).backward()
            optimizer.step()
        run.record(epoch, 1)


TRAIN: dict[str, Callable[[Run, argparse.Namespace], None]] = {
    "recommended": recommended,
    "reference": reference,
    "frozen": frozen,
    "adam": adam,
}


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """One line per result."""
    marks = (10, 20, 50, 100)
    head = ["data", "method", "seed", "samples", *(f"after {mark}" for mark in marks), "last", "s per epoch"]
    lines = [[*head, *(f"s to {level}" for level in LEVELS), "‖W − W_0‖/‖W‖ per layer after 20 (or last)"]]
    for result in results:
        curve = result["curve"]
        at = {point["epoch"]: point for point in curve}
        marked = [f"{at[mark]['accuracy']:.4f}" if mark in at else "" for mark in marks]
        reached = [next((p["seconds"] for p in curve if p["accuracy"] >= level), None) for level in LEVELS]
        last = curve[-1]
        cells = [result["dataset"], LABELS[result["row"]], str(result["seed"]), f"{result['samples']:,}", *marked]
        cells += [f"{last['accuracy']:.4f} ({last['epoch']})", f"{last['seconds'] / last['epoch']:.1f}"]
        cells += ["not" if time is None else f"{time:.0f}" for time in reached]
        lines.append([*cells, " ".join(f"{moved:.1e}" for moved in at.get(20, last)["moved"])])
    return lines


def main() -> None:
    """Run the rows asked for, then print the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the IDX files")
    parser.add_argument("--dataset", choices=list(DATASETS), default="mnist")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--rows", nargs="*", choices=list(TRAIN), default=list(TRAIN))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1000, 1000])
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="sweeps between two evaluations")
    parser.add_argument("--epochs", type=int, default=5, help="of Adam")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    for row in options.rows:
        run = Run(options, row)
        TRAIN[row](run, options)
        print(f"{run.file.stem}: {run.curve[-1]['accuracy']:.4f} after {run.seconds:.0f} s", flush=True)
    print()
    print_table(table([json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))]))


if __name__ == "__main__":
    main()
