"""A run with several processes: what the Trainer's DDP, FSDP and DeepSpeed strategies need from block training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bcd.blocks import LayerBlock
from lightning_bcd.compatibility import as_misconfiguration
from lightning_bcd.distributed.block_sync import (
    BlockGradientSync,
    average,
    broadcast_tensors,
    check_same_block,
    check_same_order,
)
from lightning_bcd.optim.store import StatePolicy
from lightning_bcd.strategy import BCDStrategy


class Ranks:
    """The other processes of a run, as the active block sees them.

    Under `strategy="ddp"` the model is not wrapped in DistributedDataParallel, whose buckets are fixed at the start and
    as large as the model: `BlockGradientSync` averages the gradients of the active block instead. Parameters and
    buffers start equal, and buffers follow rank 0 as DDP does it. With other strategies (one process, FSDP2) nothing
    changes, except that all ranks must agree on the block.

    Made in `setup`, before the Trainer would wrap the model.

    Args:
        trainer: The Trainer of the run.
        inside_backward: Names of arguments in use that step parameters inside the backward pass.

    Raises:
        MisconfigurationException: Under DeepSpeed, if the strategy averages gradients in a way of its own, or if ranks
            may use different parameters while they step inside the backward pass.
    """

    def __init__(self, trainer: Trainer, inside_backward: Sequence[str] = ()) -> None:
        self._blocks: Sequence[LayerBlock] = ()
        self._sync: BlockGradientSync | None = None
        self._several = trainer.world_size > 1
        self._device = trainer.strategy.root_device
        self._positions: dict[nn.Parameter, int] = {}
        self._averaged: list[int] = []
        self._inside_backward = bool(inside_backward)
        strategy = trainer.strategy
        if "DeepSpeed" in type(strategy).__name__:
            raise MisconfigurationException(
                "Block coordinate descent cannot work with DeepSpeed, which flattens parameters across blocks. Use "
                "strategy='ddp' or ModelParallelStrategy."
            )
        self._ddp = strategy if isinstance(strategy, DDPStrategy) else None
        if self._ddp is None:
            return
        options = self._ddp._ddp_kwargs
        self._find_unused = bool(options.get("find_unused_parameters", False))
        self._broadcasts = bool(options.get("broadcast_buffers", True))
        if self._ddp._ddp_comm_hook is not None or self._ddp._model_averaging_period is not None:
            raise MisconfigurationException(
                "Expected DDPStrategy without `ddp_comm_hook` and `model_averaging_period`, but got one: block "
                "coordinate descent averages the gradients of the active block itself. Remove it."
            )
        if self._find_unused and inside_backward:
            raise MisconfigurationException(
                f"Expected {' and '.join(inside_backward)} without find_unused_parameters=True, but got both: a rank "
                "without a gradient would keep the others waiting inside their backward pass. Use strategy='ddp', or "
                "leave the argument out."
            )
        # Instead of wrapping; the Trainer calls it once the model is on its device.
        self._ddp.configure_ddp = self._equalise  # type: ignore[method-assign]

    def _equalise(self) -> None:
        assert self._ddp is not None
        assert self._ddp.model is not None
        broadcast_tensors(self._ddp.model)

    def connect(self, blocks: Sequence[LayerBlock], *, in_backward: bool = False) -> None:
        """Take the blocks of the run; with `in_backward` the gradients are averaged one by one with `average`."""
        self._blocks = blocks
        self._positions = {p: number for number, p in enumerate(p for block in blocks for p in block.parameters)}
        if self._ddp is not None and not in_backward:
            self._sync = BlockGradientSync(find_unused=self._find_unused)

    @property
    def average(self) -> Callable[[nn.Parameter], None] | None:
        """Averages the gradient of a parameter over all ranks, where that is this package's task."""
        return None if self._ddp is None else self._average

    def _average(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._averaged.append(self._positions[parameter])
        average(parameter.grad)

    def average_copy(self, gradient: Tensor) -> Tensor:
        """Return the mean over all ranks, as a copy: for a checkpoint, which every rank will read."""
        copy = gradient.detach().clone()
        if self._ddp is not None:
            average(copy)
        return copy

    def enter(self, active: int) -> None:
        """Turn to the active block, after all ranks have shown that they mean the same.

        Raises:
            MisconfigurationException: If they do not.
        """
        if self._several and dist.is_available() and dist.is_initialized():
            with as_misconfiguration():
                check_same_block(active, [block.name for block in self._blocks], self._device)
        if self._sync is not None:
            self._sync.enter(self._blocks[active].parameters)

    def leave(self) -> None:
        """Let go of the model and of the Trainer's strategy; safe to call twice."""
        if self._sync is not None:
            self._sync.leave()
        if self._ddp is not None:
            vars(self._ddp).pop("configure_ddp", None)
            self._ddp = None

    def begin_batch(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0 (running statistics), as DDP does before a forward pass."""
        if self._ddp is not None and self._broadcasts:
            broadcast_tensors(module, buffers_only=True)

    def before_backward(self) -> None:
        """Average the gradients in the backward pass that follows."""
        self._averaged = []
        if self._sync is not None:
            self._sync.begin()

    def after_backward(self) -> None:
        """Wait for the averages, if `before_backward` was called.

        Raises:
            MisconfigurationException: If the ranks use different parameters and DDP was not told so.
        """
        with as_misconfiguration():
            if self._sync is not None and self._sync.armed:
                self._sync.finish()
            if self._inside_backward and self._ddp is not None:
                check_same_order(self._averaged, self._device)


def check_sharding(
    module: LightningModule, strategy: BCDStrategy, policy: StatePolicy, inside_backward: Sequence[str] = ()
) -> None:
    """Refuse what parameters that FSDP shards over ranks cannot do.

    Args:
        module: The module, wrapped by the Trainer's strategy.
        strategy: The selection rule; one that reads gradient norms would need them gathered.
        policy: What happens to the optimizer state of a block that leaves.
        inside_backward: Names of arguments in use that step parameters inside the backward pass.

    Raises:
        MisconfigurationException: For FSDP1 with flat parameters, or FSDP with one of the above.
    """
    if any(getattr(p, "_is_flat_param", False) for p in module.parameters()):
        raise MisconfigurationException(
            "FSDP has flattened the parameters of several blocks into one. Use FSDPStrategy(use_orig_params=True) with "
            "an auto_wrap_policy that wraps every block, or ModelParallelStrategy with fully_shard per layer."
        )
    used = list(inside_backward)
    used += [f"a strategy that reads gradient norms ({type(strategy).__name__})"] if strategy.needs_scores else []
    used += ["optimizer_state='offload'"] if policy == "offload" else []
    used += ["bfloat16 weights"] if any(p.dtype == torch.bfloat16 for p in module.parameters()) else []
    if used and is_sharded(module):
        raise MisconfigurationException(
            f"Expected a run without {' and '.join(used)} on parameters that FSDP shards over ranks, but got it. Leave "
            "it out (weights: float32 with a MixedPrecisionPolicy), or use strategy='ddp'."
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP has cut the parameters of the module into one piece per rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    # Not isinstance of DTensor, which moved between torch versions.
    return any(hasattr(p, "to_local") for p in module.parameters()) or any(
        isinstance(child, FullyShardedDataParallel) for child in module.modules()
    )
