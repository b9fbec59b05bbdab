"""Landscape expansion: blocks above the active one follow their gradients without optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bcd.blocks import LayerBlock
from lightning_bcd.optim.block import refuse_closure
from lightning_bcd.optim.masters import rounding_generator, stochastic_round

ExpansionRule: TypeAlias = Literal["sgd", "sign"]
EXPANSION_RULES: tuple[ExpansionRule, ...] = ("sgd", "sign")


class LandscapeExpansion:
    """Updates inactive blocks above the active one on the fly, in the backward pass that crosses them anyway.

    For a block above the active one (nearer to the loss, later in the list of blocks) backward computes the gradient
    of its output in any case; its weights then follow

        W ← W − η g          (`"sgd"`)
        W ← W − η sign(g)    (`"sign"`)

    as soon as g is ready, and g is freed: no optimizer state and one gradient at a time. It costs the product that
    makes g. bfloat16 weights are rounded stochastically.

    Source: Luo et al., Accelerating Block Coordinate Descent for LLM Finetuning via Landscape Expansion (BREAD),
    NeurIPS 2025: the variant that takes SGD steps in the blocks that backward crosses.

    Args:
        blocks: All blocks, in the order of the forward pass: those after the active one in the list are updated.
        rule: `"sgd"` or `"sign"`.
        lr: η > 0.
        optimizer: The optimizer of the run.
        seed: Seed of the rounding.
        reduce: Averages the gradient of a parameter over all ranks, in a distributed run.

    Attributes:
        armed: Whether the backward pass under way is that of the training step; others change nothing.

    Raises:
        ValueError: If the optimizer evaluates the loss itself (LBFGS): every evaluation would move the blocks above.
    """

    def __init__(
        self,
        blocks: Sequence[LayerBlock],
        rule: ExpansionRule,
        lr: float,
        *,
        optimizer: Optimizer,
        seed: int = 0,
        reduce: Callable[[nn.Parameter], None] | None = None,
    ) -> None:
        refuse_closure(optimizer, "expand")
        self._blocks = blocks
        self._rule = rule
        self._lr = lr
        self._seed = seed
        self._reduce = reduce
        self._draws = 0
        self._handles: list[RemovableHandle] = []
        self.armed = False

    def enter(self, active: int) -> None:
        """Unfreeze the blocks above the active one and update them in every backward pass from now on."""
        self.leave()
        for block in self._blocks[active + 1 :]:
            block.unfreeze()
            for parameter in block.parameters:
                if parameter.requires_grad:
                    update = partial(self._update, parameter)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(update))  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Remove the hooks; freezing is the scheduler's. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter, gradient_owner: Tensor) -> None:
        if not self.armed:
            return
        if self._reduce is not None:
            self._reduce(parameter)
        assert parameter.grad is not None
        direction = parameter.grad.sign() if self._rule == "sign" else parameter.grad
        if parameter.dtype == torch.bfloat16:
            generator = rounding_generator(self._seed, self._draws, parameter.device)
            self._draws += 1
            target = parameter.float().add_(direction, alpha=-self._lr)
            parameter.copy_(stochastic_round(target, generator))
        else:
            parameter.add_(direction, alpha=-self._lr)
        parameter.grad = None

    def state_dict(self) -> dict[str, int]:
        """How many tensors were rounded so far."""
        return {"draws": self._draws}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a `state_dict`."""
        self._draws = int(state_dict["draws"])
