"""A LeNet-like convolutional network trained by three-splitting BCD in mini-batches, on MNIST.

Weights of all layers, convolutions too, are solved by least squares; activations in front of convolutions take
proximal gradient steps. Every mini-batch is one sweep; its auxiliary variables start from a forward pass.
"""

import argparse
import time

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

from lightning_bcd import LiftedModule, MNISTDataModule, ThreeSplitting


def lenet() -> nn.Sequential:
    """LeNet-5 with average pooling and ReLU."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with the MNIST IDX files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2000)
    parser.add_argument("--limit-batches", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seed_everything(options.seed, verbose=False)

    data = MNISTDataModule(options.data_dir, batch_size=options.batch_size, val_fraction=0)
    algorithm = ThreeSplitting(preset="recommended", init="he", momentum=0.0, inner_iterations=3, chunk_size=500)
    model = LiftedModule(lenet(), algorithm)
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        limit_train_batches=options.limit_batches,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    (result,) = trainer.test(model, data, verbose=False)
    print(f"{trainer.global_step} sweeps, {seconds:.0f} s, test accuracy {result['test_acc']:.4f}")


if __name__ == "__main__":
    main()
