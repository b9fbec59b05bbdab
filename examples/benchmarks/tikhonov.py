"""Tikhonov BCD on MNIST and Fashion-MNIST: accuracy, seconds per sweep, and a loop over samples beside it.

Rows (squared loss, full batches, two hidden layers of `--width`; each layer reads all before it, or with `chain` the
one before):

- `reference`: settings of a published re-implementation: γ = 1, θ_t = 1/t², damping 1, projected activations, dense.
- `frozen-dense`, `frozen-chain`: hidden layers stay random; only V is fitted, as in the next rows.
- `dense`, `chain`: `TikhonovBCD(preset="recommended")`.
- `adam`: the dense network by Adam on the cross-entropy, learning rate 1e-3, batch 256, `--epochs` epochs.

With `--svm` each is followed by a line with `classifier="svm"` at the end of the same training. Accuracies are those of
the plain forward pass after the last sweep, seconds processor time. `--loop` solves for the activations of some images
one by one, too.

python examples/benchmarks/tikhonov.py --data-dir DIR --svm
python examples/benchmarks/tikhonov.py --data-dir DIR --samples 10000 --test-samples 200 --sweeps 100
python examples/benchmarks/tikhonov.py --data-dir DIR --rows --loop
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from meters import print_table
from torch import Tensor

from lightning_bcd import DenseReLU, FashionMNISTDataModule, MNISTDataModule, TikhonovBCD
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.nonnegative import NonnegativeQuadratic
from lightning_bcd.prox import SquaredLoss

DATASETS = {"mnist": MNISTDataModule, "fashion-mnist": FashionMNISTDataModule}
ROWS = ("reference", "frozen-dense", "frozen-chain", "dense", "chain", "adam")
CLASSES = 10


def load(options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Training and test images."""
    data: Any = DATASETS[options.dataset](options.data_dir, val_fraction=0, flatten=True)
    data.setup()
    return [data.train_set[: options.samples], data.test_set[: options.test_samples]]


def train(options: argparse.Namespace, row: str) -> Iterator[list[str]]:
    """Train and yield lines of the table."""
    sets, loss = load(options), SquaredLoss()
    (x, labels), frozen = sets[0], row.startswith("frozen")
    torch.manual_seed(options.seed)
    connections: Any = "chain" if row.endswith("chain") else "dense"
    network = DenseReLU([x.shape[1], options.width, options.width, CLASSES], connections)
    preset: Any = "reference" if row == "reference" else "recommended"
    algorithm = TikhonovBCD(preset=preset)
    chain, sweeps = Chain(network), 1 if frozen else options.epochs if row == "adam" else options.sweeps
    algorithm.check(chain, loss)
    algorithm.initialise(chain, x, Alone())
    network.hidden.requires_grad_(not frozen)
    state = algorithm.start(chain, x, loss.encode(labels, CLASSES, x.dtype), Alone())
    start = time.process_time()
    if row == "adam":
        adam(network, x, labels, sweeps)
    else:
        for _ in range(sweeps):
            algorithm.sweep(chain, state, loss, Alone())
    seconds = f"{(time.process_time() - start) / sweeps:.2f}"

    def line(name: str, seconds: str) -> list[str]:
        with torch.no_grad():
            found = [f"{float((network(x).argmax(1) == y).float().mean()):.4f}" for x, y in sets]
        counts = [f"{len(x):,}" for x, _ in sets]
        return [options.dataset, name, str(options.width), *counts, "0" if frozen else str(sweeps), *found, seconds]

    yield line(row, "" if frozen else seconds)
    if options.svm and row != "adam":
        start = time.process_time()
        TikhonovBCD(classifier="svm", svm_c=options.svm_c).finish(chain, state, Alone())
        yield line(f"{row}, SVM", f"{time.process_time() - start:.0f} for V")


def adam(network: DenseReLU, x: Tensor, labels: Tensor, epochs: int) -> None:
    """Train by Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), labels[batch]).backward()
            optimizer.step()


def loop(options: argparse.Namespace) -> list[list[str]]:
    """Time the activations of one sweep, one image at a time and all at once: the problem of the first sweep."""
    from scipy.optimize import nnls

    x, labels = load(options)[0]
    width, gamma = options.width, TikhonovBCD().gamma
    torch.manual_seed(options.seed)
    w1, w2 = torch.empty(width, x.shape[1]), torch.empty(width, width)
    for w in (w1, w2):
        torch.nn.init.kaiming_normal_(w, nonlinearity="relu")
    v = torch.randn(CLASSES, width) / width**0.5
    # Chain: γ/2 ‖u_1 − W_1 x‖² + γ/2 ‖u_2 − W_2 u_1‖² + ½ ‖y − V u_2‖² = ½ uᵀH u − gᵀu + constant
    eye = gamma * torch.eye(width)
    top = torch.cat([eye + gamma * w2.T @ w2, -gamma * w2.T], dim=1)
    hessian = torch.cat([top, torch.cat([-gamma * w2, eye + v.T @ v], dim=1)]).double()
    y = SquaredLoss().encode(labels, CLASSES, x.dtype)
    g = torch.cat([gamma * x @ w1.T, y @ v], dim=1)
    few = g[: options.loop_samples]

    def singly(solve: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        start = time.process_time()
        found = torch.stack([solve(row) for row in few])
        return found, (time.process_time() - start) / len(few)

    def together(make: Callable[[], Callable[[Tensor], Tensor]]) -> tuple[Tensor, float]:
        start = time.process_time()
        solve = make()
        found = torch.cat([solve(rows) for rows in g.split(512)])
        return found, (time.process_time() - start) / len(g)

    root = torch.linalg.cholesky(hessian)

    def scipy_nnls(row: Tensor) -> Tensor:
        right = torch.linalg.solve_triangular(root, row.double()[:, None], upper=False)[:, 0]
        return torch.from_numpy(nnls(root.T.numpy(), right.numpy())[0]).float()

    def exact() -> Callable[[Tensor], Tensor]:
        solver = NonnegativeQuadratic(hessian, g.dtype)
        return lambda rows: solver(rows, torch.zeros_like(rows), rows, TikhonovBCD().iterations)

    def project() -> Callable[[Tensor], Tensor]:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).float()
        return lambda rows: (rows @ inverse).clamp_min_(0)

    single = hessian.float()
    table = []
    for name, one, all_at_once in (
        ("exact", scipy_nnls, exact),
        ("project", lambda row: torch.linalg.solve(single, row).clamp_min_(0), project),
    ):
        (wanted, each), (found, batched) = singly(one), together(all_at_once)
        error = float((found[: len(few)] - wanted).abs().max() / wanted.abs().max())
        numbers = [f"{2 * width:,}", f"{1e3 * each:.3g}", f"{1e3 * batched:.3g}", f"{each / batched:,.0f}"]
        table.append([name, *numbers, f"{error:.0e}"])
    return table


def main() -> None:
    """Run the rows asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the IDX files")
    parser.add_argument("--dataset", choices=list(DATASETS), default="mnist")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--test-samples", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--sweeps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5, help="of Adam")
    parser.add_argument("--svm", action="store_true", help="a line with an SVM as output layer for each row")
    parser.add_argument("--svm-c", type=float, default=1.0)
    parser.add_argument("--loop", action="store_true", help="time the activations one by one as well")
    parser.add_argument("--loop-samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = [["data", "method", "width", "training images", "test images", "sweeps or epochs"]]
    table[0] += ["training accuracy", "test accuracy", "s per sweep or epoch"]
    for row in options.rows:
        for line in train(options, row):
            table.append(line)
            print(" | ".join(line), flush=True)
    if options.rows:
        print()
        print_table(table)
    if options.loop:
        head = ["activations", "number", "ms per image, one by one", "ms, all at once", "ratio", "largest difference"]
        print_table([head, *loop(options)])


if __name__ == "__main__":
    main()
