"""Per-block losses and norms: kept, averaged, plotted and written to every logger of a Trainer."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_bcd.report import VisitReport
from lightning_bcd.scheduler import BlockScheduler

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure

#: Columns of the update-norm image; older visits are left out so that a column stays visible.
IMAGE_VISITS = 256


class BlockLossTracker:
    """Loss of each block over time.

    In a plain loop call `record` after every step and `get_epoch_summary` after every epoch. `BCDCallback` and
    `BCDModule` own one that also writes to the Trainer's loggers.

    Args:
        num_blocks: Number of blocks; they are then called `block_0`, `block_1`, …
        names: Names of the blocks instead.

    Attributes:
        names: Block names.
        losses: Block name → list of (step, loss) pairs.
        report: Visits, steps, seconds and loss decrease per block.
        update_norms: One (block index, step, ‖Δθ‖₂) triple per visit; NaN when the visit was resumed or the parameters
            are sharded over ranks.

    Raises:
        ValueError: If both or neither argument is given, or names repeat.

    Example:
        >>> from lightning_bcd import BlockLossTracker
        >>> tracker = BlockLossTracker(num_blocks=2)
        >>> for loss in (3.0, 1.0):
        ...     tracker.record(0, loss)
        >>> tracker.get_epoch_summary()
        {'block_0': 2.0, 'block_1': nan}
    """

    def __init__(self, num_blocks: int | None = None, names: Sequence[str] | None = None) -> None:
        if (num_blocks is None) == (names is None):
            raise ValueError(
                f"Expected either `num_blocks` or `names`, but got num_blocks={num_blocks} and names={names}. "
                "Pass one of them."
            )
        self.names = list(names) if names is not None else [f"block_{i}" for i in range(num_blocks or 0)]
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"Expected at least one block and different names, but got {self.names}. Rename the blocks."
            )
        # No NaN check: it would wait for the device at every step.
        self._means = [MeanMetric(nan_strategy="disable") for _ in self.names]
        self._epoch_over = False
        self._records = 0
        self.losses: dict[str, list[tuple[int, float]]] = {name: [] for name in self.names}
        self.update_norms: list[tuple[int, int, float]] = []
        self._log_every = 1
        self._due = True
        self._since_write = [0] * len(self.names)
        self.report = VisitReport(self.names)
        self._snapshot: list[Tensor] | None = None
        self._shown = ""

    # -- a plain loop -------------------------------------------------------------------------------------

    def record(self, block_idx: int, loss: float | Tensor, step: int | None = None) -> None:
        """Add a loss of one block to its curve and to its epoch mean.

        Args:
            block_idx: Index of the block.
            loss: The loss, a number or a tensor with one element.
            step: Position on the x-axis; the number of records so far if None.

        Raises:
            IndexError: If there is no such block.
        """
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._add_to_mean(block_idx, loss)
        self.losses[self.names[block_idx]].append((self._records - 1 if step is None else step, float(loss)))

    def _add_to_mean(self, block_idx: int, loss: float | Tensor) -> None:
        if not 0 <= block_idx < len(self.names):
            raise IndexError(
                f"Expected argument `block_idx` to be in range({len(self.names)}), but got {block_idx}. Use the "
                "index of the block in the list the tracker was made for."
            )
        if self._epoch_over:
            self.start_epoch()
        self._records += 1
        self._means[block_idx].update(loss)

    def start_epoch(self) -> None:
        """Forget the means of the last epoch; the first record after a summary does it by itself."""
        for mean in self._means:
            mean.reset()
        self._epoch_over = False

    def get_epoch_summary(self) -> dict[str, float]:
        """Return the mean loss of every block in this epoch and end the epoch.

        The next `record` starts a new epoch. In a distributed run the mean is over all ranks; every rank must
        make the call.

        Returns:
            Block name → mean loss; NaN for a block without record.
        """
        self._epoch_over = True
        # MeanMetric warns when nothing was recorded; the ranks agree on the block, so they agree on this too.
        return {
            name: float(mean.compute()) if mean.update_called else math.nan
            for name, mean in zip(self.names, self._means, strict=True)
        }

    def plot_block_losses(self, path: str | None = None) -> Figure:
        """Plot the loss curve of every block.

        Args:
            path: Where to save a PNG, if given.

        Returns:
            The Matplotlib figure.
        """
        from lightning_bcd.plotting import plot_block_losses

        return plot_block_losses(self.losses, path=path)

    # -- a Trainer ----------------------------------------------------------------------------------------

    def attach(self, trainer: Trainer) -> None:
        """Prepare the loggers and the progress bar of a run."""
        for mean in self._means:
            mean.to(trainer.strategy.root_device)
        self._log_every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            for experiment in _tensorboard_writers(trainer):
                experiment.add_custom_scalars(
                    {"bcd": {"loss per block": ["Multiline", [r"bcd/loss/.*"]]}},
                )
        bar = trainer.progress_bar_callback
        if bar is not None:
            metrics = bar.get_metrics

            # The bar shows what get_metrics returns, and a logged metric cannot be a name.
            def with_block(
                trainer: Trainer, pl_module: LightningModule
            ) -> dict[str, int | str | float | dict[str, float]]:
                return {**metrics(trainer, pl_module), "block": self._shown}

            bar.get_metrics = with_block  # type: ignore[method-assign]

    def detach(self, trainer: Trainer) -> None:
        """Undo what `attach` changed; safe to call twice."""
        bar = trainer.progress_bar_callback
        if bar is not None:
            vars(bar).pop("get_metrics", None)
        self._snapshot = None

    def start_visit(self, trainer: Trainer, run: BlockScheduler, *, thin: bool = False) -> None:
        """Note that a block became active.

        Args:
            trainer: The Trainer.
            run: The scheduler, right after `begin_visit`.
            thin: Visits are so short that only one in every `log_every_n_steps` steps of a block is written;
                otherwise every visit is.
        """
        block_idx = _active(run)
        self.show(block_idx)
        self.report.begin_visit()
        self._due = not thin or self._since_write[block_idx] + run.steps_per_block >= self._log_every
        # On the host, so that the device holds no second copy of the block.
        # Not of DTensors (FSDP2), which hold one piece per rank.
        wanted = self._due and bool(trainer.loggers) and not any(hasattr(p, "to_local") for p in run.block.parameters)
        self._snapshot = [_on_host(p.detach()) for p in run.block.parameters] if wanted else None
        if self._due:
            self._write(trainer, {"bcd/active": float(block_idx)})

    def show(self, block_idx: int) -> None:
        """Name the active block in the progress bar."""
        self._shown = self.names[block_idx]

    def record_step(self, trainer: Trainer, block_idx: int, loss: Tensor, *, last: bool) -> None:
        """Take the loss of one optimizer step of the active block.

        Written to the loggers at every `log_every_n_steps`-th step of this block and at the last step of a
        visit. Counting the block's own steps keeps a block in sight whose visits never meet a common multiple.

        Args:
            trainer: The Trainer.
            block_idx: The active block.
            loss: Its loss, a scalar on any device.
            last: Whether the visit ends with this step.
        """
        self._add_to_mean(block_idx, loss)
        self.report.add_step(block_idx, loss)
        self._since_write[block_idx] += 1
        if (last and self._due) or self._since_write[block_idx] >= self._log_every:
            self._since_write[block_idx] = 0
            name, value = self.names[block_idx], float(loss)
            self.losses[name].append((_step(trainer), value))
            self._write(trainer, {f"bcd/loss/{name}": value})

    def end_visit(self, trainer: Trainer, run: BlockScheduler) -> None:
        """Write what is known once per visit: loss decrease, norms, visits, bytes; call before the next begins."""
        block_idx = _active(run)
        decrease = self.report.end_visit(block_idx)
        if not self._due or not trainer.loggers:
            return
        name = self.names[block_idx]
        metrics = {
            f"bcd/visits/{name}": float(run.strategy.visits[block_idx]),
            "bcd/optimizer_bytes": float(run.optimizer_bytes()),
        }
        if decrease is not None:
            metrics[f"bcd/loss_decrease/{name}"] = float(decrease)
        if run.grad_norm is not None:
            metrics[f"bcd/grad_norm/{name}"] = float(run.grad_norm)
        if run.strategy.needs_scores:
            metrics["bcd/probes"] = float(run.probes)
        update_norm = math.nan
        if self._snapshot is not None:
            update_norm = _distance(run.block.parameters, self._snapshot)
            metrics[f"bcd/update_norm/{name}"] = update_norm
        self.update_norms.append((block_idx, _step(trainer), update_norm))
        self._snapshot = None
        self._write(trainer, metrics)
        # After 1, 2, 4, 8 … sweeps: drawing costs little however long the run is.
        sweeps, rest = divmod(len(self.update_norms), len(self.names))
        if rest == 0 and sweeps & (sweeps - 1) == 0:
            self.write_image(trainer)

    def write_image(self, trainer: Trainer) -> None:
        """Add the block × visit image of update norms to every TensorBoard logger (needs matplotlib)."""
        writers = _tensorboard_writers(trainer) if trainer.is_global_zero and self.update_norms else []
        if not writers or importlib.util.find_spec("matplotlib") is None:
            return
        from lightning_bcd.plotting import visualize_parameter_updates

        recent = self.update_norms[-IMAGE_VISITS:]
        rows = {
            name: [norm if block == index else math.nan for block, _, norm in recent]
            for index, name in enumerate(self.names)
        }
        figure = visualize_parameter_updates(rows)
        for experiment in writers:
            experiment.add_figure("bcd/update_norms", figure, global_step=_step(trainer), close=False)

    def _write(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        # Not self.log: it would repeat the last value of a block that is no longer active.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=_step(trainer))

    def state_dict(self) -> dict[str, Any]:
        """State as plain types and tensors."""
        return {
            "means": [[float(mean.mean_value), float(mean.weight)] for mean in self._means],
            "epoch_over": self._epoch_over,
            "records": self._records,
            "losses": {name: [list(pair) for pair in curve] for name, curve in self.losses.items()},
            "update_norms": [list(entry) for entry in self.update_norms],
            "due": self._due,
            "since_write": list(self._since_write),
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`. The update norm of a visit that was cut in two is not reported."""
        for mean, (value, weight) in zip(self._means, state_dict["means"], strict=True):
            mean.reset()
            if weight > 0:
                mean.update(0.0)  # it counts as updated from here on
                mean.mean_value = torch.tensor(value, device=mean.device)
                mean.weight = torch.tensor(weight, device=mean.device)
        self._epoch_over = bool(state_dict["epoch_over"])
        self._records = int(state_dict["records"])
        self.losses = {n: [(int(s), float(v)) for s, v in curve] for n, curve in state_dict["losses"].items()}
        self.update_norms = [(int(b), int(s), float(v)) for b, s, v in state_dict["update_norms"]]
        self._due = bool(state_dict["due"])
        self._since_write = [int(count) for count in state_dict["since_write"]]
        self.report.load_state_dict(state_dict["report"])
        self._snapshot = None


def _active(run: BlockScheduler) -> int:
    assert run.active is not None, "no block is active before the first visit"
    return run.active


def _step(trainer: Trainer) -> int:
    # The axis of Lightning's own step metrics.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _on_host(tensor: Tensor) -> Tensor:
    # To pinned memory, so that nobody waits for a GPU.
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)


def _distance(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> float:
    # One parameter at a time comes back to the device.
    differences = [
        torch.dist(p.detach().float(), old.to(p.device, non_blocking=True).float())
        for p, old in zip(parameters, before, strict=True)
    ]
    return float(torch.linalg.vector_norm(torch.stack([d.to(differences[0].device) for d in differences])))


def _tensorboard_writers(trainer: Trainer) -> list[Any]:
    # By capability, not by class: TensorBoard loggers exist in several packages.
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [e for e in experiments if hasattr(e, "add_custom_scalars") and hasattr(e, "add_figure")]
