"""Three-splitting BCD: time, memory, products and accuracy of the solves, against a port of the equations alone.

python examples/benchmarks/three_splitting_sweep.py --data-dir DIR
python examples/benchmarks/three_splitting_sweep.py --data-dir DIR --nets deep --monotone 40
python examples/benchmarks/three_splitting_sweep.py --check

The baseline does the work of published code (Zeng, Lau, Lin, Yao, ICML 2019): columns = samples, float32, explicit
inverses, every product computed where it is used. Every row runs in a process of its own, all rows in turns.

Necessary work per sweep, for N samples. One product with a layer of d inputs and m outputs is 2 d m N FLOPs (= G).

- Every layer: forward product V Wᵀ and cross product UᵀV, 2 G.
- Every layer but the first: Gram matrix VᵀV, 2 d² N, and V below it: back product T W, G, and solve product, 2 d² N.
  A square layer has 5 G in all. As the Gram matrix is symmetric, half of it would do: 4.5 G.
- The Gram matrix of the input is constant, and there is no V below the first layer: 2 G in all.
- A thin layer (m < d, the output layer): V = S + (T − S Wᵀ) K with a d × m matrix K, two products of G instead of back
  and solve product. Only the Gram matrix is not thin.

Matrices without N, elementwise work and factorisations are left out; what is executed is counted with the products
of small matrices. The baseline has 6 G per square layer: one more for the residual of the bias, with the old W.
Peak memory means something from some 20,000 samples on: smaller tensors share pages of the heap.
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
from meters import CLOCKS, now, print_table, size_of, use_clock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from lightning_bcd import MNISTDataModule
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.three_splitting import ThreeSplitting
from lightning_bcd.linalg import LeastSquares
from lightning_bcd.prox import SquaredLoss

#: Hidden widths and the published α.
NETS = {"deep": ([600] * 10, 1.0), "shallow": ([1500] * 3, 5.0)}
ROWS = ["baseline", "ours", "baseline-report", "ours-report", "residual"]
PIXELS, CLASSES = 784, 10


def network(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [module for d, m in pairwise(widths) for module in (nn.Linear(d, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Baseline:
    """Three-splitting from its equations: columns are samples, nothing is kept between two uses."""

    def __init__(
        self, net: nn.Sequential, x: Tensor, y: Tensor, *, alpha: float, gamma: float = 1, rho: float = 1
    ) -> None:
        linear = [module for module in net if isinstance(module, nn.Linear)]
        self.w = [module.weight.detach().clone() for module in linear]
        self.b = [module.bias.detach()[:, None].clone() for module in linear]
        self.x, self.y, self.alpha, self.gamma, self.rho = x.T, y.T, alpha, gamma, rho
        self.u: list[Tensor] = []
        self.v: list[Tensor] = []
        for layer in range(len(linear)):
            self.u.append(self.product(layer))
            self.v.append(self.u[layer].clone() if layer == len(linear) - 1 else self.u[layer].relu())

    def below(self, layer: int) -> Tensor:
        """V_{l-1}."""
        return self.v[layer - 1] if layer else self.x

    def product(self, layer: int) -> Tensor:
        """W V_{l-1} + b."""
        return self.w[layer] @ self.below(layer) + self.b[layer]

    def sweep(self) -> None:
        """Update every block once, last layer first."""
        alpha, gamma, rho, last = self.alpha, self.gamma, self.rho, len(self.w) - 1
        self.v[last] = (self.y + gamma * self.u[last] + alpha * self.v[last]) / (1 + gamma + alpha)
        self.u[last] = (gamma * self.v[last] + rho * self.product(last)) / (gamma + rho)
        self.update_wb(last)
        for layer in reversed(range(last)):
            w, b = self.w[layer + 1], self.b[layer + 1]
            inverse = torch.inverse(gamma * torch.eye(w.shape[1]).to(w) + rho * (w.T @ w))
            self.v[layer] = inverse @ (gamma * self.u[layer].relu() + rho * (w.T @ (self.u[layer + 1] - b)))
            centre = (rho * self.product(layer) + alpha * self.u[layer]) / (rho + alpha)
            self.u[layer] = relu_step(self.v[layer], centre, (rho + alpha) / gamma)
            self.update_wb(layer)

    def update_wb(self, layer: int) -> None:
        """W and b by regularised least squares, b with the old W."""
        u, v, w, b, alpha, rho = self.u[layer], self.below(layer), self.w[layer], self.b[layer], self.alpha, self.rho
        self.w[layer] = inverse_least_squares(u, v, w, b, alpha, rho)
        self.b[layer] = (alpha * b + rho * (u - w @ v).sum(1, keepdim=True)) / (rho * u.shape[1] + alpha)

    def report(self) -> tuple[float, float]:
        """Objective and training accuracy, with products of their own."""
        last = len(self.w) - 1
        objective = float((self.v[last] - self.y).square().sum()) / 2
        out = self.x
        for layer, (w, b, u, v) in enumerate(zip(self.w, self.b, self.u, self.v, strict=True)):
            objective += self.gamma / 2 * float((v - (u if layer == last else u.relu())).square().sum())
            objective += self.rho / 2 * float((u - self.product(layer)).square().sum())
            out = w @ out + b if layer == last else (w @ out + b).relu()
        return objective, int((out.argmax(0) == self.y.argmax(0)).sum()) / len(self.x.T)


def inverse_least_squares(u: Tensor, v: Tensor, w: Tensor, b: Tensor, alpha: float, rho: float = 1) -> Tensor:
    """(αW + ρ(U − b)Vᵀ)(αI + ρVVᵀ)⁻¹ with an explicit inverse; columns are samples."""
    inverse = torch.inverse(alpha * torch.eye(len(v)).to(v) + rho * (v @ v.T))
    return (alpha * w + rho * ((u - b) @ v.T)) @ inverse


def relu_step(a: Tensor, c: Tensor, g: float) -> Tensor:
    """argmin_u (a − max(u, 0))² + g (u − c)² by a mask for every region of the (a, c) plane."""
    kappa = 1 - ((1 + g) / g) ** 0.5
    right, left, zero = (a + g * c) / (1 + g), torch.minimum(c, torch.zeros_like(c)), torch.zeros_like(c)
    u = torch.where(a + g * c < 0, left, zero)
    u = torch.where(((a + g * c >= 0) & (c >= 0)) | ((kappa * a <= c) & (c < 0)), right, u)
    return torch.where((-a <= g * c) & (c < kappa * a), c, u)


class Ours:
    """`ThreeSplitting` in a plain loop, with the interface of the baseline."""

    def __init__(self, net: nn.Sequential, x: Tensor, y: Tensor, algorithm: ThreeSplitting) -> None:
        self.net, self.algorithm, self.chain, self.loss = net, algorithm, Chain(net), SquaredLoss()
        self.state = algorithm.start(self.chain, x, y, Alone())
        self.u, self.v = self.state.variables["u"], self.state.variables["v"]

    def sweep(self) -> None:
        """Update every block once."""
        self.last = self.algorithm.sweep(self.chain, self.state, self.loss, Alone())

    @torch.no_grad()
    def report(self) -> tuple[float, float]:
        """Objective, which the sweep has found, and training accuracy."""
        x, y = self.state.x, self.state.y
        chunks = self.state.rows(self.algorithm.rows_per_chunk(x))
        hits = [(self.net(x[rows]).argmax(1) == y[rows].argmax(1)).sum() for rows in chunks]
        return float(self.last.objective), int(torch.stack(hits).sum()) / len(x)


def necessary_flops(widths: Sequence[int], samples: int, gram: float = 1.0) -> float:
    """Necessary FLOPs of a sweep, see the top of this file; `gram` is the share of VᵀV that is counted."""
    total = 0.0
    for layer, (d, m) in enumerate(pairwise(widths)):
        total += 2 * d * m
        if layer:
            total += gram * d * d + (2 * d * m if m < d else d * m + d * d)
    return 2 * samples * total


def matmul_rate(rows: int, d: int, x: Tensor) -> float:
    """FLOPs per second of products (rows × d)(d × d), in the dtype, on the device and with the threads of x."""
    operands = {"a": torch.randn(rows, d).to(x), "b": torch.randn(d, d).to(x)}
    timer = Timer("a @ b", timer=now, globals=operands, num_threads=torch.get_num_threads())
    return 2 * rows * d * d / timer.blocked_autorange(min_run_time=2).median


def peak_bytes(device: str) -> int:
    """Largest memory so far: of the process, or what the allocator gave on a GPU."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def run_row(row: str, name: str, options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Sweeps after one that warms up: seconds, bytes, products, and (objective, accuracy) after each."""
    x, y = read(options, file)
    device, (widths, alpha) = x.device.type, network_of(name, options)
    algorithm = ThreeSplitting(gamma=1.0, rho=1.0, alpha=alpha, init="reference")
    before = peak_bytes(device)
    torch.manual_seed(0)
    net = network(widths).to(device)
    algorithm.initialise(Chain(net), x, Alone())
    runner = Baseline(net, x, y, alpha=alpha) if row.startswith("baseline") else Ours(net, x, y, algorithm)
    seconds, reported = [], []
    for _ in range(options.sweeps + 1):
        start = now()
        runner.sweep()
        if row.endswith("report"):
            reported.append(runner.report())
        seconds.append(now() - start)
    found = {"seconds": statistics.median(seconds[1:]), "state": size_of([*runner.u, *runner.v]), "reported": reported}
    found["peak"] = peak_bytes(device) - before
    if row == "baseline":  # its products follow from the shapes
        runner = Baseline(net.to("meta"), x.to("meta"), y.to("meta"), alpha=alpha)
    if row in ("baseline", "ours"):
        with FlopCounterMode(display=False) as counter:
            runner.sweep()
        found["flops"] = counter.get_total_flops()
        if row == "ours" and device == "cpu":  # Gram matrices are NumPy's there, half a product each
            found["flops"] += sum(len(x) * d * d for d in widths[1:-1])
        found["rate"] = matmul_rate(algorithm.rows_per_chunk(x), max(widths[1:]), x)
    return found


@torch.no_grad()
def residuals(options: argparse.Namespace, file: Path, d: int = 600) -> list[list[str]]:
    """Table of what a W-update leaves where it should leave nothing.

    U = V Wᵀ + 1bᵀ, V the ReLU features of a random network (W ~ 0.01 N(0, 1), b = 0.1). The values before the update
    are W and b themselves: they are the exact minimiser whatever α is. What is left is ½ ‖U − V W⁺ᵀ − 1b⁺ᵀ‖², a
    layer's term of the objective, evaluated in float64 with the float32 W⁺, b⁺; for W and b it is the rounding of U.
    """
    x, _ = read(options, file)
    table = [["layers below, N, α", "condition", "‖U‖²/2", "rounding", "inverse", "ours", "ours: ‖residual‖/‖U‖"]]
    for count in sorted({min(20_000, len(x)), len(x)}):
        torch.manual_seed(0)
        v = x[:count]
        for below in range(6):
            w, b = 0.01 * torch.randn(d, v.shape[1]).to(x), torch.full((d,), 0.1).to(x)
            u = F.linear(v, w, b)
            for alpha in (1.0, 0.1) if below in (2, 5) else ():
                sums = LeastSquares(d, d, x.device)
                for rows in zip(v.split(2048), u.split(2048), strict=True):
                    sums.add(*rows)
                w_ours, b_ours = (t.float() for t in sums.solve(w, b, rho=1.0, alpha=alpha))
                w_inverse = inverse_least_squares(u.T, v.T, w, b[:, None], alpha)
                b_inverse = (alpha * b + (u - v @ w.T).sum(0)) / (count + alpha)
                halves = [float(u.double().square().sum()) / 2]
                for solution in ((w, b), (w_inverse, b_inverse), (w_ours, b_ours)):
                    error = u.double() - F.linear(v.double(), *(t.double() for t in solution))
                    halves.append(float(error.square().sum()) / 2)
                eigenvalues = torch.linalg.eigvalsh(sums.gram).clamp_min(0) + alpha
                figures = [float(eigenvalues[-1] / eigenvalues[0]), *halves, (halves[-1] / halves[0]) ** 0.5]
                table.append([f"{below}, {count:,}, {alpha:g}", *(f"{figure:.1e}" for figure in figures)])
            v = u.relu()
    return table


def check() -> None:
    """Compare the baseline with `ThreeSplitting(bias_update="reference")` in float64."""
    torch.manual_seed(0)
    net = network([7, 9, 9, 5, 3]).double()
    x, y = torch.randn(40, 7).double(), F.one_hot(torch.randint(3, (40,)), 3).double()
    baseline = Baseline(net, x, y, gamma=0.8, rho=1.3, alpha=2.0)
    start = [*baseline.w, *baseline.b]
    ours = Ours(net, x, y, ThreeSplitting(gamma=0.8, rho=1.3, alpha=2.0, bias_update="reference", chunk_size=16))
    for _ in range(3):
        baseline.sweep()
        ours.sweep()
    found = [*baseline.w, *baseline.b]
    theirs = [stage.weight for stage in ours.chain] + [stage.bias for stage in ours.chain]
    gap = max(float((p.detach().view_as(t) - t).abs().max()) for p, t in zip(theirs, found, strict=True))
    moved = min(float((t - s).abs().max()) for t, s in zip(found, start, strict=True))
    (value, accuracy), (value_ours, accuracy_ours) = baseline.report(), ours.report()
    print(f"3 sweeps in float64: largest difference of a weight {gap:.1e} (every tensor moved by {moved:.1e} or more),")
    print(f"objective {value:.12g} and {value_ours:.12g}, training accuracy {accuracy:.3f} and {accuracy_ours:.3f}")
    if gap > 1e-8 or abs(value_ours / value - 1) > 1e-8 or moved < 1e-6 or accuracy != accuracy_ours:
        raise SystemExit("The baseline and ThreeSplitting differ, or did not move.")


def load(options: argparse.Namespace, file: Path) -> None:
    """Save images and labels, of MNIST or random: reading them back leaves no trace in a process's peak memory."""
    torch.manual_seed(0)
    x, labels = torch.rand(options.samples, PIXELS), torch.randint(CLASSES, (options.samples,))
    if options.data_dir is not None:
        data = MNISTDataModule(options.data_dir, flatten=True, val_fraction=0.0)
        data.setup("fit")
        assert data.train_set is not None
        if options.samples > len(data.train_set):
            raise ValueError(f"Expected at most {len(data.train_set)} samples, but got {options.samples}. Use fewer.")
        x, labels = (t.clone() for t in data.train_set[: options.samples])
    torch.save((x, labels), file)


def read(options: argparse.Namespace, file: Path) -> tuple[Tensor, Tensor]:
    """Prepare this process; return images and one-hot labels."""
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    x, labels = (t.to(options.device) for t in torch.load(file))
    y = F.one_hot(labels, CLASSES).float()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    return x, y


def network_of(name: str, options: argparse.Namespace) -> tuple[list[int], float]:
    """Widths, input and output included, and α."""
    hidden, alpha = NETS[name]
    return [PIXELS, *(max(1, round(d * options.width_scale)) for d in hidden), CLASSES], alpha


def spread(values: Sequence[float]) -> str:
    """Median, and the range in brackets if there is one."""
    bounds = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.3f}{bounds}"


def show(name: str, found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print the tables of one network."""
    table = [["", "sweep, s", "state, MB", "peak above data, MB", "objective", "training accuracy"]]
    for row, runs in found.items():
        sizes = (f"{max(run[key] for run in runs) / 1e6:.0f}" for key in ("state", "peak"))
        reported = (f"{value:.6g}" for value in runs[-1]["reported"][-1]) if row.endswith("report") else ("", "")
        table.append([row, spread([run["seconds"] for run in runs]), *sizes, *reported])
    print_table(table)
    table = [["baseline / ours", "time", "peak memory"]]
    for end, title in (("", "updates alone"), ("-report", "with objective and training accuracy")):
        if {"baseline" + end, "ours" + end} <= found.keys():
            pairs = list(zip(found["baseline" + end], found["ours" + end], strict=True))
            table.append([title, *(spread([a[key] / b[key] for a, b in pairs]) for key in ("seconds", "peak"))])
    if len(table) > 1:
        print_table(table)
    if "ours" in found:
        widths, flops = network_of(name, options)[0], found["ours"][-1]["flops"]
        counts = {f"necessary, VᵀV as {g:g} G": necessary_flops(widths, options.samples, g) for g in (1.0, 0.5)}
        counts |= {f"executed: {row}": found[row][-1]["flops"] for row in ("ours", "baseline") if row in found}
        rows = [[title, f"{count / 1e12:.4f}", f"{flops / count:.3f}"] for title, count in counts.items()]
        print_table([["products per sweep", "TFLOP", "ours / this"], *rows])
    for row in ("ours", "baseline"):
        for run in found.get(row, [])[-1:]:
            done, rate = run["flops"] / run["seconds"], run["rate"]
            print(f"{row}: {done / 1e9:.1f} GFLOP/s, {done / rate:.3f} of the rate of a float32 product of a ", end="")
            print(f"chunk with a square matrix ({rate / 1e9:.1f} GFLOP/s, measured after the sweeps)")
    for run in found.get("ours-report", [])[-1:]:
        values = [objective for objective, _ in run["reported"]]
        changes = [(new - old) / old for old, new in pairwise(values)]
        print(f"ours: objective {values[0]:.8g} after one sweep, {values[-1]:.8g} after {len(values)}; ", end="")
        print(f"{sum(c > 0 for c in changes)} rises, largest relative change {max(changes):+.1e}")
    print(flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the IDX files of MNIST; random numbers without")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--nets", default="deep,shallow")
    parser.add_argument("--width-scale", type=float, default=1.0, help="factor of the hidden widths, for a try-out")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--sweeps", type=int, default=2, help="timed sweeps, after one that warms up")
    parser.add_argument("--rounds", type=int, default=1, help="times every row is run, in turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--monotone", type=int, metavar="K", help="only K sweeps of ours-report: a rise?")
    parser.add_argument("--check", action="store_true", help="only compare the baseline with ThreeSplitting")
    options = parser.parse_args()
    options.nets, options.rows = options.nets.split(","), options.rows.split(",")
    for given, known in ((options.nets, NETS), (options.rows, ROWS)):
        if not set(given) <= set(known):
            parser.error(f"expected some of {', '.join(known)}, but got {', '.join(given)}")
    if options.monotone:
        options.rows, options.sweeps = ["ours-report"], options.monotone
    if options.sweeps < 1:
        parser.error(f"expected at least one sweep, but got {options.sweeps}")
    return options


def main() -> None:
    """Run every row in a process of its own and print what they found."""
    options = parse()
    if options.check:
        check()
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    source = "MNIST" if options.data_dir else "random data"
    print(f"{options.samples:,} samples ({source}), {options.device}, {options.threads} thread(s), ", end="")
    print(f"PyTorch {torch.__version__}, {options.clock} clock\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.pt"

        def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                return pool.submit(function, *arguments, options, file).result()

        fresh(load)
        rows = [row for row in options.rows if row != "residual"]
        for name in options.nets if rows else ():
            widths, alpha = network_of(name, options)
            print("-".join(map(str, widths)) + f", α = {alpha:g}\n", flush=True)
            found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
            for _ in range(options.rounds):
                for row, runs in found.items():
                    runs.append(fresh(run_row, row, name))
            show(name, found, options)
        if "residual" in options.rows:
            print("½ ‖U − V Wᵀ − 1bᵀ‖² after a W-update that should leave 0; W is 600 × 600:\n")
            print_table(fresh(residuals))


if __name__ == "__main__":
    main()
