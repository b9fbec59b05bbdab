"""Train a digits classifier one block at a time: `callbacks=[...]` is all that differs from ordinary Lightning."""

import argparse

from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import BCDCallback
from lightning_bcd.datamodules import DigitsDataModule
from lightning_bcd.models import MLPClassifier

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20)
options = parser.parse_args()

seed_everything(0)
model, data = MLPClassifier([64, 256, 256, 10]), DigitsDataModule()
trainer = Trainer(max_epochs=options.epochs, callbacks=[BCDCallback(strategy="random", steps_per_block=20)])
trainer.fit(model, data)
trainer.test(model, data)  # the loss of every block: tensorboard --logdir lightning_logs
