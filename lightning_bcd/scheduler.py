"""Which block is trained now: the bookkeeping that the callback and the manual-optimization mixin share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bcd.blocks import LayerBlock
from lightning_bcd.optim.block import BlockOptimizer, check_optimizer
from lightning_bcd.optim.in_backward import StepInBackward
from lightning_bcd.optim.masters import MasterWeights
from lightning_bcd.optim.store import OptimizerStateStore, StatePolicy
from lightning_bcd.probe import GradientNormProbe, squared_norm
from lightning_bcd.strategy import BCDStrategy

STATE_VERSION = 2

FreezeMode: TypeAlias = Literal["freeze", "mask"]


class Companion(Protocol):
    """Something that follows the active block, for example hooks on its parameters."""

    def enter(self, active: int) -> None:
        """Turn to this block; called at every begin of a visit and after a resume, idempotent."""

    def leave(self) -> None:
        """Let go of the model; safe to call twice."""


class BlockScheduler:
    """Moves training from block to block: a visit is `steps_per_block` optimizer steps on one block.

    The user's optimizer and parameter groups are not replaced: the scheduler flips `requires_grad`, frees the
    gradients of blocks that leave and keeps, drops or moves their optimizer state.

    Args:
        blocks: The blocks; together they hold every trainable parameter once.
        strategy: Chooses the block of each visit; it is set up anew.
        steps_per_block: Optimizer steps per visit, at least 1.
        mode: `"freeze"` sets `requires_grad` of inactive blocks to False, so backward stops at the active
            block; `"mask"` runs the full backward pass and drops the gradients of inactive blocks.
        optimizer: The optimizer that holds all parameters of the blocks.
        policy: What happens to the optimizer state of a block that leaves, see `OptimizerStateStore`.
        warmup_steps: After a switch the learning rate rises linearly over this many steps.
        masters: float32 masters of bfloat16 weights of the active block.
        in_backward: Takes the optimizer step of each parameter inside the backward pass.
        companions: Follow the active block.

    Attributes:
        active: Index of the active block, None before the first visit.
        steps: Optimizer steps taken in the current visit.
        probes: Measurements of all gradient norms so far, one full backward pass each.
        grad_norm: ‖∂L/∂block‖₂ of the active block where `measure_gradient` was called last in this visit.

    Raises:
        ValueError: If a parameter of a block is in no parameter group, or the optimizer is LBFGS.
    """

    def __init__(
        self,
        blocks: Sequence[LayerBlock],
        strategy: BCDStrategy,
        *,
        steps_per_block: int,
        mode: FreezeMode,
        optimizer: Optimizer,
        policy: StatePolicy,
        warmup_steps: int = 0,
        masters: MasterWeights | None = None,
        in_backward: StepInBackward | None = None,
        companions: Sequence[Companion] = (),
    ) -> None:
        self.blocks = list(blocks)
        self.strategy = strategy
        self.steps_per_block = steps_per_block
        self.mode = mode
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.active: int | None = None
        self.steps = 0
        self.probes = 0
        self.grad_norm: Tensor | None = None
        self.masters = masters
        self.in_backward = in_backward
        self._companions = list(companions)
        self._probe: GradientNormProbe | None = None
        self._stand_in: nn.Parameter | None = None
        self._engaged = False
        # From here on: the Trainer restores a checkpoint before `listen`.
        self._handles: list[RemovableHandle] = [] if masters is None else masters.keep_state_precision(optimizer)
        self._full_lrs: list[Any] = []
        self._without_gradient: set[int] = set()
        self._groups = self._group_sizes()
        # FSDP1 may leave a rank with nothing of a block.
        strategy.setup(len(self.blocks), [max(1, block.num_parameters()) for block in self.blocks])
        check_optimizer(self.blocks, optimizer, masters=masters is not None)
        self._store = OptimizerStateStore(optimizer, policy, float32=masters is not None)

    @property
    def block(self) -> LayerBlock:
        """The active block."""
        assert self.active is not None, "no block is active before the first visit"
        return self.blocks[self.active]

    @property
    def visit_done(self) -> bool:
        """Whether the next optimizer step belongs to another visit."""
        return self.active is None or self.steps >= self.steps_per_block

    @property
    def probing(self) -> bool:
        """Whether a gradient-norm measurement is under way."""
        return self._probe is not None

    def listen(self) -> None:
        """Count optimizer steps from now on.

        The optimizer itself says when it stepped: a step that AMP skips for overflow is none.
        """
        self._handles += [
            self.optimizer.register_step_pre_hook(self._warm_up),
            self.optimizer.register_step_post_hook(self._count_step),
        ]

    def _warm_up(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.steps < self.warmup_steps:
            self._full_lrs = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (self.steps + 1) / (self.warmup_steps + 1)

    def _count_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Right after the step: learning-rate schedulers must see the full rates.
        self._restore_lrs()
        if self.masters is not None:
            self.masters.lower()
        if self.in_backward is not None:
            self.in_backward.forget()
        # A fused optimizer steps under AMP also when it skips for overflow, and knows it by this attribute.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.steps += 1

    def _restore_lrs(self) -> None:
        if self._full_lrs:
            for group, lr in zip(self.optimizer.param_groups, self._full_lrs, strict=True):
                group["lr"] = lr
            self._full_lrs = []

    def note_gradient(self) -> None:
        """Look whether the active block got a gradient in the first step of a visit; if not, end the visit.

        Warns once per block with its name.

        Raises:
            ValueError: If no block of all that were tried got one.
        """
        assert self.active is not None
        stepped = self.in_backward is not None and self.in_backward.stepped
        if stepped or any(p.grad is not None for p in self.block.parameters):
            self._without_gradient.discard(self.active)
            return
        if self.active not in self._without_gradient:
            warnings.warn(
                f"Block {self.block.name!r} got no gradient: the loss does not depend on it. Its visit ends early. "
                "Freeze the unused parameters before training to leave the block out.",
                stacklevel=3,
            )
        self._without_gradient.add(self.active)
        if len(self._without_gradient) == len(self.blocks):
            raise ValueError(
                "No block got a gradient, so nothing can be trained. Check that the loss depends on the parameters "
                "and is not detached."
            )
        # The step under way is the last one: further steps would train nothing.
        self.steps = self.steps_per_block - 1

    def stand_in_gradient(self) -> None:
        """Give a block without gradient one of zeros, which a gradient scaler needs to see."""
        if all(p.grad is None for p in self.block.parameters):
            self._stand_in = next(p for p in self.block.parameters if p.requires_grad)
            self._stand_in.grad = torch.zeros_like(self._stand_in)

    def drop_stand_in(self) -> None:
        """Take the zeros away again, so that weight decay and momentum move nothing."""
        if self._stand_in is not None:
            self._stand_in.grad = None
            self._stand_in = None

    def measure_gradient(self) -> None:
        """Set `grad_norm` if the step under way is the last of the visit; no host sync."""
        if self.steps != self.steps_per_block - 1:
            return
        squares = [squared_norm(p.grad) for p in self.block.parameters if p.grad is not None]
        if self.in_backward is not None:
            squares += self.in_backward.squares
        if squares:
            self.grad_norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()

    def check_any_gradient(self) -> None:
        """Raise ValueError if no parameter of any block got a gradient (call after a full backward pass)."""
        stepped = self.in_backward is not None and self.in_backward.stepped
        if not stepped and all(p.grad is None for block in self.blocks for p in block.parameters):
            raise ValueError(
                "No block got a gradient, so nothing can be trained. Check that training_step returns a loss that "
                "depends on the parameters and is not detached."
            )

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.optimizer.param_groups]

    def groups_changed(self) -> bool:
        """Whether parameter groups were added or resized since the start."""
        return self._group_sizes() != self._groups

    def begin_visit(self) -> tuple[int | None, int]:
        """Let the strategy choose a block and make it the active one.

        Returns:
            The index of the block that left (None at the first visit) and of the one that came.

        Raises:
            IndexError: If the strategy returned an index out of range.
        """
        self._drop_probe()
        old, new = self.active, self.strategy.next()
        self.active = new
        self.steps = 0
        self.grad_norm = None
        if old != new:
            self.drop_inactive_gradients()
        self.apply()
        return old, new

    def apply(self) -> None:
        """Bring `requires_grad`, the optimizer and its state in line with the active block; idempotent."""
        assert self.active is not None
        self._engaged = True
        if isinstance(self.optimizer, BlockOptimizer):
            self.optimizer.active = self.active
        for index, block in enumerate(self.blocks):
            if index == self.active or self.mode == "mask":
                block.unfreeze()
            else:
                block.freeze()
            if index != self.active:
                self._store.leave(block.parameters)
                if self.masters is not None:
                    self.masters.leave(block.parameters)
        self._store.enter(self.block.parameters)
        if self.masters is not None:
            self.masters.enter(self.block.parameters)
        if self.in_backward is not None:
            self.in_backward.enter(self.block.parameters)
        for companion in self._companions:
            companion.enter(self.active)

    def prepare_step(self, *, measure: bool) -> None:
        """Before the forward pass of the last batch of an optimizer step.

        In the last step of a visit the offloaded state of the next block starts to come back, if the strategy knows the
        block. `measure` says whether `measure_gradient` will be called.
        """
        last = self.steps == self.steps_per_block - 1
        if self.in_backward is not None:
            self.in_backward.measure = squared_norm if last and measure else None
        upcoming = self.strategy.peek() if last and self._store.policy == "offload" else None
        if upcoming is not None and upcoming != self.active:
            self._store.prefetch(self.blocks[upcoming].parameters)

    def lift(self) -> None:
        """Before the optimizer step and before clipping: bfloat16 weights step through their float32 masters."""
        if self.masters is not None and self.in_backward is None:
            self.masters.lift()

    def release(self) -> None:
        """Restore every `requires_grad` and learning rate and stop counting; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._restore_lrs()
        self._drop_probe()
        for companion in self._companions:
            companion.leave()
        if self.in_backward is not None:
            self.in_backward.leave()
        if self.masters is not None:
            self.masters.restore()
        if self._engaged:
            for block in self.blocks:
                block.unfreeze()
        self._engaged = False

    def _drop_probe(self) -> None:
        # A batch without loss has no backward pass that would have ended the measurement.
        if self._probe is not None:
            self._probe.disarm()
            self._probe = None

    def wants_scores(self) -> bool:
        """Whether the step about to be taken is the last of a visit whose end is measured."""
        return self.steps == self.steps_per_block - 1 and self.strategy.wants_scores()

    def start_probe(self) -> None:
        """Measure gradient norms in the next backward pass; call before its forward pass."""
        assert self.active is not None
        if self._probe is None:
            self._probe = GradientNormProbe(self.blocks, self.active, freeze=self.mode == "freeze")
            self._probe.arm()

    def finish_probe(self) -> list[float]:
        """Return the gradient norm of every block after that backward pass and freeze inactive blocks again."""
        self.probes += 1
        assert self._probe is not None
        norms = self._probe.norms()
        self._drop_probe()
        return norms

    def drop_inactive_gradients(self) -> None:
        """Set the gradients of all inactive blocks to None, so that no optimizer moves them."""
        for index, block in enumerate(self.blocks):
            if index != self.active:
                for parameter in block.parameters:
                    parameter.grad = None

    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state held beside the weights."""
        return self._store.state_bytes()

    def state_dict(self) -> dict[str, Any]:
        """Position, strategy and offloaded optimizer state as plain types and tensors."""
        names = self._parameter_names()
        return {
            "version": STATE_VERSION,
            "blocks": [block.name for block in self.blocks],
            "active": self.active,
            "steps": self.steps,
            "strategy": self.strategy.state_dict(),
            "probes": self.probes,
            "without_gradient": sorted(self._without_gradient),
            "early_state": self._store.early,
            "offloaded": {names[parameter]: state for parameter, state in self._store.host_state().items()},
            "masters": None if self.masters is None else self.masters.state_dict(names),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`. Call `apply` before the next step.

        Raises:
            ValueError: If the format or the blocks differ from those of the saved run.
        """
        if (version := state_dict.get("version")) != STATE_VERSION:
            raise ValueError(
                f"Expected a block state of format version {STATE_VERSION}, but got {version!r}. Resume with the "
                "release that wrote the checkpoint, or start a new run from its weights."
            )
        names = [block.name for block in self.blocks]
        if (saved := list(state_dict["blocks"])) != names:
            raise ValueError(
                f"Expected the blocks of the saved run, but got others. Saved {len(saved)}: {saved}. Now "
                f"{len(names)}: {names}. Resume with the same `blocks` argument and model, or start a new run."
            )
        self.strategy.load_state_dict(state_dict["strategy"])
        self.active = state_dict["active"]
        self.steps = int(state_dict["steps"])
        self.probes = int(state_dict["probes"])
        self._without_gradient = set(state_dict["without_gradient"])
        self._store.early = bool(state_dict["early_state"])
        parameters = {name: parameter for parameter, name in self._parameter_names().items()}
        # State that was saved under another policy and is not wanted now is left behind.
        if self._store.policy == "offload":
            self._store.host = {parameters[name]: state for name, state in state_dict["offloaded"].items()}
        if self.masters is not None and state_dict["masters"] is not None:
            self.masters.load_state_dict(state_dict["masters"], parameters)

    def _parameter_names(self) -> dict[nn.Parameter, str]:
        return {p: f"{block.name}#{i}" for block in self.blocks for i, p in enumerate(block.parameters)}
