"""MNIST with a 784-500-500-500-10 network: block coordinate descent with Adam beside plain Adam.

Both runs take the same number of optimizer steps from the same weights on the same batches. `--data-dir` is the
folder with the four IDX files (train-images-idx3-ubyte.gz, ...).
"""

import argparse
import time

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_bcd import BCDCallback
from lightning_bcd.datamodules import MNISTDataModule
from lightning_bcd.models import MLPClassifier


class DecayingClassifier(MLPClassifier):
    """The MLP with a learning rate that falls linearly to zero; schedulers work as in any Lightning module."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def train(callbacks: list[Callback], options: argparse.Namespace) -> tuple[int, float, float]:
    """Train a fresh model; return its optimizer steps, seconds and test accuracy."""
    seed_everything(options.seed, verbose=False)
    make = MLPClassifier if options.constant_lr else DecayingClassifier
    model = make([784, 500, 500, 500, 10], lr=options.lr)
    # All 60,000 training images; test accuracy is looked at once, after the last epoch.
    data = MNISTDataModule(options.data_dir, batch_size=options.batch_size, val_fraction=0)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=callbacks,
        limit_train_batches=options.limit_batches,
        limit_test_batches=options.limit_batches,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    return trainer.global_step, seconds, trainer.test(model, data, verbose=False)[0]["test_acc"]


def main() -> None:
    """Train both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps-per-block", type=int, default=50)
    parser.add_argument("--warmup-steps", type=int, default=10, help="of BCD, after every switch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--constant-lr", action="store_true", help="instead of a linear fall to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-batches", type=int, help="batches per epoch and test, for a quick look")
    options = parser.parse_args()

    # A visit starts with fresh optimizer state; the warm-up keeps Adam's first steps in it small.
    bcd = BCDCallback(
        strategy="random",
        steps_per_block=options.steps_per_block,
        warmup_steps=options.warmup_steps,
        seed=options.seed,
    )
    methods: dict[str, list[Callback]] = {"BCD with Adam": [bcd], "Adam": []}
    print(f"{'method':<15}{'steps':>8}{'seconds':>10}{'test accuracy':>15}")
    for name, callbacks in methods.items():
        steps, seconds, accuracy = train(callbacks, options)
        print(f"{name:<15}{steps:>8}{seconds:>10.1f}{accuracy:>15.4f}")


if __name__ == "__main__":
    main()
