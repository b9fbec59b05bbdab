"""The demo: block coordinate descent beside plain Adam on real data, with tables, plots and TensorBoard logs."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_bcd.blocks import readable_bytes
from lightning_bcd.callback import BCDCallback
from lightning_bcd.datamodules import DigitsDataModule, MNISTDataModule
from lightning_bcd.models import MLPClassifier
from lightning_bcd.tracking import BlockLossTracker


def run_demo(output: Path, *, epochs: int | None = None, data_dir: Path | None = None, seed: int = 0) -> None:
    """Train an MLP by BCD with Adam and by plain Adam; print tables, write plots and TensorBoard logs.

    Both runs start from the same weights and take the same number of optimizer steps on the same batches. The
    bytes in the tables are measured: gradients and optimizer state that exist after each step.

    Args:
        output: Folder for the plots and logs; made if needed.
        epochs: Passes over the training data; 30 for the digits and 3 for MNIST if None.
        data_dir: Train on the MNIST files in this folder instead of scikit-learn's digits.
        seed: Seed of the weights and of the order of the blocks.

    Raises:
        FileNotFoundError: If a file is missing in `data_dir`.
        ModuleNotFoundError: If scikit-learn is not installed and `data_dir` is None.
    """
    data: DigitsDataModule | MNISTDataModule
    widths: tuple[int, ...]
    if data_dir is None:
        title, widths, usual_epochs, visit = "digits", (64, 256, 256, 256, 256, 10), 30, 45
        data = DigitsDataModule(batch_size=32, val_fraction=0)
    else:
        title, widths, usual_epochs, visit = "MNIST", (784, 500, 500, 500, 10), 3, 50
        data = MNISTDataModule(data_dir, val_fraction=0)
    data.setup()
    batches = len(data.train_dataloader())
    steps = batches * (epochs or usual_epochs)
    # Short runs get short visits, so that every block is trained at least twice.
    visit = max(1, min(visit, steps // (2 * (len(widths) - 1))))
    logs = output / "tensorboard"
    logs.mkdir(parents=True, exist_ok=True)

    seed_everything(seed, verbose=False)
    model = MLPClassifier(widths)
    bcd = BCDCallback(strategy="random", steps_per_block=visit, seed=seed)
    print(
        f"MLP {'-'.join(map(str, widths))} ({sum(p.numel() for p in model.parameters()):,} parameters) on {title}.\n"
        f"Both runs take {steps} optimizer steps ({steps // batches} epochs of {batches} batches) from the same "
        "weights on the same batches.\n"
    )
    with _quiet(), _threads(1 if data_dir is None else torch.get_num_threads()):
        bcd_run = _train(copy.deepcopy(model), data, steps, logs / "bcd", [bcd])
        adam_run = _train(copy.deepcopy(model), data, steps, logs / "adam", [])
    assert bcd.tracker is not None
    visits = {name: _means(curve, visit) for name, curve in bcd.tracker.losses.items()}
    _show_blocks(bcd, visits, bcd_run)
    _show_comparison(bcd_run, adam_run, visit)
    for file in _plot(output, bcd.tracker, visits, {"BCD": bcd_run.losses, "Adam": adam_run.losses}, batches):
        print(f"Plot: {file}")
    print(f"To look at the logs: tensorboard --logdir {shlex.quote(str(logs))}")


def _train(
    model: MLPClassifier, data: LightningDataModule, steps: int, logs: Path, callbacks: Sequence[Callback]
) -> _Run:
    run = _Run()
    # TensorBoard would draw the events of an earlier demo into the same curves.
    for earlier in logs.glob("events.out.tfevents.*"):
        earlier.unlink()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        callbacks=[*callbacks, run],
        logger=TensorBoardLogger(logs.parent, name="", version=logs.name),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    run.steps = trainer.global_step
    run.accuracy = float(trainer.test(model, data, verbose=False)[0]["test_acc"])
    return run


class _Run(Callback):
    """What one training run of the demo leaves behind."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        #: Largest bytes of gradient and optimizer state, for each parameter and for all at the same time.
        self.largest: dict[nn.Parameter, int] = {}
        self.peak = 0
        self.steps = 0
        self.accuracy = math.nan

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        # Gradients are freed before the next backward pass: now gradient and optimizer state are both held.
        state = trainer.optimizers[0].state
        held = {}
        for parameter in pl_module.parameters():
            tensors = [value for value in state.get(parameter, {}).values() if isinstance(value, Tensor)]
            held[parameter] = tensor_bytes(tensors if parameter.grad is None else [*tensors, parameter.grad])
            self.largest[parameter] = max(self.largest.get(parameter, 0), held[parameter])
        self.peak = max(self.peak, sum(held.values()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says about devices, loggers and workers; it is not about the demo."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads; on matrices as small as those of the digits they only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _means(curve: Sequence[tuple[int, float]], length: int) -> list[tuple[int, float]]:
    """Return the last step and the mean loss of every `length` consecutive entries: single batches are noise."""
    parts = [curve[start : start + length] for start in range(0, len(curve), length)]
    return [(part[-1][0], fmean(loss for _, loss in part)) for part in parts]


def _show_blocks(bcd: BCDCallback, curves: Mapping[str, Sequence[tuple[int, float]]], run: _Run) -> None:
    total = sum(run.largest.values())
    rows = []
    for block, visits in zip(bcd.blocks, bcd.strategy.visits, strict=True):
        losses = [loss for _, loss in curves[block.name]]
        held = sum(run.largest[parameter] for parameter in block.parameters)
        ends = [f"{losses[0]:.4f}", f"{losses[-1]:.4f}"] if losses else ["-", "-"]
        rows.append(
            [block.name, f"{block.num_parameters():,}", str(visits), *ends, readable_bytes(held), f"{held / total:.0%}"]
        )
    header = ["block", "parameters", "visits", "first visit's loss", "last", "gradient + Adam", "of all blocks"]
    _print_table("Blocks of the BCD run", header, rows)


def _show_comparison(bcd: _Run, adam: _Run, visit: int) -> None:
    rows = [
        [name, str(run.steps), f"{run.accuracy:.4f}", readable_bytes(run.peak), f"{run.peak / adam.peak:.2f}x"]
        for name, run in ((f"BCD, Adam, {visit} steps per visit", bcd), ("Adam, all parameters", adam))
    ]
    header = ["method", "optimizer steps", "test accuracy", "peak gradient + optimizer", "against Adam"]
    _print_table("BCD against Adam", header, rows)


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        # A pipe or file has no width of its own; 80 columns would break the lines.
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _plot(
    output: Path,
    tracker: BlockLossTracker,
    visits: Mapping[str, Sequence[tuple[int, float]]],
    losses: Mapping[str, Sequence[float]],
    batches: int,
) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from lightning_bcd.plotting import plot_block_losses, plot_loss_curves, visualize_parameter_updates

    files = [output / name for name in ("loss_curves.png", "block_losses.png", "update_norms.png")]
    epochs = {name: [loss for _, loss in _means(list(enumerate(run)), batches)] for name, run in losses.items()}
    plot_loss_curves(epochs, files[0])
    plot_block_losses(visits, files[1])
    norms = {
        name: [norm if index == active else math.nan for active, _, norm in tracker.update_norms]
        for index, name in enumerate(tracker.names)
    }
    visualize_parameter_updates(norms, files[2])
    return files


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the memory of tensors together, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
