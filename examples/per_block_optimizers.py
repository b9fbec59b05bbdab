"""Another optimizer for every block: Adam for the hidden layers, SGD with momentum for the output layer.

`optimizer=` takes a function from parameters to an optimizer, or a mapping from a regular expression for block
names to such functions; the first match wins. It replaces the optimizer of `configure_optimizers`.
"""

import argparse
from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import BCDCallback
from lightning_bcd.datamodules import DigitsDataModule
from lightning_bcd.models import MLPClassifier


def main() -> None:
    """Train with two kinds of optimizers and show which block has which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    seed_everything(0)
    model, data = MLPClassifier([64, 256, 256, 10]), DigitsDataModule()
    callback = BCDCallback(
        blocks="linear",
        strategy="backward",
        steps_per_block=20,
        optimizer={
            r"net\.output": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            ".*": partial(torch.optim.Adam, lr=1e-3),
        },
        optimizer_state="keep",
    )
    trainer = Trainer(max_epochs=options.epochs, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    trainer.test(model, data)
    for block, optimizer in zip(callback.blocks, trainer.optimizers[0].optimizers, strict=True):
        print(f"{block.name}: {type(optimizer).__name__}")


if __name__ == "__main__":
    main()
