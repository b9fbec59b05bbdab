"""Hybrid coordinate descent in a BCDModule: layer by layer, every weight by its own line search, no learning rate.

Each layer is a block with an optimizer of its own. Line searches trust their batch, so a batch holds all images.
"""

import argparse
from collections.abc import Iterable

from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_bcd import BCDModule, DigitsDataModule, HybridCoordinateDescent


class HybridClassifier(BCDModule):
    """A small network for the digits.

    Args:
        dw: Weights with a gradient of at least this size take a gradient step; the others are searched.
        search: `"global"` or `"local"`, see `HybridCoordinateDescent`.
        inner_steps: Optimizer steps per layer and epoch.
    """

    def __init__(self, dw: float = 1.0, search: str = "local", inner_steps: int = 1) -> None:
        super().__init__(blocks="linear", inner_steps=inner_steps, sweep="all", optimizer=self.make_optimizer)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimizer of one block."""
        return HybridCoordinateDescent(parameters, dw=self.hparams["dw"], search=self.hparams["search"], model=self.net)

    def block_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

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
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--search", choices=["global", "local"], default="local")
    options = parser.parse_args()

    seed_everything(0)
    model, data = HybridClassifier(search=options.search), DigitsDataModule(batch_size=None)
    trainer = Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(model, data)
    trainer.test(model, data)
    print({name: round(loss, 4) for name, loss in model.tracker.get_epoch_summary().items()})


if __name__ == "__main__":
    main()
