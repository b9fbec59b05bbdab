"""Gradient block coordinate descent inside Lightning's automatic optimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_bcd.blocks import BlockSpec, LayerBlock, create_blocks_from_model
from lightning_bcd.checkpointing import check_checkpointing, remove_input_gradient_hooks
from lightning_bcd.compatibility import (
    as_misconfiguration,
    check_alone,
    check_at_least,
    check_automatic,
    check_choice,
    check_expansion,
    check_finite,
    check_groups,
    check_unclipped,
    connect_optimizer,
    get_rng,
    loss_scaler,
    observe_scores,
    set_rng,
    warn_if_short,
)
from lightning_bcd.compiling import warn_if_recompiling
from lightning_bcd.expansion import ExpansionRule, LandscapeExpansion
from lightning_bcd.optim.block import OptimizerFactory
from lightning_bcd.optim.in_backward import StepInBackward
from lightning_bcd.optim.masters import ROUNDINGS, MasterWeights, Rounding
from lightning_bcd.optim.store import STATE_POLICIES, StatePolicy
from lightning_bcd.ranks import Ranks, check_sharding
from lightning_bcd.report import BlockReport
from lightning_bcd.scheduler import BlockScheduler
from lightning_bcd.scored_strategy import resolve_strategy
from lightning_bcd.strategy import BCDStrategy
from lightning_bcd.tracking import BlockLossTracker
from lightning_bcd.window import AccumulationWindow


class BCDCallback(Callback):
    """Trains one block of the model at a time, with the user's own optimizer.

    Every `steps_per_block` optimizer steps the strategy chooses the next block. Only that block has gradients and,
    with `optimizer_state="reset"`, optimizer state: gradient and optimizer memory of one block. Parameter groups,
    schedulers, clipping, accumulation, AMP and checkpoints work as before. Block changes happen between accumulation
    windows only::

        trainer = Trainer(callbacks=[BCDCallback(steps_per_block=50)])

    Args:
        blocks: How to cut the model, see `create_blocks_from_model`: `"auto"`, `"transformer"`, `"layer"`, `"linear"`,
            `"child"`, a mapping from names to regular expressions, a list of `LayerBlock`, or a function of the module.
        strategy: `"cyclic"`, `"backward"`, `"random"`, `"uniform"`, `"greedy"`, `"importance"`, or a
            `BCDStrategy`. (`Trainer(strategy=...)` is another thing: it picks devices.)
        steps_per_block: Optimizer steps per visit.
        optimizer_state: What happens to the optimizer state of a block that leaves: `"reset"` drops it,
            `"keep"` keeps it in place, `"offload"` moves it to host memory.
        mode: `"freeze"` turns off `requires_grad` of inactive blocks, so backward stops at the active block;
            `"mask"` runs the full backward pass and drops their gradients; `"auto"` freezes.
        optimizer: Instead of the module's optimizer: a function from parameters to an optimizer, or one per block as
            a mapping from a regular expression for block names to such a function. Builds a `BlockOptimizer`.
        num_blocks: Merge neighbouring blocks into this many of nearly equal size.
        max_parameters: Split blocks that have more parameters than this.
        coverage: In any `coverage × blocks` visits every block is visited (not for `"uniform"`).
        refresh_every: For `"greedy"` and `"importance"`: measure gradient norms every so many visits. A
            measurement runs the full backward pass in the last step of a visit.
        warmup_steps: After a switch the learning rate rises linearly over this many steps:
            step s of a visit uses lr · min(1, (s + 1) / (warmup_steps + 1)).
        nan_check: Stop before the backward pass when the loss is not finite (one host sync per batch).
        step_in_backward: Step each parameter as soon as its gradient is ready and free the gradient. Not together
            with gradient accumulation, clipping or a gradient scaler.
        rounding: bfloat16 weights (`precision="bf16-true"`) train through float32 masters of the active block, which
            are written back by `"stochastic"` rounding or to the `"nearest"` bfloat16.
        keep_residual: Keep what that rounding cuts off on the host (2 bytes per weight), so that a block goes on
            exactly where it stopped.
        expand: Landscape expansion: in the same backward pass blocks above the active one follow their gradients by
            plain `"sgd"` or `"sign"` steps, without optimizer state. Not with what `step_in_backward` excludes.
        expand_lr: Learning rate of these steps; required with `expand`.
        save_rng: Save the global random state too, for bit-identical resume of models that draw from it (dropout).
        seed: Seed of the strategy (if given by name, like `coverage` and `refresh_every`) and of rounding.

    Attributes:
        tracker: The `BlockLossTracker` of the run.
        blocks: The blocks of the run.

    Raises:
        MisconfigurationException: If an argument is out of range, or the Trainer, module or optimizer cannot
            work with block coordinate descent; the message names the remedy.
    """

    def __init__(
        self,
        blocks: BlockSpec = "auto",
        strategy: str | BCDStrategy = "random",
        steps_per_block: int = 50,
        optimizer_state: StatePolicy = "reset",
        mode: Literal["auto", "freeze", "mask"] = "auto",
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        num_blocks: int | None = None,
        max_parameters: int | None = None,
        coverage: int = 4,
        refresh_every: int = 1,
        warmup_steps: int = 0,
        nan_check: bool = True,
        step_in_backward: bool = False,
        rounding: Rounding = "stochastic",
        keep_residual: bool = False,
        expand: ExpansionRule | None = None,
        expand_lr: float | None = None,
        save_rng: bool = False,
        seed: int = 0,
    ) -> None:
        check_choice("optimizer_state", optimizer_state, STATE_POLICIES)
        check_choice("mode", mode, ("auto", "freeze", "mask"))
        check_at_least("steps_per_block", steps_per_block, 1)
        check_at_least("warmup_steps", warmup_steps, 0)
        check_choice("rounding", rounding, ROUNDINGS)
        check_expansion(expand, expand_lr, mode)
        self.steps_per_block = steps_per_block
        self.optimizer_state: StatePolicy = optimizer_state
        self.mode = mode
        self.warmup_steps = warmup_steps
        self.nan_check = nan_check
        self.save_rng = save_rng
        self.seed = seed
        self.step_in_backward = step_in_backward
        self.rounding: Rounding = rounding
        self.keep_residual = keep_residual
        self.expand: ExpansionRule | None = expand
        self.expand_lr = expand_lr
        self.blocks: list[LayerBlock] = []
        self.tracker: BlockLossTracker | None = None
        with as_misconfiguration():
            self.strategy = resolve_strategy(strategy, seed=seed, coverage=coverage, refresh_every=refresh_every)
        self._block_arguments = (blocks, {"num_blocks": num_blocks, "max_parameters": max_parameters})
        self._optimizer_factory = optimizer
        self._window = AccumulationWindow()
        self._run: BlockScheduler | None = None
        self._ranks: Ranks | None = None
        self._expansion: LandscapeExpansion | None = None
        self._unhooked: dict[Any, None] = {}
        self._restored: dict[str, Any] | None = None
        self._fitting = False

    def on_block_switch(self, trainer: Trainer, pl_module: LightningModule, old: int | None, new: int) -> None:
        """Override to act when a visit begins; `old` is None at the first visit and may equal `new`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is built."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        self._run, self._restored = None, None
        check_alone(trainer, BCDCallback)
        check_automatic(pl_module)
        for argument in self._inside_backward():
            check_unclipped(argument, trainer, pl_module)
        self._ranks = Ranks(trainer, self._inside_backward())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the blocks and connect to the optimizer. Nothing is frozen yet: DDP and summaries have seen all."""
        what, sizes = self._block_arguments
        check_sharding(pl_module, self.strategy, self.optimizer_state, self._inside_backward())
        with as_misconfiguration():
            if self.mode != "mask":
                check_checkpointing(pl_module)
            self.blocks = create_blocks_from_model(pl_module, what, **sizes)
            self._run = self._make_run(trainer, connect_optimizer(trainer, self.blocks, self._optimizer_factory))
            self.tracker = BlockLossTracker(names=[block.name for block in self.blocks])
        self._take_up(self._restored or {})
        self._restored = None

    def _inside_backward(self) -> list[str]:
        return [argument for argument in ("step_in_backward", "expand") if getattr(self, argument)]

    def _make_run(self, trainer: Trainer, optimizer: Optimizer) -> BlockScheduler:
        assert self._ranks is not None
        self._ranks.connect(self.blocks, in_backward=self.step_in_backward)
        average = self._ranks.average
        masters = MasterWeights(rounding=self.rounding, keep_residual=self.keep_residual, seed=self.seed)
        self._expansion = None
        if self.expand is not None and self.expand_lr is not None:
            self._expansion = LandscapeExpansion(
                self.blocks, self.expand, self.expand_lr, optimizer=optimizer, seed=self.seed, reduce=average
            )
        return BlockScheduler(
            self.blocks,
            self.strategy,
            steps_per_block=self.steps_per_block,
            mode="mask" if self.mode == "mask" else "freeze",
            optimizer=optimizer,
            policy=self.optimizer_state,
            warmup_steps=self.warmup_steps,
            masters=masters,
            in_backward=StepInBackward(optimizer, masters=masters, reduce=average) if self.step_in_backward else None,
            companions=[companion for companion in (self._ranks, self._expansion) if companion is not None],
        )

    def _take_up(self, state: dict[str, Any]) -> None:
        run, tracker = self._active_run()
        self._window = AccumulationWindow()
        if state:
            with as_misconfiguration():
                run.load_state_dict(state["run"])
            tracker.load_state_dict(state["tracker"])
            self._window.load_state_dict(state["window"])
            if self._expansion is not None and "expansion" in state:
                self._expansion.load_state_dict(state["expansion"])
        self._rng: dict[str, Any] | None = state.get("rng")
        self._saw_backward = self._window.open
        self._observed = False
        self._needs_apply = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect to loggers and step counting; warn if the run is too short for all blocks."""
        run, tracker = self._active_run()
        tracker.attach(trainer)
        run.listen()
        warn_if_short(trainer.estimated_stepping_batches, self.steps_per_block, len(run.blocks))
        warn_if_recompiling(pl_module, run.blocks, run.mode)

    def _active_run(self) -> tuple[BlockScheduler, BlockLossTracker]:
        assert self._run is not None
        assert self.tracker is not None
        return self._run, self.tracker

    @property
    def report(self) -> list[BlockReport]:
        """Visits, steps, seconds and mean loss decrease of every block so far; empty before the first fit."""
        return [] if self.tracker is None else self.tracker.report.rows()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch means of the tracker."""
        self._active_run()[1].start_epoch()
        # Lightning zeroes the gradients of a window that an epoch left open.
        self._window.close()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a visit if one is due; restored runs take up theirs."""
        run, tracker = self._active_run()
        assert self._ranks is not None
        check_groups(run.groups_changed())
        tracker.report.begin_batch()
        if run.visit_done or self._needs_apply:
            # Gradient checkpointing may have been switched on in between.
            self._unhooked |= dict.fromkeys(remove_input_gradient_hooks(pl_module))
        if run.visit_done:
            with as_misconfiguration(IndexError, TypeError):
                old, new = run.begin_visit()
            tracker.start_visit(trainer, run)
            self.on_block_switch(trainer, pl_module, old, new)
        elif self._needs_apply:
            run.apply()
            assert run.active is not None
            tracker.show(run.active)
        if self._needs_apply:
            self._restore_after_resume(run)
        self._observed = False
        self._ranks.begin_batch(pl_module)
        self._window.open = trainer.fit_loop._should_accumulate()
        if not self._window.open:
            run.prepare_step(measure=bool(trainer.loggers))
            if run.wants_scores():
                run.start_probe()

    def _restore_after_resume(self, run: BlockScheduler) -> None:
        # Here and not earlier: the Trainer zeroes gradients after it has restored a checkpoint.
        self._window.restore_gradients(run.blocks)
        if self._rng is not None:
            set_rng(self._rng)
        self._needs_apply = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss while no parameter has changed."""
        run, _ = self._active_run()
        if self.nan_check:
            check_finite(loss, trainer, run.block)
        if not loss.requires_grad and run.mode == "freeze":
            # The active block takes no part in this loss. Backward then has nothing to do, but must be possible.
            loss.requires_grad_(True)
        if not self._window.open and self._ranks is not None:
            self._ranks.before_backward()
        self._arm(True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the other ranks and read the probe."""
        run, _ = self._active_run()
        self._arm(False)
        if self._ranks is not None:
            self._ranks.after_backward()
        self._saw_backward = True
        if run.probing:
            self._observe(run, trainer)
        if not self._window.open and loss_scaler(trainer) is not None:
            run.stand_in_gradient()

    def _arm(self, armed: bool) -> None:
        for inside in (self._expansion, self._run.in_backward if self._run is not None else None):
            if inside is not None:
                inside.armed = armed

    def _observe(self, run: BlockScheduler, trainer: Trainer) -> None:
        if self._observed:  # LBFGS evaluates several times per step
            return
        self._observed = True
        observe_scores(run, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop gradients of inactive blocks, before clipping, and notice a block without gradient."""
        run, _ = self._active_run()
        run.drop_stand_in()
        if run.mode == "mask" and self._saw_backward and not self._observed:
            with as_misconfiguration():
                run.check_any_gradient()
        if run.mode == "mask" or self._expansion is not None:
            run.drop_inactive_gradients()
        if self._saw_backward and run.steps == 0:
            with as_misconfiguration():
                run.note_gradient()
        if trainer.loggers:
            run.measure_gradient()
        run.lift()
        self._saw_backward = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss of a finished step and the end of a visit."""
        run, tracker = self._active_run()
        assert run.active is not None
        self._window.add(outputs, trainer.accumulate_grad_batches)
        tracker.report.end_batch(run.active)
        if self._window.open:
            return
        if (mean := self._window.close()) is not None:
            tracker.record_step(trainer, run.active, mean, last=run.visit_done)
        if run.visit_done:
            tracker.end_visit(trainer, run)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore `requires_grad` and report the visits of every block."""
        _, tracker = self._active_run()
        tracker.write_image(trainer)
        self._release(trainer)
        rank_zero_info(f"BCDCallback: visits of {self.steps_per_block} steps\n{tracker.report.table()}")

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
        for module in self._unhooked:
            module.enable_input_require_grads()
        self._unhooked = {}
        if self._run is not None and self.tracker is not None:
            self._run.release()
            self.tracker.detach(trainer)
        self._needs_apply = True

    def state_dict(self) -> dict[str, Any]:
        """State as plain types and tensors; complete at any point between two batches."""
        if self._run is None or self.tracker is None or self._ranks is None:
            return {}
        state = {
            "run": self._run.state_dict(),
            "tracker": self.tracker.state_dict(),
            "window": self._window.state_dict(self.blocks, self._run.active, self._ranks.average_copy),
        }
        if self._expansion is not None:
            state["expansion"] = self._expansion.state_dict()
        if self.save_rng:
            state["rng"] = get_rng()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state, from `on_fit_start` on; testing or validating a checkpoint changes nothing."""
        if self._fitting and self._run is None:
            self._restored = state_dict
        elif self._fitting:
            self._take_up(state_dict)
