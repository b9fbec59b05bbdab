"""Several steps per block on the same batch, with LBFGS for the output layer.

A BCDModule has its own training loop (manual optimization): you write `block_loss`, it visits a block, takes
`inner_steps` optimizer steps on it and goes on. Given the hidden layers, the output layer is a convex problem: a
good one for LBFGS, which evaluates `block_loss` as often as it likes.
"""

import argparse
from functools import partial
from typing import Literal

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bcd import BCDModule
from lightning_bcd.datamodules import DigitsDataModule


class ManualClassifier(BCDModule):
    """A small network for the digits.

    Args:
        inner_steps: Optimizer steps per visit.
        sweep: Visit one block per batch (`"block"`) or all of them (`"all"`).
        lr: Learning rate of Adam for the hidden layers.
    """

    def __init__(self, inner_steps: int = 2, sweep: Literal["block", "all"] = "all", lr: float = 1e-3) -> None:
        super().__init__(
            blocks="linear",
            strategy="cyclic",
            inner_steps=inner_steps,
            sweep=sweep,
            optimizer={
                r"net\.4": partial(torch.optim.LBFGS, max_iter=5, line_search_fn="strong_wolfe"),
                ".*": partial(torch.optim.Adam, lr=lr),
            },
        )
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def block_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy, with a little weight decay to keep the convex problem bounded."""
        x, y = batch
        return F.cross_entropy(self.net(x), y) + 1e-4 * self.net[4].weight.square().sum()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the validation accuracy."""
        self.log("val_acc", self._accuracy(batch), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the test accuracy."""
        self.log("test_acc", self._accuracy(batch))

    def _accuracy(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.net(x).argmax(dim=1) == y).float().mean()


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--inner-steps", type=int, default=2)
    options = parser.parse_args()

    seed_everything(0)
    # LBFGS trusts its batch: it should be large.
    model, data = ManualClassifier(inner_steps=options.inner_steps), DigitsDataModule(batch_size=256)
    trainer = Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    trainer.test(model, data)
    print({name: round(loss, 4) for name, loss in model.tracker.get_epoch_summary().items()})


if __name__ == "__main__":
    main()
