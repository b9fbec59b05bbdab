import pytest
import torch

from lightning_bcd.gram import GRAM_BLOCK, gram
from lightning_bcd.linalg import LeastSquares, RowSolver, factor, power_iteration
from lightning_bcd.prox import L1, Box, ElasticNet, GroupLasso, NonNegative, Ridge

F64 = torch.float64
CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_a_gram_matrix_by_half_of_its_products_is_the_product():
    for d in (1, 7, GRAM_BLOCK + 200, 3 * GRAM_BLOCK - 5):
        v = random(9, d)
        torch.testing.assert_close(gram(v), v.T @ v)
        # By blocks, for what NumPy does not multiply: here small integers, exact in half precision.
        v = v.round().bfloat16()
        torch.testing.assert_close(gram(v).double(), v.double().T @ v.double())


def fed(v, u, chunk=5, **options):
    problem = LeastSquares(v.shape[1], u.shape[1], CPU, **options)
    for rows, targets in zip(v.split(chunk), u.split(chunk), strict=True):
        problem.add(rows, targets)
    return problem


def value(v, u, w, b, w_old, b_old, rho, alpha, penalty):
    residual = u - v @ w.T - (0 if b is None else b)
    total = rho / 2 * residual.square().sum() + alpha / 2 * (w - w_old).square().sum() + penalty.value(w)
    return total if b is None else total + alpha / 2 * (b - b_old).square().sum()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("bias", [None, "exact", "joint"])
@pytest.mark.parametrize(("n", "d"), [(30, 6), (6, 30)])
@pytest.mark.parametrize("penalty", [Ridge(0.0), Ridge(0.8)])
def test_least_squares_solutions_are_stationary_on_both_sides(n, d, bias, known, penalty):
    v, u, w_old, b_old = random(n, d), random(n, 4, seed=1), random(4, d, seed=2), random(4, seed=3)
    rho, alpha = 1.7, 0.6
    problem = fed(v, u, rows=n, gram=v.T @ v if known and n > d else None)
    assert (problem.rows is not None) == (n < d)
    w, b = problem.solve(
        w_old, None if bias is None else b_old, rho=rho, alpha=alpha, penalty=penalty, bias_update=bias or "exact"
    )
    w = w.requires_grad_()
    if bias is None:
        assert b is None
        gradient = torch.autograd.grad(value(v, u, w, None, w_old, None, rho, alpha, penalty), w)
    else:
        # Stationary in b at the new W; in W at the old b ("exact"), or at the new one ("joint").
        b = b.requires_grad_()
        in_b = torch.autograd.grad(value(v, u, w, b, w_old, b_old, rho, alpha, penalty), b)[0]
        at = b_old if bias == "exact" else b
        in_w = torch.autograd.grad(value(v, u, w, at, w_old, b_old, rho, alpha, penalty), w)[0]
        gradient = (in_w, in_b)
    for part in gradient:
        torch.testing.assert_close(part, torch.zeros_like(part), atol=1e-9, rtol=0)


def test_the_reference_bias_uses_the_old_weights():
    v, u, w_old, b_old = random(9, 3), random(9, 2, seed=1), random(2, 3, seed=2), random(2, seed=3)
    _, b = fed(v, u).solve(w_old, b_old, rho=2.0, alpha=0.5, bias_update="reference")
    torch.testing.assert_close(b, (0.5 * b_old + 2 * (u - v @ w_old.T).sum(0)) / (2 * 9 + 0.5))


PENALTIES = [L1(2.0), ElasticNet(1.0, 0.5), NonNegative(), Box(-0.1, 0.2), GroupLasso(3.0)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("bias", [None, "exact", "joint"])
def test_penalised_solutions_are_fixed_points_of_the_proximal_gradient(penalty, bias):
    v, u, w_old, b_old = random(40, 5), random(40, 3, seed=1), random(3, 5, seed=2), random(3, seed=3)
    rho, alpha = 1.1, 0.4
    b0 = None if bias is None else b_old
    w, b = fed(v, u).solve(
        w_old, b0, rho=rho, alpha=alpha, penalty=penalty, bias_update=bias or "exact", iterations=500
    )
    leaf = w.clone().requires_grad_()
    at = {None: None, "exact": b_old, "joint": b}[bias]
    smooth = value(v, u, leaf, at, w_old, b_old, rho, alpha, Ridge(0.0))
    gradient = torch.autograd.grad(smooth, leaf)[0]
    torch.testing.assert_close(penalty.prox(w - 0.01 * gradient, 0.01), w, atol=1e-7, rtol=0)


@pytest.mark.parametrize("lipschitz", [False, True])
@pytest.mark.parametrize("penalty", [None, Ridge(1.0), L1(1.0), NonNegative()])
def test_a_gradient_step_descends_and_finds_the_solution_in_the_end(penalty, lipschitz):
    v, u = random(40, 5), random(40, 3, seed=1)
    w = random(3, 5, seed=2).abs()
    problem = fed(v, u)
    r = penalty or Ridge(0.0)
    before = value(v, u, w, None, w, None, 1.0, 0.0, r)
    for _ in range(300):
        new, _ = problem.step(w, None, rho=1.0, alpha=0.1, penalty=penalty, lipschitz=lipschitz)
        after = value(v, u, new, None, w, None, 1.0, 0.1, r)
        assert after <= before + 1e-10
        w, before = new, value(v, u, new, None, new, None, 1.0, 0.0, r)
    best, _ = fed(v, u).solve(w, None, rho=1.0, alpha=0.0, penalty=penalty, iterations=1000)
    torch.testing.assert_close(w, best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [None, 4])
def test_the_residual_needs_no_rows(rows, bias):
    v, u, w, b = random(4, 6), random(4, 3, seed=1), random(3, 6, seed=2), random(3, seed=3) if bias else None
    expected = (u - v @ w.T - (0 if b is None else b)).square().sum()
    torch.testing.assert_close(fed(v, u, chunk=3, rows=rows).residual_square(w, b), expected)


def test_a_float32_least_squares_leaves_almost_no_residual_where_none_is_needed():
    v = random(4000, 300).relu().float()
    u = v @ random(300, 300, seed=1).T.float() / 17
    w, _ = fed(v, u, chunk=512).solve(torch.zeros(300, 300), None, rho=1.0, alpha=1e-6)
    assert float((u - v @ w.float().T).norm() / u.norm()) < 1e-4


@pytest.mark.parametrize(("m", "d"), [(3, 8), (8, 8), (9, 4), (1, 1)])
def test_rows_are_solved_exactly_and_report_their_residual(m, d):
    w, s, t = random(m, d), random(20, d, seed=1), random(20, m, seed=2)
    gamma, rho = 0.7, 1.9
    v, square = RowSolver(w, gamma, rho)(s, t)
    expected = torch.linalg.solve(gamma * torch.eye(d, dtype=F64) + rho * w.T @ w, (gamma * s + rho * t @ w).T).T
    torch.testing.assert_close(v, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(square, (t - v @ w.T).square().sum(), rtol=1e-9, atol=1e-10)


def test_power_iteration_finds_the_largest_eigenvalue_and_warm_starts():
    a = random(30, 30)
    a = a @ a.T
    largest = torch.linalg.eigvalsh(a)[-1]
    value, vector = power_iteration(lambda x: a @ x, random(30, seed=1), iterations=200)
    torch.testing.assert_close(value, largest, rtol=1e-6, atol=0)
    again, _ = power_iteration(lambda x: a @ x, vector, iterations=1)
    torch.testing.assert_close(again, largest, rtol=1e-6, atol=0)
    assert float(power_iteration(lambda x: 0 * x, vector)[0]) == 0


def test_a_singular_matrix_is_factored_with_jitter_and_a_hopeless_one_refused():
    v = random(3, 6)
    singular = v.T @ v
    lower = factor(singular)
    torch.testing.assert_close(lower @ lower.T, singular, atol=1e-6, rtol=0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"my matrix to have full rank.*`alpha` > 0"):
        factor(-torch.eye(3, dtype=F64), "my matrix")
    with pytest.raises(torch.linalg.LinAlgError, match="my matrix to be finite"):
        factor(torch.full((3, 3), torch.nan, dtype=F64), "my matrix")


def test_empty_problems_are_refused():
    for d, m, rows in ((0, 2, 4), (2, 0, 4), (2, 2, 0)):
        with pytest.raises(ValueError, match="at least one row, feature and output"):
            LeastSquares(d, m, CPU, rows=rows)
