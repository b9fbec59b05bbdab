"""dlADMM: time, memory and products of an iteration, against a port of the equations alone.

python examples/benchmarks/dladmm_sweep.py --data-dir DIR
python examples/benchmarks/dladmm_sweep.py --data-dir DIR --dataset fashion-mnist --samples 10000 --baseline-sweeps 2
python examples/benchmarks/dladmm_sweep.py --check

The baseline does the work of published code (Wang, Yu, Chen, Zhao, KDD 2019): every product is computed where it is
used, in the output step also in every iteration of FISTA; step lengths are found by trials that compare objective
values in the precision of the data, with value and gradient at the old point computed anew in every trial. Both begin
with the published settings: W, b ~ 0.1 N(0, 1), ρ = 1e-6, search start 1, output +1 on the label and −1 elsewhere,
output step by FISTA. The schedule of ρ, which needs the training loss, is left out of both. Every row runs in a process
of its own.

In exact arithmetic both have the same iterates: `--check` compares them in float64. In float32 the sums that a trial
compares often agree to all digits, and rounding decides how far the baseline goes on doubling.

Necessary work of an iteration, M_l = 2 d_l d_{l-1} N FLOPs: every layer's W is updated twice and every A twice, each
by a product for the gradient and one for the curvature along it: 4 M_1 + 8 Σ_{l≥2} M_l. Every 20th sweep computes the
held products anew, Σ M_l more. Peak memory means something from some 20,000 samples on.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from meters import CLOCKS, now, print_table, use_clock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_bcd import DLADMM, MLP, FashionMNISTDataModule, MNISTDataModule
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox import CrossEntropyLoss

DATASETS = {"mnist": MNISTDataModule, "fashion-mnist": FashionMNISTDataModule}
ROWS = ["baseline", "ours", "recommended"]
PIXELS, CLASSES = 784, 10
PUBLISHED_RHO = 1e-6
#: Doublings after which a float32 step is zero, whatever the gradient; not reached with finite numbers.
MOST_TRIALS = 400


class Baseline:
    """dlADMM from its equations: nothing is kept between two uses."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, *, rho: float, start: float = 1.0) -> None:
        linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
        self.w = [module.weight.detach().clone() for module in linear]
        self.b = [module.bias.detach().clone() for module in linear]
        self.x, self.y, self.rho, self.start, self.last = x, y, rho, start, len(linear) - 1
        self.z: list[Tensor] = []
        self.a: list[Tensor] = []
        for layer in range(self.last):
            self.z.append(self.product(layer))
            self.a.append(self.z[layer].relu())
        self.z.append(2 * y - 1)
        self.u = torch.zeros_like(y)
        self.trials = 0

    def below(self, layer: int) -> Tensor:
        """A_{l-1}."""
        return self.a[layer - 1] if layer else self.x

    def product(self, layer: int, w: Tensor | None = None, a: Tensor | None = None) -> Tensor:
        """A_{l-1} W_lᵀ + 1b_lᵀ."""
        return F.linear(self.below(layer) if a is None else a, self.w[layer] if w is None else w, self.b[layer])

    def target(self, layer: int) -> Tensor:
        """Z_l, for the last layer Z_L + U/ρ."""
        return self.z[layer] + self.u / self.rho if layer == self.last else self.z[layer]

    def value(self, layer: int, w: Tensor | None = None, a: Tensor | None = None) -> Tensor:
        """ρ/2 ‖target − P_l‖²."""
        return self.rho / 2 * (self.target(layer) - self.product(layer, w, a)).square().sum()

    def pull(self, layer: int) -> Tensor:
        """The derivative of that by P_l."""
        return self.rho * (self.product(layer) - self.target(layer))

    def sweep(self) -> None:
        """Backward, forward, dual."""
        last = self.last
        self.update_z_last()
        self.update_b(last)
        self.update_w(last)
        for layer in reversed(range(last)):
            self.update_a(layer)
            self.update_z(layer)
            self.update_b(layer)
            self.update_w(layer)
        for layer in range(last):
            self.update_w(layer)
            self.update_b(layer)
            self.update_z(layer)
            self.update_a(layer)
        self.update_w(last)
        self.update_b(last)
        self.update_z_last()
        self.u = self.u + self.rho * (self.z[last] - self.product(last))

    def update_z(self, layer: int) -> None:
        """The better of the minimisers for Z ≤ 0 and Z ≥ 0."""
        p, a = self.product(layer), self.a[layer]
        left, right = p.clamp(max=0), ((p + a) / 2).clamp(min=0)
        values = [(z - self.product(layer)).square() + (a - z.relu()).square() for z in (left, right)]
        self.z[layer] = torch.where(values[0] < values[1], left, right)

    def centre(self) -> Tensor:
        """P_L − U/ρ."""
        return self.product(self.last) - self.u / self.rho

    def update_z_last(self) -> None:
        """FISTA of the published code for R(Z; Y) + ρ/2 ‖Z − P_L + U/ρ‖², from the old Z."""
        eta = 4.0
        zeta = z = self.z[self.last]
        momentum, objective = 1.0, float("inf")
        for _ in range(500):
            before = objective
            fit = -(self.y * F.log_softmax(z, 1)).sum()
            objective = float(fit + self.rho / 2 * (z - self.centre()).square().sum())
            if abs(objective - before) < 1e-3:
                break
            grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            share, momentum = (1 - momentum) / grown, grown
            moved = (self.rho * self.centre() + z / eta - (z.softmax(1) - self.y)) / (self.rho + 1 / eta)
            z, zeta = (1 - share) * moved + share * zeta, moved
        self.z[self.last] = z

    def update_b(self, layer: int) -> None:
        """The exact minimiser."""
        self.b[layer] = self.b[layer] - self.pull(layer).mean(0) / self.rho

    def update_w(self, layer: int) -> None:
        """A gradient step."""
        self.w[layer] = self.search(
            lambda w: self.value(layer, w=w), lambda: self.pull(layer).T @ self.below(layer), self.w[layer]
        )

    def update_a(self, layer: int) -> None:
        """A gradient step."""
        image = self.z[layer].relu()
        self.a[layer] = self.search(
            lambda a: self.value(layer + 1, a=a) + self.rho / 2 * (a - image).square().sum(),
            lambda: self.pull(layer + 1) @ self.w[layer + 1] + self.rho * (self.a[layer] - image),
            self.a[layer],
        )

    def search(self, value: Callable[[Tensor], Tensor], gradient: Callable[[], Tensor], old: Tensor) -> Tensor:
        """The first trial with a quadratic of curvature θ = s, 2s, 4s … above the objective."""
        theta = self.start
        for _ in range(MOST_TRIALS):
            self.trials += 1
            slope = gradient()
            trial = old - slope / theta
            move = trial - old
            if value(trial) <= value(old) + (slope * move).sum() + theta / 2 * move.square().sum():
                return trial
            theta *= 2
        raise RuntimeError(f"Expected a trial to be accepted, but {MOST_TRIALS} were not. Check the data for NaN.")


class Ours:
    """`DLADMM` in a plain loop, with the interface of the baseline."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, algorithm: DLADMM) -> None:
        self.chain, self.loss, self.algorithm = Chain(net), CrossEntropyLoss(), algorithm
        self.state = algorithm.start(self.chain, x, y, Alone())
        self.z, self.a, (self.u,) = (self.state.variables[name] for name in ("z", "a", "u"))

    @property
    def w(self) -> list[Tensor]:
        """Weights."""
        return [stage.weight.detach() for stage in self.chain]

    @property
    def b(self) -> list[Tensor]:
        """Biases."""
        return [stage.bias.detach() for stage in self.chain if stage.bias is not None]

    def sweep(self) -> None:
        """Update every block."""
        self.algorithm.sweep(self.chain, self.state, self.loss, Alone())


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation and run it."""
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def published(net: nn.Module, x: Tensor, y: Tensor, rho: float = PUBLISHED_RHO) -> Ours:
    """Ours with the iterates of the baseline."""
    return Ours(net, x, y, DLADMM(preset="reference", rho=rho, rho_schedule="constant"))


@torch.no_grad()
def network(widths: Sequence[int]) -> nn.Module:
    """W, b ~ 0.1 N(0, 1), as published."""
    torch.manual_seed(0)
    net = MLP(list(widths))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def necessary_flops(widths: Sequence[int], samples: int) -> float:
    """4 M_1 + 8 Σ_{l≥2} M_l."""
    return sum((8 if layer else 4) * 2 * d * m * samples for layer, (d, m) in enumerate(pairwise(widths)))


def peak_bytes() -> int:
    """Largest memory of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


@torch.no_grad()
def run_row(row: str, options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Iterations from the start: seconds of each, peak memory, and the products of the last of them."""
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    x, labels = torch.load(file)
    y, net = F.one_hot(labels, CLASSES).float(), network(options.widths)
    before = peak_bytes()
    runner: Baseline | Ours
    if row == "baseline":
        runner = Baseline(net, x, y, rho=PUBLISHED_RHO)
    elif row == "ours":
        runner = published(net, x, y)
    else:
        algorithm = DLADMM(preset="recommended")
        algorithm.initialise(Chain(net), x, Alone())
        runner = Ours(net, x, y, algorithm)
    seconds = []
    for _ in range(options.baseline_sweeps if row == "baseline" else options.sweeps):
        products, flops, trials = Products(), FlopCounterMode(display=False), getattr(runner, "trials", 0)
        start = now()
        with flops, products:
            runner.sweep()
        seconds.append(now() - start)
    found = {"seconds": seconds, "peak": peak_bytes() - before, "products": products.count}
    found["flops"] = flops.get_total_flops()
    found["trials"] = getattr(runner, "trials", 0) - trials
    return found


@torch.no_grad()
def check() -> None:
    """Compare the baseline with `DLADMM(preset="reference")` in float64."""
    torch.manual_seed(0)
    net = MLP([7, 9, 8, 3]).double()
    x, y = torch.randn(40, 7).double(), F.one_hot(torch.randint(3, (40,)), 3).double()
    baseline = Baseline(net, x, y, rho=0.7)
    start = [*baseline.w, *baseline.b]
    ours = published(net, x, y, rho=0.7)
    for _ in range(8):
        baseline.sweep()
        ours.sweep()
    found, theirs = ([*run.w, *run.b, *run.z, *run.a, run.u] for run in (baseline, ours))
    gap = max(float((p - t).abs().max()) for p, t in zip(theirs, found, strict=True))
    moved = min(float((t - s).abs().max()) for t, s in zip(found, start, strict=False))
    print(f"8 iterations in float64: largest difference of W, b, Z, A, U {gap:.1e} ", end="")
    print(f"(every W and b moved by {moved:.1e} or more, {baseline.trials} trials)")
    if gap > 1e-8 or moved < 1e-3:
        raise SystemExit("The baseline and DLADMM differ, or did not move.")


def load(options: argparse.Namespace, file: Path) -> None:
    """Save images and labels, of a data set or random: reading them back leaves no trace in a process's peak memory."""
    torch.manual_seed(0)
    x, labels = torch.rand(options.samples, options.widths[0]), torch.randint(CLASSES, (options.samples,))
    if options.data_dir is not None:
        data = DATASETS[options.dataset](options.data_dir, flatten=True, val_fraction=0.0)
        data.setup("fit")
        assert data.train_set is not None
        if options.samples > len(data.train_set):
            raise ValueError(f"Expected at most {len(data.train_set)} samples, but got {options.samples}. Use fewer.")
        x, labels = (t.clone() for t in data.train_set[: options.samples])
    torch.save((x, labels), file)


def show(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the tables."""
    necessary = necessary_flops(options.widths, options.samples)
    table = [
        ["", "first iteration, s", "median, s", "trials", "products", "TFLOP", "of necessary", "peak above data, MB"]
    ]
    for row, run in found.items():
        times = (run["seconds"][0], statistics.median(run["seconds"]))
        share = run["flops"] / necessary
        cells = [*(f"{t:.2f}" for t in times), f"{run['trials']:,}" if run["trials"] else "", f"{run['products']:,}"]
        table.append([row, *cells, f"{run['flops'] / 1e12:.3f}", f"{share:.3f}", f"{run['peak'] / 1e6:.0f}"])
    print_table(table)
    print(f"Necessary: 4 M_1 + 8 Σ M_l = {necessary / 1e12:.3f} TFLOP. Trials and products are of the last iteration.")
    if {"baseline", "ours"} <= found.keys():
        table = [["baseline / ours", "time", "products", "FLOPs", "peak memory"]]
        for title, pick in (("first iteration", lambda s: s[0]), ("median", statistics.median)):
            times = pick(found["baseline"]["seconds"]) / pick(found["ours"]["seconds"])
            rest = (found["baseline"][key] / found["ours"][key] for key in ("products", "flops", "peak"))
            table.append([title, *(f"{value:.1f}" for value in (times, *rest))])
        print_table(table)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the IDX files; random numbers without")
    parser.add_argument("--dataset", choices=list(DATASETS), default="mnist")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[PIXELS, 1000, 1000, CLASSES])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--sweeps", type=int, default=3, help="iterations that are timed, from the start")
    parser.add_argument("--baseline-sweeps", type=int, default=1, help="the same, of the baseline")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help="cpu: processor time")
    parser.add_argument("--check", action="store_true", help="only compare the baseline with DLADMM")
    options = parser.parse_args()
    if min(options.sweeps, options.baseline_sweeps) < 1:
        parser.error("expected at least one iteration")
    if options.widths[-1] != CLASSES or (options.data_dir and options.widths[0] != PIXELS):
        parser.error(f"expected widths from {PIXELS} to {CLASSES}, but got {options.widths}")
    return options


def main() -> None:
    """Run every row in a process of its own and print what they found."""
    options = parse()
    if options.check:
        check()
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    source = DATASETS[options.dataset].title if options.data_dir else "random data"
    print(f"{options.samples:,} samples ({source}), {'-'.join(map(str, options.widths))}, ", end="")
    print(f"{options.threads} thread(s), PyTorch {torch.__version__}, {options.clock} clock\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.pt"

        def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                return pool.submit(function, *arguments, options, file).result()

        fresh(load)
        show({row: fresh(run_row, row) for row in options.rows}, options)


if __name__ == "__main__":
    main()
