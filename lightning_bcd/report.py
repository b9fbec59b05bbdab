"""What every block got out of its visits: visits, steps, seconds, mean loss decrease."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class BlockReport:
    """The books of one block.

    Attributes:
        name: Name of the block.
        visits: Finished visits.
        steps: Optimizer steps.
        seconds: Wall-clock time from the first to the last batch of its visits, in this run and those it resumed.
        mean_loss_decrease: Mean over finished visits of (loss of the first step − loss of the last step); NaN without.
    """

    name: str
    visits: int = 0
    steps: int = 0
    seconds: float = 0.0
    mean_loss_decrease: float = float("nan")


class VisitReport:
    """Adds up the visits of every block.

    Losses stay on their device until `rows` is asked for, so that counting never waits for a GPU.

    Args:
        names: Block names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._visits = [0] * len(self._names)
        self._steps = [0] * len(self._names)
        self._seconds = [0.0] * len(self._names)
        self._decrease: list[Tensor | float] = [0.0] * len(self._names)
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._since: float | None = None

    def begin_batch(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def end_batch(self, block_idx: int) -> None:
        """Stop the clock and add the time to the block."""
        if self._since is not None:
            self._seconds[block_idx] += time.perf_counter() - self._since
        self._since = None

    def begin_visit(self) -> None:
        """Forget the losses of the last visit."""
        self._first = self._last = None

    def add_step(self, block_idx: int, loss: Tensor) -> None:
        """Count one optimizer step and take its loss, a scalar on any device."""
        self._steps[block_idx] += 1
        self._first = loss if self._first is None else self._first
        self._last = loss

    def end_visit(self, block_idx: int) -> Tensor | None:
        """Count a visit and return its loss decrease, None if it had no loss."""
        self._visits[block_idx] += 1
        if self._first is None or self._last is None:
            return None
        decrease = self._first - self._last.to(self._first.device)
        self._decrease[block_idx] = self._decrease[block_idx] + decrease
        return decrease

    def rows(self) -> list[BlockReport]:
        """Return the books of all blocks, in block order."""
        return [
            BlockReport(name, visits, steps, seconds, float(decrease) / visits if visits else float("nan"))
            for name, visits, steps, seconds, decrease in zip(
                self._names, self._visits, self._steps, self._seconds, self._decrease, strict=True
            )
        ]

    def table(self) -> str:
        """Return the books as aligned text."""
        header = ("block", "visits", "steps", "seconds", "mean loss decrease")
        lines = [header] + [
            (row.name, str(row.visits), str(row.steps), f"{row.seconds:.1f}", f"{row.mean_loss_decrease:.4g}")
            for row in self.rows()
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        )

    def state_dict(self) -> dict[str, Any]:
        """State as plain types and tensors."""
        return {
            "visits": list(self._visits),
            "steps": list(self._steps),
            "seconds": list(self._seconds),
            "decrease": [float(value) for value in self._decrease],
            "first": self._first,
            "last": self._last,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._visits = [int(count) for count in state_dict["visits"]]
        self._steps = [int(count) for count in state_dict["steps"]]
        self._seconds = [float(seconds) for seconds in state_dict["seconds"]]
        self._decrease = [float(value) for value in state_dict["decrease"]]
        self._first, self._last = state_dict["first"], state_dict["last"]
