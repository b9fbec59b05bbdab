"""Block coordinate descent in a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bcd.blocks import LayerBlock
from lightning_bcd.optim.block import BlockOptimizer, OptimizerFactory


class BlockCoordinateDescentCoordinator:
    """Takes optimizer steps on one block at a time; every block has an optimizer and a state of its own.

    Only the active block has `requires_grad` while a step runs. Afterwards, also when the loss raises, every
    parameter's flag is what it was, and the blocks hold no gradient. (With `closure=` the coordinator knows only the
    blocks; with `model` it also freezes the model's other parameters.)

    Args:
        blocks: The blocks, e.g. from `create_blocks_from_model`.
        optimizer_class: A `torch.optim.Optimizer` class.
        optimizer_kwargs: Its keyword arguments, e.g. `{"lr": 0.01}`.
        per_block_kwargs: Keyword arguments for single blocks, by block name; they override
            `optimizer_kwargs`.

    Raises:
        ValueError: If there is no block, two blocks share a parameter, or `per_block_kwargs` names an unknown
            block.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_bcd import BlockCoordinateDescentCoordinator, create_blocks_from_model
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> blocks = create_blocks_from_model(model, block_type="linear")
        >>> coordinator = BlockCoordinateDescentCoordinator(blocks, torch.optim.SGD, {"lr": 0.01})
        >>> x, y = torch.randn(16, 4), torch.randn(16, 1)
        >>> losses = [coordinator.step(i, model, x, y, nn.MSELoss()) for i in range(len(blocks))]
    """

    def __init__(
        self,
        blocks: Sequence[LayerBlock],
        optimizer_class: type[Optimizer],
        optimizer_kwargs: Mapping[str, Any] | None = None,
        per_block_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.blocks = list(blocks)
        if not self.blocks:
            raise ValueError(
                "Expected argument `blocks` to hold at least one LayerBlock, but got none. Make them with "
                "create_blocks_from_model(model)."
            )
        owners: dict[nn.Parameter, str] = {}
        for block in self.blocks:
            for parameter in block.parameters:
                if (owner := owners.setdefault(parameter, block.name)) != block.name:
                    raise ValueError(
                        f"Expected argument `blocks` to be disjoint, but {owner!r} and {block.name!r} share a "
                        "parameter. Keep it in one of them."
                    )
        special = dict(per_block_kwargs or {})
        if unknown := special.keys() - {block.name for block in self.blocks}:
            raise ValueError(
                f"Expected argument `per_block_kwargs` to name blocks, but got {sorted(unknown)}. The blocks are "
                f"{[block.name for block in self.blocks]}."
            )
        common = dict(optimizer_kwargs or {})
        # One entry per position: block names may contain characters that mean something in a pattern.
        factories: list[OptimizerFactory] = [
            partial(optimizer_class, **{**common, **special.get(block.name, {})}) for block in self.blocks
        ]
        self.optimizer = BlockOptimizer(self.blocks, factories)

    def step(
        self,
        block_idx: int,
        model: nn.Module | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        closure: Callable[[], Tensor] | None = None,
    ) -> float:
        """Take one optimizer step on one block.

        Args:
            block_idx: Index of the block.
            model: Called as `model(x)`.
            x: Inputs.
            y: Targets.
            criterion: Called as `criterion(model(x), y)`, returns the scalar loss.
            closure: Instead of the four arguments above: returns the scalar loss of any forward pass. It does
                not call backward.

        Returns:
            The loss before the step.

        Raises:
            IndexError: If there is no such block.
            ValueError: If neither or both forms are given, the loss is not a finite scalar, or it does not
                depend on the block. No parameter has changed then (after a failure inside LBFGS the weights
                are put back and the history of the block is dropped).
        """
        if not 0 <= block_idx < len(self.blocks):
            raise IndexError(
                f"Expected argument `block_idx` to be in range({len(self.blocks)}), but got {block_idx}. Use the "
                "index of the block in `blocks`."
            )
        evaluate = _loss_function(model, x, y, criterion, closure)
        first: Tensor | None = None

        def loss_and_gradient() -> Tensor:
            nonlocal first
            self.optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss = evaluate()
            self._check_loss(loss, block_idx)
            loss.backward()  # type: ignore[no-untyped-call]
            first = loss.detach() if first is None else first
            return loss.detach()

        with self._only(block_idx, model):
            self.optimizer.active = block_idx
            if self.optimizer.requires_closure:
                self.optimizer.step(loss_and_gradient)
            else:
                loss_and_gradient()
                self.optimizer.step()
        assert first is not None
        return float(first)

    @contextmanager
    def _only(self, active: int, model: nn.Module | None) -> Iterator[None]:
        parameters = {p for block in self.blocks for p in block.parameters}
        outside = set() if model is None else set(model.parameters()) - parameters
        flags = [(p, p.requires_grad) for p in parameters | outside]
        try:
            for parameter in outside:
                parameter.requires_grad_(False)
            for index, block in enumerate(self.blocks):
                if index == active:
                    block.unfreeze()
                else:
                    block.freeze()
            yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _check_loss(self, loss: Tensor, block_idx: int) -> None:
        name = self.blocks[block_idx].name
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"Expected the loss of block {name!r} to be a scalar tensor, but got {loss!r}. Reduce it, e.g. "
                "with .mean()."
            )
        if not torch.isfinite(loss):
            raise ValueError(
                f"Expected the loss of block {name!r} to be finite, but got {loss.item()}. No parameter was "
                "changed; lower the learning rate or check the data."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"Expected the loss to depend on block {name!r}, but no parameter of it takes part. Check that "
                "the model uses the block and that the loss is not detached."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all block optimizers."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.optimizer.load_state_dict(state_dict)


def _loss_function(
    model: nn.Module | None,
    x: Tensor | None,
    y: Tensor | None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
    closure: Callable[[], Tensor] | None,
) -> Callable[[], Tensor]:
    if closure is not None and model is None and x is None and y is None and criterion is None:
        return closure
    if closure is None and model is not None and x is not None and y is not None and criterion is not None:
        return lambda: criterion(model(x), y)
    raise ValueError(
        "Expected either `model`, `x`, `y` and `criterion`, or `closure`, but got a mixture or too little. Use "
        "step(i, model, x, y, criterion) or step(i, closure=loss_function)."
    )
