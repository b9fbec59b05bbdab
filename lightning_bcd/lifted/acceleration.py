"""Two accelerations of lifted algorithms: auxiliary variables that start anew, weights that move on (heavy ball)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_bcd.lifted.algorithm import LiftedAlgorithm, LiftedState
from lightning_bcd.lifted.chain import Chain


@dataclass(frozen=True, kw_only=True)
class Accelerated(LiftedAlgorithm):
    """Arguments `restart_every` and `momentum`, and what they do around a sweep.

    Args:
        restart_every: Set the auxiliary variables to those of a forward pass before every k-th sweep; never if None.
        momentum: β in [0, 1): after a sweep the weights of hidden stages move on by β times their last move (heavy
            ball). 0 if None. The report is that of the sweep, before this move.
    """

    restart_every: int | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart_every is not None and self.restart_every < 1:
            raise ValueError(
                f"Expected argument `restart_every` to be None or at least 1, but got {self.restart_every}. Use None."
            )
        if not 0 <= (self.momentum or 0.0) < 1:
            raise ValueError(f"Expected argument `momentum` to be in [0, 1), but got {self.momentum}. Use e.g. 0.9.")

    def restarts(self, state: LiftedState) -> bool:
        """Whether the auxiliary variables start anew before this sweep."""
        return self.restart_every is not None and state.sweep % self.restart_every == 0 and not state.fresh

    @contextmanager
    def heavy_ball(self, chain: Chain, state: LiftedState) -> Iterator[None]:
        """W ← W_old + v, v ← (W − W_old) + β v for hidden stages, around one sweep that makes W of W_old."""
        before = [p.clone() for p in chain.hidden_parameters()] if self.momentum else []
        yield
        for index, (p, old) in enumerate(zip(chain.hidden_parameters(), before, strict=False)):
            move = p - old
            last = state.velocity.get(str(index))
            state.velocity[str(index)] = move if last is None else move.add_(last, alpha=self.momentum or 0.0)
            p.copy_(old + move)
