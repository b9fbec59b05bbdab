"""Networks with sign activations on MNIST: three-splitting BCD against the straight-through estimator with Adam.

The gradient of the sign is zero, so back-propagation cannot train what lies below it. The straight-through estimator
replaces it by that of hard tanh. Three-splitting needs no gradient: its sub-problem for the sign is solved exactly. The
third row keeps the hidden layers as initialised and solves the last layer.

A ridge on the last layer keeps its weights small, so that targets ask for large changes of the hidden activations:
otherwise no unit is ever asked to change its sign.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from lightning_bcd import MLP, MNISTDataModule, ThreeSplitting
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.linalg import LeastSquares
from lightning_bcd.prox import NoPenalty, Ridge, resolve_loss

Data = dict[str, tuple[Tensor, Tensor]]


class StraightThrough(torch.autograd.Function):
    """Sign forwards, hard tanh backwards (Hubara et al., Binarized Neural Networks, NeurIPS 2016)."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        """Return the sign, with sign(0) = +1."""
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype) * 2 - 1

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Pass the gradient where |u| ≤ 1."""
        (u,) = ctx.saved_tensors
        return gradient * (u.abs() <= 1)


class StraightThroughSign(nn.Module):
    """The module of it."""

    def forward(self, u: Tensor) -> Tensor:
        """Return the sign."""
        return StraightThrough.apply(u)


def accuracy(network: nn.Module, data: Data) -> float:
    """Share of test images that are classified correctly."""
    x, y = data["test"]
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


def lifted(data: Data, options: argparse.Namespace) -> float:
    """Three-splitting, full batches."""
    x, labels = data["train"]
    network = MLP(options.widths, activation="Sign")
    penalties = [NoPenalty()] * (len(options.widths) - 2) + [Ridge(options.ridge)]
    algorithm = ThreeSplitting(preset="recommended", init="orthogonal", weight_penalty=penalties)
    chain, loss = Chain(network), resolve_loss("squared")
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, loss.encode(labels, 10, x.dtype), Alone())
    for sweep in range(options.sweeps):
        algorithm.sweep(chain, state, loss, Alone())
        if options.verbose:
            print(f"sweep {sweep + 1}: {accuracy(network, data):.4f}", flush=True)
    refit(chain, data)
    return accuracy(network, data)


def frozen(data: Data, options: argparse.Namespace) -> float:
    """Random hidden layers, last layer solved."""
    chain = Chain(network := MLP(options.widths, activation="Sign"))
    ThreeSplitting(init="orthogonal").initialise(chain, data["train"][0], Alone())
    refit(chain, data)
    return accuracy(network, data)


def refit(chain: Chain, data: Data) -> None:
    """Solve the last layer on the features of a forward pass, by ridge regression."""
    x, labels = data["train"]
    last = chain[-1]
    problem = LeastSquares(last.weight.shape[1], 10, x.device)
    for rows, targets in zip(x.split(2048), nn.functional.one_hot(labels, 10).float().split(2048), strict=True):
        *_, (_, features), _ = chain.forward(rows)
        problem.add(features, targets)
    w, b = problem.solve(last.weight * 0, last.bias * 0, rho=1.0, alpha=1e-3 * len(x), bias_update="joint")
    with torch.no_grad():
        last.weight.copy_(w)
        last.bias.copy_(b)


def straight_through(data: Data, options: argparse.Namespace) -> float:
    """Adam with the straight-through estimator."""
    x, y = data["train"]
    modules: list[nn.Module] = []
    for index, (a, b) in enumerate(zip(options.widths, options.widths[1:], strict=False)):
        modules += [nn.Linear(a, b)] + ([StraightThroughSign()] if index < len(options.widths) - 2 else [])
    network = nn.Sequential(*modules)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.lr)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return accuracy(network, data)


ROWS = {
    "three-splitting": lifted,
    "random features, last layer solved": frozen,
    "straight-through estimator, Adam": straight_through,
}


def main() -> None:
    """Run all rows for all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the MNIST IDX files")
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 500, 500, 10])
    parser.add_argument("--samples", type=int, default=60000)
    parser.add_argument("--sweeps", type=int, default=20)
    parser.add_argument("--ridge", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=20, help="of Adam")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print the accuracy after every sweep")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = MNISTDataModule(options.data_dir, val_fraction=0, flatten=True)
    module.setup()
    data = {"train": module.train_set[: options.samples], "test": module.test_set[:]}
    print(f"| method, net {'-'.join(map(str, options.widths))} | test accuracy | seconds |\n|---|---|---|")
    for name, run in ROWS.items():
        found, start = [], time.perf_counter()
        for seed in options.seeds:
            torch.manual_seed(seed)
            found.append(run(data, options))
        spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
        seconds = (time.perf_counter() - start) / len(found)
        print(f"| {name} | {statistics.mean(found):.4f}{spread} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
