"""Layers on several processes: neighbours exchange activations while they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bcd.communicator import Codec, Communicator
from lightning_bcd.distributed.all_reduce import all_reduce_sum


class LayerGroups(Communicator):
    """One contiguous group of layers per process of the default group; every process has all samples.

    Messages are started by `pass_down` and `pass_up` and finished by `wait`, so that they travel during the updates in
    between. Without a codec a tensor travels as it is, straight into the tensor of the other side.

    Args:
        groups: The layers of every process, in order.

    Attributes:
        sent: Bytes sent to neighbours so far.
    """

    def __init__(self, groups: Sequence[range]) -> None:
        self.groups, self.rank = list(groups), dist.get_rank()
        self.sent = 0
        self._works: list[Any] = []
        self._after: list[Callable[[], object]] = []
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def layers(self, depth: int) -> range:
        """The layers of this process."""
        return self.groups[self.rank]

    def combine(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        with clear_errors():
            all_reduce_sum(tensors)

    def pass_down(self, send: Tensor | None, receive: Tensor | None, codec: Codec | None = None) -> None:
        """Start to send a tensor to the process below and to receive one from the process above."""
        self._start((self.rank - 1, send), (self.rank + 1, receive), codec, None)

    def pass_up(
        self,
        send: Tensor | None,
        receive: Tensor | None,
        codec: Codec | None = None,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Start to send a tensor to the process above and to receive one from the process below, then call `then`."""
        self._start((self.rank + 1, send), (self.rank - 1, receive), codec, then)

    def _start(
        self,
        send: tuple[int, Tensor | None],
        receive: tuple[int, Tensor | None],
        codec: Codec | None,
        then: Callable[[], object] | None,
    ) -> None:
        operations = []
        peer, tensor = send
        if tensor is not None:
            message = tensor if codec is None else codec.encode(tensor)
            self._buffers["sent", peer] = message  # alive until it has arrived
            self.sent += message.numel() * message.element_size()
            operations.append(dist.P2POp(dist.isend, message, peer))
        peer, tensor = receive
        if tensor is not None:
            message = tensor if codec is None else self._buffer(peer, codec.size(tensor.numel()), tensor.device)
            operations.append(dist.P2POp(dist.irecv, message, peer))
            if codec is not None:
                self._after.append(lambda: codec.decode(message, tensor))
        if operations:
            with clear_errors():
                self._works += dist.batch_isend_irecv(operations)
        if then is not None:
            self._after.append(then)

    def _buffer(self, peer: int, size: int, device: torch.device) -> Tensor:
        """A buffer for messages of a neighbour, made once."""
        buffer = self._buffers.get(("received", peer))
        if buffer is None or buffer.numel() != size:
            buffer = self._buffers["received", peer] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer

    def wait(self) -> None:
        """Finish what is on its way.

        Raises:
            RuntimeError: If a neighbour is gone, or silent for longer than the timeout of the process group.
        """
        works, self._works = self._works, []
        with clear_errors():
            for work in works:
                work.wait()
        after, self._after = self._after, []
        for function in after:
            function()

    def gather(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
        """Return tensors of layers, on the host, as they are at the processes that own the layers."""
        self.wait()
        mine = {index: t.detach().cpu() for index, t in enumerate(tensors) if owners[index] in self.groups[self.rank]}
        parts: list[Any] = [None] * len(self.groups)
        with clear_errors():
            dist.all_gather_object(parts, mine)
        whole = {index: tensor for part in parts for index, tensor in part.items()}
        return [whole[index] for index in range(len(tensors))]


class clear_errors:  # noqa: N801  # used like the functions of contextlib
    """Say what a failed message means, instead of naming sockets."""

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise a RuntimeError with the remedy for an error of the process group."""
        if isinstance(error, RuntimeError):
            raise RuntimeError(
                "Lost a process that holds other layers: it ended, or was silent for longer than the timeout of "
                "LayerParallelStrategy. Look at its output, and start all processes again from the last checkpoint."
            ) from error
