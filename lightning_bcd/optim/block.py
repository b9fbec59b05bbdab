"""One torch optimizer made of one optimizer per block."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bcd.blocks import LayerBlock

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
BlockFactories: TypeAlias = OptimizerFactory | Mapping[str, OptimizerFactory] | Sequence[OptimizerFactory]


class BlockOptimizer(Optimizer):
    """One optimizer per block behind the interface of one `torch.optim.Optimizer`.

    Only the optimizer of the active block steps. Schedulers, gradient clipping, AMP scaling, `zero_grad` and
    `state_dict` see all parameter groups and one state, as with any optimizer: the groups of the inner
    optimizers are shared, not copied.

    Args:
        blocks: The blocks, in order.
        factory: Called with the parameters of a block, returns its optimizer, e.g.
            `functools.partial(torch.optim.AdamW, lr=1e-3)`; or a mapping from a regular expression for block
            names (`re.fullmatch`, first match wins) to such a factory; or one factory per block.

    Attributes:
        active: Index of the block whose optimizer steps.
        optimizers: The inner optimizers, in block order.

    Raises:
        ValueError: If no pattern matches a block, or a pattern matches none, or a list has the wrong length.
    """

    def __init__(self, blocks: Sequence[LayerBlock], factory: BlockFactories) -> None:
        factories = _factory_per_block(blocks, factory)
        self.optimizers = [make(list(block.parameters)) for make, block in zip(factories, blocks, strict=True)]
        self.active = 0
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self._complete = False
        self._group_counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        super().__init__(groups, dict(self.optimizers[0].defaults))
        # Optimizers that make their state early (Adagrad) bring it with them.
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
        self._complete = True
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups that belong to no block.

        Raises:
            ValueError: Always, once the optimizer is made.
        """
        if self._complete:
            raise ValueError(
                "Expected the parameter groups of a BlockOptimizer to stay as they are, but got another group. Make a "
                "new BlockOptimizer over blocks that hold the parameters."
            )
        super().add_param_group(param_group)

    def _share(self) -> None:
        # torch replaces both containers in load_state_dict, so the inner optimizers are pointed at them again.
        groups = iter(self.param_groups)
        for optimizer, count in zip(self.optimizers, self._group_counts, strict=True):
            optimizer.param_groups = [next(groups) for _ in range(count)]
            optimizer.state = self.state

    @property
    def requires_closure(self) -> bool:
        """Whether the active optimizer must be given a closure (LBFGS)."""
        return requires_closure(self.optimizers[self.active])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the optimizer of the active block and return the closure's value.

        An optimizer that evaluates the closure several times (LBFGS) moves the weights in between. If an evaluation
        raises, the weights are put back and the block's history is dropped.
        """
        optimizer = self.optimizers[self.active]
        if not self.requires_closure:
            return optimizer.step(closure)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            return optimizer.step(closure)
        except BaseException:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
                    self.state.pop(parameter, None)
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict` of a BlockOptimizer over the same blocks."""
        super().load_state_dict(state_dict)
        self._share()

    def fresh_state(self, parameters: Sequence[nn.Parameter]) -> dict[Tensor, Any]:
        """Return the state new optimizers would start with for `parameters`."""
        wanted = set(parameters)
        state: dict[Tensor, Any] = {}
        for optimizer in self.optimizers:
            state.update(fresh_state(optimizer, wanted))
        return state


def requires_closure(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` evaluates the loss itself and so must be given a closure."""
    return bool(getattr(optimizer, "requires_closure", isinstance(optimizer, torch.optim.LBFGS)))


def check_optimizer(blocks: Sequence[LayerBlock], optimizer: Optimizer, *, masters: bool) -> None:
    """Raise ValueError unless the optimizer can train one block at a time.

    Args:
        blocks: The blocks.
        optimizer: Must hold all their parameters, and not treat them as one vector (LBFGS).
        masters: Whether bfloat16 weights step through float32 masters, which an optimizer that evaluates the loss
            itself cannot do.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = {b.name: n for b in blocks if (n := sum(p not in held for p in b.parameters if p.requires_grad))}
    if missing:
        listing = ", ".join(f"{name} ({count} parameters)" for name, count in missing.items())
        raise ValueError(
            f"Expected the optimizer to hold every parameter of every block, but it lacks those of {listing}. "
            "Pass model.parameters() to the optimizer, or freeze these parameters before training."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"Expected an optimizer that leaves parameters without gradient alone, but got "
            f"{type(optimizer).__name__}, which treats all parameters as one vector. Give each block its own: "
            "`optimizer=torch.optim.LBFGS`."
        )
    if masters and any(p.dtype == torch.bfloat16 for block in blocks for p in block.parameters):
        refuse_closure(optimizer, "bfloat16 weights (precision='bf16-true')")


def refuse_closure(optimizer: Optimizer, feature: str) -> None:
    """Raise ValueError if the optimizer, or that of a block, evaluates the loss itself; `feature` is what cannot."""
    inner = optimizer.optimizers if isinstance(optimizer, BlockOptimizer) else [optimizer]
    if names := [type(each).__name__ for each in inner if requires_closure(each)]:
        raise ValueError(
            f"Expected an optimizer that takes one gradient per step with {feature}, but got {names[0]}, which "
            f"evaluates the loss several times. Use another optimizer, or leave out {feature}."
        )


def _factory_per_block(blocks: Sequence[LayerBlock], factory: BlockFactories) -> list[OptimizerFactory]:
    if isinstance(factory, Sequence):
        if len(factory) != len(blocks):
            raise ValueError(
                f"Expected argument `factory` to hold one factory for each of {len(blocks)} blocks, but got "
                f"{len(factory)}. Pass a single factory to use it for every block."
            )
        return list(factory)
    if not isinstance(factory, Mapping):
        return [factory] * len(blocks)
    used: set[str] = set()
    factories = []
    for block in blocks:
        pattern = next((p for p in factory if re.fullmatch(p, block.name)), None)
        if pattern is None:
            raise ValueError(
                f"Expected argument `optimizer` to have a pattern for every block, but none of {list(factory)} "
                f"matches block {block.name!r}. Add the pattern '.*' as the last entry for all others."
            )
        used.add(pattern)
        factories.append(factory[pattern])
    if unused := [pattern for pattern in factory if pattern not in used]:
        raise ValueError(
            f"Expected argument `optimizer` to name blocks, but {unused} match none of "
            f"{[block.name for block in blocks]}. Remove the patterns or correct them (the first match wins)."
        )
    return factories


def fresh_state(optimizer: Optimizer, wanted: set[nn.Parameter]) -> dict[Tensor, Any]:
    """Return the state a new optimizer of the same class and settings would start with for `wanted`."""
    groups = [
        {**group, "params": params}
        for group in optimizer.param_groups
        if (params := [p for p in group["params"] if p in wanted])
    ]
    if not groups:
        return {}
    # Settings of the constructor that are in no group (Adagrad's initial_accumulator_value).
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    make: Callable[..., Optimizer] = type(optimizer)
    return dict(make(groups, **settings).state)
