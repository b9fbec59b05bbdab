"""Bytes that two processes all-reduce per step: plain DDP, DDP with unused-parameter detection, BCDCallback.

The model is the GPT-2-like one of the other benchmarks (12 layers, d = 256, 10.8 million parameters, 14 blocks), with
batches of 2 × 32 tokens per process. Every message of a kilobyte or more is counted at `torch.distributed.all_reduce`;
what DistributedDataParallel sends by itself is led there by PyTorch's own communication hook.

    python examples/benchmarks/ddp_traffic.py
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from language_model import LanguageModel, Repeat
from lightning.pytorch import Callback, LightningModule, Trainer
from meters import Clock, TimedBCD, print_table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_bcd import create_blocks_from_model

WORLD_SIZE = 2
ROWS = {
    "full": "DDP, all parameters",
    "unused": "DDP, one block unfrozen, find_unused_parameters=True",
    "bcd": 'Trainer(strategy="ddp") with BCDCallback',
}


class Traffic:
    """Counts the bytes of every tensor of a kilobyte or more that this process all-reduces."""

    def __init__(self) -> None:
        self.bytes = 0
        original = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            size = tensor.numel() * tensor.element_size()
            self.bytes += size if size >= 1024 else 0
            return original(tensor, *args, **kwargs)

        dist.all_reduce = counted

    def take(self) -> int:
        """Return the bytes since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken


class Net(nn.Module):
    """The model with its loss as forward pass, which is what DistributedDataParallel prepares."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LanguageModel(layers=12, width=256, heads=4, vocabulary=5000, length=128)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net.loss(tokens)


class Training(LightningModule):
    """The same for a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return self.net(tokens)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class AlignedBCD(TimedBCD):
    """Starts its clock when both processes are there: a switch, not the wait for the slower process."""

    def on_train_batch_start(self, *args: Any) -> None:
        dist.barrier()
        super().on_train_batch_start(*args)


class StepTraffic(Callback):
    """Bytes of every step; also those that the Trainer's DistributedDataParallel would send."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.bytes: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(None, allreduce_hook)
        self.traffic.take()

    def on_train_batch_end(self, *args: Any) -> None:
        self.bytes.append(self.traffic.take())


def run_ddp(traffic: Traffic, batch: Tensor, visit: int, *, one_block: bool) -> dict[str, Any]:
    """Train under DistributedDataParallel: all parameters, or one block after the other by `requires_grad`."""
    net = Net()
    model = DistributedDataParallel(net, find_unused_parameters=one_block)
    model.register_comm_hook(None, allreduce_hook)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    blocks = create_blocks_from_model(net)
    sizes, seconds = [], []
    for step in range((len(blocks) + 1) * visit):
        start = time.perf_counter()
        if one_block and step % visit == 0:
            for index, block in enumerate(blocks):
                for parameter in block.parameters:
                    parameter.requires_grad_(index == (step // visit) % len(blocks))
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        sizes.append(traffic.take())
    return {"bytes": sizes, "seconds": seconds, "switches": []}


def run_bcd(traffic: Traffic, batch: Tensor, visit: int) -> dict[str, Any]:
    """Train with the callback in a Trainer."""
    clock, meter, bcd = Clock(), StepTraffic(traffic), AlignedBCD(strategy="cyclic", steps_per_block=visit)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy="ddp",
        devices=WORLD_SIZE,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, bcd, meter],
    )
    model = Training()
    blocks = len(create_blocks_from_model(model))
    trainer.fit(model, Repeat(batch, (blocks + 1) * visit))
    sent = [sum(p.numel() * p.element_size() for p in block.parameters) for block in bcd.blocks]
    return {"bytes": meter.bytes, "seconds": clock.seconds, "switches": bcd.switches, "blocks": sent}


def work(rank: int, row: str, visit: int, port: int, result: Path) -> None:
    """One process of one row."""
    # What torchrun sets: Lightning then takes the processes as they are and starts none.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="benchmark",
        GLOO_SOCKET_IFNAME="lo",
    )
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    traffic = Traffic()
    batch = torch.randint(5000, (2, 33), generator=torch.Generator().manual_seed(rank))
    if row == "bcd":
        measured = run_bcd(traffic, batch, visit)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
        measured = run_ddp(traffic, batch, visit, one_block=row == "unused")
    dist.barrier()
    if rank == 0:
        torch.save(measured, result)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without tearing the interpreter down: a gloo thread that lets go of its last tensor only then could abort.
    os._exit(0)


def measure(row: str, visit: int) -> dict[str, Any]:
    """Run one row in its own processes."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        result = Path(directory) / "measured.pt"
        mp.spawn(work, (row, visit, port, result), nprocs=WORLD_SIZE)
        return torch.load(result)


def main() -> None:
    """Print the table and the time of a block switch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=list(ROWS), nargs="+", default=list(ROWS))
    parser.add_argument("--steps-per-block", type=int, default=2)
    arguments = parser.parse_args()
    visit = arguments.steps_per_block
    runs = {row: measure(row, visit) for row in arguments.rows}
    print(f"{WORLD_SIZE} gloo processes, {platform.machine()}, 1 thread each, torch {torch.__version__}\n")
    table = [["row", "all-reduced per step, MB: mean (smallest - largest)", "DDP, all parameters / this", "step, ms"]]
    for row, run in runs.items():
        sweep = run["bytes"][visit:]  # after the first visit: every block equally often
        mean = statistics.mean(sweep)
        full = statistics.mean(runs["full"]["bytes"][visit:]) if "full" in runs else None
        cells = [f"{mean / 1e6:.3f} ({min(sweep) / 1e6:.3f} - {max(sweep) / 1e6:.3f})"]
        cells += [f"{full / mean:.1f}" if full else "", f"{1e3 * statistics.mean(run['seconds'][visit:]):.0f}"]
        table.append([ROWS[row], *cells])
    print_table(table)
    if "bcd" in runs:
        switches, blocks = runs["bcd"]["switches"], runs["bcd"]["blocks"]
        # After the warm-up visit of the first block come the others, then the first again.
        wanted = [size for size in (*blocks[1:], blocks[0]) for _ in range(visit)]
        exact = wanted == runs["bcd"]["bytes"][visit:]
        print(f"{len(blocks)} blocks; BCDCallback sends exactly the gradient bytes of the active block: {exact}")
        print(f"block switch, ms: median {1e3 * statistics.median(switches):.2f}, max {1e3 * max(switches):.2f}")


if __name__ == "__main__":
    main()
