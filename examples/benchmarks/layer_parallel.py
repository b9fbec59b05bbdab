"""pdADMM on several processes: predicted and measured speed-up, bytes per sweep.

python examples/benchmarks/layer_parallel.py                     # 10 layers of 1000, 2 processes of one thread each
python examples/benchmarks/layer_parallel.py --processes 1 2 4   # with at least as many cores

Predicted: seconds of every update of every layer, measured in one process, go through a simulation of the schedule:
what a process computes, when a message leaves, how long it travels (latency and bandwidth of this machine's gloo,
measured between two processes), and who waits for it. Measured: the same sweeps in several processes, wall clock. One
process per core, or the figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from meters import print_table

from lightning_bcd import MLP, PDADMM, PDADMMGQ, MNISTDataModule
from lightning_bcd.communicator import Alone, Communicator, balanced_groups
from lightning_bcd.distributed.exchange import LayerGroups
from lightning_bcd.lifted import pdadmm
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox import CrossEntropyLoss


def problem(options: argparse.Namespace) -> tuple[Chain, torch.Tensor, torch.Tensor]:
    """Network, images and one-hot labels: of MNIST, or random."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, labels = torch.rand(options.samples, 784), torch.randint(10, (options.samples,))
    if options.data_dir is not None:
        data = MNISTDataModule(options.data_dir, flatten=True, val_fraction=0.0)
        data.setup("fit")
        assert data.train_set is not None
        x, labels = (t.clone() for t in data.train_set[: options.samples])
    network = MLP([784, *[options.width] * (options.layers - 1), 10])
    return Chain(network), x, CrossEntropyLoss().encode(labels, 10, x.dtype)


def costs(chain: Chain) -> list[float]:
    """Products per layer; the input of the first is fixed."""
    return [(2 if layer else 1) * stage.weight.numel() for layer, stage in enumerate(chain)]


def run(options: argparse.Namespace, comm: Communicator) -> list[float]:
    """Wall seconds of every sweep after one that warms up."""
    chain, x, y = problem(options)
    algorithm = PDADMMGQ(rho=1e-3, init="he", bits=options.bits) if options.bits else PDADMM(rho=1e-3, init="he")
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, y, comm)
    algorithm.release(state, comm.layers(len(chain)))
    seconds = []
    for _ in range(options.sweeps + 1):
        start = time.perf_counter()
        algorithm.sweep(chain, state, CrossEntropyLoss(), comm)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def profile(options: argparse.Namespace) -> dict[str, list[float]]:
    """Median seconds of every update of every layer, in one process."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)

    class Timed(pdadmm.Sweep):
        pass

    def timed(name: str) -> Any:
        function = getattr(pdadmm.Sweep, name)

        def wrapper(self: Any, layer: int) -> None:
            start = time.perf_counter()
            function(self, layer)
            found[name, layer].append(time.perf_counter() - start)

        return wrapper

    for name in ("update_p", "update_w", "update_b", "update_z", "update_q", "update_u"):
        setattr(Timed, name, timed(name))
    original, pdadmm.Sweep = pdadmm.Sweep, Timed  # type: ignore[misc]
    try:
        run(options, Alone())
    finally:
        pdadmm.Sweep = original  # type: ignore[misc]
    phases: dict[str, list[float]] = {}
    for phase, names in {"p": ["p"], "wbz": ["w", "b", "z"], "qu": ["q", "u"]}.items():
        phases[phase] = [
            sum(statistics.median(found["update_" + name, layer][1:] or [0.0]) for name in names)
            for layer in range(options.layers)
        ]
    return phases


def simulate(
    phases: dict[str, list[float]], groups: Sequence[range], message: Sequence[float], sweeps: int = 20
) -> float:
    """Seconds per sweep of the schedule of `PDADMM.visit`; message: seconds for P or Q of each boundary."""
    count = len(groups)
    arrival_q = [0.0] * count  # when Q of the group below arrives
    done = [0.0] * count
    for _ in range(sweeps):
        after_p, arrival_p = [0.0] * count, [0.0] * (count + 1)
        for rank, group in enumerate(groups):
            inner = done[rank] + sum(phases["p"][layer] for layer in group[1:])
            after_p[rank] = max(inner, arrival_q[rank]) + (phases["p"][group[0]] if rank else 0.0)
            if rank:
                arrival_p[rank - 1] = after_p[rank] + message[group[0] - 1]
        for rank, group in enumerate(groups):
            middle = max(after_p[rank] + sum(phases["wbz"][layer] for layer in group), arrival_p[rank])
            done[rank] = middle + sum(phases["qu"][layer] for layer in group)
        for rank, group in enumerate(groups[:-1]):
            arrival_q[rank + 1] = done[rank] + message[group[-1]]
    return max(done) / sweeps


def worker(rank: int, size: int, options: argparse.Namespace, folder: str) -> None:
    """One process of a measured run; rank 0 also measures what a message costs."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    chain, *_ = problem(options)
    comm = LayerGroups(balanced_groups(costs(chain), size))
    dist.barrier()
    seconds = run(options, comm)
    comm.wait()
    message = {numbers: ping(rank, numbers) for numbers in (1, options.samples * options.width)}
    found = {"seconds": seconds, "sent": comm.sent / (options.sweeps + 1), "message": message}
    torch.save(found, Path(folder) / f"{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def ping(rank: int, numbers: int) -> float:
    """Seconds for a message of that many float32 numbers between ranks 0 and 1, half of a round trip."""
    buffer = torch.zeros(numbers)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        if rank == 0:
            dist.send(buffer, 1)
            dist.recv(buffer, 1)
        elif rank == 1:
            dist.recv(buffer, 0)
            dist.send(buffer, 0)
        seconds.append((time.perf_counter() - start) / 2)
    return statistics.median(seconds[1:])


def main() -> None:
    """Profile one process, predict, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the IDX files of MNIST; random numbers without")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--bits", type=int, help="quantise P and Q")
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="measured; must begin with 1")
    parser.add_argument("--port", type=int, default=29_511)
    options = parser.parse_args()
    if options.processes[0] != 1:
        parser.error(f"expected --processes to begin with 1, but got {options.processes}")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    print(f"{options.layers} layers of {options.width}, {options.samples:,} samples, float32, one thread per process, ")
    print(f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, PyTorch {torch.__version__}\n")
    phases = profile(options)
    table = [["seconds per sweep", *phases]]
    for layer in range(options.layers):
        table.append([f"layer {layer + 1}", *(f"{values[layer]:.4f}" for values in phases.values())])
    print_table(table)

    measured: dict[int, dict[str, Any]] = {1: {"seconds": run(options, Alone()), "sent": 0.0}}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.processes[1:]:
            mp.spawn(worker, (size, options, folder), nprocs=size)
            parts = [torch.load(Path(folder) / f"{size}-{rank}.pt") for rank in range(size)]
            seconds = [max(values) for values in zip(*(part["seconds"] for part in parts), strict=True)]
            measured[size] = {
                "seconds": seconds,
                "sent": sum(part["sent"] for part in parts),
                "message": parts[0]["message"],
            }
    latency, large = 1e-4, 0.0
    for found in measured.values():
        if "message" in found:
            latency, large = found["message"].values()
    sizes = f"{options.samples} × {options.width}"
    print(f"message: {latency * 1e6:.0f} µs empty, {large * 1e3:.1f} ms with {sizes} numbers\n")
    chain, *_ = problem(options)
    boundary = [large] * (options.layers - 1)
    serial = simulate(phases, balanced_groups(costs(chain), 1), boundary)
    table = [["processes", "predicted, s", "predicted speed-up", "measured, s", "measured speed-up", "bytes sent"]]
    base = statistics.median(measured[1]["seconds"])
    for size in range(1, options.layers + 1):
        predicted = simulate(phases, balanced_groups(costs(chain), size), boundary)
        row = [str(size), f"{predicted:.3f}", f"{serial / predicted:.2f}", "", "", ""]
        if size in measured:
            seconds = statistics.median(measured[size]["seconds"])
            row[3:] = [f"{seconds:.3f}", f"{base / seconds:.2f}", f"{measured[size]['sent']:,.0f}"]
        table.append(row)
    print_table(table)


if __name__ == "__main__":
    main()
