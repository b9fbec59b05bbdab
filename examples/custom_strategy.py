"""A selection rule of your own: subclass BCDStrategy and return an index from `select`.

The base class counts visits, owns a seeded random generator, saves both in checkpoints and makes sure that no block
waits for more than `coverage × blocks` visits. This rule draws large blocks more often.
"""

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import BCDCallback, BCDStrategy
from lightning_bcd.datamodules import DigitsDataModule
from lightning_bcd.models import MLPClassifier


class SizeStrategy(BCDStrategy):
    """Draws block b with a probability proportional to its number of parameters."""

    def select(self) -> int:
        """Return the next block."""
        sizes = torch.tensor(self.block_sizes, dtype=torch.float64)
        return int(torch.multinomial(sizes, 1, generator=self.generator))


def main() -> None:
    """Train and show how often each block was visited."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    seed_everything(0)
    model, data = MLPClassifier([64, 256, 256, 10]), DigitsDataModule()
    callback = BCDCallback(strategy=SizeStrategy(seed=0), steps_per_block=5)
    trainer = Trainer(max_epochs=options.epochs, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    trainer.test(model, data)
    for block, visits in zip(callback.blocks, callback.strategy.visits, strict=True):
        print(f"{block.name}: {block.num_parameters()} parameters, {visits} visits")


if __name__ == "__main__":
    main()
