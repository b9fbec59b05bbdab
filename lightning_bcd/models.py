"""A ready-made classifier, for configuration files, the demo and first experiments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


class MLPClassifier(LightningModule):
    """A multilayer perceptron with ReLU, trained by Adam on the cross-entropy.

    With L layers::

        v_0 = x,   v_l = max(0, W_l v_{l-1} + b_l) for l < L,   logits = W_L v_{L-1} + b_L

    Batches are pairs (x, y): x of shape (N, …), flattened to (N, widths[0]); y of shape (N,), class indices.
    Logs `train_loss` per step and `val_loss`, `val_acc`, `test_loss`, `test_acc` (a share in [0, 1]) per epoch.

    Args:
        widths: Input size, hidden sizes, number of classes: at least two positive integers.
        lr: Learning rate of Adam, positive.

    Raises:
        ValueError: If `widths` is too short or an argument is not positive.
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 256, 10), lr: float = 1e-3) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"Expected argument `widths` to be at least two positive integers, but got {list(widths)}. Give the "
                "input size, the hidden sizes and the number of classes, e.g. [64, 256, 10]."
            )
        if lr <= 0:
            raise ValueError(f"Expected argument `lr` to be positive, but got {lr}. Adam's usual value is 0.001.")
        self.save_hyperparameters()
        self.lr = lr
        # Names instead of positions: blocks take them over.
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for index, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            if index < len(widths) - 1:
                layers[f"hidden{index}"] = nn.Linear(fan_in, fan_out)
                layers[f"relu{index}"] = nn.ReLU()
            else:
                layers["output"] = nn.Linear(fan_in, fan_out)
        self.net = nn.Sequential(layers)
        self.val_acc = MulticlassAccuracy(num_classes=widths[-1], average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=widths[-1], average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (N, widths[-1])."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_acc`."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `test_loss` and `test_acc`."""
        self._evaluate(batch, "test", self.test_acc)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        x, y = batch
        logits = self(x)
        accuracy(logits, y)
        self.log(f"{stage}_loss", F.cross_entropy(logits, y), batch_size=len(y))
        self.log(f"{stage}_acc", accuracy, prog_bar=True, batch_size=len(y))

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return the predicted classes, shape (N,); the batch may come with or without labels."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        return self(x).argmax(dim=1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)
