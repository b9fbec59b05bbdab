"""The accumulation window: the batches whose gradients one optimizer step adds up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_bcd.blocks import LayerBlock


class AccumulationWindow:
    """Mean loss and gradients of a window that may be open when a checkpoint is written.

    Attributes:
        open: Whether the optimizer step waits for more batches.
    """

    def __init__(self) -> None:
        self.open = False
        self._loss: Tensor | None = None
        self._batches = 0
        self._gradients: dict[str, Tensor] = {}

    @property
    def started(self) -> bool:
        """Whether a batch is in it."""
        return self._batches > 0

    def add(self, outputs: Any, length: int) -> None:
        """Take what `training_step` returned for one batch of a window of at most `length` batches."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided the loss by the length of a full window.
            loss = loss.detach() * length
            self._loss = loss if self._loss is None else self._loss.to(loss.device) + loss
            self._batches += 1

    def close(self) -> Tensor | None:
        """Empty the window and return the mean loss of its batches, None without any."""
        mean = None if self._loss is None else self._loss / self._batches
        self._loss, self._batches = None, 0
        return mean

    def restore_gradients(self, blocks: Sequence[LayerBlock]) -> None:
        """Give the parameters the gradients of a window that was open when the checkpoint was written."""
        for position, gradient in self._gradients.items():
            block, index = map(int, position.split("."))
            parameter = blocks[block].parameters[index]
            parameter.grad = gradient.to(parameter.device)
        self._gradients = {}

    def state_dict(
        self, blocks: Sequence[LayerBlock], active: int | None, copy: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """State as plain types and tensors; inside a window with the gradients gathered so far.

        Args:
            blocks: All blocks.
            active: Index of the active one; other gradients will be dropped and are not kept.
            copy: Returns what to keep of a gradient.
        """
        kept = blocks[active].parameters if self.open and active is not None else []
        gradients = {
            f"{active}.{index}": copy(parameter.grad)
            for index, parameter in enumerate(kept)
            if parameter.grad is not None
        }
        return {"loss": self._loss, "batches": self._batches, "gradients": gradients}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; gradients wait for `restore_gradients`."""
        self._loss = state_dict["loss"]
        self._batches = int(state_dict["batches"])
        self._gradients = dict(state_dict["gradients"])
        self.open = self.started
