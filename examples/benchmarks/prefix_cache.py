"""Inner steps with and without the prefix cache: same losses, less time. Ratios in one run.

python examples/benchmarks/prefix_cache.py --model mlp
python examples/benchmarks/prefix_cache.py --model transformer
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bcd import BCDModule


class Net(BCDModule):
    """Twelve layers in one nn.Sequential; several optimizer steps per block and batch."""

    def __init__(self, model: str, cache_prefix: bool, inner_steps: int) -> None:
        super().__init__(inner_steps=inner_steps, cache_prefix=cache_prefix, optimizer=torch.optim.AdamW)
        if model == "mlp":
            self.net = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(12)))
            self.shape = (512, 512)
        else:
            layer = [nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True) for _ in range(12)]
            self.net = nn.Sequential(*layer)
            self.shape = (8, 128, 256)
        self.losses: list[float] = []

    def block_loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss


class Repeat:
    """The same batch again and again: loading costs nothing."""

    def __init__(self, batch: list[Tensor], times: int) -> None:
        self.item, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([self.item] * self.times)


class Timer(Callback):
    """Seconds of every batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def run(model: str, cache_prefix: bool, inner_steps: int) -> tuple[list[float], list[float]]:
    """Visit every block once; return the losses and the seconds per inner step of every block."""
    seed_everything(0, verbose=False)
    net, timer = Net(model, cache_prefix, inner_steps), Timer()
    batch = [torch.randn(net.shape), torch.randn(net.shape)]
    trainer = Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer],
    )
    trainer.fit(net, Repeat(batch, 12))
    return net.losses, [seconds / inner_steps for seconds in timer.seconds]


def main() -> None:
    """Print the table of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["mlp", "transformer"], default="mlp")
    parser.add_argument("--inner-steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    plain_times, cached_times = [], []
    for _ in range(arguments.rounds):
        losses, plain = run(arguments.model, False, arguments.inner_steps)
        cached_losses, cached = run(arguments.model, True, arguments.inner_steps)
        assert losses == cached_losses, "the cache must not change a bit of the loss"
        plain_times.append(plain)
        cached_times.append(cached)
    # The best of all rounds for every block: a shared machine is only ever slower than it can be.
    plain, cached = (statistics.mean(map(min, zip(*times, strict=True))) for times in (plain_times, cached_times))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"12-layer {arguments.model}, {arguments.inner_steps} inner steps, {device}, {torch.get_num_threads()} threads"
    )
    print("| | without cache | with cache | speed-up |\n|---|---|---|---|")
    print(
        f"| inner step, s (mean over blocks, best of {arguments.rounds} rounds) | {plain:.4f} | {cached:.4f} "
        f"| {plain / cached:.2f}, losses equal to the last bit |"
    )


if __name__ == "__main__":
    main()
