"""The training step behind `BCDModule`: visits, inner steps and the state between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bcd.blocks import BlockSpec, LayerBlock, create_blocks_from_model
from lightning_bcd.compatibility import as_misconfiguration, check_finite, loss_scaler, observe_scores
from lightning_bcd.optim.block import BlockOptimizer, OptimizerFactory
from lightning_bcd.optim.masters import MasterWeights
from lightning_bcd.optim.store import StatePolicy
from lightning_bcd.prefix import PrefixCache
from lightning_bcd.ranks import Ranks, check_sharding
from lightning_bcd.scheduler import BlockScheduler
from lightning_bcd.schedules import SchedulerIntervals
from lightning_bcd.tracking import BlockLossTracker


class Sweep(Callback):
    """The training step of a BCDMixin and its state.

    A callback, so that the books are kept also when the user overrides hooks of the module without `super()`.
    """

    def __init__(
        self,
        *,
        blocks: tuple[BlockSpec, int | None],
        factory: OptimizerFactory | Mapping[str, OptimizerFactory],
        policy: StatePolicy,
        inner_steps: int,
        whole: bool,
        clip: tuple[float | None, str],
        accumulate: int,
        cache_prefix: bool,
        prefix_module: str | None,
        nan_check: bool,
    ) -> None:
        self._blocks = blocks
        self._factory = factory
        self._policy: StatePolicy = policy
        self._inner_steps = inner_steps
        self._whole = whole
        self._clip = clip
        self._accumulate = accumulate
        self._cache_prefix = cache_prefix
        self._prefix_module = prefix_module
        self._nan_check = nan_check
        self._run: BlockScheduler | None = None
        self._ranks: Ranks | None = None
        self._fitting = False
        self._watched: SchedulerIntervals | None = None
        self._restored: dict[str, Any] = {}

    # -- setting up -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work and watch for schedulers."""
        self._fitting = stage == "fit"
        if stage == "fit":
            self._ranks = Ranks(trainer)
            self._run, self._restored = None, {}
            if self._watched is not None:
                self._watched.release()  # of a fit that broke off early
            self._watched = SchedulerIntervals(pl_module)

    @property
    def _intervals(self) -> SchedulerIntervals:
        assert self._watched is not None, "setup comes first"
        return self._watched

    def build(self, module: Any) -> BlockOptimizer:
        """Make the blocks of the module and their optimizer."""
        what, num_blocks = self._blocks
        with as_misconfiguration():
            blocks = create_blocks_from_model(module, what, num_blocks=num_blocks)
            module.bcd_blocks = blocks
            return BlockOptimizer(blocks, self._factory)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect blocks, strategy and optimizer; nothing is frozen yet."""
        module: Any = pl_module
        optimizers = trainer.optimizers
        if len(optimizers) != 1 or not isinstance(optimizers[0], BlockOptimizer):
            raise MisconfigurationException(
                f"Expected {type(pl_module).__name__}.configure_optimizers to return the optimizer of "
                "super().configure_optimizers(), but got another one. Call it and add only schedulers; pass "
                "`optimizer=` to choose the optimizer of each block."
            )
        blocks = module.bcd_blocks
        check_sharding(pl_module, module.bcd_strategy, self._policy)
        assert self._ranks is not None
        self._ranks.connect(blocks)
        try:
            self._run = BlockScheduler(
                blocks,
                module.bcd_strategy,
                steps_per_block=self._inner_steps,
                mode="freeze",
                optimizer=optimizers[0],
                policy=self._policy,
                masters=MasterWeights(),
                companions=[self._ranks],
            )
            module.tracker = self._tracker = BlockLossTracker(names=[block.name for block in blocks])
            self._cache = PrefixCache(self._find_prefix(pl_module, blocks)) if self._cache_prefix else None
            if self._restored:
                self._run.load_state_dict(self._restored["run"])
                self._tracker.load_state_dict(self._restored["tracker"])
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error
        held = self._restored.get("held", [])
        self._held: list[tuple[Any, int]] = [(trainer.strategy.batch_to_device(batch), index) for batch, index in held]
        self._restored = {}

    def _find_prefix(self, module: nn.Module, blocks: Sequence[LayerBlock]) -> nn.Sequential:
        if self._prefix_module is not None:
            found = dict(module.named_modules()).get(self._prefix_module)
            if not isinstance(found, nn.Sequential):
                raise ValueError(
                    f"Expected argument `prefix_module` to name an nn.Sequential, but {self._prefix_module!r} is "
                    f"{'missing' if found is None else type(found).__name__}. Use a name from named_modules()."
                )
            return found
        needed = {p for block in blocks for p in block.parameters}
        candidates = {
            name: child
            for name, child in module.named_modules()
            if isinstance(child, nn.Sequential) and needed <= set(child.parameters())
        }
        if len(candidates) != 1:
            raise ValueError(
                f"Expected one nn.Sequential that holds all blocks for cache_prefix=True, but found "
                f"{list(candidates)}. Name the one to use with `prefix_module=`."
            )
        return next(iter(candidates.values()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect to loggers, schedulers and step counting."""
        self._tracker.attach(trainer)
        self._intervals.apply(trainer)
        assert self._run is not None
        self._run.listen()

    # -- training -------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch means of the tracker."""
        self._tracker.start_epoch()

    def training_step(self, module: Any, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Make the visits due on this batch; return the loss of the last step."""
        run, trainer = self._run, module.trainer
        if run is None:
            raise MisconfigurationException(
                f"{type(module).__name__}.configure_callbacks does not return the callback of BCDMixin. Start it with "
                "`callbacks = super().configure_callbacks()`. (Finders of the learning rate or batch size take all "
                "callbacks away and do not work with BCDModule.)"
            )
        self._held.append((batch, batch_idx))
        if len(self._held) < self._accumulate and not trainer.is_last_batch:
            return None
        loss: Tensor | None = None
        for _ in range(len(run.blocks) if self._whole else 1):
            loss = self._visit(module, run, trainer)
            if loss is None or _out_of_steps(trainer):
                break
        self._held = []
        return None if loss is None else {"loss": loss}

    def _visit(self, module: Any, run: BlockScheduler, trainer: Trainer) -> Tensor | None:
        loss: Tensor | None = None
        self._tracker.report.begin_batch()
        if run.visit_done:
            with as_misconfiguration(IndexError, TypeError):
                run.begin_visit()
            self._tracker.start_visit(trainer, run, thin=True)
        else:
            run.apply()
        with self._cache.active() if self._cache is not None else nullcontext():
            for _ in range(self._inner_steps - run.steps):
                loss = self._inner_step(module, run, trainer)
                assert run.active is not None
                self._tracker.record_step(trainer, run.active, loss, last=run.visit_done)
                if run.visit_done or _out_of_steps(trainer):
                    break
        assert run.active is not None
        self._tracker.report.end_batch(run.active)
        if run.visit_done:
            self._tracker.end_visit(trainer, run)
        return loss

    def _inner_step(self, module: Any, run: BlockScheduler, trainer: Trainer) -> Tensor:
        optimizer = module.optimizers()
        run.prepare_step(measure=bool(trainer.loggers))
        first: Tensor | None = None

        def evaluate() -> Tensor:
            nonlocal first
            loss = self._loss_and_gradient(module, run, trainer, probe=first is None and run.wants_scores())
            first = loss if first is None else first
            return loss

        if run.optimizer.requires_closure:  # type: ignore[attr-defined]
            optimizer.step(closure=evaluate)
        else:
            evaluate()
            optimizer.step()
        self._intervals.step(trainer, "step")
        assert first is not None
        return first

    def _loss_and_gradient(self, module: Any, run: BlockScheduler, trainer: Trainer, probe: bool) -> Tensor:
        # The weights have moved since the last evaluation in the same autocast context.
        torch.clear_autocast_cache()
        run.optimizer.zero_grad(set_to_none=True)
        if self._cache is not None:
            self._cache.new_evaluation()
        total: Tensor | None = None
        ranks = self._ranks
        assert ranks is not None
        with torch.enable_grad():
            for batch, batch_idx in self._held:
                last = batch_idx == self._held[-1][1]
                ranks.begin_batch(module)
                if probe and last:
                    run.start_probe()
                loss = module.block_loss(batch, batch_idx) / len(self._held)
                if self._nan_check:
                    check_finite(loss, trainer, run.block)
                if last:
                    ranks.before_backward()
                if loss.requires_grad:
                    module.manual_backward(loss)
                total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        ranks.after_backward()
        if run.probing:
            observe_scores(run, trainer)
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="mean")
        if run.steps == 0:
            with as_misconfiguration():
                run.note_gradient()
        if loss_scaler(trainer) is not None:
            run.stand_in_gradient()
        return total

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure and clip the gradient of the active block."""
        # Gradients are unscaled here, and for LBFGS this runs at every evaluation.
        assert self._run is not None
        self._run.drop_stand_in()
        if trainer.loggers:
            self._run.measure_gradient()
        self._run.lift()
        value, algorithm = self._clip
        if value is not None:
            pl_module.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers of interval "epoch"."""
        self._intervals.step(trainer, "epoch")

    # -- the end --------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore `requires_grad`."""
        self._tracker.write_image(trainer)
        self._release(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore `requires_grad`, learning rates and hooks when training breaks off."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the Trainer, also when there was nothing left to train."""
        if stage == "fit":
            self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        if self._ranks is not None:
            self._ranks.leave()
        if self._watched is not None:
            self._watched.release()
        if self._run is not None:
            self._run.release()
            self._tracker.detach(trainer)

    def state_dict(self) -> dict[str, Any]:
        """State as plain types and tensors (and the held batches, if the window is open)."""
        if self._run is None:
            return {}
        return {
            "run": self._run.state_dict(),
            "tracker": self._tracker.state_dict(),
            # Batches that wait for the rest of their accumulation window.
            "held": [[_plain(batch), batch_idx] for batch, batch_idx in self._held],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until `on_fit_start` has made the blocks; testing a checkpoint changes nothing."""
        if self._fitting:
            self._restored = state_dict


def _plain(batch: Any) -> Any:
    # A checkpoint holds plain containers only; a batch may be a mapping of a library (Hugging Face).
    if isinstance(batch, Mapping):
        return {key: _plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_plain(value) for value in batch]
    return batch


def _out_of_steps(trainer: Trainer) -> bool:
    return 0 <= trainer.max_steps <= trainer.global_step
