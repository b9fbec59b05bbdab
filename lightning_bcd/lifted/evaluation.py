"""Forward pass, evaluation and logging of a lifted network: what needs no algorithm."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_bcd.compatibility import as_misconfiguration
from lightning_bcd.lifted.algorithm import LiftedAlgorithm, Report, precise
from lightning_bcd.lifted.batch import encode_targets, split_batch
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox.losses import Loss


class LiftedEvaluation(LightningModule):
    """The part of `LiftedModule` that uses the network by a plain forward pass.

    Args:
        network: The network.
        algorithm: The algorithm; it scales targets.
        loss: The loss.
    """

    def __init__(self, network: nn.Module, algorithm: LiftedAlgorithm, loss: Loss) -> None:
        super().__init__()
        self.chain = Chain(network)
        self.loss = loss
        algorithm.check(self.chain, loss)
        self.network = network
        self.algorithm = algorithm
        self.num_outputs = self.chain[-1].weight.shape[0]
        for name in ("train", "val", "test") if self.num_outputs > 1 else ():
            setattr(self, f"{name}_accuracy", MulticlassAccuracy(self.num_outputs, average="micro"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the network, N × outputs."""
        out: Tensor = self.network(x)
        return out

    def _log_report(self, report: Report, samples: int) -> None:
        values = {"lifted/objective": report.objective, "lifted/data_fit": report.data_fit}
        for index, stage in enumerate(self.chain):
            values[f"lifted/penalty/{stage.name}"] = report.of_stage(index)
            for name, residuals in report.residuals.items():
                key = "residual" if name == "linear" else f"{name}_residual"
                values[f"lifted/{key}/{stage.name}"] = residuals[index]
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": samples}
        # The report is summed over the processes already; the flag only keeps Lightning quiet.
        options["sync_dist"] = self.trainer.world_size > 1
        self.log("lifted/objective", values.pop("lifted/objective"), prog_bar=True, **options)
        self.log_dict(values, **options)

    def _log_train_accuracy(self, batch: Any) -> None:
        x, y = batch
        accuracy: MulticlassAccuracy | None = getattr(self, "train_accuracy", None)
        if accuracy is None or y.is_floating_point():
            return
        with precise(x.device):
            for rows, labels in zip(x.split(4096), y.split(4096), strict=True):
                accuracy.update(self.network(rows), labels)
        self.log("train_acc", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log `val_loss` (mean per sample) and `val_acc`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log `test_loss` and `test_acc`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        with as_misconfiguration():
            x, targets = split_batch(batch)
            outputs = self(x)
            y = encode_targets(targets, len(x), outputs.dtype, self.num_outputs, self.loss)
        loss = self.loss.value(outputs, self.algorithm.scale_targets(y)) / len(x)
        self.log(f"{stage}_loss", loss, batch_size=len(x), sync_dist=self.trainer.world_size > 1)
        accuracy: MulticlassAccuracy | None = getattr(self, f"{stage}_accuracy", None)
        if accuracy is not None and not targets.is_floating_point():
            accuracy(outputs, targets)
            self.log(f"{stage}_acc", accuracy, prog_bar=True, batch_size=len(x))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the outputs of the network, N × outputs; the batch may come with or without targets."""
        return self(batch if isinstance(batch, Tensor) else batch[0])  # type: ignore[no-any-return]
