"""Gradients of the active block averaged over all ranks during backward; nothing else travels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

#: Small gradients travel together in messages of at least this size.
BUCKET_BYTES = 1 << 20


class BlockGradientSync:
    """Averages the gradients of one block over all ranks while backward is still running.

    As in DistributedDataParallel the messages are in the reverse order of the parameters, each is sent as soon as its
    gradients are ready and all before it are sent, and every rank ends with the same bits. Only the gradients of the
    active block are sent, and there are no buckets of the size of the model.

    A parameter that got no gradient on this rank counts as zero. At the first backward of a visit the ranks tell each
    other which parameters got one: those without on every rank keep `None`.

    Args:
        find_unused: Parameters may be without gradient on some ranks, others in every step (mixture of experts): the
            ranks tell each other in every step.

    Attributes:
        armed: Whether `begin` was called and `finish` not yet.
    """

    def __init__(self, *, find_unused: bool = False) -> None:
        self._find_unused = find_unused
        self._parameters: list[nn.Parameter] = []
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[Tensor, int] = {}
        self._handles: list[RemovableHandle] = []
        self._unused: set[Tensor] | None = None
        self.armed = False

    def enter(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watch these parameters from now on."""
        self.leave()
        self._parameters = [p for p in reversed(parameters) if p.requires_grad]
        self._buckets = _fill_buckets(self._parameters)
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._unused = None
        for parameter in self._parameters:
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.armed = False

    def begin(self) -> None:
        """Arm: the backward pass that follows is the last one before the optimizer step."""
        self.armed = True
        self._waiting = [len(bucket) for bucket in self._buckets]
        self._works: list[dist.Work | None] = []
        self._sent = 0

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self.armed:
            return
        bucket = self._bucket_of[parameter]
        if self._waiting[bucket] == 0:
            raise ValueError(
                "A parameter of the active block got its gradient twice in one backward pass, so it was sent to the "
                "other ranks too early. Use activation checkpointing with use_reentrant=False."
            )
        self._waiting[bucket] -= 1
        while self._sent < len(self._buckets) and self._waiting[self._sent] == 0:
            self._send(self._buckets[self._sent])

    def _send(self, bucket: list[nn.Parameter]) -> None:
        messages = [_prepared(parameter) for parameter in bucket]
        if len(bucket) > 1 and not any(message.is_sparse for message in messages):
            messages = [torch.cat([gradient.flatten() for gradient in messages])]
            # At once, so that the gradients do not stay beside the message.
            for parameter, part in zip(bucket, torch.split(messages[0], [p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        for message in messages:
            message.div_(dist.get_world_size())
            self._works.append(dist.all_reduce(message, async_op=True))
        self._sent += 1

    def finish(self) -> None:
        """Send the rest and wait: `grad` holds the averages then.

        Raises:
            ValueError: If a parameter has a gradient on some ranks only, and `find_unused` is off.
        """
        missing = {p for p in self._parameters if p.grad is None}
        first = self._unused is None
        users: list[int] | None = None
        while self._sent < len(self._buckets):
            self._send(self._buckets[self._sent])
        if first or self._find_unused:
            device = self._parameters[0].device
            counts = torch.tensor([p not in missing for p in self._parameters], dtype=torch.int32, device=device)
            dist.all_reduce(counts)
            users = counts.tolist()
            self._unused = {p for p, count in zip(self._parameters, users, strict=True) if count == 0}
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = []
        self.armed = False
        assert self._unused is not None
        for parameter in self._unused:
            parameter.grad = None
        if not self._find_unused and (
            missing != self._unused or (users is not None and any(0 < n < dist.get_world_size() for n in users))
        ):
            raise ValueError(
                "A parameter of the active block has a gradient on some ranks, or in some steps, only: the loss does "
                "not always depend on it. Use Trainer(strategy='ddp_find_unused_parameters_true')."
            )


def average(tensor: Tensor) -> None:
    """Average a tensor over all ranks in place."""
    message = tensor if tensor.is_sparse else tensor.contiguous()
    message.div_(dist.get_world_size())
    dist.all_reduce(message)
    if message is not tensor:
        tensor.copy_(message)


def check_same_order(parameters: Sequence[int], device: torch.device) -> None:
    """Raise ValueError on every rank unless all ranks averaged the same parameters in the same order (a host sync)."""
    digest = 0
    for number in parameters:
        digest = (digest * 1_000_003 + number + 1) % (1 << 61)
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes.sum()) != 0:
        raise ValueError(
            "A parameter has a gradient on some ranks only, and gradients that do not belong together were averaged "
            "inside the backward pass. Start again from the last checkpoint without `step_in_backward` and `expand`."
        )


def check_same_block(block_idx: int, names: Sequence[str], device: torch.device) -> None:
    """Raise ValueError on every rank if the ranks are about to train different blocks (one number per rank travels)."""
    mine = torch.tensor([block_idx], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    chosen = [int(index) for index in everyone]
    if len(set(chosen)) > 1:
        listing = ", ".join(f"rank {rank}: {names[index]}" for rank, index in enumerate(chosen))
        raise ValueError(
            f"Expected every rank to choose the same block, but got {listing}. A BCDStrategy must not depend on what "
            "differs between ranks: draw from `self.generator`, and use the norms given to `observe`."
        )


def broadcast_tensors(module: nn.Module, *, buffers_only: bool = False) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks."""
    tensors = [] if buffers_only else list(module.parameters())
    # Messages are plain memory: what has gaps is sent as a copy.
    sent = [(tensor.detach(), tensor.detach().contiguous()) for tensor in [*tensors, *module.buffers()]]
    works = [dist.broadcast(message, src=0, async_op=True) for _, message in sent]
    for work, (tensor, message) in zip(works, sent, strict=True):
        if work is not None:
            work.wait()
        if message.data_ptr() != tensor.data_ptr():
            tensor.copy_(message)


def _prepared(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.coalesce()
    elif not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def _fill_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    room = 0
    kind: tuple[torch.dtype, torch.device] | None = None
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if room <= 0 or kind != (parameter.dtype, parameter.device) or size >= BUCKET_BYTES:
            buckets.append([])
            room = BUCKET_BYTES
            kind = (parameter.dtype, parameter.device)
        buckets[-1].append(parameter)
        room -= size
    return buckets
