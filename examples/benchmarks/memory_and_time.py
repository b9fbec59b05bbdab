"""Step time and memory of block coordinate descent, full AdamW and the badam package, as ratios in one run.

All rows train the same model on the same batch with AdamW inside a Lightning Trainer, in turns, so that a drift of the
machine hits every row. Bytes are counted tensors (and, on CUDA, the allocator's peak), taken in runs of their own that
are not timed. With bf16 weights full AdamW is the plain one, with bf16 state and no fp32 master weights, which BCD
and badam keep for the active block.

    python examples/benchmarks/memory_and_time.py                                 # GPT-2-like, fp32 and bf16 weights
    python examples/benchmarks/memory_and_time.py --rows full reset --size mlp --precision fp32
    python examples/benchmarks/memory_and_time.py --device cuda --size 1b --precision bf16
    python examples/benchmarks/memory_and_time.py --device cuda --size largest --precision bf16

The row `badam` needs `pip install badam transformers`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import platform
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from language_model import SIZES, Repeat, Size, llama_of
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from meters import CLOCKS, ByteMeter, Clock, StepBytes, TimedBCD, now, print_table, use_clock
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bcd import create_blocks_from_model

ROWS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "full": ("full AdamW", None),
    "reset": ("BCD, reset", {"optimizer_state": "reset"}),
    "keep": ("BCD, keep", {"optimizer_state": "keep"}),
    "offload": ("BCD, offload", {"optimizer_state": "offload"}),
    "in-backward": ("BCD, reset, step in backward", {"step_in_backward": True}),
    "badam": ("badam", None),
}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-true"}
LONG_VISIT = 50


class Training(LightningModule):
    """The model under AdamW. `meter`, if given, counts bytes."""

    def __init__(self, net: nn.Module, meter: ByteMeter | None) -> None:
        super().__init__()
        self.net, self.meter = net, meter

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # The MLP's batch takes the precision of the weights; tokens stay integers.
        batch = batch.to(next(self.net.parameters()).dtype) if batch.is_floating_point() else batch
        if self.meter is None:
            return self.net.loss(batch)
        with self.meter.count_activations(self.net):
            return self.net.loss(batch)

    def make_adamw(self) -> Optimizer:
        # Fused on CUDA: the default there makes temporary copies as large as all parameters of the step.
        fused = next(self.parameters()).is_cuda
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, fused=fused)
        if self.meter is not None:
            self.meter.watch(self.net, optimizer)
        return optimizer

    def configure_optimizers(self) -> Optimizer:
        return self.make_adamw()


class BAdamTraining(Training):
    """The same with badam's optimizer by module, over the blocks of this package, first to last.

    Its step does not take a closure, so it runs in manual optimization.
    """

    def __init__(self, net: nn.Module, meter: ByteMeter | None, steps_per_block: int) -> None:
        super().__init__(net, meter)
        self.automatic_optimization = False
        self.steps_per_block = steps_per_block
        self.switches: list[float] = []

    def configure_optimizers(self) -> Optimizer:
        from badam import BlockOptimizer

        names = {parameter: name for name, parameter in self.named_parameters()}
        optimizer = BlockOptimizer(
            self.make_adamw(),
            list(self.named_parameters()),
            block_prefix_list=[[names[p] for p in block.parameters] for block in create_blocks_from_model(self)],
            switch_block_every=self.steps_per_block,
            switch_mode="ascending",
        )
        switch = optimizer.switch_trainable_params

        def timed_switch() -> None:
            start = now()
            switch()
            self.switches.append(now() - start)

        optimizer.switch_trainable_params = timed_switch
        return optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.optimizers().step()


@dataclass
class Run:
    """What one fit showed."""

    seconds: list[float]
    switches: list[float]
    steps: list[StepBytes]
    allocated: int  # peak of the CUDA allocator


def fit(
    row: str, size: Size, arguments: argparse.Namespace, precision: str, *, visit: int, steps: int, count: bool = False
) -> Run:
    """Train a fresh model for `steps` steps with `visit` steps per block."""
    seed_everything(0, verbose=False)
    clock, meter = Clock(), ByteMeter() if count else None
    _, options = ROWS[row]
    bcd = None if options is None else TimedBCD(strategy="cyclic", steps_per_block=visit, **options)
    if arguments.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # badam prints the names of every block it switches to.
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_epochs=1,
            accelerator={"cpu": "cpu", "cuda": "gpu"}[arguments.device],
            devices=1,
            precision=PRECISIONS[precision],
            logger=TensorBoardLogger(directory) if arguments.tensorboard else False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback for callback in (clock, bcd, meter) if callback],
        )
        with trainer.init_module():
            net = size.make()
        model = BAdamTraining(net, meter, visit) if row == "badam" else Training(net, meter)
        trainer.fit(model, Repeat(size.batch(), steps))
    switches = model.switches if isinstance(model, BAdamTraining) else bcd.switches if bcd else []
    allocated = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    return Run(clock.seconds, switches, meter.steps if meter else [], allocated)


def step_seconds(row: str, run: Run, visit: int, blocks: int) -> tuple[float, float]:
    """Mean seconds per step over one sweep, switches included: at `visit` and at LONG_VISIT steps per block.

    The second is put together from the first: a visit is `visit` steps; its first and last steps hold the switch and
    the making of the new state, the others cost what any further step would.
    """
    if row == "full":
        mean = statistics.mean(run.seconds[2:])
        return mean, mean
    # Warm-up is the first visit; badam's is one step shorter.
    first = visit - 1 if row == "badam" else visit
    sweep = [run.seconds[first + index * visit :][:visit] for index in range(blocks)]
    mean = statistics.mean(second for seconds in sweep for second in seconds)
    further = statistics.mean(statistics.median(seconds[1:-1]) for seconds in sweep)
    return mean, further + (mean - further) * visit / LONG_VISIT


def measure_times(
    rows: list[str], size: Size, arguments: argparse.Namespace, precision: str, blocks: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[float]]]:
    """Fit every row in turns; return per row the two mean step times of every round, and all switch times."""
    visit = arguments.steps_per_block
    times: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    switches: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(arguments.rounds):
        for row in rows:
            steps = 14 if row == "full" else (blocks + 1) * visit
            run = fit(row, size, arguments, precision, visit=visit, steps=steps)
            times[row].append(step_seconds(row, run, visit, blocks))
            switches[row] += run.switches
    return times, switches


def measure_bytes(row: str, size: Size, arguments: argparse.Namespace, precision: str, blocks: int) -> Run:
    """Two sweeps of two steps per block; the second is kept: then `keep` holds the state of all blocks."""
    # Two steps: at the second one the state of the block is complete when its gradients come.
    steps = 3 if row == "full" else 4 * blocks
    run = fit(row, size, arguments, precision, visit=2, steps=steps, count=True)
    run.steps = run.steps[1:] if row == "full" else run.steps[2 * blocks :]
    return run


def ratio(own: Sequence[float], others: Sequence[float] | None) -> str:
    """Median of the ratios round by round, and their range."""
    if others is None:
        return ""
    ratios = [a / b for a, b in zip(own, others, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def print_times(rows: list[str], size: Size, arguments: argparse.Namespace, precision: str, blocks: int) -> None:
    """Measure and print the table of seconds."""
    times, switches = measure_times(rows, size, arguments, precision, blocks)
    visit = arguments.steps_per_block
    columns = [visit, LONG_VISIT] if visit != LONG_VISIT else [visit]
    header = ["row"]
    for length in columns:
        header += [f"step, ms ({length} per block)", "/ full", "/ badam"]
    header += ["switch, ms: median (max)"] + (["tokens/s"] if size.tokens else [])
    table = [header]
    for row in rows:
        cells = [ROWS[row][0]]
        for index in range(len(columns)):
            seconds = {name: [pair[index] for pair in pairs] for name, pairs in times.items()}
            versus = [ratio(seconds[row], seconds.get(other)) if row != other else "" for other in ("full", "badam")]
            cells += [f"{1e3 * statistics.median(seconds[row]):.1f}", *versus]
        many = switches[row]
        cells.append(f"{1e3 * statistics.median(many):.2f} ({1e3 * max(many):.2f})" if many else "")
        if size.tokens:
            cells.append(f"{size.tokens / statistics.median(seconds[row]):,.0f}")
        table.append(cells)
    print_table(table)


def print_bytes(rows: list[str], size: Size, arguments: argparse.Namespace, precision: str, blocks: int) -> None:
    """Measure and print the table of bytes, in MB = 10⁶ bytes."""
    runs = {row: measure_bytes(row, size, arguments, precision, blocks) for row in rows}
    header = ["row", "gradient, MB: peak / mean", "state: peak / mean", "masters: peak"]
    header += ["gradient + state + masters: peak", "/ full", "/ badam", "mean", "/ full"]
    header += ["saved activations: max / mean"]
    header += ["peak allocated, GB"] if arguments.device == "cuda" else []
    table = [header]
    for row, run in runs.items():

        def both(values: Sequence[int]) -> str:
            return f"{max(values) / 1e6:.2f} / {statistics.mean(values) / 1e6:.2f}"

        totals = {name: [step.total for step in other.steps] for name, other in runs.items()}
        peaks = {name: max(values) for name, values in totals.items()}
        means = {name: statistics.mean(values) for name, values in totals.items()}
        versus = {
            (kind, other): f"{values[row] / values[other]:.3f}" if other in values and other != row else ""
            for kind, values in (("peak", peaks), ("mean", means))
            for other in ("full", "badam")
        }
        cells = [ROWS[row][0], both([step.gradient for step in run.steps]), both([step.state for step in run.steps])]
        cells += [f"{max(sum(step.masters.values()) for step in run.steps) / 1e6:.2f}"]
        cells += [f"{peaks[row] / 1e6:.2f}", versus["peak", "full"], versus["peak", "badam"]]
        cells += [f"{means[row] / 1e6:.2f}", versus["mean", "full"], both([step.activations for step in run.steps])]
        cells += [f"{run.allocated / 1e9:.2f}"] if arguments.device == "cuda" else []
        table.append(cells)
    print_table(table)


def print_largest(rows: list[str], arguments: argparse.Namespace, precision: str) -> None:
    """Deepen a wide Llama-like model by a quarter at a time until memory is full; measure the last that fits."""
    table = [["row", "layers", "parameters, 10⁹", "peak allocated, GB", "tokens/s"]]
    for row in rows:
        best, layers = 0, 4
        # Two visits reach the peak: the first layer has the deepest backward pass and the largest state.
        while runs(row, layers, arguments, precision):
            best, layers = layers, layers + max(1, layers // 4)
        if best == 0:
            table.append([ROWS[row][0], "none fits", "", "", ""])
            continue
        size = llama_of(best)
        blocks = best + 2
        run = fit(row, size, arguments, precision, visit=2, steps=14 if row == "full" else 2 * (blocks + 1))
        seconds = run.seconds[2:]  # one sweep, after a warm-up visit
        with torch.device("meta"):
            billions = sum(p.numel() for p in size.make().parameters()) / 1e9
        speed = f"{size.tokens / statistics.mean(seconds):,.0f}"
        table.append([ROWS[row][0], str(best), f"{billions:.2f}", f"{run.allocated / 1e9:.1f}", speed])
    print_table(table)


def runs(row: str, layers: int, arguments: argparse.Namespace, precision: str) -> bool:
    """Whether a model of this depth trains for two visits."""
    try:
        fit(row, llama_of(layers), arguments, precision, visit=2, steps=4)
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def main() -> None:
    """Print the tables of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="gpt")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), nargs="+", default=list(PRECISIONS), help="of weights")
    parser.add_argument("--rows", choices=list(ROWS), nargs="+", default=list(ROWS))
    parser.add_argument("--tables", choices=["time", "bytes"], nargs="+", default=["time", "bytes"])
    parser.add_argument(
        "--steps-per-block", type=int, default=4, help="3 or more; 50 measures the long visits directly"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of all rows")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of this process, for a busy machine"
    )
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, update norms included")
    arguments = parser.parse_args()
    if arguments.steps_per_block < 3:
        parser.error("--steps-per-block must be 3 or more: first and last steps of a visit are told from the others")
    if arguments.size == "largest" and arguments.device != "cuda":
        parser.error("--size largest needs --device cuda: host memory has no clean end")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    use_clock(arguments.clock)
    rows = list(arguments.rows)
    if "badam" in rows and not (find_spec("badam") and find_spec("transformers")):
        print("Row `badam` is left out: pip install badam transformers\n")
        rows.remove("badam")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    for precision in arguments.precision:
        print(
            f"{arguments.size}, {precision} weights, {device}, {threads} threads, torch {torch.__version__}", end=", "
        )
        if arguments.size == "largest":
            print("\n")
            print_largest(rows, arguments, precision)
            continue
        size = SIZES[arguments.size]
        with torch.device("meta"):
            net = size.make()
        blocks = len(create_blocks_from_model(net))
        print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {blocks} blocks\n", flush=True)
        if "bytes" in arguments.tables:
            print_bytes(rows, size, arguments, precision, blocks)
        if "time" in arguments.tables:
            print_times(rows, size, arguments, precision, blocks)


if __name__ == "__main__":
    main()
