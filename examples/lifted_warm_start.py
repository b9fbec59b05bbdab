"""Lifted warm start, then Adam, against Adam alone, at equal training time.

A few sweeps of three-splitting BCD train an ordinary network; Adam goes on with its parameters. Both ways get the same
seconds of training on the same machine; the table shows what each reached. Which is ahead depends on the data, the
network and the time given.
"""

import argparse
import time

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from torch import nn

from lightning_bcd import MLP, DigitsDataModule, LiftedModule, MNISTDataModule, ThreeSplitting


class AdamModule(LightningModule):
    """Any network, cross-entropy, Adam."""

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def accuracy(network: nn.Module, data) -> float:
    """Share of test images that are classified correctly."""
    x, y = data.test_set[:]
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


def quiet_trainer(**arguments) -> Trainer:
    """A Trainer that only trains."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", limit_val_batches=0, **quiet, **arguments)


def adam(network: nn.Module, data, options: argparse.Namespace, seconds: float) -> None:
    """Train with Adam for so many seconds."""
    timer = Timer(duration={"seconds": max(seconds, 1)}, interval="step")
    quiet_trainer(max_epochs=-1, callbacks=[timer]).fit(AdamModule(network, options.lr), data)


def main() -> None:
    """Train both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder with the MNIST IDX files; the digits of scikit-learn without it")
    parser.add_argument("--hidden", type=int, nargs="+", default=[100] * 5)
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of training, for each way, the sweeps included")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    make = (lambda size: MNISTDataModule(options.data_dir, size)) if options.data_dir else DigitsDataModule
    whole, batches = make(None), make(options.batch_size)
    for data in (whole, batches):
        data.setup()
    widths = [whole.num_features, *options.hidden, whole.num_classes]

    network = MLP(widths)
    start = time.perf_counter()
    quiet_trainer(max_epochs=options.sweeps).fit(LiftedModule(network, ThreeSplitting(preset="recommended")), whole)
    seconds = time.perf_counter() - start
    print(f"{options.sweeps} lifted sweeps: {seconds:.1f} s, test accuracy {accuracy(network, whole):.4f}")
    adam(network, batches, options, options.seconds - seconds)
    print(f"then Adam to {options.seconds:.0f} s: test accuracy {accuracy(network, whole):.4f}")

    alone = MLP(widths)
    adam(alone, batches, options, options.seconds)
    print(f"Adam alone for {options.seconds:.0f} s: test accuracy {accuracy(alone, whole):.4f}")


if __name__ == "__main__":
    main()
