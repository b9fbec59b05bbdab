"""Selection rules: coverage, determinism, state and the formulas."""

import io
import itertools
import math
import random
from functools import partial

import pytest
import torch

from lightning_bcd import (
    BCDStrategy,
    CyclicStrategy,
    GreedyStrategy,
    ImportanceStrategy,
    RandomStrategy,
    ScoredStrategy,
)
from lightning_bcd.scored_strategy import STRATEGY_NAMES, resolve_strategy


class EvensFirst(BCDStrategy):
    """What a user writes: even blocks, then odd ones."""

    def select(self):
        order = [*range(0, self.num_blocks, 2), *range(1, self.num_blocks, 2)]
        return order[self.num_visits % self.num_blocks]


class Stubborn(BCDStrategy):
    """Always the same block."""

    def select(self):
        return self.num_blocks // 2


class Hostile(BCDStrategy):
    """Random, but never a block that has waited for long, so that all of them fall due together."""

    def select(self):
        recent = sorted(range(self.num_blocks), key=self._last_visit.__getitem__)[-2:]
        return recent[int(torch.randint(len(recent), (), generator=self.generator))]


class Answers(BCDStrategy):
    """Returns what it is given."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def select(self):
        return self.answer


STRATEGIES = {
    "cyclic": CyclicStrategy,
    "backward": partial(CyclicStrategy, reverse=True),
    "random": RandomStrategy,
    "uniform": partial(RandomStrategy, replacement=True),
    "greedy": GreedyStrategy,
    "greedy without penalty": partial(GreedyStrategy, visit_penalty=0.0),
    "greedy, rare scores": partial(GreedyStrategy, refresh_every=3),
    "importance": ImportanceStrategy,
    "importance, nearly greedy": partial(ImportanceStrategy, temperature=1e-3, floor=0.0, decay=0.0),
    "user": EvensFirst,
}
COVERED = {**STRATEGIES, "stubborn": Stubborn, "hostile": Hostile}
del COVERED["uniform"]


def hostile_norms(strategy, rng):
    """Norms that keep a strategy away from the blocks that wait longest."""
    longest = sorted(range(strategy.num_blocks), key=strategy._last_visit.__getitem__)
    kind = rng.randrange(4)
    if kind == 0:  # all the weight on the block visited last
        return [1e30 if block == longest[-1] else 0.0 for block in range(strategy.num_blocks)]
    if kind == 1:  # the longer the wait the smaller the norm, over many orders of magnitude
        return [10.0 ** (3 * longest.index(block)) for block in range(strategy.num_blocks)]
    if kind == 2:
        return [0.0] * strategy.num_blocks
    return [rng.expovariate(1.0) for _ in range(strategy.num_blocks)]


def visit(strategy, count, rng=None):
    """Make visits; measure when the strategy wants to."""
    rng = rng or random.Random(0)
    chosen = []
    for _ in range(count):
        chosen.append(strategy.next())
        if strategy.wants_scores():
            strategy.observe(hostile_norms(strategy, rng))
    return chosen


@pytest.mark.parametrize("name", COVERED)
def test_every_window_of_coverage_times_blocks_visits_holds_every_block(name):
    for seed in range(24):
        rng = random.Random(seed)
        num_blocks, coverage = rng.randint(1, 7), rng.randint(1, 5)
        strategy = COVERED[name](coverage=coverage, seed=seed)
        strategy.setup(num_blocks, [rng.randint(1, 10**6) for _ in range(num_blocks)])
        window = coverage * num_blocks
        chosen = visit(strategy, 8 * window, rng)
        for start in range(len(chosen) - window + 1):
            assert len(set(chosen[start : start + window])) == num_blocks, (seed, num_blocks, coverage, start)


def test_without_the_guarantee_a_block_can_wait_forever():
    strategy = Stubborn(coverage=None)
    strategy.setup(5)
    assert visit(strategy, 100) == [2] * 100


def test_the_guarantee_takes_no_more_visits_than_it_must():
    strategy = Stubborn(coverage=4)
    strategy.setup(5)
    chosen = visit(strategy, 400)
    assert chosen.count(2) == 400 - 4 * 20  # each of the four others once in 20 visits


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_gives_the_same_blocks_and_leaves_the_global_random_state_alone(name):
    runs = []
    before = torch.get_rng_state()
    for _ in range(2):
        strategy = STRATEGIES[name](seed=3)
        strategy.setup(5)
        runs.append(visit(strategy, 60))
    assert runs[0] == runs[1]
    assert torch.equal(torch.get_rng_state(), before)
    strategy.setup(5)  # starts anew
    assert visit(strategy, 60) == runs[0]


@pytest.mark.parametrize("name", ["random", "uniform", "importance"])
def test_another_seed_gives_other_blocks(name):
    runs = []
    for seed in (0, 1):
        strategy = STRATEGIES[name](seed=seed)
        strategy.setup(5)
        runs.append(visit(strategy, 60))
    assert runs[0] != runs[1]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("at", [0, 3, 7, 13])
def test_a_saved_strategy_continues_in_the_middle_of_a_cycle(name, at):
    first = STRATEGIES[name](seed=5)
    first.setup(5, [3, 1, 4, 1, 5])
    rng = random.Random(1)
    visit(first, at, rng)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    rest = random.Random()
    rest.setstate(rng.getstate())
    expected = visit(first, 40, rng)

    second = STRATEGIES[name](seed=99)
    second.setup(5, [3, 1, 4, 1, 5])
    visit(second, 4)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert visit(second, 40, rest) == expected
    assert second.visits == first.visits
    assert second.num_visits == at + 40 == sum(second.visits)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_saved_state_does_not_change_when_its_strategy_goes_on(name):
    strategy = STRATEGIES[name]()
    strategy.setup(4)
    visit(strategy, 6)
    state = strategy.state_dict()
    copy = {key: value.clone() if isinstance(value, torch.Tensor) else repr(value) for key, value in state.items()}
    visit(strategy, 9)
    for key, value in copy.items():
        assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else repr(state[key]) == value


def test_cyclic_goes_forward_or_backward():
    forward, backward = CyclicStrategy(), CyclicStrategy(reverse=True)
    forward.setup(3)
    backward.setup(3)
    assert visit(forward, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert visit(backward, 7) == [2, 1, 0, 2, 1, 0, 2]


def test_random_visits_every_block_once_per_cycle_in_changing_order():
    strategy = RandomStrategy(seed=1)
    strategy.setup(6)
    chosen = visit(strategy, 60)
    cycles = [tuple(chosen[start : start + 6]) for start in range(0, 60, 6)]
    assert all(sorted(cycle) == list(range(6)) for cycle in cycles)
    assert len(set(cycles)) > 5


def test_uniform_draws_are_independent_and_exempt_from_coverage():
    strategy = RandomStrategy(replacement=True, coverage=1)
    strategy.setup(4)
    chosen = visit(strategy, 4000)
    for block in range(4):
        assert abs(chosen.count(block) / 4000 - 1 / 4) < 0.03
    repeats = sum(a == b for a, b in itertools.pairwise(chosen))
    assert abs(repeats / 3999 - 1 / 4) < 0.03
    assert any(len(set(chosen[start : start + 4])) < 4 for start in range(100))


@pytest.mark.parametrize("name", ["greedy", "importance"])
def test_scored_rules_make_one_cyclic_pass_before_they_ask_for_scores(name):
    strategy = STRATEGIES[name]()
    strategy.setup(5)
    wanted = []
    chosen = []
    for _ in range(5):
        chosen.append(strategy.next())
        wanted.append(strategy.wants_scores())
    assert chosen == [0, 1, 2, 3, 4]
    assert wanted == [False] * 4 + [True]


@pytest.mark.parametrize("name", ["cyclic", "backward", "random", "uniform", "user"])
def test_rules_without_scores_never_ask_for_them(name):
    strategy = STRATEGIES[name]()
    strategy.setup(3)
    for _ in range(10):
        strategy.next()
        assert not strategy.wants_scores()
    assert not strategy.needs_scores


def test_scores_are_wanted_every_refresh_every_visits():
    strategy = GreedyStrategy(refresh_every=3)
    strategy.setup(4)
    wanted = []
    for number in range(1, 14):
        strategy.next()
        if strategy.wants_scores():
            wanted.append(number)
    assert wanted == [4, 7, 10, 13]


def test_greedy_chooses_what_an_exhaustive_search_chooses():
    rng = random.Random(2)
    for penalty in (0.0, 0.5, 1.0, 2.0):
        sizes = [rng.randint(1, 1000) for _ in range(6)]
        strategy = GreedyStrategy(visit_penalty=penalty, coverage=None)
        strategy.setup(6, sizes)
        visits = [0] * 6
        norms = None
        for number in range(80):
            if number < 6:
                expected = number
            else:
                values = [norms[b] / math.sqrt(sizes[b]) / (1 + visits[b]) ** penalty for b in range(6)]
                expected = values.index(max(values))
            assert strategy.next() == expected
            visits[expected] += 1
            norms = [rng.expovariate(1.0) for _ in range(6)]
            strategy.observe(norms)


def test_greedy_without_penalty_starves_and_with_penalty_shares():
    counts = {}
    for penalty in (0.0, 1.0):
        strategy = GreedyStrategy(visit_penalty=penalty, coverage=None)
        strategy.setup(4)
        for _ in range(40):
            strategy.next()
            strategy.observe([4.0, 3.0, 2.0, 1.0])
        counts[penalty] = strategy.visits
    assert counts[0.0] == [37, 1, 1, 1]
    assert counts[1.0] == [16, 12, 8, 4]  # in proportion to the scores


def test_a_block_does_not_win_for_being_large():
    strategy = GreedyStrategy(visit_penalty=0.0, coverage=None)
    strategy.setup(2, [10_000, 1])
    strategy.next()
    strategy.next()
    strategy.observe([10.0, 0.2])  # ‖g‖ / √n: 0.1 and 0.2
    assert strategy.next() == 1


def test_importance_probabilities_follow_the_formula():
    rng = random.Random(3)
    for _ in range(20):
        blocks, decay, temperature, floor = rng.randint(1, 6), rng.random(), rng.uniform(0.2, 3), rng.random()
        sizes = [rng.randint(1, 50) for _ in range(blocks)]
        strategy = ImportanceStrategy(decay=decay, temperature=temperature, floor=floor)
        strategy.setup(blocks, sizes)
        mean = None
        for _ in range(4):
            norms = [rng.expovariate(1.0) for _ in range(blocks)]
            strategy.observe(norms)
            scores = [norm / math.sqrt(size) for norm, size in zip(norms, sizes, strict=True)]
            mean = scores if mean is None else [decay * m + (1 - decay) * s for m, s in zip(mean, scores, strict=True)]
        powers = [m ** (1 / temperature) for m in mean]
        expected = [(1 - floor) * power / sum(powers) + floor / blocks for power in powers]
        assert strategy.probabilities(strategy.scores).tolist() == pytest.approx(expected, rel=1e-9)


def test_importance_draws_with_its_probabilities():
    strategy = ImportanceStrategy(floor=0.2, coverage=None)
    strategy.setup(3)
    visit_pass = [strategy.next() for _ in range(3)]
    strategy.observe([1.0, 2.0, 5.0])
    chosen = [strategy.next() for _ in range(4000)]
    assert visit_pass == [0, 1, 2]
    for block, norm in enumerate([1.0, 2.0, 5.0]):
        assert abs(chosen.count(block) / 4000 - (0.8 * norm / 8 + 0.2 / 3)) < 0.03


@pytest.mark.parametrize(
    ("scores", "temperature", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 1.0, [0.25, 0.25, 0.25, 0.25]),
        ([0.0, 1.0, 0.0, 0.0], 1.0, [0.025, 0.925, 0.025, 0.025]),
        ([1e30, 1e-30, 1e29, 0.0], 1e-4, [0.925, 0.025, 0.025, 0.025]),  # m^{1/T} itself overflows
        ([1e300, 1e-300, 1.0, 5.0], 1e9, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_importance_survives_extreme_scores(scores, temperature, expected):
    strategy = ImportanceStrategy(temperature=temperature, floor=0.1)
    strategy.setup(4)
    assert strategy.probabilities(scores).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_measurement_that_is_not_finite_is_dropped(bad):
    strategy = GreedyStrategy(coverage=None)
    strategy.setup(3)
    for _ in range(3):
        strategy.next()
    strategy.observe([bad, 1.0, 1.0])
    assert strategy.scores is None
    assert strategy.next() == 0  # the cyclic pass goes on
    strategy.observe([1.0, 5.0, 1.0])
    strategy.observe([1.0, bad, 1.0])
    assert strategy.scores == [1.0, 5.0, 1.0]
    assert strategy.next() == 1


def test_a_user_strategy_may_read_scores():
    class Smallest(ScoredStrategy):
        def select_by_score(self, scores):
            return min(range(self.num_blocks), key=scores.__getitem__)

    strategy = Smallest()
    strategy.setup(3)
    chosen = []
    for _ in range(5):
        chosen.append(strategy.next())
        strategy.observe([3.0, 1.0, 2.0])
    assert chosen == [0, 1, 2, 1, 1]


def test_names_resolve_to_strategies_and_objects_to_themselves():
    resolved = {name: resolve_strategy(name, seed=4, coverage=3, refresh_every=2) for name in STRATEGY_NAMES}
    assert {name: type(strategy) for name, strategy in resolved.items()} == {
        "cyclic": CyclicStrategy,
        "backward": CyclicStrategy,
        "random": RandomStrategy,
        "uniform": RandomStrategy,
        "greedy": GreedyStrategy,
        "importance": ImportanceStrategy,
    }
    assert resolved["backward"].reverse
    assert not resolved["cyclic"].reverse
    assert resolved["uniform"].replacement
    assert not resolved["random"].replacement
    assert resolved["random"].seed == 4
    assert resolved["greedy"].refresh_every == resolved["importance"].refresh_every == 2
    assert resolved["greedy"].coverage == 3
    mine = EvensFirst()
    assert resolve_strategy(mine, seed=9) is mine


def test_next_before_setup_is_refused():
    with pytest.raises(RuntimeError, match="before setup"):
        CyclicStrategy().next()


@pytest.mark.parametrize("answer", [3, -1, 100])
def test_an_index_out_of_range_is_refused(answer):
    strategy = Answers(answer)
    strategy.setup(3)
    with pytest.raises(IndexError, match=r"Answers.select\(\).*range\(3\).*got " + str(answer)):
        strategy.next()
    assert strategy.num_visits == 0


@pytest.mark.parametrize("answer", [None, 1.0, "1", True, torch.tensor(1)])
def test_an_answer_that_is_no_integer_is_refused(answer):
    strategy = Answers(answer)
    strategy.setup(3)
    with pytest.raises(TypeError, match=r"select\(\) to return an int"):
        strategy.next()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CyclicStrategy(coverage=0), "coverage"),
        (lambda: GreedyStrategy(refresh_every=0), "refresh_every"),
        (lambda: GreedyStrategy(visit_penalty=-0.1), "visit_penalty"),
        (lambda: ImportanceStrategy(decay=1.0), "decay"),
        (lambda: ImportanceStrategy(decay=-0.1), "decay"),
        (lambda: ImportanceStrategy(temperature=0.0), "temperature"),
        (lambda: ImportanceStrategy(temperature=math.nan), "temperature"),
        (lambda: ImportanceStrategy(floor=1.1), "floor"),
        (lambda: resolve_strategy("gredy"), "greedy.*got 'gredy'"),
        (lambda: CyclicStrategy().setup(0), "num_blocks"),
        (lambda: CyclicStrategy().setup(-2), "num_blocks"),
        (lambda: CyclicStrategy().setup(2, [1]), "block_sizes"),
        (lambda: CyclicStrategy().setup(2, [1, 0]), "block_sizes"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=rf"Expected argument.*{message}"):
        make()


@pytest.mark.parametrize("wrong", [3, CyclicStrategy, None])
def test_what_is_no_strategy_is_refused(wrong):
    with pytest.raises(TypeError, match="Expected argument `strategy`"):
        resolve_strategy(wrong)


def test_the_wrong_number_of_norms_is_refused():
    strategy = GreedyStrategy()
    strategy.setup(3)
    with pytest.raises(ValueError, match=r"`grad_norms`.*3 blocks.*got 2"):
        strategy.observe([1.0, 2.0])


def test_the_state_of_another_strategy_or_another_number_of_blocks_is_refused():
    saved = RandomStrategy()
    saved.setup(4)
    visit(saved, 5)
    for strategy, blocks in ((GreedyStrategy(), 4), (RandomStrategy(), 3)):
        strategy.setup(blocks)
        with pytest.raises(ValueError, match=r"RandomStrategy state for 4|4 blocks"):
            strategy.load_state_dict(saved.state_dict())
        assert strategy.num_visits == 0
    with pytest.raises(ValueError, match="for 0 blocks"):
        RandomStrategy().load_state_dict(saved.state_dict())


def test_backward_is_backward_whatever_the_coverage():
    strategy = resolve_strategy("backward", coverage=1)
    strategy.setup(3)
    assert [strategy.next() for _ in range(6)] == [2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_peek_tells_the_next_block_or_nothing_and_changes_nothing(name):
    rng = random.Random(4)
    plain, peeked = (resolve_strategy(name, seed=3, coverage=2) for _ in range(2))
    known = 0
    for strategy in (plain, peeked):
        strategy.setup(5)
    for _ in range(60):
        norms = [rng.random() for _ in range(5)]
        for strategy in (plain, peeked):
            if strategy.wants_scores():
                strategy.observe(norms)
        expected = peeked.peek()
        assert peeked.peek() == expected
        chosen = peeked.next()
        assert expected in (None, chosen)
        assert chosen == plain.next()
        known += expected is not None
    # Rules that read gradients know the first pass and forced visits, the others everything.
    assert known == 60 if name in ("cyclic", "backward", "random", "uniform") else 5 <= known < 60


def test_a_resumed_strategy_keeps_what_it_peeked_at():
    first, second = (RandomStrategy(replacement=True, seed=1) for _ in range(2))
    for strategy in (first, second):
        strategy.setup(7)
    expected = first.peek()
    second.load_state_dict(first.state_dict())
    assert second.peek() == expected == second.next()
