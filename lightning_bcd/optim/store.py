"""What happens to the optimizer state of a block that leaves: kept, dropped, or moved to host memory and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bcd.optim.block import BlockOptimizer, fresh_state

StatePolicy: TypeAlias = Literal["reset", "keep", "offload"]
STATE_POLICIES: tuple[StatePolicy, ...] = ("reset", "keep", "offload")


class HostTransfer:
    """Copies tensors between GPUs and pinned host memory, each GPU on a stream of its own beside the computation.

    Tensors of other devices (the CPU, sharded tensors) and step counters (0-dim; their device depends on the optimizer,
    their size is nothing) are passed through as they are.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        # Not before the work queued so far: it wrote what is read, or still uses the memory that is written.
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def to_host(self, tensor: Tensor) -> Tensor:
        """Start a copy to pinned memory and return it; complete after `synchronize`."""
        if not tensor.is_cuda or tensor.dim() == 0:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream = self._side_stream(tensor.device)
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        # The device memory may be used again once the copy is through.
        tensor.record_stream(stream)
        return host

    def to_device(self, tensor: Tensor, device: torch.device, *, counters: bool) -> Tensor:
        """Start a copy to `device` and return it; the computation may use it after `join`.

        `counters`: also of step counters, which may come from a checkpoint on another device.
        """
        if tensor.device == device or (tensor.dim() == 0 and not counters):
            return tensor
        if device.type != "cuda":
            return tensor.to(device)
        copy = torch.empty_like(tensor, device=device)
        stream = self._side_stream(device)
        with torch.cuda.stream(stream):
            copy.copy_(tensor, non_blocking=True)
        copy.record_stream(stream)
        return copy

    def join(self) -> None:
        """Let the computation wait for the copies on the GPU; the host goes on."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def synchronize(self) -> None:
        """Wait on the host until every copy is complete."""
        for stream in self._streams.values():
            stream.synchronize()


class OptimizerStateStore:
    """Keeps, drops or moves the optimizer state of parameters that leave the active block.

    Args:
        optimizer: Any torch optimizer whose state is kept per parameter in `optimizer.state`.
        policy: `"reset"` drops the state (memory of one block), `"keep"` leaves it, `"offload"` moves it to
            host memory (pinned when the parameter is on a GPU) and back when the block returns. On the CPU
            the state is only taken out of `optimizer.state`, not copied.
        early: Whether the optimizer makes its state in its constructor (Adagrad) instead of at the first
            step; then `"reset"` gives a returning block the initial state. Found out if None, which is only
            right before the first step.
        float32: bfloat16 parameters step through float32 masters: state that was made early in the dtype of the
            parameter is turned to float32 when the block comes.
    """

    def __init__(
        self, optimizer: Optimizer, policy: StatePolicy, early: bool | None = None, *, float32: bool = False
    ) -> None:
        self.optimizer = optimizer
        self.float32 = float32
        self.policy = policy
        self.early = len(optimizer.state) > 0 if early is None else early
        self.host: dict[nn.Parameter, Any] = {}
        self._ahead: dict[nn.Parameter, Any] = {}
        self._transfer = HostTransfer()

    def leave(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the state of parameters that become inactive out of the optimizer, as the policy says."""
        if self.policy == "keep":
            return
        for parameter in parameters:
            state = self.optimizer.state.pop(parameter, None)
            if state and self.policy == "offload":
                self.host[parameter] = _map_tensors(state, self._transfer.to_host)

    def prefetch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Start to fetch the offloaded state of the block that comes next, while the current one still trains."""
        for parameter in parameters:
            if parameter.is_cuda and parameter in self.host and parameter not in self._ahead:
                self._ahead[parameter] = self._fetch(parameter)

    def _fetch(self, parameter: nn.Parameter) -> Any:
        # These optimizers want their step counters on the device of the parameters.
        counters = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        move = partial(self._transfer.to_device, device=parameter.device, counters=counters)
        return _map_tensors(self.host[parameter], move)

    def enter(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give parameters that become active their state back, as the policy says."""
        for parameter in parameters:
            if parameter in self.host:
                ahead = self._ahead.pop(parameter, None)
                self.optimizer.state[parameter] = self._fetch(parameter) if ahead is None else ahead
                del self.host[parameter]
        # What was fetched for a block that did not come after all is still on the host.
        self._ahead.clear()
        self._transfer.join()
        missing = [p for p in parameters if self.early and p not in self.optimizer.state]
        if missing and isinstance(self.optimizer, BlockOptimizer):
            self.optimizer.state.update(self.optimizer.fresh_state(missing))
        elif missing:
            self.optimizer.state.update(fresh_state(self.optimizer, set(missing)))
        for parameter in parameters:
            if self.float32 and parameter.dtype == torch.bfloat16 and parameter in self.optimizer.state:
                self.optimizer.state[parameter] = _map_tensors(self.optimizer.state[parameter], _to_float32)

    def host_state(self) -> dict[nn.Parameter, Any]:
        """Return the offloaded state, complete."""
        self._transfer.synchronize()
        return self.host

    def state_bytes(self) -> int:
        """Bytes of the optimizer state that is not on the host: what the policy keeps next to the weights."""
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        _map_tensors(dict(self.optimizer.state), count)
        return total


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, function) for item in value)
    return value
