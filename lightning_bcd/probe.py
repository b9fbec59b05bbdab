"""Gradient norms of all blocks from one backward pass, holding the gradients of one block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_bcd.blocks import LayerBlock


def squared_norm(grad: Tensor) -> Tensor:
    """Return ‖grad‖² as a float32 scalar (float64 stays float64); sparse gradients count their values."""
    values = grad.coalesce().values() if grad.is_sparse else grad
    # Half precision would overflow at 256².
    values = values if values.dtype == torch.float64 else values.float()
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.square()


def _norms(squares: Sequence[Sequence[Tensor]]) -> list[float]:
    # One transfer for all blocks: sum on the device that holds the first term.
    sums = [torch.stack([s.to(terms[0].device) for s in terms]).sum().sqrt() if terms else None for terms in squares]
    present = [s for s in sums if s is not None]
    values = iter(torch.stack([s.to(present[0]) for s in present]).tolist() if present else [])
    return [0.0 if s is None else next(values) for s in sums]


class GradientNormProbe:
    """Measures the gradient norm of every block during one backward pass.

    All blocks are unfrozen. As soon as the gradient of an inactive parameter is ready its squared norm is
    added up and the gradient is freed, so that never more than the active block's gradients (and one more
    tensor) are in memory. The gradients of the active block are the same bits as without the probe.

    Args:
        blocks: All blocks.
        active: Index of the block that keeps its gradients.
        freeze: Whether inactive blocks are frozen again by `disarm`.
    """

    def __init__(self, blocks: Sequence[LayerBlock], active: int, *, freeze: bool = True) -> None:
        self._blocks = blocks
        self._active = active
        self._freeze = freeze
        self._squares: list[list[Tensor]] = [[] for _ in blocks]
        self._handles: list[RemovableHandle] = []

    def arm(self) -> None:
        """Unfreeze all blocks and watch the next backward pass; call before the forward pass."""
        for index, block in enumerate(self._blocks):
            block.unfreeze()
            for parameter in block.parameters:
                if parameter.requires_grad:
                    self._watch(index, parameter)

    def _watch(self, index: int, parameter: nn.Parameter) -> None:
        squares = self._squares[index]
        # A tensor hook sees the gradient of this backward pass alone: before it is added to an accumulation window, and
        # before anything averages it over ranks.
        measure = parameter.register_hook(lambda grad: squares.append(squared_norm(grad)))  # type: ignore[no-untyped-call]
        self._handles.append(measure)
        if index != self._active:
            self._handles.append(parameter.register_post_accumulate_grad_hook(_free))  # type: ignore[no-untyped-call]

    def disarm(self) -> None:
        """Remove the hooks and, if asked to, freeze the inactive blocks again; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for index, block in enumerate(self._blocks):
            if index != self._active and self._freeze:
                block.freeze()

    def norms(self) -> list[float]:
        """Return the norms seen since `arm` (0 for a block without gradient)."""
        return _norms(self._squares)


def _free(parameter: Tensor) -> None:
    parameter.grad = None
