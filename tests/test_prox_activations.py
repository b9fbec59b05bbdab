"""The scalar sub-problems of the activations against brute force in float64."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_bcd.prox import (
    GELU,
    Abs,
    ClippedReLU,
    HardTanh,
    Identity,
    LeakyReLU,
    ReLU,
    Sigmoid,
    Sign,
    SiLU,
    SmoothActivation,
    Softplus,
    Tanh,
)

PIECEWISE = [Identity(), ReLU(), LeakyReLU(), LeakyReLU(0.3), HardTanh(), HardTanh(-2.0, 0.5), ClippedReLU(), Abs()]
SMOOTH = [Sigmoid(), Tanh(), Softplus(), Softplus(5.0), Softplus(1.0, 3.0), GELU(), GELU("tanh"), SiLU()]
MODULES = [
    (Identity(), nn.Identity()),
    (ReLU(), nn.ReLU()),
    (LeakyReLU(0.2), nn.LeakyReLU(0.2)),
    (HardTanh(-0.5, 2.0), nn.Hardtanh(-0.5, 2.0)),
    (ClippedReLU(), nn.ReLU6()),
    (Sigmoid(), nn.Sigmoid()),
    (Tanh(), nn.Tanh()),
    (Softplus(2.0, 7.0), nn.Softplus(2.0, 7.0)),
    (GELU(), nn.GELU()),
    (GELU("tanh"), nn.GELU("tanh")),
    (SiLU(), nn.SiLU()),
]
each = {"ids": repr}


def loguniform(n, low, high):
    return 10 ** (low + (high - low) * torch.rand(n, dtype=torch.float64))


def signed(x):
    return x * torch.sign(torch.randn_like(x))


def normal(n):
    return torch.randn(n, dtype=torch.float64)


def problems(n=150):
    """(a, c, g) in float64, exact in float32: ordinary, huge, in the tails, with two basins of similar depth, ties."""
    a = [normal(n), signed(loguniform(n, -4, 6)), signed(loguniform(n, -2, 6)), 0.5 * normal(n)]
    c = [2 * normal(n), signed(loguniform(n, -4, 6)), 30 * normal(n), 6 * normal(n)]
    g = [loguniform(n, -2, 2), loguniform(n, -4, 4), loguniform(n, -4, 4), loguniform(n, -4, 0)]
    a.append(signed(loguniform(n, 0, 6)))
    g.append(loguniform(n, -4, 4))
    c.append(-a[-1].sign() * 2 * torch.rand(n).double() * (a[-1].abs() / g[-1]).sqrt())
    special = torch.tensor([0.0, -1e-6, 1.0, -1.0, 0.5, -2.0, 3.0, 6.0, 20.0, -20.0, 1e6, -1e6], dtype=torch.float64)
    grid = torch.cartesian_prod(special, special, torch.tensor([1e-4, 1 / 3, 1e4], dtype=torch.float64))
    # Two wells of SiLU of nearly the same depth, one of them between two grid points.
    grid = torch.cat([grid, torch.tensor([[-0.2711173, -6.5106125, 0.0041798693]], dtype=torch.float64)])
    columns = [torch.cat([*parts, extra]) for parts, extra in zip((a, c, g), grid.unbind(1), strict=True)]
    return [column.float().double() for column in columns]


def rise(sigma, u, v, a, c, g):
    """Objective at u minus objective at v, without cancellation next to large squares."""
    su, sv = sigma(u), sigma(v)
    return (sv - su) * ((a - su) + (a - sv)) + g * (u - v) * ((u - c) + (v - c))


def objective(sigma, u, a, c, g):
    return (a - sigma(u)).square() + g * (u - c).square()


def brute_force(sigma, a, c, g, allowed=lambda u: u == u, points=1601, basins=3, levels=7):
    """The best point of a dense grid, then of finer and finer grids around the best few local minima."""
    a, c, g = a[:, None], c[:, None], g[:, None]
    near = torch.logspace(-8, 1, 40, dtype=torch.float64) * (1 + c.abs())
    span = 10.0 if isinstance(sigma, GELU) else 45 / getattr(sigma, "beta", 1.0)
    ends = [-2.0, -1.0, -1e-6, 0.0, 0.5, 1.0, 6.0]
    if isinstance(sigma, Softplus):  # both sides of its jump
        end = sigma.threshold / sigma.beta
        ends += [end, math.nextafter(end, math.inf)]
    fixed = torch.cat([torch.linspace(-span, span, points, dtype=torch.float64), torch.tensor(ends).double()])
    pieces = [(a * s + g * c) / (s * s + g) for s in (1.0, -1.0, 0.01, 0.3)]
    u = torch.cat([fixed.expand(len(a), -1), c, c + near, c - near, *pieces], dim=1).sort(dim=1).values

    def value(u):
        k = (...,) + (None,) * (u.ndim - 2)
        return rise(sigma, u, c[k].expand_as(u), a[k], c[k], g[k]).masked_fill_(~allowed(u), math.inf)

    f = nn.functional.pad(value(u), (1, 1), value=math.inf)
    local = (f[:, 1:-1] <= f[:, :-2]) & (f[:, 1:-1] <= f[:, 2:])
    index = f[:, 1:-1].masked_fill(~local, math.inf).topk(basins, dim=1, largest=False).indices
    best = [u.gather(1, index)]
    low = u.gather(1, (index - 1).clamp(min=0))
    high = u.gather(1, (index + 1).clamp(max=u.shape[1] - 1))
    for _ in range(levels):
        u = torch.lerp(low[..., None], high[..., None], torch.linspace(0, 1, 25, dtype=torch.float64))
        index = value(u).argmin(dim=2, keepdim=True)
        best.append(u.gather(2, index).squeeze(2))
        low = u.gather(2, (index - 1).clamp(min=0)).squeeze(2)
        high = u.gather(2, (index + 1).clamp(max=24)).squeeze(2)
    found = torch.cat(best, dim=1)
    return found.gather(1, value(found).argmin(dim=1, keepdim=True)).squeeze(1)


def check_global(sigma, a, c, g, allowed=lambda u: u == u):
    best = brute_force(sigma, a, c, g, allowed)
    lowest = objective(sigma, best, a, c, g)
    for dtype, tolerance, rounding in [(torch.float64, 1e-9, 1e-14), (torch.float32, 1e-4, 1e-6)]:
        u = sigma.solve(a.to(dtype), c.to(dtype), g.to(dtype))
        assert u.dtype == dtype
        excess = rise(sigma, u.double(), best, a, c, g)
        allowance = tolerance * (lowest + rounding * (a.square() + g * c.square() + 1))
        # torch's σ has an absolute error (GELU computes 1 + erf), which 2 (a − σ) multiplies.
        allowance += 4 * torch.finfo(dtype).eps * lowest.sqrt() * (1 + best.abs())
        worst = (excess - allowance).argmax()
        where = f"a={a[worst]:.8g} c={c[worst]:.8g} g={g[worst]:.8g}: {u[worst]:.8g}, better {best[worst]:.8g}"
        assert (excess <= allowance).all(), f"{dtype} {where}"
        assert allowed(u.double() * (1 + 1e-7)).all()


@pytest.mark.parametrize("sigma", PIECEWISE + SMOOTH, **each)
def test_solve_finds_the_global_minimum(sigma):
    check_global(sigma, *problems())


def test_sign_finds_the_global_minimum_outside_of_the_margin():
    def allowed(u):
        return (u >= 0) | (u <= -1e-6)

    check_global(Sign(), *problems(), allowed)


@pytest.mark.parametrize("sigma", [sigma for sigma in SMOOTH if sigma != Softplus(1.0, 3.0)], **each)
@pytest.mark.parametrize("kind", ["merging", "tangent"])
def test_solve_finds_the_global_minimum_where_minimisers_are_born(sigma, kind):
    """c and g such that the slope of the objective and its derivative nearly vanish at the same point."""
    n, scale = 500, 0.4 if isinstance(sigma, GELU) else 1 / getattr(sigma, "beta", 1.0)
    a = signed(loguniform(n, -2, 6))
    a[::2] = -0.3 * torch.rand(n // 2).double()  # between the turning value and 0 GELU and SiLU have two wells
    if kind == "merging":  # both vanish, and the next derivative too
        points = torch.linspace(-12, 12, 801, dtype=torch.float64) * scale
        value, slope, curvature = sigma._jet(points)
        u = points[(curvature * (a[:, None] - value) - slope**2).argmax(dim=1)]
        off_g, off_c = loguniform(n, -4, 0), 1e-3 * normal(n)
    else:
        u, off_g, off_c = 8 * scale * normal(n), 1e-3 * normal(n), 1e-4 * normal(n)
    value, slope, curvature = sigma._jet(u)
    g = ((curvature * (a - value) - slope**2) * (1 - off_g)).clamp(1e-4, 1e4)
    c = u - slope * (a - value) / g * (1 + off_c)
    check_global(sigma, *(x.float().double() for x in (a, c, g)))


@pytest.mark.parametrize("sigma", [*PIECEWISE, *SMOOTH, Sign()], **each)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_is_never_worse_than_c_and_old(sigma, dtype):
    a, c, g = (x.to(dtype) for x in problems())
    margin = 1e-6 if sigma == Sign() else 0.0  # c itself may lie inside the margin
    for old in (c + 0.1, sigma.solve(a, c, g), signed(a), torch.zeros_like(a)):
        u = sigma.solve(a, c, g, old)
        wide = [x.double() for x in (a, c, g)]
        scale = torch.finfo(dtype).eps * (wide[0] ** 2 + wide[2] * (wide[1] ** 2 + old.double() ** 2) + 1)
        assert (rise(sigma, u.double(), old.double(), *wide) <= 4 * scale).all()
        free = (c >= 0) | (c <= -margin)
        assert (rise(sigma, u.double(), wide[1], *wide) <= 4 * scale)[free].all()


@pytest.mark.parametrize("sigma", [Sign(), *SMOOTH], **each)
def test_old_is_kept_when_nothing_is_better(sigma):
    a, c, g = problems()
    u = sigma.solve(a, c, g)
    assert torch.equal(sigma.solve(a, c, g, u), u)


def test_sign_keeps_old_inside_the_margin_and_in_a_tie():
    a, c = torch.zeros(3), torch.zeros(3)
    old = torch.tensor([-1e-9, 0.0, 3.0])
    a[0], c[0] = -1.0, -1e-9
    assert torch.equal(Sign().solve(a, c, 1.0, old), torch.tensor([-1e-9, 0.0, 0.0]))


@pytest.mark.parametrize("g", [1e-4, 0.3, 1.0, 7.0, 1e4])
def test_relu_agrees_with_the_comparison_of_its_candidates(g):
    a, c, _ = problems()
    plus, minus = ((a + g * c) / (1 + g)).clamp(min=0), c.clamp(max=0)
    difference = rise(ReLU(), plus, minus, a, c, g)
    clear = difference.abs() > 1e-12 * (a.square() + g * c.square())
    expected = torch.where(difference <= 0, plus, minus)
    u = ReLU().solve(a, c, g)
    torch.testing.assert_close(u[clear], expected[clear], rtol=1e-10, atol=1e-10)
    assert torch.equal(u, ReLU().solve(a, c, torch.tensor(g, dtype=torch.float64)))


def test_ties_go_to_the_positive_piece():
    # g = 1/3: kappa = -1, and a = 1, c = -1 have the value 1 at u = 0.5 and at u = -1.
    one, g = torch.ones(1, dtype=torch.float64), 1 / 3
    for sigma in (ReLU(), LeakyReLU(0.0)):
        torch.testing.assert_close(sigma.solve(one, -one + 1e-15, g), 0.5 * one)
    assert Abs().solve(one, 0 * one, 1.0) == 0.5
    assert Sign().solve(0 * one, 0 * one, 1.0) == 0


@pytest.mark.parametrize(("sigma", "module"), MODULES, ids=[repr(sigma) for sigma, _ in MODULES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_derivatives_are_those_of_the_torch_module(sigma, module, dtype):
    u = torch.cat([torch.linspace(-45, 45, 1801), torch.tensor([-0.5, 0.0, 2.0, 3.5, 6.0, -1e6, 1e6])]).to(dtype)
    assert torch.equal(sigma(u), module(u))
    u.requires_grad_()
    (gradient,) = torch.autograd.grad(module(u).sum(), u)
    torch.testing.assert_close(sigma.derivative(u.detach()), gradient, rtol=1e-5, atol=torch.finfo(dtype).eps * 64)


def test_sign_abs_and_their_derivatives():
    u = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 2.0])
    assert Sign()(u).tolist() == [-1, -1, 1, 1, 1]
    assert not Sign.differentiable
    assert Sign().derivative(u).tolist() == [0] * 5
    assert Abs()(u).tolist() == u.abs().tolist()
    assert Abs().derivative(u).tolist() == [-1, -1, 0, 0, 1]


@pytest.mark.parametrize("sigma", [*PIECEWISE, *SMOOTH, Sign()], **each)
def test_monotone_says_the_truth(sigma):
    values = sigma(torch.linspace(-30, 15, 4501, dtype=torch.float64))
    jump = math.log1p(math.exp(-sigma.threshold)) / sigma.beta if isinstance(sigma, Softplus) else 0.0
    assert bool((values.diff() >= -jump - 1e-15).all()) == sigma.monotone


@pytest.mark.parametrize("sigma", SMOOTH, **each)
def test_second_derivatives_are_right(sigma):
    u = torch.linspace(-8, 2.9, 301, dtype=torch.float64, requires_grad=True)
    value, slope, curvature = sigma._jet(u)
    torch.testing.assert_close(value, sigma(u))
    (expected,) = torch.autograd.grad(sigma(u).sum(), u, create_graph=True)
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(curvature, torch.autograd.grad(expected.sum(), u)[0])


@pytest.mark.parametrize("sigma", SMOOTH, **each)
def test_grids_fit_the_bit_mask_and_hold_the_turning_points(sigma):
    grid = sigma._grid()
    assert len(grid) <= 52
    assert all(low < high for low, high in pairwise(grid))
    turns = torch.tensor([grid[k] for k in sigma.turns], dtype=torch.float64)
    assert sigma.monotone == (len(turns) == 0)
    assert (sigma.derivative(turns).abs() < 1e-3).all()


@pytest.mark.parametrize("sigma", [ReLU(), HardTanh(), Sign(), Tanh(), SiLU()], **each)
def test_chunks_shapes_strides_and_broadcasting_make_no_difference(sigma):
    size = 2**15 * torch.get_num_threads() // 100 + 7
    a, c, old = torch.randn(3, 101, size)
    assert a.numel() > 2**15 * torch.get_num_threads()
    g = torch.rand(size) + 0.5
    whole = sigma.solve(a, c, g, old)
    # Vectorised and scalar code of one function differ in the last bit.
    torch.testing.assert_close(whole[3:5], sigma.solve(a[3:5], c[3:5], g, old[3:5]))
    columns = [x.T for x in (a, c, g.expand_as(a), old)]
    torch.testing.assert_close(whole.T, sigma.solve(*columns))
    assert sigma.solve(a[:0], c[:0], 1.0).shape == (0, size)
    torch.testing.assert_close(sigma.solve(a, c, 0.5, old), sigma.solve(a, c, torch.tensor(0.5), old))


def test_solve_leaves_its_arguments_alone():
    for sigma in [*PIECEWISE, *SMOOTH, Sign()]:
        arguments = problems(5)
        copies = [x.clone() for x in arguments]
        sigma.solve(*arguments, arguments[1])
        sigma.derivative(arguments[1])
        assert all(torch.equal(x, y) for x, y in zip(arguments, copies, strict=True))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LeakyReLU(-0.1), "negative_slope"),
        (lambda: LeakyReLU(math.nan), "negative_slope"),
        (lambda: HardTanh(1.0, 1.0), "max_val"),
        (lambda: HardTanh(-math.inf, 1.0), "min_val"),
        (lambda: HardTanh(0.0, math.inf), "max_val"),
        (lambda: ClippedReLU(0.0), "max_val"),
        (lambda: Softplus(beta=0.0), "beta"),
        (lambda: Softplus(threshold=-1.0), "threshold"),
        (lambda: GELU("erf"), "approximate"),
    ],
)
def test_bad_hyperparameters_are_refused(make, name):
    with pytest.raises(ValueError, match=f"Expected argument `{name}`"):
        make()


def test_activations_are_values():
    assert ReLU() == ReLU() != Abs()
    assert Softplus(2.0) == Softplus(2.0) != Softplus(3.0)
    assert len({Tanh(), Tanh(), GELU(), GELU("tanh")}) == 3
    assert repr(HardTanh()) == "HardTanh(min_val=-1.0, max_val=1.0)"
    assert not issubclass(ReLU, SmoothActivation)
