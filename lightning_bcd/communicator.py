"""What a lifted algorithm asks of the processes it shares its work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Packs a tensor for the wire."""

    def encode(self, values: Tensor) -> Tensor:
        """Return the bytes of a tensor, uint8."""

    def decode(self, message: Tensor, out: Tensor) -> None:
        """Fill `out` with what the bytes say."""

    def size(self, entries: int) -> int:
        """Number of bytes of a tensor."""


class Communicator:
    """The communicator of one process; its subclasses share samples or layers with other processes.

    Attributes:
        size: Number of processes that share the samples.
    """

    size = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes that share the samples."""

    def extremes(self, bounds: Tensor) -> Tensor:
        """Return the smallest of the first entry and the largest of the second over the processes."""
        return bounds

    def layers(self, depth: int) -> range:
        """The layers of this process: one range without a gap."""
        return range(depth)

    def combine(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes that share the layers."""

    def pass_down(self, send: Tensor | None, receive: Tensor | None, codec: Codec | None = None) -> None:
        """Start to send a tensor to the process below and to receive one from the process above."""

    def pass_up(
        self,
        send: Tensor | None,
        receive: Tensor | None,
        codec: Codec | None = None,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Start to send a tensor to the process above and to receive one from the process below, then call `then`."""

    def wait(self) -> None:
        """Finish what is on its way."""

    def gather(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
        """Return tensors of layers as they are at the processes that own the layers.

        Args:
            tensors: One per entry of `owners`; what this process does not own may be out of date, or empty.
            owners: The layer each belongs to.
        """
        return list(tensors)


#: One process.
Alone = Communicator


def balanced_groups(costs: Sequence[float], groups: int) -> list[range]:
    """Cut layers into contiguous groups whose largest cost is as small as possible.

    Args:
        costs: Cost of every layer.
        groups: Number of groups, at most that of layers; each gets at least one layer.

    Raises:
        ValueError: If there are more groups than layers.
    """
    depth = len(costs)
    if not 1 <= groups <= depth:
        raise ValueError(
            f"Expected at most one process per layer, but got {groups} processes and {depth} layers. Use devices="
            f"{depth} or fewer."
        )
    total = torch.tensor([0.0, *costs], dtype=torch.float64).cumsum(0).tolist()
    # best[k][e]: smallest possible largest cost of the first e layers in k groups, and where the last group begins.
    best = [[(total[end], 0) for end in range(depth + 1)]]
    for group in range(1, groups):
        row = [(float("inf"), 0)] * (depth + 1)
        for end in range(group + 1, depth + 1):
            row[end] = min((max(best[-1][cut][0], total[end] - total[cut]), cut) for cut in range(group, end))
        best.append(row)
    cuts = [depth]
    for row in reversed(best):
        cuts.append(row[cuts[-1]][1])
    return [range(first, end) for first, end in zip(cuts[:0:-1], cuts[-2::-1], strict=True)]
