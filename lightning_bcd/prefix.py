"""Reuse of a frozen prefix's activations while one batch is evaluated several times."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Entry(NamedTuple):
    input: Tensor
    version: int
    length: int
    output: Tensor
    output_version: int


class PrefixCache:
    """Remembers what the frozen children at the start of an `nn.Sequential` returned.

    With K steps on the same batch the children before the first trainable one compute the same K times. The
    cache runs them once and starts the later evaluations behind them; the loss has the same bits. A prefix that
    draws random numbers (dropout) or changes a buffer (BatchNorm in training) is not reused, with one warning.
    Memory: one activation per call of the module and batch.

    Args:
        module: The sequential module to watch.

    Raises:
        ValueError: If the module has a forward of its own instead of that of `nn.Sequential`.
    """

    def __init__(self, module: nn.Sequential) -> None:
        if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
            raise ValueError(
                f"Expected a module with the forward pass of nn.Sequential for cache_prefix=True, but got "
                f"{type(module).__name__}, which has its own. Name a plain nn.Sequential with `prefix_module=`."
            )
        self.module = module
        self._entries: dict[int, _Entry] = {}
        self._calls = 0
        self._warned = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Reuse activations inside this context: same weights in the prefix, same batches."""
        self.module.forward = self._forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.module.forward
            self._entries.clear()

    def new_evaluation(self) -> None:
        """Begin another evaluation of the same batches: the n-th call meets the n-th call of the last one."""
        self._calls = 0

    def _forward(self, input: Any) -> Any:
        call, self._calls = self._calls, self._calls + 1
        children = list(self.module)
        trainable = (i for i, child in enumerate(children) if any(p.requires_grad for p in child.parameters()))
        length = next(trainable, len(children))
        if length == 0 or not isinstance(input, Tensor) or input.requires_grad:
            return self._run(children, input)
        entry = self._entries.get(call)
        if entry is not None and entry.length == length and _unchanged(entry, input):
            return self._run(children[length:], entry.output)
        self._entries.pop(call, None)
        version, before = input._version, self._side_effects(children[:length], input)
        output = self._run(children[:length], input)
        if self._side_effects(children[:length], input) == before:
            if isinstance(output, Tensor):
                self._entries[call] = _Entry(input, version, length, output, output._version)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                "cache_prefix=True has no effect on this block: its frozen prefix draws random numbers or changes "
                "buffers (dropout, BatchNorm in training mode). Put these modules into eval mode to reuse activations.",
                stacklevel=2,
            )
        return self._run(children[length:], output)

    @staticmethod
    def _run(children: list[nn.Module], value: Any) -> Any:
        for child in children:
            value = child(value)
        return value

    @staticmethod
    def _side_effects(children: list[nn.Module], input: Tensor) -> tuple[Any, ...]:
        generators = [torch.get_rng_state()]
        if input.is_cuda:
            generators.append(torch.cuda.get_rng_state(input.device))
        buffers = [(id(b), b._version) for child in children for b in child.buffers()]
        return (*(bytes(state.numpy()) for state in generators), *buffers)


def _unchanged(entry: _Entry, input: Tensor) -> bool:
    # The active block may work in place on what it is given, and the caller on the batch.
    if entry.input._version != entry.version or entry.output._version != entry.output_version:
        return False
    # The comparison of values costs a host sync; the same tensor object needs none.
    return input is entry.input or (input.shape == entry.input.shape and torch.equal(input, entry.input))
