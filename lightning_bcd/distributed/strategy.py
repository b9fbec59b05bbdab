"""LayerParallelStrategy: a group of layers per process."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.nn import Module

from lightning_bcd.communicator import balanced_groups
from lightning_bcd.distributed.exchange import LayerGroups


class LayerParallelStrategy(DDPStrategy):
    """Train the layers of one network on several processes: `Trainer(strategy="layer_parallel", devices=4)`.

    For algorithms that update all layers at once (pdADMM and its variants). Every process has all samples and a
    contiguous group of layers with their auxiliary variables; neighbours exchange P and Q. The layers are brought
    together for validation, checkpoints and at the end. The processes are started and talk as under `"ddp"`, across
    machines too.

    Args:
        layers: Number of layers of every process; balanced by their work if None.
        timeout: After how long without an answer a process counts as lost.
        accelerator: See `DDPStrategy`, as are the other arguments.
        parallel_devices: Devices of this machine.
        cluster_environment: How processes find each other.
        checkpoint_io: How checkpoints are written.
        precision_plugin: Set by the Trainer.
        process_group_backend: `"gloo"` or `"nccl"`; chosen by the device if None.
        start_method: How processes are started.
    """

    strategy_name = "layer_parallel"

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        timeout: timedelta = timedelta(minutes=5),
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.layers = None if layers is None else list(layers)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All samples for every process."""
        return {"num_replicas": 1, "rank": 0}

    def process_dataloader(self, dataloader: object) -> object:
        """Full batches are not cut."""
        replicated = getattr(dataloader, "replicated", None)
        return super().process_dataloader(dataloader if replicated is None else replicated())

    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]
        """No gradients are averaged: the module stays as it is."""
        return model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of all layers, brought together first."""
        assert self.lightning_module is not None
        share = getattr(self.lightning_module, "share_weights", None)
        if share is not None:
            share()
        return super().lightning_module_state_dict()

    def communicator(self, costs: Sequence[float]) -> LayerGroups:
        """The communicator of a network.

        Args:
            costs: Work per layer.

        Raises:
            ValueError: If `layers` does not suit the network or the number of processes.
        """
        if self.layers is None:
            return LayerGroups(balanced_groups(costs, self.world_size))
        if len(self.layers) != self.world_size or sum(self.layers) != len(costs) or min(self.layers) < 1:
            raise ValueError(
                f"Expected argument `layers` of LayerParallelStrategy to be {self.world_size} positive numbers, one "
                f"per process, that add up to the {len(costs)} layers of the network, but got {self.layers}."
            )
        groups, first = [], 0
        for count in self.layers:
            groups.append(range(first, first + count))
            first += count
        return LayerGroups(groups)


StrategyRegistry.register(
    LayerParallelStrategy.strategy_name,
    LayerParallelStrategy,
    description="A group of layers per process, for algorithms that update all layers at once.",
)
