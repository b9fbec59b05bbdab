"""The memory of training one block at a time, told before training.

    peak = weights + buffers + max over blocks (gradients + optimizer state + masters)

The optimizer state is not guessed from the class of the optimizer: a real one takes a step on tensors of the meta
device, which have shapes and no data, and what it keeps is counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_bcd.blocks import LayerBlock, readable_bytes
from lightning_bcd.optim.block import BlockOptimizer, OptimizerFactory, requires_closure
from lightning_bcd.optim.store import STATE_POLICIES, OptimizerStateStore, StatePolicy

#: What Lightning makes of the floating-point weights of a module; None leaves them as they are.
_WEIGHT_DTYPES: dict[str, torch.dtype | None] = {
    "32-true": None,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "16-mixed": None,
    "bf16-mixed": None,
}
_SHORT_NAMES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_RESIDUAL = 2  # bytes per element: the low 16 bits of a float32 master

_Dtypes: TypeAlias = Mapping[nn.Parameter, torch.dtype]
_Copies: TypeAlias = dict[nn.Parameter, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """What parameters need beside their weights while they are trained, in bytes.

    Attributes:
        name: Name of the block.
        gradients: Most bytes of gradients at a time.
        optimizer_state: Bytes of optimizer state after a step.
        masters: Bytes of float32 copies of bfloat16 weights.
    """

    name: str
    gradients: int
    optimizer_state: int
    masters: int

    @property
    def total(self) -> int:
        """Gradients, optimizer state and masters together."""
        return self.gradients + self.optimizer_state + self.masters


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of memory that training one block at a time holds at its peak, without activations; print it for a table.

    Attributes:
        weights: Bytes of all parameters, frozen ones included, each tied one once.
        buffers: Bytes of all buffers.
        blocks: What each block needs while it is the active one, in order.
        at_once: What the parameters of all blocks need when they are trained at once, without masters.
        early_state: Bytes of state that the optimizer makes for all parameters in its constructor (Adagrad). It is held
            until the first visit begins.
        host: Bytes in host memory: with `"offload"` the optimizer state of all blocks, with `keep_residual` 2 bytes per
            element of bfloat16 weights.
        policy: What happens to the optimizer state of a block that leaves.
    """

    weights: int
    buffers: int
    blocks: tuple[BlockMemory, ...]
    at_once: BlockMemory
    early_state: int
    host: int
    policy: StatePolicy

    @property
    def largest(self) -> BlockMemory:
        """The block that sets the peak."""
        if self.policy == "keep":  # the state is there whichever block is active
            return max(self.blocks, key=lambda block: block.gradients + block.masters)
        return max(self.blocks, key=lambda block: block.total)

    @property
    def gradients(self) -> int:
        """Gradients at the peak."""
        return self.largest.gradients

    @property
    def optimizer_state(self) -> int:
        """Optimizer state at the peak: that of the largest block, with `"keep"` that of all blocks."""
        if self.policy == "keep":
            return sum(block.optimizer_state for block in self.blocks)
        return self.largest.optimizer_state

    @property
    def masters(self) -> int:
        """Float32 masters at the peak."""
        return self.largest.masters

    @property
    def total(self) -> int:
        """The peak: weights + buffers + (gradients + optimizer state + masters, or `early_state` if that is more)."""
        training = self.gradients + self.optimizer_state + self.masters
        return self.weights + self.buffers + max(training, self.early_state)

    @property
    def full(self) -> int:
        """The peak of training all blocks at once: weights + buffers + gradients + optimizer state."""
        return self.weights + self.buffers + self.at_once.total

    @property
    def handover(self) -> int:
        """The peak while the state of the next block is fetched ahead (`"offload"` on a GPU); else as `total`."""
        if self.policy != "offload" or len(self.blocks) == 1:
            return self.total
        costs = [
            block.total + max(other.optimizer_state for other in self.blocks if other is not block)
            for block in self.blocks
        ]
        return max(self.total, self.weights + self.buffers + max(costs))

    def __str__(self) -> str:
        at_once = self.at_once
        rows = [
            ("memory without activations", "one block", "all at once"),
            ("weights", readable_bytes(self.weights), readable_bytes(self.weights)),
            ("buffers", readable_bytes(self.buffers), readable_bytes(self.buffers)),
            ("gradients", readable_bytes(self.gradients), readable_bytes(at_once.gradients)),
            ("optimizer state", readable_bytes(self.optimizer_state), readable_bytes(at_once.optimizer_state)),
            ("float32 masters", readable_bytes(self.masters), readable_bytes(at_once.masters)),
            ("peak", readable_bytes(self.total), readable_bytes(self.full)),
        ]
        extra = {
            "state before the first visit": self.early_state,
            "peak while the next state is fetched": self.handover if self.policy == "offload" else 0,
            "in host memory": self.host,
        }
        rows += [(name, readable_bytes(count), "") for name, count in extra.items() if count]
        a, b, c = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [f"{name:<{a}}  {one:>{b}}  {every:>{c}}".rstrip() for name, one, every in rows]
        ratio = self.total / max(self.full, 1)
        return "\n".join([*lines, f"largest block: {self.largest.name}; peak: {ratio:.2f}x of all at once"])


def estimate_memory(
    model: nn.Module,
    blocks: Sequence[LayerBlock],
    optimizer: OptimizerFactory | Optimizer,
    precision: str | int = "32-true",
    *,
    optimizer_state: StatePolicy = "reset",
    step_in_backward: bool = False,
    keep_residual: bool = False,
) -> MemoryEstimate:
    """Tell the memory that training `model` one block at a time will need.

    Counted are the bytes of tensors: weights, buffers, gradients, optimizer state and masters. Not counted are
    activations, among them the half-precision copies of weights that autocast makes (`*-mixed`), the temporaries of a
    step (AdamW: one more tensor per parameter of the block with `foreach=True`, which is the default on a GPU, three of
    the size of one parameter with `foreach=False`, none with `fused=True`), and the rounding of allocators. Inactive
    blocks are taken to be frozen; in mask mode backward makes the gradients of all blocks. Sharded parameters count in
    full. On the CPU `"offload"` moves references only: `host` is then part of the same memory.

    bfloat16 weights (`"bf16-true"`, or a model that has them) have float32 masters while their block is active. Its
    bfloat16 gradients become float32 for the step, one parameter at a time:

        gradients = 4 · n_b + 2 · (elements of the largest parameter),   masters = 4 · n_b

    Args:
        model: The model; it is not modified. It may be on the meta device.
        blocks: The blocks, see `create_blocks_from_model`. Parameters that are in none count as weights only, and so do
            those that were frozen when their block was made.
        optimizer: Called with the parameters of a block, returns its optimizer, e.g. `torch.optim.AdamW`; or the
            optimizer of the whole model, also a `BlockOptimizer`. What Adagrad makes for frozen parameters that it was
            given does not count.
        precision: The `precision` of the Trainer. `"64-true"`, `"bf16-true"` and `"16-true"` convert the weights; all
            others leave them as they are.
        optimizer_state: What happens to the state of a block that leaves: `"reset"`, `"keep"` or `"offload"`.
        step_in_backward: Whether each parameter is stepped as soon as its gradient is there. Then the gradient of the
            largest parameter is the most there is at a time.
        keep_residual: Whether the low 16 bits of the masters stay in host memory.

    Returns:
        The bytes by term and by block; LBFGS counts with its full history.

    Raises:
        ValueError: If `precision` or `optimizer_state` is unknown, there is no block, a parameter of a block is not in
            the model or in two blocks, or the optimizer lacks parameters of a block or cannot step.
        TypeError: If `optimizer` is neither an optimizer nor callable.
    """
    if optimizer_state not in STATE_POLICIES:
        raise ValueError(
            f"Expected argument `optimizer_state` to be one of {', '.join(STATE_POLICIES)}, but got "
            f"{optimizer_state!r}. Choose one of them."
        )
    if not isinstance(optimizer, Optimizer) and not callable(optimizer):
        raise TypeError(
            f"Expected argument `optimizer` to be an optimizer or a function that makes one, but got {optimizer!r}. "
            "Pass for example `torch.optim.AdamW`."
        )
    target = weight_dtype(precision)
    dtypes = {p: target if target is not None and p.is_floating_point() else p.dtype for p in model.parameters()}
    trained = _trained(blocks, dtypes)
    lifted = {p: torch.float32 if dtype == torch.bfloat16 else dtype for p, dtype in dtypes.items()}
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else []
    places = {p: number for number, group in enumerate(groups) for p in group["params"]}
    known: dict[Any, tuple[int, int]] = {}

    def count(block: str, parameters: Sequence[nn.Parameter], kinds: _Dtypes) -> tuple[int, int]:
        # One step for all layers of the same shapes: on the CPU a step takes time.
        key = tuple((p.shape, kinds[p], places.get(p)) for p in parameters)
        if key not in known:
            known[key] = _state_bytes(optimizer, block, parameters, kinds)
        return known[key]

    members, states, early = [], [], 0
    for block, parameters in zip(blocks, trained, strict=True):
        early_state, at_once = count(block.name, parameters, dtypes)
        has_masters = any(dtypes[p] != lifted[p] for p in parameters)
        state = count(block.name, parameters, lifted)[1] if has_masters else at_once
        members.append(_block_memory(block.name, parameters, dtypes, lifted, state, step_in_backward))
        states.append(at_once)
        early += early_state
    every = [p for parameters in trained for p in parameters]
    residuals = sum(_RESIDUAL * p.numel() for p in every if dtypes[p] != lifted[p])
    offloaded = sum(block.optimizer_state for block in members)
    buffers = [(b, target if target is not None and b.is_floating_point() else b.dtype) for b in model.buffers()]
    return MemoryEstimate(
        weights=sum(_bytes(p, dtype) for p, dtype in dtypes.items()),
        buffers=sum(_bytes(buffer, dtype) for buffer, dtype in buffers),
        blocks=tuple(members),
        at_once=BlockMemory(
            name="all", gradients=sum(_bytes(p, dtypes[p]) for p in every), optimizer_state=sum(states), masters=0
        ),
        early_state=early,
        host=offloaded * (optimizer_state == "offload") + residuals * keep_residual,
        policy=optimizer_state,
    )


def weight_dtype(precision: str | int) -> torch.dtype | None:
    """Return the dtype that a Trainer of this precision gives to floating-point weights; None if it leaves theirs.

    Args:
        precision: `"32-true"`, `"64-true"`, `"bf16-true"`, `"16-true"`, `"16-mixed"`, `"bf16-mixed"`, or one of the
            short forms `32`, `64` (true), `16` and `"bf16"` (mixed).

    Raises:
        ValueError: If the precision is none of these.
    """
    name = _SHORT_NAMES.get(str(precision), str(precision))
    if name not in _WEIGHT_DTYPES:
        raise ValueError(
            f"Expected argument `precision` to be one of {', '.join([*_WEIGHT_DTYPES, *_SHORT_NAMES])}, but got "
            f"{precision!r}. Choose one of them."
        )
    return _WEIGHT_DTYPES[name]


def _trained(blocks: Sequence[LayerBlock], dtypes: _Dtypes) -> list[list[nn.Parameter]]:
    """Return the parameters of each block that were not frozen by the user."""
    counts: dict[nn.Parameter, int] = {}
    for parameter in (p for block in blocks for p in block.parameters):
        counts[parameter] = counts.get(parameter, 0) + 1
    if not blocks or any(count > 1 or p not in dtypes for p, count in counts.items()):
        foreign = sum(p not in dtypes for p in counts)
        repeated = sum(count > 1 for count in counts.values())
        raise ValueError(
            f"Expected argument `blocks` to hold parameters of `model`, each once, but got {len(blocks)} blocks with "
            f"{foreign} parameters of another model and {repeated} in several blocks. Make them with "
            "`create_blocks_from_model`."
        )
    # Not `requires_grad`: in the middle of training it is off for all blocks but one.
    return [[p for p, trains in zip(block.parameters, block._requires_grad, strict=True) if trains] for block in blocks]


def _block_memory(
    name: str,
    parameters: Sequence[nn.Parameter],
    dtypes: _Dtypes,
    lifted: _Dtypes,
    state: int,
    step_in_backward: bool,
) -> BlockMemory:
    masters = {p: _bytes(p, lifted[p]) for p in parameters if dtypes[p] != lifted[p]}
    # Of a parameter with master, the gradient that backward leaves and the one of the step exist side by side.
    copied = {p: _bytes(p, dtypes[p]) for p in masters}
    stepped = {p: _bytes(p, lifted[p]) for p in parameters}
    if step_in_backward:
        gradients = max((stepped[p] + copied.get(p, 0) for p in parameters), default=0)
    else:
        gradients = sum(stepped.values()) + max(copied.values(), default=0)
    return BlockMemory(name=name, gradients=gradients, optimizer_state=state, masters=sum(masters.values()))


def _bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * dtype.itemsize


# -- the state of the optimizer -------------------------------------------------------------------------------


def _state_bytes(
    optimizer: OptimizerFactory | Optimizer,
    block: str,
    parameters: Sequence[nn.Parameter],
    dtypes: _Dtypes,
) -> tuple[int, int]:
    """Return the bytes of state right after the constructor and after a step on copies of the parameters."""
    if not parameters:
        return 0, 0
    failure: Exception | None = None
    # Zeros on the CPU for optimizers that look at values. A block at a time is what training holds as well.
    for device in ("meta", "cpu"):
        copies = {p: nn.Parameter(torch.zeros(p.shape, dtype=dtypes[p], device=device)) for p in parameters}
        try:
            made = (
                _remade(optimizer, copies) if isinstance(optimizer, Optimizer) else [optimizer(list(copies.values()))]
            )
            held = {p for each in made for group in each.param_groups for p in group["params"]}
            if held == set(copies.values()):
                early = sum(_count_state(each) for each in made)
                return early, sum(_count_after_step(each) for each in made)
        except Exception as error:  # whatever an optimizer may raise where it was not made to run
            failure = error
        else:
            raise ValueError(
                f"Expected argument `optimizer` to hold every parameter of block {block!r}, or to be a function of "
                f"them, but its parameters are others. Pass for example `torch.optim.AdamW`."
            )
    raise ValueError(
        f"Expected argument `optimizer` to work on block {block!r} with gradients of zeros, but it raised "
        f"{type(failure).__name__}: {failure}. Pass one that keeps as much state, for example `torch.optim.AdamW`."
    ) from failure


def _remade(optimizer: Optimizer, copies: _Copies) -> list[Optimizer]:
    """Make optimizers of the same classes and settings over the copies."""
    made: list[Optimizer] = []
    for each in optimizer.optimizers if isinstance(optimizer, BlockOptimizer) else [optimizer]:
        groups = [
            {**group, "params": held}
            for group in each.param_groups
            if (held := [copies[p] for p in group["params"] if p in copies])
        ]
        if groups:
            # Settings of the constructor that are in no group (Adagrad's initial_accumulator_value).
            accepted = inspect.signature(type(each)).parameters
            make: Any = type(each)
            made.append(make(groups, **{name: value for name, value in each.defaults.items() if name in accepted}))
    return made


def _count_state(optimizer: Optimizer) -> int:
    return OptimizerStateStore(optimizer, "keep").state_bytes()


def _count_after_step(optimizer: Optimizer) -> int:
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, LBFGS):
        # Its history grows over many steps. When it is full there are, as long as all parameters together, two vectors
        # per entry, the last gradient and direction, and two numbers per entry and the scale of the first Hessian.
        entries = int(optimizer.param_groups[0]["history_size"])
        length = sum(p.numel() for p in parameters)
        return (2 * (entries + 1) * length + 2 * entries + 1) * parameters[0].element_size()

    def closure() -> Tensor:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros(())

    # How the step is computed changes nothing in what it keeps, but not every device can do it every way.
    for group in optimizer.param_groups:
        for name in {"foreach", "fused", "capturable"} & group.keys():
            group[name] = False
    if requires_closure(optimizer):
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        optimizer.step()
    return _count_state(optimizer)
