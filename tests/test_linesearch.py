"""Step lengths against loops over trial points."""

import math

import pytest
import torch

from lightning_bcd.linesearch import step_length

F64 = torch.float64


def loop(curvature, start, doublings=None):
    """1/θ of the loop θ₀, 2θ₀, 4θ₀ … until θ ≥ κ."""
    theta, count = start, 0
    while theta < curvature:
        theta, count = 2 * theta, count + 1
        if doublings is not None and count > doublings:
            return 0.0
    return 1 / theta if curvature > 0 else 0.0


def curvatures(start, seed):
    """Random ones over 24 orders of magnitude, powers of two times the start, and their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    random = 10 ** (24 * torch.rand(3000, generator=generator, dtype=F64) - 12)
    powers = torch.tensor([start * 2.0**k for k in range(-40, 60)], dtype=F64)
    near = [torch.nextafter(powers, torch.tensor(bound, dtype=F64)) for bound in (0.0, math.inf)]
    return torch.cat([random, powers, *near])


@pytest.mark.parametrize("doublings", [None, 0, 1, 10])
@pytest.mark.parametrize("start", [1.0, 20.0, 0.1, 1e-6, 3.7e5])
def test_backtracking_equals_the_loop_over_trials_to_the_last_bit(start, doublings):
    kappa = curvatures(start, seed=int(start))
    found = step_length(kappa, "backtracking", start=start, doublings=doublings)
    wanted = torch.tensor([loop(k, start, doublings) for k in kappa.tolist()], dtype=F64)
    assert torch.equal(found, wanted)
    assert (found == 0).any() == (doublings is not None)


def test_a_power_of_two_times_the_start_is_taken_itself():
    for start in (1.0, 20.0, 0.3):
        for k in range(60):
            exact = torch.tensor(start * 2.0**k, dtype=F64)
            above = torch.nextafter(exact, torch.tensor(math.inf, dtype=F64))
            assert float(step_length(exact, "backtracking", start=start)) == 1 / (start * 2.0**k)
            assert float(step_length(above, "backtracking", start=start)) == 1 / (start * 2.0 ** (k + 1))


def test_backtracking_never_takes_a_curvature_below_the_start():
    kappa = torch.tensor([1e-300, 1e-12, 0.5, 1.0], dtype=F64)
    assert torch.equal(step_length(kappa, "backtracking", start=1.0), torch.ones(4, dtype=F64))


@pytest.mark.parametrize("doublings", [0, 3, 10])
def test_where_more_doublings_were_needed_the_step_is_left_out(doublings):
    last = torch.tensor(20.0 * 2**doublings, dtype=F64)
    assert float(step_length(last, "backtracking", start=20.0, doublings=doublings)) == 1 / float(last)
    assert float(step_length(last * (1 + 1e-12), "backtracking", start=20.0, doublings=doublings)) == 0


@pytest.mark.parametrize("rule", ["exact", "backtracking", "lipschitz"])
def test_without_curvature_there_is_no_step(rule):
    zero = torch.zeros((), dtype=F64)
    for bound in (zero, zero + 3):
        length = step_length(zero, rule, start=2.0, doublings=10, bound=bound)
        assert float(length) == 0
        assert length.dtype == F64


def test_exact_is_the_inverse_of_the_curvature():
    kappa = curvatures(1.0, seed=5)
    assert torch.equal(step_length(kappa, "exact"), 1 / kappa)


def test_lipschitz_is_the_inverse_of_the_bound_unless_the_curvature_exceeds_it():
    kappa = torch.tensor([0.1, 2.0, 5.0], dtype=F64)
    length = step_length(kappa, "lipschitz", bound=torch.tensor(2.5, dtype=F64))
    assert torch.equal(length, 1 / torch.tensor([2.5, 2.5, 5.0], dtype=F64))


def test_on_a_quadratic_the_loop_that_evaluates_it_finds_the_same_step():
    """f(x − g/θ) ≤ f(x) − ‖g‖²/(2θ) exactly when θ ≥ κ; with θ = κ the step ends at the minimum along g."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(300):
        size = 1 + trial % 7
        factor = torch.randn(size, size, generator=generator, dtype=F64) * 10 ** (trial % 5 - 2)
        hessian, point = factor @ factor.T, torch.randn(size, generator=generator, dtype=F64)

        def f(x, hessian=hessian):
            return x @ hessian @ x / 2

        g = hessian @ point
        kappa = (g @ hessian @ g) / (g @ g)
        theta = 1e-3
        while f(point - g / theta) > f(point) - (g @ g) / (2 * theta):
            theta *= 2
        assert float(step_length(kappa, "backtracking", start=1e-3)) == 1 / theta
        length = step_length(kappa, "exact")
        reached = f(point - length * g)
        assert all(reached <= f(point - length * by * g) for by in (0.0, 0.9, 0.99, 1.01, 1.1, 2.0))
