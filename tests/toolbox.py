"""Small models, loaders and runners that the tests share."""

from __future__ import annotations

import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain

FEATURES, CLASSES, HIDDEN = 6, 3, 8


def data(samples: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()
    return TensorDataset(x, y)


def loader(samples: int = 48, batch_size: int = 8) -> DataLoader:
    return DataLoader(data(samples), batch_size=batch_size)


def mlp(seed: int = 0, layers: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        widths = [FEATURES] + [HIDDEN] * (layers - 1) + [CLASSES]
        modules: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            modules += [nn.Linear(a, b)] + ([nn.ReLU()] if i < layers - 1 else [])
        return nn.Sequential(*modules)


class Classifier(LightningModule):
    """An MLP in automatic optimization; `make_optimizers(parameters)` returns what configure_optimizers may return."""

    def __init__(
        self, make_optimizers: Callable[[Any], Any] | None = None, net: nn.Module | None = None, layers: int = 3
    ) -> None:
        super().__init__()
        self.net = net if net is not None else mlp(layers=layers)
        self.make_optimizers = make_optimizers or (lambda params: torch.optim.Adam(params, lr=1e-2))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizers(self.parameters())


class StatefulLoader:
    """Shuffled batches that go on where a checkpoint left them, as a resumable loader must."""

    def __init__(self, samples: int = 48, batch_size: int = 8, seed: int = 1) -> None:
        self.tensors = data(samples).tensors
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self.resumed = False

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.batch_size

    def __iter__(self) -> Iterator[list[Tensor]]:
        if not self.resumed:
            self.position = 0
        self.resumed = False
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.tensors[0]), generator=generator)
        while self.position < len(self):
            rows = order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
            self.position += 1
            if self.position == len(self):
                self.epoch += 1
            yield [tensor[rows] for tensor in self.tensors]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.resumed = self.position < len(self)


class MemoryLogger(Logger):
    """Keeps everything it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.hyperparams = args

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((-1 if step is None else step, dict(metrics)))

    def series(self, key: str) -> list[tuple[int, float]]:
        return [(step, metrics[key]) for step, metrics in self.rows if key in metrics]


def trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return Trainer(**{**defaults, **arguments}, callbacks=list(callbacks))


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Recorder(Callback):
    """Notes after every batch which parameters moved and what the optimizer held."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.steps: list[int] = []
        self.trainable: list[set[str]] = []
        self.held: list[set[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.trainable.append({n for n, p in pl_module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.moved.append({n for n, p in named.items() if not torch.equal(p, self.before[n])})
        self.steps.append(trainer.global_step)
        state = trainer.optimizers[0].state
        self.held.append({n for n, p in named.items() if state.get(p)})


def run_processes(function: Callable[..., None], directory: Path, world_size: int = 2) -> list[Any]:
    """Run `function(rank, directory)` in gloo-ready processes; return what each saved in `<rank>.pt`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_process, (function, directory, world_size, port), nprocs=world_size)
    return [torch.load(directory / f"{rank}.pt") for rank in range(world_size)]


def _process(rank: int, function: Callable[..., Any], directory: Path, world_size: int, port: int) -> None:
    # What torchrun sets: Lightning then takes the processes as they are and starts none.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    torch.save(function(rank, directory), directory / f"{rank}.pt")
    # Leave without tearing the interpreter down, as forked children of multiprocessing do: a gloo thread that lets go
    # of its last tensor only then would ask for the interpreter lock, and the process would abort after its work.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def begin(algorithm, net, x, y, loss, comm=None):
    """Chain and auxiliary variables of a lifted algorithm."""
    chain = Chain(net)
    algorithm.check(chain, loss)
    return chain, algorithm.start(chain, x, y, comm or Alone())


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages that operations made and that were alive at once."""

    def __init__(self):
        super().__init__()
        self.users = {}  # address of a storage made here -> tensors that use it
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self.users:
                if address in given:  # a view of something older
                    continue
                self.users[address] = 0
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            self.users[address] += 1
            weakref.finalize(tensor, self._gone, address, storage.nbytes())
        return result

    def _gone(self, address, size):
        self.users[address] -= 1
        if self.users[address] == 0:
            del self.users[address]
            self.now -= size
