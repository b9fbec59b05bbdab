"""Selection rules that read gradient norms, and the names of all rules."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from lightning_bcd.strategy import BCDStrategy, CyclicStrategy, RandomStrategy


class ScoredStrategy(BCDStrategy):
    """Base of the rules that read gradient norms: one cyclic pass first, then `select_by_score`.

    Norms are normalised by block size, s_b = ‖g_b‖ / √n_b, so that a block does not win for being large.

    Args:
        refresh_every: Measure the norms every so many visits (a measurement costs one full backward pass).
        seed: Seed of `generator`.
        coverage: See `BCDStrategy`.
    """

    needs_scores = True

    def __init__(self, *, refresh_every: int = 1, seed: int = 0, coverage: int | None = 4) -> None:
        super().__init__(seed=seed, coverage=coverage)
        if refresh_every < 1:
            raise ValueError(f"Expected argument `refresh_every` to be at least 1, but got {refresh_every}. Use 1.")
        self.refresh_every = refresh_every
        self.scores: list[float] | None = None

    def setup(self, num_blocks: int, block_sizes: Sequence[int] | None = None) -> None:
        """Start anew; see `BCDStrategy.setup`."""
        super().setup(num_blocks, block_sizes)
        self.scores = None

    def wants_scores(self) -> bool:
        """Not before the end of the cyclic pass, then every `refresh_every` visits."""
        since_pass = self.num_visits - self.num_blocks
        return since_pass >= 0 and since_pass % self.refresh_every == 0

    def peek(self) -> int | None:
        """Return the next block of the first pass; later choices depend on norms still to be measured."""
        overdue = super().peek()
        return self.num_visits if overdue is None and self.num_visits < self.num_blocks else overdue

    def select(self) -> int:
        """Return the next block of the first pass, later the block `select_by_score` chooses."""
        if self.num_visits < self.num_blocks or self.scores is None:
            return self.num_visits % self.num_blocks
        return self.select_by_score(self.scores)

    @abstractmethod
    def select_by_score(self, scores: Sequence[float]) -> int:
        """Return the next block given the normalised scores."""

    def observe(self, grad_norms: Sequence[float]) -> None:
        """Normalise and keep the norms. A measurement that is not finite is dropped (a skipped AMP step)."""
        if len(grad_norms) != self.num_blocks:
            raise ValueError(
                f"Expected argument `grad_norms` to hold one norm for each of {self.num_blocks} blocks, but got "
                f"{len(grad_norms)}. Pass the norms in block order."
            )
        if all(math.isfinite(norm) for norm in grad_norms):
            self.update_scores(
                [norm / math.sqrt(size) for norm, size in zip(grad_norms, self.block_sizes, strict=True)]
            )

    def update_scores(self, scores: list[float]) -> None:
        """Replace the scores; averaging rules override this."""
        self.scores = scores

    def state_dict(self) -> dict[str, Any]:
        """State, with the scores."""
        return {**super().state_dict(), "scores": None if self.scores is None else list(self.scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        super().load_state_dict(state_dict)
        scores = state_dict["scores"]
        self.scores = None if scores is None else [float(score) for score in scores]


class GreedyStrategy(ScoredStrategy):
    """Gauss-Southwell on normalised gradient norms with a visit penalty.

    Chooses argmax_b s_b / (1 + visits_b)^p. Without the penalty (p = 0) the block with the largest gradient,
    usually the head, takes almost every visit (Nutini et al., *Coordinate descent converges faster with the
    Gauss-Southwell rule than random selection*, ICML 2015, study the pure rule on convex problems).

    Args:
        visit_penalty: The exponent p ≥ 0.
        refresh_every: See `ScoredStrategy`.
        seed: Unused, the rule is deterministic.
        coverage: See `BCDStrategy`.
    """

    def __init__(
        self, *, visit_penalty: float = 1.0, refresh_every: int = 1, seed: int = 0, coverage: int | None = 4
    ) -> None:
        super().__init__(refresh_every=refresh_every, seed=seed, coverage=coverage)
        if visit_penalty < 0:
            raise ValueError(f"Expected argument `visit_penalty` to be at least 0, but got {visit_penalty}. Use 1.0.")
        self.visit_penalty = visit_penalty

    def select_by_score(self, scores: Sequence[float]) -> int:
        """Return the block with the largest penalised score; ties go to the first."""
        return max(range(self.num_blocks), key=lambda b: scores[b] / (1 + self.visits[b]) ** self.visit_penalty)


class ImportanceStrategy(ScoredStrategy):
    """Random blocks, likelier the larger the moving average of their gradient norm.

    With m ← β m + (1 − β) s the probabilities are p_b = (1 − ε) m_b^{1/T} / Σ m^{1/T} + ε / K for K blocks.

    Args:
        decay: β in [0, 1), memory of the moving average, per measurement.
        temperature: T > 0. Large: nearly uniform; small: nearly greedy.
        floor: ε in [0, 1], the share of uniform draws.
        refresh_every: See `ScoredStrategy`.
        seed: Seed of the draws.
        coverage: See `BCDStrategy`.
    """

    def __init__(
        self,
        *,
        decay: float = 0.9,
        temperature: float = 1.0,
        floor: float = 0.1,
        refresh_every: int = 1,
        seed: int = 0,
        coverage: int | None = 4,
    ) -> None:
        super().__init__(refresh_every=refresh_every, seed=seed, coverage=coverage)
        if not (0 <= decay < 1 and temperature > 0 and 0 <= floor <= 1):
            raise ValueError(
                "Expected arguments 0 ≤ `decay` < 1, `temperature` > 0 and 0 ≤ `floor` ≤ 1, but got "
                f"decay={decay}, temperature={temperature}, floor={floor}. The defaults are 0.9, 1.0 and 0.1."
            )
        self.decay, self.temperature, self.floor = decay, temperature, floor

    def update_scores(self, scores: list[float]) -> None:
        """Move the averages towards the new scores."""
        if self.scores is not None:
            scores = [self.decay * old + (1 - self.decay) * new for old, new in zip(self.scores, scores, strict=True)]
        self.scores = scores

    def probabilities(self, scores: Sequence[float]) -> torch.Tensor:
        """Return the probability of each block, shape (num_blocks,), float64."""
        # Through logarithms: m^{1/T} overflows for a small T.
        logits = torch.tensor(scores, dtype=torch.float64).log() / self.temperature
        peaked = torch.softmax(logits, 0) if logits.isfinite().any() else torch.full_like(logits, 1 / len(scores))
        return (1 - self.floor) * peaked + self.floor / self.num_blocks

    def select_by_score(self, scores: Sequence[float]) -> int:
        """Draw a block from `probabilities`."""
        return int(torch.multinomial(self.probabilities(scores), 1, generator=self.generator))


STRATEGY_NAMES = ("cyclic", "backward", "random", "uniform", "greedy", "importance")


def resolve_strategy(
    strategy: str | BCDStrategy, *, seed: int = 0, coverage: int | None = 4, refresh_every: int = 1
) -> BCDStrategy:
    """Turn a short name into a strategy; an object is returned as it is.

    Args:
        strategy: `"cyclic"`, `"backward"`, `"random"`, `"uniform"`, `"greedy"`, `"importance"`, or an object.
        seed: Seed for the random rules. Ignored for an object, like the other arguments.
        coverage: See `BCDStrategy`.
        refresh_every: See `ScoredStrategy`.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the argument is neither a name nor a `BCDStrategy`.
    """
    if isinstance(strategy, BCDStrategy):
        return strategy
    if not isinstance(strategy, str):
        raise TypeError(
            f"Expected argument `strategy` to be a BCDStrategy object or one of {', '.join(STRATEGY_NAMES)}, "
            f"but got {strategy!r}. Pass an instance, not a class."
        )
    if strategy in ("cyclic", "backward"):
        return CyclicStrategy(reverse=strategy == "backward", seed=seed, coverage=coverage)
    if strategy in ("random", "uniform"):
        return RandomStrategy(replacement=strategy == "uniform", seed=seed, coverage=coverage)
    if strategy == "greedy":
        return GreedyStrategy(refresh_every=refresh_every, seed=seed, coverage=coverage)
    if strategy == "importance":
        return ImportanceStrategy(refresh_every=refresh_every, seed=seed, coverage=coverage)
    raise ValueError(
        f"Expected argument `strategy` to be one of {', '.join(STRATEGY_NAMES)}, but got {strategy!r}. "
        "Subclass BCDStrategy for a rule of your own."
    )
