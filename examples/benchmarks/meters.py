"""What a step costs: the clocks and byte counters that the benchmarks share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_bcd import BCDCallback


class TimedBCD(BCDCallback):
    """BCDCallback that notes the seconds of its hooks between two batches: end of the one and start of the other."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seconds: list[float] = []
        self.switched: list[int] = []
        self._before = 0.0

    def on_block_switch(self, trainer: Trainer, pl_module: LightningModule, old: int | None, new: int) -> None:
        self.switched.append(len(self.seconds))

    def on_train_batch_start(self, *args: Any) -> None:
        start = now()
        super().on_train_batch_start(*args)
        self.seconds.append(self._before + now() - start)

    def on_train_batch_end(self, *args: Any) -> None:
        start = now()
        super().on_train_batch_end(*args)
        self._before = now() - start

    @property
    def switches(self) -> list[float]:
        """Seconds between two batches where the block changes; the first visit switches nothing."""
        return [self.seconds[batch] for batch in self.switched[1:]]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_read = CLOCKS["wall"]


def use_clock(name: str) -> None:
    """Measure with `"wall"` or `"cpu"` (of this process, for a busy machine) from now on."""
    global _read
    _read = CLOCKS[name]


def now() -> float:
    """Seconds, after the work queued on the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return _read()


class Clock(Callback):
    """Seconds from the start of each batch to the start of the next: everything the Trainer does included."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.stamps.append(now())

    def on_train_epoch_end(self, *args: Any) -> None:
        self.stamps.append(now())

    @property
    def seconds(self) -> list[float]:
        """One number per batch."""
        return [end - start for start, end in pairwise(self.stamps)]


@dataclass
class StepBytes:
    """Largest bytes within one step."""

    gradient: int = 0
    state: int = 0
    both: int = 0  # gradient and state at one time
    activations: int = 0
    masters: dict[int, int] = field(default_factory=dict)  # of the parameters that were stepped

    @property
    def total(self) -> int:
        """Gradient, state and master weights; masters live through the step."""
        return self.both + sum(self.masters.values())


class ByteMeter(Callback):
    """Counts gradients, optimizer state, master weights and saved activations in every step.

    Gradients are counted whenever one is accumulated and right after an optimizer stepped, before anyone frees them.
    Master weights are what an optimizer steps besides, or in a wider type than, the model's own weights.
    """

    def __init__(self) -> None:
        self.steps: list[StepBytes] = []
        self._step = StepBytes()

    def watch(self, net: nn.Module, optimizer: Optimizer) -> None:
        """Call in configure_optimizers: these hooks must run before those of callbacks."""
        self._optimizer = optimizer
        self._weights = {parameter: parameter.dtype for parameter in net.parameters()}
        optimizer.register_step_post_hook(self._after_step)
        # Sees the optimizers of single parameters that step in backward, too.
        self._handle = register_optimizer_step_post_hook(self._after_step)
        for parameter in self._weights:
            parameter.register_post_accumulate_grad_hook(self._sample)

    def _after_step(self, optimizer: Optimizer, *args: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            # Not one of the model's, or lifted to another type for the step.
            if parameter.grad is not None and parameter.dtype != self._weights.get(parameter):
                self._step.masters[id(parameter)] = size_of([parameter])
        self._sample()

    def _sample(self, *args: Any) -> None:
        stepped = (p for group in self._optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in {*self._weights, *stepped} if p.grad is not None]
        states = [t for state in self._optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        step, gradient, state = self._step, size_of(gradients), size_of(states)
        step.gradient, step.state = max(step.gradient, gradient), max(step.state, state)
        step.both = max(step.both, gradient + state)

    @contextlib.contextmanager
    def count_activations(self, net: nn.Module) -> Iterator[None]:
        """Count what the graph built inside saves for backward, each storage once, weights left out."""
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self._step.activations = sum(saved.values())

    def on_train_batch_end(self, *args: Any) -> None:
        self._sample()
        self.steps.append(self._step)
        self._step = StepBytes()

    def on_train_end(self, *args: Any) -> None:
        self._handle.remove()


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def print_table(rows: list[list[str]]) -> None:
    """Print a Markdown table; the first row is its header."""
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
