"""What a Trainer must look like for gradient block coordinate descent, and the errors when it does not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_bcd.blocks import LayerBlock
from lightning_bcd.expansion import EXPANSION_RULES
from lightning_bcd.optim.block import BlockOptimizer, OptimizerFactory
from lightning_bcd.scheduler import BlockScheduler


@contextmanager
def as_misconfiguration(*errors: type[Exception]) -> Iterator[None]:
    """Turn errors of pure code into the MisconfigurationException that Lightning users expect, with the same text."""
    wanted = errors or (TypeError, ValueError)
    try:
        yield
    except wanted as error:
        raise MisconfigurationException(str(error)) from error


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a MisconfigurationException unless `value` is one of `choices`."""
    if value not in choices:
        raise MisconfigurationException(
            f"Expected argument `{name}` to be one of {', '.join(choices)}, but got {value!r}. Choose one of them."
        )


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a MisconfigurationException unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationException(
            f"Expected argument `{name}` to be an integer of at least {least}, but got {value!r}. Change the value."
        )


def check_alone(trainer: Trainer, kind: type) -> None:
    """Raise a MisconfigurationException if the Trainer has several callbacks of a kind."""
    if sum(isinstance(callback, kind) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"Expected one {kind.__name__} in the Trainer, but got several. Two would freeze each other's blocks: "
            "keep one and put all blocks into it."
        )


def check_automatic(module: LightningModule) -> None:
    """Raise a MisconfigurationException if the module optimizes manually."""
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"BCDCallback works in automatic optimization, but {type(module).__name__} sets "
            "automatic_optimization=False. Derive it from BCDModule (or mix in BCDMixin) instead, or remove "
            "the manual optimization."
        )


def check_unclipped(argument: str, trainer: Trainer, module: LightningModule) -> None:
    """Raise a MisconfigurationException if the Trainer needs whole gradients at the optimizer step.

    Args:
        argument: Name of the argument that steps parameters inside the backward pass, for the message.
        trainer: The Trainer.
        module: The module.
    """
    accumulates = trainer.accumulate_grad_batches != 1 or any(
        isinstance(callback, GradientAccumulationScheduler)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    found = {
        "gradient accumulation (accumulate_grad_batches)": accumulates,
        "gradient clipping (gradient_clip_val)": bool(trainer.gradient_clip_val),
        "a configure_gradient_clipping of the module": is_overridden("configure_gradient_clipping", module),
        "a gradient scaler (precision='16-mixed')": loss_scaler(trainer) is not None,
    }
    if argument == "step_in_backward" and is_overridden("on_before_optimizer_step", module):
        warnings.warn(
            f"{type(module).__name__}.on_before_optimizer_step will see no gradient: with `step_in_backward` each is "
            "freed as soon as its parameter has stepped. bcd/grad_norm/<block> is logged all the same.",
            stacklevel=3,
        )
    if used := [name for name, is_used in found.items() if is_used]:
        raise MisconfigurationException(
            f"`{argument}` updates parameters inside the backward pass, before a whole gradient exists, so it cannot "
            f"work with {' and '.join(used)}. Remove that, or `{argument}`."
        )


def check_expansion(rule: str | None, lr: float | None, mode: str) -> None:
    """Raise a MisconfigurationException unless the arguments of landscape expansion fit together."""
    if rule is None and lr is None:
        return
    check_choice("expand", str(rule), EXPANSION_RULES)
    if lr is None or not lr > 0:
        raise MisconfigurationException(
            f"Expected argument `expand_lr` to be a positive learning rate with expand={rule!r}, but got {lr!r}. Start "
            "with the learning rate that plain SGD would need."
        )
    if mode == "mask":
        raise MisconfigurationException(
            "Expected argument `mode` to be 'auto' or 'freeze' with `expand`, but got 'mask'. Expansion needs backward "
            "to stop at the active block."
        )


def connect_optimizer(
    trainer: Trainer,
    blocks: Sequence[LayerBlock],
    factory: OptimizerFactory | Mapping[str, OptimizerFactory] | None,
) -> Optimizer:
    """Return the optimizer of the run; with a factory install a BlockOptimizer in its place.

    Raises:
        MisconfigurationException: If a scheduler hangs on the optimizer that would be replaced.
    """
    if factory is not None:
        if trainer.lr_scheduler_configs:
            raise MisconfigurationException(
                "`optimizer=` replaces the module's optimizer, but configure_optimizers returned a learning-rate "
                "scheduler bound to the old one. Return the scheduler together with BlockOptimizer(blocks, factory) "
                "from configure_optimizers and leave `optimizer` at None."
            )
        trainer.strategy.optimizers = [BlockOptimizer(blocks, factory)]
    return trainer.optimizers[0]


def check_groups(changed: bool) -> None:
    """Raise a MisconfigurationException if parameter groups changed during training."""
    if changed:
        raise MisconfigurationException(
            "The parameter groups of the optimizer changed during training, so blocks and optimizer no longer fit. "
            "Do not combine block coordinate descent with callbacks that add groups (BackboneFinetuning); let the "
            "optimizer hold all parameters from the start."
        )


def warn_if_short(planned: float, steps_per_block: int, num_blocks: int) -> None:
    """Warn when the run ends before every block was trained once."""
    if 0 <= planned < steps_per_block * num_blocks:
        warnings.warn(
            f"The run takes {planned:.0f} optimizer steps, but {num_blocks} blocks × {steps_per_block} steps per "
            f"block = {steps_per_block * num_blocks} are needed to train every block once. Part of the model will "
            "not be trained: lower steps_per_block, merge blocks with num_blocks=, or train longer.",
            stacklevel=3,
        )


def loss_scaler(trainer: Trainer) -> Any | None:
    """Return the gradient scaler of `16-mixed` precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def observe_scores(run: BlockScheduler, trainer: Trainer) -> None:
    """Hand the gradient norms just measured to the strategy, without the loss scale and equal on all ranks."""
    scaler = loss_scaler(trainer)
    # The norms are measured in the backward pass, before the scaler divides.
    scale = scaler.get_scale() if scaler is not None else 1.0
    run.strategy.observe(_agree([norm / scale for norm in run.finish_probe()], trainer))


def check_finite(loss: Tensor, trainer: Trainer, block: LayerBlock) -> None:
    """Raise ValueError if the loss is not finite; no parameter has changed then (one host sync)."""
    # A loss scale may push a finite loss to infinity, which the scaler then handles.
    if bool(torch.isnan(loss) if loss_scaler(trainer) is not None else ~torch.isfinite(loss)):
        raise ValueError(
            f"Expected a finite loss, but got {loss.item()} at step {trainer.global_step} while block {block.name!r} "
            "was active. No parameter was changed by it; lower the learning rate or check the data. nan_check=False "
            "turns this check off."
        )


def _agree(norms: Sequence[float], trainer: Trainer) -> list[float]:
    # The mean over all ranks, so that every rank chooses the same block.
    if trainer.world_size == 1:
        return list(norms)
    local = torch.tensor(norms, dtype=torch.float64, device=trainer.strategy.root_device)
    return [float(norm) for norm in trainer.strategy.reduce(local, reduce_op="mean")]


def get_rng() -> dict[str, Any]:
    """Return the global random state of torch as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng(state: Mapping[str, Any]) -> None:
    """Restore what `get_rng` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
