"""mDLAM on Cora and Citeseer: objective against sweeps and seconds, with momentum and without.

Networks of 3 layers, 100 wide; ρ = 1e-3, 200 sweeps over all training nodes. Features: `powers`: [X, ÂX, … Â⁴X];
`published`: [X, (Â + I)X, … (Â + I)⁴X], the published ones, which are larger. Rows:

- `published`: the published settings: searched steps, FISTA, no momentum, W, b ~ 0.1 N(0, 1), Z_L = ±1.
- `published+momentum`: the same with Nesterov's momentum and the exact output step.
- `recommended`, `recommended-momentum`: `MDLAM(preset="recommended")`, and without momentum.

The objective is the problem's own, after the sweep. Test accuracies are those at the end, and those after the sweep
with the best validation accuracy. Seconds are processor time of the sweeps alone. `--figure` draws the objective of the
first seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from meters import print_table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_bcd import MDLAM, MLP, PlanetoidDataModule
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox import CrossEntropyLoss

HOPS = 4
PUBLISHED: dict[str, Any] = {"preset": "reference"}
ROWS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "published+momentum": PUBLISHED | {"momentum": True, "output_solver": "newton"},
    "recommended": {"preset": "recommended"},
    "recommended-momentum": {"preset": "recommended", "momentum": False},
}


def prepare(options: argparse.Namespace, name: str, features: str) -> PlanetoidDataModule:
    """The graph with these features: (Â + I)^k X = Σ_j C(k, j) Â^j X."""
    data = PlanetoidDataModule(options.data_dir, name=name, hops=HOPS)
    data.setup()
    if features == "published":
        for part in ("train_set", "val_set", "test_set"):
            x, y = getattr(data, part)[:]
            powers = x.chunk(HOPS + 1, dim=1)
            sums = [sum(math.comb(k, j) * powers[j] for j in range(k + 1)) for k in range(HOPS + 1)]
            setattr(data, part, TensorDataset(torch.cat(sums, dim=1), y))
    return data


def train(options: argparse.Namespace, data: PlanetoidDataModule, row: str, seed: int) -> list[dict[str, float]]:
    """Sweep, and note objective, seconds and accuracies after every one."""
    (x, y), *held_out = (part[:] for part in (data.train_set, data.val_set, data.test_set))
    torch.manual_seed(seed)
    network = MLP([data.num_features, options.width, options.width, data.num_classes])
    loss, chain, algorithm = CrossEntropyLoss(), Chain(network), MDLAM(**ROWS[row])
    if row.startswith("published"):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, loss.encode(y, data.num_classes, x.dtype), Alone())
    curve, seconds = [], 0.0
    for _ in range(options.sweeps):
        start = time.process_time()
        objective = float(algorithm.sweep(chain, state, loss, Alone()).objective)
        seconds += time.process_time() - start
        validation, test = (accuracy(network, *part) for part in held_out)
        curve.append({"objective": objective, "seconds": seconds, "validation": validation, "test": test})
    return curve


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of correct classes."""
    return float((network(x).argmax(1) == y).float().mean())


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def line(graph: str, row: str, curves: list[list[dict[str, float]]], marks: list[int]) -> list[str]:
    """Line of the table."""
    objectives = [f"{mean(curve[mark - 1]['objective'] for curve in curves):.3g}" for mark in marks]
    chosen = [max(curve, key=lambda point: point["validation"])["test"] for curve in curves]
    pace = mean(curve[-1]["seconds"] / len(curve) for curve in curves)
    ends = [curve[-1]["test"] for curve in curves]
    return [graph, row, str(len(curves)), *objectives, f"{pace:.3f}", spread(ends), spread(chosen)]


def draw(path: Path, curves: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    """Objective against seconds, one panel per graph."""
    from matplotlib.figure import Figure

    graphs = list(dict.fromkeys(graph for graph, _ in curves))
    figure = Figure(figsize=(10, 3.6 * math.ceil(len(graphs) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(graphs) / 2), 2, squeeze=False).flat
    for axes, graph in zip(panels, graphs, strict=False):
        for (name, row), curve in curves.items():
            if name == graph:
                style = "-" if row in ("published+momentum", "recommended") else "--"
                axes.semilogy([p["seconds"] for p in curve], [p["objective"] for p in curve], style, label=row)
        axes.set(title=graph, xlabel="processor seconds", ylabel="objective")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with cora.npz and citeseer.npz")
    parser.add_argument("--graphs", nargs="+", choices=PlanetoidDataModule.names, default=["cora", "citeseer"])
    parser.add_argument("--features", nargs="+", choices=["powers", "published"], default=["powers", "published"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="file to draw into")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    marks = sorted({mark for mark in (1, 10, 40, 100) if mark < options.sweeps} | {options.sweeps})
    head = ["graph, features", "row", "seeds", *(f"objective after {mark}" for mark in marks), "s per sweep"]
    table = [[*head, "test at the end", "test at best validation"]]
    first = {}
    for name, features in itertools.product(options.graphs, options.features):
        data, graph = prepare(options, name, features), f"{name}, {features}"
        for row in options.rows:
            curves = [train(options, data, row, seed) for seed in options.seeds]
            first[graph, row] = curves[0]
            table.append(line(graph, row, curves, marks))
            print(" | ".join(table[-1]), flush=True)
    print()
    print_table(table)
    if options.figure is not None:
        draw(options.figure, first)


if __name__ == "__main__":
    main()
