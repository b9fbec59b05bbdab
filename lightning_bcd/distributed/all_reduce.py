"""Sums over the samples of all processes: what data-parallel lifted training sends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bcd.communicator import Communicator


def all_reduce_sum(tensors: Sequence[Tensor]) -> int:
    """Replace every tensor by its sum over all processes; return the bytes of the message."""
    message = torch.cat([tensor.double().flatten() for tensor in tensors])
    dist.all_reduce(message)
    for tensor, part in zip(tensors, torch.split(message, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    return message.numel() * message.element_size()


class AllReduce(Communicator):
    """Adds tensors up over all processes of the default group, in one float64 message.

    Every process gets the same bits and solves the same small systems. What travels are Gram matrices, cross products
    and scalars: their size depends on the widths of the network, not on the number of samples.

    Attributes:
        size: Number of processes.
        bytes: Bytes given to all-reduce so far.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size()
        self.bytes = 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        self.bytes += all_reduce_sum(tensors)

    def extremes(self, bounds: Tensor) -> Tensor:
        """Return the smallest of the first entry and the largest of the second over all processes."""
        message = bounds * bounds.new_tensor([-1, 1])
        dist.all_reduce(message, dist.ReduceOp.MAX)
        self.bytes += message.numel() * message.element_size()
        return message * bounds.new_tensor([-1, 1])
