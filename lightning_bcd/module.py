"""Block coordinate descent in manual optimization: inner steps on one batch, sweeps, closures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bcd.blocks import BlockSpec, LayerBlock
from lightning_bcd.compatibility import check_at_least, check_choice
from lightning_bcd.optim.block import OptimizerFactory
from lightning_bcd.optim.store import STATE_POLICIES, StatePolicy
from lightning_bcd.scored_strategy import resolve_strategy
from lightning_bcd.strategy import BCDStrategy
from lightning_bcd.sweep import Sweep
from lightning_bcd.tracking import BlockLossTracker


class BCDMixin:
    """Block coordinate descent for a LightningModule in manual optimization.

    Mix it in before the module class, write `block_loss` and call `configure_bcd` in the constructor::

        class Net(BCDMixin, ExistingModule):
            def __init__(self):
                super().__init__()
                self.configure_bcd(inner_steps=4, optimizer=torch.optim.Adam)

            def block_loss(self, batch, batch_idx):
                ...

    Every optimizer step advances `trainer.global_step` by one, so `max_steps` stops exactly, also inside a visit.
    `ModelCheckpoint(every_n_train_steps=n)` looks once per batch: choose a multiple of the steps per batch.

    Attributes:
        tracker: The `BlockLossTracker` of the run, from the start of training on.
        bcd_blocks: The blocks.
        bcd_strategy: The strategy.
    """

    automatic_optimization = False
    tracker: BlockLossTracker
    bcd_blocks: list[LayerBlock]
    bcd_strategy: BCDStrategy
    _sweep: Sweep | None = None

    def configure_bcd(
        self,
        *,
        blocks: BlockSpec = "auto",
        strategy: str | BCDStrategy = "cyclic",
        inner_steps: int = 1,
        sweep: Literal["block", "all"] = "block",
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        optimizer_state: StatePolicy = "keep",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate: int = 1,
        cache_prefix: bool = False,
        prefix_module: str | None = None,
        num_blocks: int | None = None,
        coverage: int = 4,
        refresh_every: int = 1,
        nan_check: bool = True,
        seed: int = 0,
    ) -> None:
        """Set how the module is trained.

        Args:
            blocks: How to cut the model, see `create_blocks_from_model`.
            strategy: Name or object, see `BCDCallback`.
            inner_steps: Optimizer steps on the active block per visit, all on the same batch.
            sweep: `"block"` visits one block per batch, `"all"` as many as there are blocks, one after another.
            optimizer: From parameters to an optimizer, e.g. `torch.optim.Adam`; or one per block as a mapping
                from a regular expression for block names to such a function. Adam with lr = 1e-3 if None.
            optimizer_state: `"keep"`, `"reset"` or `"offload"` for blocks that leave. Keeping is the default
                because visits are short here.
            gradient_clip_val: Clip the gradient of the active block to this norm or value.
            gradient_clip_algorithm: `"norm"` or `"value"`.
            accumulate: Batches per visit: every step uses the mean gradient of this many batches (the last visit
                of an epoch takes what is left). They are held in memory until the visit is over.
            cache_prefix: Compute the frozen layers before the active block once per visit, see `PrefixCache`.
            prefix_module: Name of the `nn.Sequential` to do that for; by default the only one that holds all
                blocks.
            num_blocks: Merge neighbouring blocks into this many.
            coverage: See `BCDStrategy`; like `refresh_every` and `seed` for strategies given by name.
            refresh_every: See `ScoredStrategy`.
            nan_check: Stop before the backward pass when the loss is not finite.
            seed: Seed of the strategy.

        Raises:
            MisconfigurationException: If an argument is out of range.
        """
        check_choice("sweep", sweep, ("block", "all"))
        check_choice("optimizer_state", optimizer_state, STATE_POLICIES)
        check_choice("gradient_clip_algorithm", gradient_clip_algorithm, ("norm", "value"))
        check_at_least("inner_steps", inner_steps, 1)
        check_at_least("accumulate", accumulate, 1)
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise MisconfigurationException(
                f"Expected argument `gradient_clip_val` to be positive or None, but got {gradient_clip_val}. Use None "
                "to switch clipping off."
            )
        try:
            self.bcd_strategy = resolve_strategy(strategy, seed=seed, coverage=coverage, refresh_every=refresh_every)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error
        self._sweep = Sweep(
            blocks=(blocks, num_blocks),
            factory=torch.optim.Adam if optimizer is None else optimizer,
            policy=optimizer_state,
            inner_steps=inner_steps,
            whole=sweep == "all",
            clip=(gradient_clip_val, gradient_clip_algorithm),
            accumulate=accumulate,
            cache_prefix=cache_prefix,
            prefix_module=prefix_module,
            nan_check=nan_check,
        )

    def block_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the scalar loss of a batch; called once per inner step (more often by LBFGS).

        Override it. Do not call backward and do not change parameters in it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define block_loss(self, batch, batch_idx). Write it and return the scalar "
            "loss of the batch; BCDModule does the rest."
        )

    def configure_optimizers(self) -> Any:
        """Return one `BlockOptimizer` over all blocks.

        To add a scheduler, override: `optimizer = super().configure_optimizers()` and return
        `{"optimizer": optimizer, "lr_scheduler": {"scheduler": ..., "interval": "step"}}`. It is stepped by its
        interval: once per inner step or once per epoch.
        """
        return self._bcd_sweep().build(self)

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that keeps the books; call `super().configure_callbacks()` when you override this."""
        return [self._bcd_sweep()]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Visit one block, or all blocks, on this batch; returns the loss of the last step."""
        return self._bcd_sweep().training_step(self, batch, batch_idx)

    def _bcd_sweep(self) -> Sweep:
        if self._sweep is None:
            self.configure_bcd()
        assert self._sweep is not None
        return self._sweep


class BCDModule(BCDMixin, LightningModule):
    """A LightningModule trained by block coordinate descent with several steps per block and batch.

    Write `block_loss`, the scalar loss of a batch::

        class Net(BCDModule):
            def __init__(self):
                super().__init__(inner_steps=4, optimizer=torch.optim.Adam)
                self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

            def block_loss(self, batch, batch_idx):
                x, y = batch
                return F.cross_entropy(self.net(x), y)

    Args:
        blocks: See `BCDMixin.configure_bcd`, like all other arguments.
        strategy: Selection rule.
        inner_steps: Optimizer steps per visit.
        sweep: `"block"` or `"all"` blocks per batch.
        optimizer: Optimizer class or factory, or one per block.
        optimizer_state: What happens to the state of a block that leaves.
        gradient_clip_val: Clipping threshold.
        gradient_clip_algorithm: `"norm"` or `"value"`.
        accumulate: Batches per visit.
        cache_prefix: Reuse the activations of frozen layers within a visit.
        prefix_module: The `nn.Sequential` to reuse them for.
        num_blocks: Merge blocks into this many.
        coverage: Coverage guarantee of the strategy.
        refresh_every: Visits between two measurements of gradient norms.
        nan_check: Check the loss before the backward pass.
        seed: Seed of the strategy.
    """

    def __init__(
        self,
        *,
        blocks: BlockSpec = "auto",
        strategy: str | BCDStrategy = "cyclic",
        inner_steps: int = 1,
        sweep: Literal["block", "all"] = "block",
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        optimizer_state: StatePolicy = "keep",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate: int = 1,
        cache_prefix: bool = False,
        prefix_module: str | None = None,
        num_blocks: int | None = None,
        coverage: int = 4,
        refresh_every: int = 1,
        nan_check: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.configure_bcd(
            blocks=blocks,
            strategy=strategy,
            inner_steps=inner_steps,
            sweep=sweep,
            optimizer=optimizer,
            optimizer_state=optimizer_state,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            accumulate=accumulate,
            cache_prefix=cache_prefix,
            prefix_module=prefix_module,
            num_blocks=num_blocks,
            coverage=coverage,
            refresh_every=refresh_every,
            nan_check=nan_check,
            seed=seed,
        )
