"""A fine-tuning task for every strategy, with and without landscape expansion, against full AdamW.

A 6-layer language model is pre-trained on the sequences of one Markov chain with full AdamW and then trained on those
of another chain: everything the model knows about which token follows which is wrong there. All rows start from the
same pre-trained weights and see the same batches. The learning rates of each family of rows (full, BCD, BCD with
expansion) are chosen on a separate seed that enters no mean.

    python examples/benchmarks/finetune_task.py
    python examples/benchmarks/finetune_task.py --rows full random random+expand --seeds 1 --steps 160
"""

from __future__ import annotations

import argparse
import copy
import logging
import platform
import statistics
import sys
import time
import warnings
from itertools import product
from typing import Any

import torch
from language_model import LanguageModel
from lightning.pytorch import LightningModule, Trainer
from meters import ByteMeter, print_table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bcd import BCDCallback

VOCABULARY, SUCCESSORS, LENGTH, BATCH = 128, 16, 64, 8
STRATEGIES = ("cyclic", "backward", "random", "uniform", "greedy", "importance")
ROWS = ("full", *STRATEGIES, *(f"{strategy}+expand" for strategy in STRATEGIES))
LEARNING_RATES = (1e-3, 3e-3)
EXPANSION_RATES = (1.0, 3.0)
SELECTION_SEED = 1000


def make_chain(generator: torch.Generator) -> Tensor:
    """Return a transition matrix in which every token has SUCCESSORS possible successors of unequal probability."""
    chain = torch.zeros(VOCABULARY, VOCABULARY)
    for row in chain:
        weights = torch.rand(SUCCESSORS, generator=generator).square() + 1e-3
        row[torch.randperm(VOCABULARY, generator=generator)[:SUCCESSORS]] = weights / weights.sum()
    return chain


def draw(chain: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Return sequences of the chain, shape (samples, LENGTH + 1), with a uniform first token."""
    tokens = [torch.randint(VOCABULARY, (samples,), generator=generator)]
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, dim=1)


class Training(LightningModule):
    """A language model under AdamW. `meter`, if given, counts bytes."""

    def __init__(self, net: nn.Module, lr: float, meter: ByteMeter | None = None) -> None:
        super().__init__()
        self.net, self.lr, self.meter = net, lr, meter

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return self.net.loss(tokens)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if self.meter is not None:
            self.meter.watch(self.net, optimizer)
        return optimizer


def fit(model: Training, tokens: Tensor, steps: int, bcd: BCDCallback | None = None) -> float:
    """Take `steps` optimizer steps in order of the data; return the seconds."""
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback for callback in (bcd, model.meter) if callback],
    )
    start = time.perf_counter()
    trainer.fit(model, DataLoader(tokens, batch_size=BATCH))
    return time.perf_counter() - start


class Task:
    """One seed: the pre-trained model, the data of the other chain."""

    def __init__(self, seed: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        old, new = make_chain(generator), make_chain(generator)
        self.seed, self.steps = seed, steps
        self.training, self.held_out = draw(new, steps * BATCH, generator), draw(new, 512, generator)
        # What a model that knows the chain would reach.
        self.floor = float(-new[self.held_out[:, :-1], self.held_out[:, 1:]].log().mean())
        torch.manual_seed(seed)
        self.net = LanguageModel(layers=6, width=64, heads=2, vocabulary=VOCABULARY, length=LENGTH)
        fit(Training(self.net, 3e-3), draw(old, steps * BATCH, generator), steps)
        self.start = evaluate(self.net, self.held_out)

    def finetune(self, row: str, lr: float, expand_lr: float, steps_per_block: int) -> tuple[float, float]:
        """Return the held-out loss and the seconds."""
        net = copy.deepcopy(self.net)
        bcd = make_callback(row, expand_lr, steps_per_block, self.seed)
        seconds = fit(Training(net, lr), self.training, self.steps, bcd)
        return evaluate(net, self.held_out), seconds

    def count_bytes(self, row: str, expand_lr: float) -> int:
        """Return the peak of gradient and optimizer state over one sweep, in a short run that is not timed."""
        meter = ByteMeter()
        fit(Training(copy.deepcopy(self.net), 1e-3, meter), self.training, 24, make_callback(row, expand_lr, 2, 0))
        return max(step.total for step in meter.steps)


def make_callback(row: str, expand_lr: float, steps_per_block: int, seed: int) -> BCDCallback | None:
    """Return the callback of a row, None for full AdamW."""
    if row == "full":
        return None
    strategy, _, expand = row.partition("+")
    options: dict[str, Any] = {"expand": "sgd", "expand_lr": expand_lr} if expand else {}
    return BCDCallback(strategy=strategy, steps_per_block=steps_per_block, seed=seed, **options)


@torch.no_grad()
def evaluate(net: nn.Module, tokens: Tensor) -> float:
    """Return the mean loss."""
    return float(net.loss(tokens))


def choose_rates(rows: list[str], steps: int, steps_per_block: int) -> dict[str, tuple[float, float]]:
    """Return (lr, expand_lr) per family, the pair with the lowest loss on the selection seed.

    The families are tried with `full`, `random` and `random+expand`.
    """
    task = Task(SELECTION_SEED, steps)
    chosen: dict[str, tuple[float, float]] = {}
    for family in dict.fromkeys(map(family_of, rows)):
        trial = {"full": "full", "BCD": "random", "BCD, expanded": "random+expand"}[family]
        grid = list(product(LEARNING_RATES, EXPANSION_RATES if "+" in trial else (0.0,)))
        losses = [task.finetune(trial, *rates, steps_per_block)[0] for rates in grid]
        chosen[family] = grid[losses.index(min(losses))]
        tried = ", ".join(
            f"lr {lr:g}{f' and expand_lr {expand_lr:g}' if expand_lr else ''}: {loss:.3f}"
            for (lr, expand_lr), loss in zip(grid, losses, strict=True)
        )
        print(f"learning rates of {family}, on a seed of their own: {tried}", flush=True)
    return chosen


def family_of(row: str) -> str:
    """Rows that share their learning rates."""
    return "full" if row == "full" else "BCD, expanded" if "+" in row else "BCD"


def title(row: str) -> str:
    """Name of a row in the table."""
    return "full AdamW" if row == "full" else f"BCD, {row.replace('+expand', ', expand=sgd')}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS))
    parser.add_argument("--steps", type=int, default=640, help="of pre-training and of training on the other chain")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps-per-block", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.steps < 24:
        parser.error("--steps must be 24 or more: bytes are counted over a sweep of that length")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {arguments.steps} steps, "
        f"{arguments.seeds} seeds, {arguments.steps_per_block} steps per block"
    )
    rates = choose_rates(arguments.rows, arguments.steps, arguments.steps_per_block)
    results: dict[str, list[tuple[float, float]]] = {row: [] for row in arguments.rows}
    tasks = [Task(seed, arguments.steps) for seed in range(arguments.seeds)]
    # Seed by seed, so that a drift of the machine hits every row.
    for task in tasks:
        for row in arguments.rows:
            results[row].append(task.finetune(row, *rates[family_of(row)], arguments.steps_per_block))
        print(f"seed {task.seed} done", file=sys.stderr, flush=True)
    start, floor = (statistics.mean(getattr(task, name) for task in tasks) for name in ("start", "floor"))
    print(f"held-out loss before training: {start:.3f}; of the chain itself: {floor:.3f}\n")
    table = [["row", "held-out loss", "peak gradient + state, MB", "seconds"]]
    for row, pairs in results.items():
        losses, seconds = zip(*pairs, strict=True)
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        peak = tasks[0].count_bytes(row, rates[family_of(row)][1])
        cells = [f"{statistics.mean(losses):.3f}{spread}", f"{peak / 1e6:.2f}", f"{statistics.median(seconds):.1f}"]
        table.append([title(row), *cells])
    print_table(table)


if __name__ == "__main__":
    main()
