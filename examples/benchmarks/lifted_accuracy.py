"""Accuracy and time of three-splitting BCD on MNIST, beside Adam, with controls.

Rows, each for a net and a seed:

- `lifted`: `ThreeSplitting(preset="recommended")`, full batches, one sweep over 60,000 images per epoch.
- `frozen`: hidden layers stay as initialised; only the last layer is solved (least squares on its features).
- `adam`: Adam on the cross-entropy, batch 256, at each of the learning rates given; the best is tabulated.
- `warm`: a few lifted sweeps, then Adam.

Every row goes into a JSON file of its own in `--output`, so that rows can be run apart (also on several machines); the
table and the figure are made of all files there. Training time excludes evaluation; on a CPU it is processor time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bcd import MLP, MNISTDataModule, ThreeSplitting
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.linalg import LeastSquares
from lightning_bcd.prox import resolve_loss

NETS = {"deep": [784] + [600] * 10 + [10], "shallow": [784, 1500, 1500, 1500, 10], "tiny": [784, 60, 60, 10]}
LABELS = {
    "lifted": "three-splitting, recommended",
    "frozen": "random features, last layer solved",
    "adam": "Adam",
    "warm": "three-splitting, then Adam",
}


class Clock:
    """Seconds of training and the accuracy after each epoch."""

    def __init__(self, network: nn.Module, data: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.network, self.data = network, data
        self.seconds, self.curve = 0.0, []
        # Processor time on a CPU: with one thread it is that of an idle machine, whatever else runs.
        self.now = time.perf_counter if data["test"][0].is_cuda else time.process_time
        self.resume()

    def resume(self) -> None:
        """Go on counting."""
        self.since = self.now()

    def record(self) -> None:
        """Stop counting, evaluate, go on."""
        x, y = self.data["test"]
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds += self.now() - self.since
        with torch.no_grad():
            accuracy = (self.network(x).argmax(1) == y).float().mean()
        self.curve.append((self.seconds, float(accuracy)))
        self.resume()


def sweep(network: nn.Module, clock: Clock, sweeps: int) -> None:
    """Train by three-splitting."""
    x, labels = clock.data["train"]
    loss, chain = resolve_loss("squared"), Chain(network)
    algorithm = ThreeSplitting(preset="recommended")
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, loss.encode(labels, 10, x.dtype), Alone())
    for _ in range(sweeps):
        algorithm.sweep(chain, state, loss, Alone())
        clock.record()


def solve_last(network: nn.Module, clock: Clock) -> None:
    """Initialise like `sweep` and solve for the last layer alone."""
    x, labels = clock.data["train"]
    chain = Chain(network)
    ThreeSplitting(preset="recommended").initialise(chain, x, Alone())
    last = chain[-1]
    problem = LeastSquares(last.weight.shape[1], 10, x.device)
    for rows, targets in zip(x.split(2048), nn.functional.one_hot(labels, 10).float().split(2048), strict=True):
        *_, (_, features), _ = chain.forward(rows)
        problem.add(features, targets)
    w, b = problem.solve(last.weight, last.bias, rho=1.0, alpha=1e-3 * len(x) / 600, bias_update="joint")
    with torch.no_grad():
        last.weight.copy_(w)
        last.bias.copy_(b)
    clock.record()


def adam(network: nn.Module, clock: Clock, epochs: int, lr: float, seed: int) -> None:
    """Train by back-propagation."""
    x, y = clock.data["train"]
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
        clock.record()


def run(options: argparse.Namespace, net: str, row: str, seed: int, lr: float) -> dict[str, Any]:
    """One row."""
    data = MNISTDataModule(options.data_dir, val_fraction=0, flatten=True)
    data.setup()
    device = torch.device(options.device)
    sets = {"train": data.train_set[: options.samples], "test": data.test_set[:]}
    sets = {name: (x.to(device), y.to(device)) for name, (x, y) in sets.items()}
    torch.manual_seed(seed)
    network = MLP(NETS[net]).to(device)
    if row == "adam":
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
    clock = Clock(network, sets)
    if row == "frozen":
        solve_last(network, clock)
    if row in ("lifted", "warm"):
        sweep(network, clock, options.sweeps if row == "lifted" else options.warm_sweeps)
    if row in ("adam", "warm"):
        adam(network, clock, options.epochs, lr, seed)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "net": net,
        "row": row,
        "seed": seed,
        "lr": lr if row in ("adam", "warm") else None,
        "curve": clock.curve,
        "threads": torch.get_num_threads(),
        "machine": machine,
        "samples": len(sets["train"][0]),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table over all results."""
    head = (
        "| net | method | seeds | epochs | test accuracy | best | spread of last 10 | s per epoch | s to 0.94 | 0.97 |"
    )
    lines = [head]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str, float | None], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["net"], result["row"], result["lr"]), []).append(result)
    for (net, row, lr), members in sorted(groups.items(), key=str):
        final = [m["curve"][-1][1] for m in members]
        best = max(a for m in members for _, a in m["curve"])
        tails = [[a for _, a in m["curve"][-10:]] for m in members]
        spread = max(max(t) - min(t) for t in tails) if len(tails[0]) == 10 else None
        pace = [m["curve"][-1][0] / len(m["curve"]) for m in members]
        deviation = f" ± {statistics.stdev(final):.4f}" if len(final) > 1 else ""
        reached = [_time_to(members, level) for level in (0.94, 0.97)]
        name = LABELS[row] + (f", lr {lr:g}" if lr else "")
        lines.append(
            f"| {net} | {name} | {len(members)} | {len(members[0]['curve'])} | "
            f"{statistics.mean(final):.4f}{deviation} | {best:.4f} | {'' if spread is None else f'{spread:.4f}'} | "
            f"{statistics.mean(pace):.1f} | {reached[0]} | {reached[1]} |"
        )
    return "\n".join(lines)


def _time_to(members: list[dict[str, Any]], level: float) -> str:
    times = [next((t for t, a in m["curve"] if a >= level), None) for m in members]
    return f"{statistics.mean(times):.0f}" if None not in times else "not reached"  # type: ignore[type-var]


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over training time, one panel per net."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    nets = sorted({r["net"] for r in results})
    canvas, panels = plt.subplots(1, len(nets), figsize=(5.5 * len(nets), 4), squeeze=False, layout="constrained")
    colours = {"lifted": "tab:blue", "adam": "tab:orange", "warm": "tab:green", "frozen": "tab:gray"}
    for axes, net in zip(panels[0], nets, strict=True):
        shown = set()
        for result in (r for r in results if r["net"] == net):
            seconds, accuracy = zip(*result["curve"], strict=True)
            label = LABELS[result["row"]] if result["row"] not in shown else None
            shown.add(result["row"])
            if result["row"] == "frozen":
                axes.axhline(accuracy[-1], color=colours["frozen"], linestyle=":", label=label)
            else:
                axes.plot(seconds, accuracy, color=colours[result["row"]], label=label, linewidth=1, marker=".")
        axes.set(title=f"{net} net", xlabel="seconds of training", ylabel="test accuracy", ylim=(0.88, 1), xscale="log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    canvas.savefig(path, dpi=120)


def main() -> None:
    """Run the rows asked for, then print the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the MNIST IDX files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files and the figure")
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["deep", "shallow"])
    parser.add_argument("--rows", nargs="*", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--samples", type=int, default=60000)
    parser.add_argument("--sweeps", type=int, default=30)
    parser.add_argument("--warm-sweeps", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="of Adam")
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    for net in options.nets:
        for seed in options.seeds:
            for row in options.rows:
                for lr in options.lrs if row in ("adam", "warm") else [0.0]:
                    result = run(options, net, row, seed, lr)
                    name = f"{net}-{row}-{seed}" + (f"-{lr:g}" if lr else "")
                    (options.output / f"{name}.json").write_text(json.dumps(result))
                    print(f"{name}: {result['curve'][-1][1]:.4f} after {result['curve'][-1][0]:.0f} s", flush=True)
    results = [json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))]
    print(table(results))
    figure(results, options.output / "time_to_accuracy.png")


if __name__ == "__main__":
    main()
