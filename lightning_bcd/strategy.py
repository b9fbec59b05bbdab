"""Selection rules: which block is trained next.

A strategy is asked once per *visit* (the time a block stays active). `Trainer(strategy=...)` of Lightning
picks devices; a `BCDStrategy` picks blocks.

Write your own by subclassing `BCDStrategy` and returning an index from `select`:

    class OddFirst(BCDStrategy):
        def select(self) -> int:
            order = [*range(1, self.num_blocks, 2), *range(0, self.num_blocks, 2)]
            return order[self.num_visits % self.num_blocks]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch


class BCDStrategy(ABC):
    """Base class of all selection rules.

    Subclasses implement `select`; the base class counts visits, owns the random generator, checks the answer
    and guarantees coverage: in any `coverage × num_blocks` consecutive visits every block is visited.

    Attributes:
        num_blocks: Number of blocks, set by `setup`.
        num_visits: Visits handed out so far.
        visits: Visits per block.
        generator: The seeded `torch.Generator` to draw from. Never the global random state, so that selection
            does not change dropout or shuffling, and all ranks of a distributed run draw the same numbers.

    Args:
        seed: Seed of `generator`.
        coverage: A block that was not visited for `coverage × num_blocks` visits is visited next, whatever
            `select` would say. `None` switches the guarantee off.
    """

    #: Whether the strategy reads gradient norms. They cost one full backward pass per measured visit.
    needs_scores: bool = False

    def __init__(self, *, seed: int = 0, coverage: int | None = 4) -> None:
        if coverage is not None and (not isinstance(coverage, int) or coverage < 1):
            raise ValueError(
                f"Expected argument `coverage` to be a positive integer or None, but got {coverage!r}. "
                "Use None to switch the guarantee off."
            )
        self.seed = seed
        self.coverage = coverage
        self.generator = torch.Generator()
        self.num_blocks = 0
        self.block_sizes: list[int] = []
        self.num_visits = 0
        self.visits: list[int] = []
        self._last_visit: list[int] = []

    def setup(self, num_blocks: int, block_sizes: Sequence[int] | None = None) -> None:
        """Start anew for `num_blocks` blocks; called once before the first visit.

        Args:
            num_blocks: Number of blocks.
            block_sizes: Number of parameters of each block (1 each if not given).

        Raises:
            ValueError: If there is no block or the sizes do not fit.
        """
        sizes = [1] * num_blocks if block_sizes is None else [int(size) for size in block_sizes]
        if num_blocks < 1 or len(sizes) != num_blocks or min(sizes) < 1:
            raise ValueError(
                f"Expected argument `num_blocks` to be positive with one positive size per block, but got "
                f"num_blocks={num_blocks} and block_sizes={block_sizes}. Pass the sizes of the blocks you made."
            )
        self.num_blocks = num_blocks
        self.block_sizes = sizes
        self.generator.manual_seed(self.seed)
        self.num_visits = 0
        self.visits = [0] * num_blocks
        # Virtual visits before the start: all different, so at most one block falls due at a time.
        self._last_visit = [block - num_blocks for block in range(num_blocks)]

    @abstractmethod
    def select(self) -> int:
        """Return the index of the next block, in `range(self.num_blocks)`."""

    def observe(self, grad_norms: Sequence[float]) -> None:  # noqa: B027 - most rules need no norms
        """Receive the gradient norm ‖∂L/∂block‖₂ of every block, in block order, when `wants_scores()` is true."""

    def wants_scores(self) -> bool:
        """Whether the gradient norms should be measured at the end of the current visit."""
        return self.needs_scores

    def next(self) -> int:
        """Choose the next block and count the visit.

        Returns:
            The block index, that of the block whose coverage is due if there is one, else what `select` says.

        Raises:
            RuntimeError: If `setup` was not called.
            TypeError: If `select` returned something that is not an integer.
            IndexError: If `select` returned an index that is not in `range(num_blocks)`.
        """
        if not self.num_blocks:
            raise RuntimeError(f"{type(self).__name__}.next() was called before setup(num_blocks). Call setup first.")
        block = self._overdue()
        if block is None:
            block = self.select()
            if isinstance(block, bool) or not isinstance(block, int):
                raise TypeError(
                    f"Expected {type(self).__name__}.select() to return an int, but got {block!r}. "
                    "Convert tensors and NumPy scalars with int(...)."
                )
            if not 0 <= block < self.num_blocks:
                raise IndexError(
                    f"Expected {type(self).__name__}.select() to return an index in range({self.num_blocks}), "
                    f"but got {block}. Negative indices are not allowed; check the number of blocks."
                )
        self._last_visit[block] = self.num_visits
        self.visits[block] += 1
        self.num_visits += 1
        return block

    def peek(self) -> int | None:
        """Return the block that `next` will choose where that is known ahead, else None.

        Changes nothing that `next` returns; used to fetch optimizer state while the current block still trains.
        """
        return self._overdue()

    def _overdue(self) -> int | None:
        # Last visits are all different, so deadlines are too: serving the one that is due keeps every promise.
        if self.coverage is None:
            return None
        oldest = min(range(self.num_blocks), key=self._last_visit.__getitem__)
        return oldest if self.num_visits - self._last_visit[oldest] >= self.coverage * self.num_blocks else None

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers, lists and tensors (loads with `weights_only=True`)."""
        return {
            "name": type(self).__name__,
            "num_visits": self.num_visits,
            "visits": list(self.visits),
            "last_visit": list(self._last_visit),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; `setup` must have been called with the same number of blocks.

        Raises:
            ValueError: If the state was saved by another strategy or for another number of blocks.
        """
        if state_dict["name"] != type(self).__name__ or len(state_dict["visits"]) != self.num_blocks:
            raise ValueError(
                f"Expected argument `state_dict` to be a {type(self).__name__} state for {self.num_blocks} blocks, "
                f"but got a {state_dict['name']} state for {len(state_dict['visits'])}. Resume with the strategy "
                "and blocks of the saved run, or start a new run from the weights alone."
            )
        self.num_visits = int(state_dict["num_visits"])
        self.visits = [int(count) for count in state_dict["visits"]]
        self._last_visit = [int(visit) for visit in state_dict["last_visit"]]
        self.generator.set_state(state_dict["generator"])


class CyclicStrategy(BCDStrategy):
    """Blocks in order, again and again.

    Args:
        reverse: Last block first (`"backward"`). Blocks near the output have the shortest backward pass.
        seed: Unused; like `coverage` here for a uniform interface.
        coverage: Unused: a cycle covers every block.
    """

    def __init__(self, *, reverse: bool = False, seed: int = 0, coverage: int | None = 4) -> None:
        super().__init__(seed=seed, coverage=coverage)
        self.coverage = None
        self.reverse = reverse

    def select(self) -> int:
        """Return the next block in order."""
        position = self.num_visits % self.num_blocks
        return self.num_blocks - 1 - position if self.reverse else position

    def peek(self) -> int | None:
        """Return the next block in order."""
        return self.select()


class RandomStrategy(BCDStrategy):
    """A fresh random permutation of all blocks per cycle, or independent draws.

    Args:
        replacement: Draw every visit independently and uniformly (`"uniform"`). A block may then wait for any
            time: the coverage guarantee does not apply.
        seed: Seed of the draws.
        coverage: See `BCDStrategy`; 1 leaves only one order. Ignored with `replacement=True`.
    """

    def __init__(self, *, replacement: bool = False, seed: int = 0, coverage: int | None = 4) -> None:
        super().__init__(seed=seed, coverage=None if replacement else coverage)
        self.replacement = replacement
        self._order: list[int] = []

    def setup(self, num_blocks: int, block_sizes: Sequence[int] | None = None) -> None:
        """Start anew; see `BCDStrategy.setup`."""
        super().setup(num_blocks, block_sizes)
        self._order = []

    def select(self) -> int:
        """Return the next block of the permutation, or a uniform draw."""
        self._draw()
        return self._order.pop(0)

    def peek(self) -> int | None:
        """Return the block that is overdue or, having drawn it, the one that comes next."""
        self._draw()
        overdue = super().peek()
        return self._order[0] if overdue is None else overdue

    def _draw(self) -> None:
        if self._order:
            return
        if self.replacement:
            self._order = [int(torch.randint(self.num_blocks, (), generator=self.generator))]
        else:
            self._order = torch.randperm(self.num_blocks, generator=self.generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """State, with the rest of the current permutation."""
        return {**super().state_dict(), "order": list(self._order)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        super().load_state_dict(state_dict)
        self._order = [int(block) for block in state_dict["order"]]
