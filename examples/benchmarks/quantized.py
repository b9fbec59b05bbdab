"""pdADMM-G-Q: bytes between layers and test accuracy with P and Q of 32, 16, 8 and 4 bits, on Cora and MNIST.

`--sweeps` sweeps of `PDADMMGQ(preset="recommended")` in full batches; "32 bits" is PDADMMG, float32 without a grid.
The grid spans three times the range of Q in the first forward pass. Bytes are those on the wire of one boundary in one
sweep: P in one direction, Q in the other. Networks of 2 layers, `--width` wide, on [X, ÂX, … Â⁴X] of Cora and on
`--samples` training images of MNIST. Accuracy is that at the end, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from meters import print_table
from torch import Tensor

from lightning_bcd import MLP, PDADMMG, PDADMMGQ, MNISTDataModule, PlanetoidDataModule
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.quantized import GridCodec
from lightning_bcd.prox import CrossEntropyLoss
from lightning_bcd.prox.penalties import UniformGrid

#: Data set → μ.
RIDGE = {"cora": 5.0, "mnist": 0.01}
Rows = tuple[Tensor, Tensor]


def load(options: argparse.Namespace, name: str) -> tuple[Rows, Rows, int]:
    """Training and test samples, and the number of classes."""
    data: Any
    if name == "mnist":
        data = MNISTDataModule(options.data_dir / "mnist", val_fraction=0, flatten=True)
    else:
        data = PlanetoidDataModule(options.data_dir / "planetoid", name=name, hops=4)
    data.setup()
    chosen = slice(options.samples if name == "mnist" else None)
    return data.train_set[chosen], data.test_set[:], data.num_classes


def train(options: argparse.Namespace, name: str, algorithm: PDADMMG, seed: int) -> float:
    """Test accuracy after the last sweep."""
    (x, labels), (test_x, test_labels), classes = load(options, name)
    torch.manual_seed(seed)
    network = MLP([x.shape[1], options.width, classes])
    chain, loss = Chain(network), CrossEntropyLoss()
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, loss.encode(labels, classes, x.dtype), Alone())
    for _ in range(options.sweeps):
        algorithm.sweep(chain, state, loss, Alone())
    with torch.no_grad():
        return float((network(test_x).argmax(1) == test_labels).float().mean())


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the folders mnist and planetoid")
    parser.add_argument("--data", nargs="+", choices=list(RIDGE), default=list(RIDGE))
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 16, 8, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--samples", type=int, default=10_000, help="training images of MNIST")
    parser.add_argument("--sweeps", type=int, default=60)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = [["data", "bits", "seeds", "test accuracy", "bytes per boundary and sweep (P + Q)", "of float32"]]
    for name in options.data:
        entries = len(load(options, name)[0][0]) * options.width
        for bits in options.bits:
            kind: dict[str, Any] = {} if bits == 32 else {"bits": bits, "quantize": "both"}
            algorithm = (PDADMMGQ if kind else PDADMMG)(preset="recommended", mu=RIDGE[name], **kind)
            found = [train(options, name, algorithm, seed) for seed in options.seeds]
            size = 2 * (GridCodec(UniformGrid(0.0, 1.0, 2**bits)).size(entries) if kind else 4 * entries)
            shown = f"{mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")
            table.append([name, str(bits), str(len(found)), shown, f"{size:,}", f"{size / (8 * entries):.3f}"])
            print(" | ".join(table[-1]), flush=True)
    print()
    print_table(table)


if __name__ == "__main__":
    main()
