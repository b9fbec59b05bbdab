"""pdADMM-G-Q: pdADMM-G whose P or Q take values of a small grid, so that few bits travel between layers.

    P_l, Q_l ∈ Δ = {low, low + s, …, high}

Q_l is the nearest point of Δ to its minimiser. P_l is the nearest point to a gradient step whose length is given by the
largest eigenvalue of its Hessian, so that the objective does not rise (Section 4 of [1]).

[1] Wang, Li, Chai, Wang, Cheng, Zhao. Towards Quantized Model Parallelism for Graph-Augmented MLPs Based on
    Gradient-Free ADMM Framework. IEEE Transactions on Neural Networks and Learning Systems, 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Codec, Communicator
from lightning_bcd.lifted.algorithm import LiftedState, check_choice
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.pdadmm import PDADMMG
from lightning_bcd.prox.penalties import UniformGrid


@dataclass(frozen=True, kw_only=True)
class PDADMMGQ(PDADMMG):
    """pdADMM-G-Q (Wang, Li, Chai, Wang, Cheng, Zhao, TNNLS 2022, Algorithm 2).

    Args:
        quantize: Which variables take values of the grid: `"p"`, `"q"` or `"both"`.
        grid: (low, high, levels), with at most 65,536 levels; the paper's Δ = {−1, 0, …, 20} is (−1, 20, 22).
        bits: Instead of `grid`: 2^bits levels over three times the range of Q in the first forward pass, which lies in
            the middle. 8 if neither is given.

    The other arguments are those of `PDADMMG`.

    Raises:
        ValueError: If both `grid` and `bits` are given, or one is out of range.
    """

    quantize: Literal["p", "q", "both"] = "both"
    grid: tuple[float, float, int] | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("quantize", self.quantize, ["p", "q", "both"])
        if self.grid is not None and self.bits is not None:
            raise ValueError("Expected one of the arguments `grid` and `bits`, but got both. Leave one out.")
        if self.bits is not None and not (isinstance(self.bits, int) and 1 <= self.bits <= 16):
            raise ValueError(f"Expected argument `bits` to be an integer from 1 to 16, but got {self.bits}. Use 8.")
        if self.grid is not None:
            if len(self.grid) != 3 or not 2 <= self.grid[2] <= 2**16:
                raise ValueError(
                    f"Expected argument `grid` to be (low, high, levels) with 2 to 65,536 levels, but got {self.grid}."
                )
            UniformGrid(*self.grid)

    def start(
        self, chain: Chain, x: Tensor, y: Tensor, comm: Communicator, velocity: dict[str, Tensor] | None = None
    ) -> LiftedState:
        """Initialise the variables by a forward pass, fix the grid and put the variables on it."""
        state = super().start(chain, x, y, comm, velocity)
        if self.grid is None and "grid" not in state.velocity:
            # Over all processes: the extremes of samples that others hold count too.
            q = state.variables["q"]
            mine = torch.stack([torch.stack([t.min() for t in q]).min(), torch.stack([t.max() for t in q]).max()])
            low, high = comm.extremes(mine).double().unbind()
            span = torch.where(high > low, high - low, torch.ones_like(low))
            # Room on both sides: weights grow, and P has negative entries where Q has none.
            state.velocity["grid"] = torch.stack([low - span, low + 2 * span])
        for name in self._snapped:
            for tensor in state.variables[name]:
                tensor.copy_(self.snap(name, tensor, state))
        self.refresh(chain, state)
        return state

    @property
    def _snapped(self) -> tuple[str, ...]:
        return ("p", "q") if self.quantize == "both" else (self.quantize,)

    def _grid(self, state: LiftedState) -> UniformGrid:
        if self.grid is not None:
            return UniformGrid(*self.grid)
        low, high = state.velocity["grid"].tolist()
        return UniformGrid(low, high, 2 ** (self.bits or 8))

    def snap(self, name: str, value: Tensor, state: LiftedState) -> Tensor:
        """The nearest point of the grid, for variables that are quantised."""
        return self._grid(state).prox(value, 1.0) if name in self._snapped else value

    def projection(self, name: str, state: LiftedState) -> Callable[[Tensor], Tensor] | None:
        """The nearest point of the grid, for variables that are quantised."""
        return partial(self.snap, name, state=state) if name in self._snapped else None

    def codec(self, name: str, state: LiftedState) -> Codec | None:
        """Packed indices of grid points, for variables that are quantised."""
        return GridCodec(self._grid(state)) if name in self._snapped else None


class GridCodec:
    """Packs values of a grid as indices of ⌈log₂ levels⌉ bits each, without gaps.

    Args:
        grid: The grid; what is decoded equals what was encoded to the last bit.
    """

    def __init__(self, grid: UniformGrid) -> None:
        self.grid = grid
        self.bits = (grid.levels - 1).bit_length()

    def size(self, entries: int) -> int:
        """Number of bytes of a tensor."""
        return -(-entries * self.bits // 8)

    def encode(self, values: Tensor) -> Tensor:
        """Return the bytes of a tensor on the grid, uint8."""
        index = ((values.flatten() - self.grid.low) / self.grid.spacing).round_().to(torch.int32)
        index.clamp_(max=self.grid.levels - 1)  # rounding may have put the last level too high
        if self.bits == 8:
            return index.to(torch.uint8)
        # Groups of eight entries are whole bytes.
        index = torch.cat([index, index.new_zeros(-len(index) % 8)])
        bits = index[:, None].bitwise_right_shift(self._places(self.bits, values.device)).bitwise_and_(1)
        packed = (bits.view(-1, 8) << self._places(8, values.device)).sum(1).to(torch.uint8)
        return packed[: self.size(values.numel())]

    def decode(self, message: Tensor, out: Tensor) -> None:
        """Fill `out` with the values of the bytes."""
        index: Tensor = message
        if self.bits != 8:
            bits = message[:, None].int().bitwise_right_shift(self._places(8, message.device)).bitwise_and_(1)
            bits = bits.flatten()[: out.numel() * self.bits].view(-1, self.bits)
            index = (bits << self._places(self.bits, message.device)).sum(1)
        # The arithmetic of `UniformGrid.prox`: the same bits come out.
        out.copy_(index.to(out.dtype).mul_(self.grid.spacing).add_(self.grid.low).view_as(out))

    @staticmethod
    def _places(count: int, device: torch.device) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=device)
