"""Penalties and constraints: values, and proximal operators against brute force."""

import math

import pytest
import torch

from lightning_bcd.prox import (
    L1,
    Ball,
    Box,
    ElasticNet,
    GroupLasso,
    NonNegative,
    NoPenalty,
    Penalty,
    Ridge,
    RowSparse,
    UniformGrid,
)

# With each separable penalty its value at a single number, written down a second time.
SEPARABLE = [
    (NoPenalty(), lambda w: 0 * w),
    (L1(0.7), lambda w: 0.7 * w.abs()),
    (L1(0.0), lambda w: 0 * w),
    (Ridge(0.3), lambda w: 0.15 * w**2),
    (ElasticNet(0.7, 0.3), lambda w: 0.7 * w.abs() + 0.15 * w**2),
    (NonNegative(), lambda w: torch.where(w >= 0, 0.0, math.inf)),
    (Box(-0.5, 2.0), lambda w: torch.where((w >= -0.5) & (w <= 2.0), 0.0, math.inf)),
    (Box(1.0, math.inf), lambda w: torch.where(w >= 1.0, 0.0, math.inf)),
]
MATRIX = [Ball(1.5), GroupLasso(0.8), GroupLasso(0.8, dim=0), GroupLasso(0.0), RowSparse(2), UniformGrid(-1.0, 2.0, 7)]
ALL = [penalty for penalty, _ in SEPARABLE] + MATRIX
CONSTRAINTS = [NonNegative(), Ball(1.5), Box(-0.5, 2.0), Box(0.1, 0.7), RowSparse(2), UniformGrid(-1.0, 2.0, 1000)]
each = {"ids": repr}


def objective(penalty, w, v, t):
    return float(penalty.value(w) + (w - v).double().square().sum() / (2 * t))


@pytest.mark.parametrize(("penalty", "formula"), SEPARABLE, ids=[repr(p) for p, _ in SEPARABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1e-3, 0.5, 1.0, 40.0])
def test_separable_prox_is_the_best_of_a_dense_grid(penalty, formula, dtype, t):
    kinks = torch.tensor([0.0, 0.7 * t, -0.7 * t, -0.5, 2.0, 1.0, 1e6, -1e6])
    v = torch.cat([kinks, 3 * torch.randn(400), 1e-3 * torch.randn(40)]).to(dtype)
    w = penalty.prox(v, t)
    assert w.dtype == dtype
    v, w = v.double(), w.double()
    grid = torch.linspace(-1.5, 1.5, 2001).double() * v.abs().clamp(min=1e-3)[:, None] + torch.zeros(len(v), 1)
    grid = torch.cat([grid, v[:, None], torch.tensor([0.0, -0.5, 1.0, 2.0]).double().expand(len(v), -1)], dim=1)
    lowest = (formula(grid) + (grid - v[:, None]) ** 2 / (2 * t)).min(dim=1).values
    ours = formula(w) + (w - v) ** 2 / (2 * t)
    rounding = torch.finfo(dtype).eps * (1 + v**2 / t)
    assert (ours <= lowest + 8 * rounding).all()


@pytest.mark.parametrize(("penalty", "formula"), SEPARABLE, ids=[repr(p) for p, _ in SEPARABLE])
def test_separable_values_are_sums_in_float64(penalty, formula):
    w = penalty.prox(torch.randn(7, 5), 1.0)
    value = penalty.value(w)
    assert value.dtype == torch.float64
    assert value.shape == ()
    torch.testing.assert_close(value, formula(w.double()).double().sum(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("penalty", ALL, **each)
@pytest.mark.parametrize("t", [1e-2, 1.0, 10.0])
def test_prox_beats_perturbations_and_other_points(penalty, t):
    v = torch.randn(6, 4, dtype=torch.float64)
    v[4] = 0
    w = penalty.prox(v, t)
    lowest = objective(penalty, w, v, t)
    assert lowest < math.inf
    others = [v, torch.zeros_like(v), torch.ones_like(v), penalty.prox(-v, t), penalty.prox(2 * v, t)]
    others += [w + size * torch.randn_like(v) for size in (1e-4, 1e-2, 1.0) for _ in range(20)]
    others += [penalty.prox(w + size * torch.randn_like(v), t) for size in (1e-4, 1e-2, 1.0) for _ in range(20)]
    others += [w * (torch.rand(6, 1) < 0.7) for _ in range(20)]
    for other in others:
        assert lowest <= objective(penalty, other, v, t) + 1e-12


@pytest.mark.parametrize("penalty", ALL, **each)
def test_prox_keeps_its_argument_and_takes_a_tensor_as_step(penalty):
    v = torch.randn(6, 4)
    copy = v.clone()
    w = penalty.prox(v, 0.3)
    assert torch.equal(v, copy)
    torch.testing.assert_close(penalty.prox(v, torch.tensor(0.3)), w)
    assert w.shape == v.shape


def test_one_step_per_entry_or_per_group():
    v, t = torch.randn(6, 4).double(), torch.rand(6, 1).double()
    for penalty in (L1(0.7), Ridge(0.3), ElasticNet(0.7, 0.3), GroupLasso(0.8)):
        rows = [penalty.prox(row, float(step)) for row, step in zip(v.split(1), t, strict=True)]
        torch.testing.assert_close(penalty.prox(v, t), torch.cat(rows))


@pytest.mark.parametrize("penalty", [p for p in ALL if p.convex], **each)
def test_convex_proxes_are_firmly_nonexpansive(penalty):
    for _ in range(20):
        x, y = torch.randn(2, 6, 4, dtype=torch.float64)
        p, q = penalty.prox(x, 0.6), penalty.prox(y, 0.6)
        assert (p - q).square().sum() <= ((p - q) * (x - y)).sum() + 1e-12


@pytest.mark.parametrize("penalty", CONSTRAINTS, **each)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projections_are_feasible_and_do_not_move_again(penalty, dtype):
    v = 3 * torch.randn(8, 5).to(dtype)
    w = penalty.prox(v, 1.0)
    assert penalty.value(v) == math.inf
    assert penalty.value(w) == 0
    assert penalty.value(w).dtype == torch.float64
    assert torch.equal(penalty.prox(w, 5.0), w)
    assert torch.equal(penalty.prox(v, 1e-3), w)


def test_constraints_forgive_rounding_only():
    w = torch.tensor([[0.0, 0.5]])
    for penalty, violated in [(NonNegative(), -1.0), (Box(0.0, 0.5), 1.0), (UniformGrid(0.0, 1.0, 3), 1.0)]:
        assert penalty.value(w + violated * 1e-8) == 0
        assert penalty.value(w + violated * 1e-4) == math.inf


def test_group_lasso_follows_its_closed_form():
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[2.4, 3.2], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(GroupLasso(2.0).prox(v, 0.5), expected)
    torch.testing.assert_close(GroupLasso(2.0, dim=0).prox(v.T, 0.5), expected.T)
    torch.testing.assert_close(GroupLasso(2.0).value(v), torch.tensor(11.0, dtype=torch.float64))
    torch.testing.assert_close(GroupLasso(2.0, dim=0).value(v.T), torch.tensor(11.0, dtype=torch.float64))
    assert torch.equal(GroupLasso(0.0).prox(v, 0.5), v)


def test_groups_of_a_convolution_are_its_channels():
    w = torch.randn(4, 3, 2, 2).double()
    for dim, flat in [(1, w.flatten(1)), (0, w.transpose(0, 1).flatten(1))]:
        torch.testing.assert_close(GroupLasso(0.5, dim).value(w), 0.5 * flat.norm(dim=1).sum())
        moved = GroupLasso(0.5, dim).prox(w, 1.0)
        moved = moved.flatten(1) if dim == 1 else moved.transpose(0, 1).flatten(1)
        torch.testing.assert_close(moved, GroupLasso(0.5).prox(flat, 1.0))
    assert (RowSparse(3).prox(w, 1.0).flatten(1).norm(dim=1) > 0).sum() == 3


def test_row_sparse_keeps_exactly_the_largest_rows():
    v = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [1.0, 0.0]])
    assert RowSparse(2).prox(v, 1.0).tolist() == [[0, 0], [0, 3], [2, 2], [0, 0]]
    assert (RowSparse(3).prox(v, 1.0).norm(dim=1) > 0).sum() == 3  # a tie
    assert torch.equal(RowSparse(9).prox(v, 1.0), v)
    assert RowSparse(4).value(v) == 0
    assert RowSparse(3).value(v) == math.inf


@pytest.mark.parametrize(
    "grid", [UniformGrid(-1.0, 20.0, 22), UniformGrid(-1.0, 2.0, 1000), UniformGrid(0.1, 0.3, 2)], **each
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_prox_is_the_nearest_of_all_levels(grid, dtype):
    levels = torch.linspace(grid.low, grid.high, grid.levels, dtype=torch.float64)
    spread = grid.high - grid.low
    middles = (levels[1:] + levels[:-1]) / 2
    v = torch.cat([levels, middles, grid.low + spread * (2 * torch.rand(2000).double() - 0.5)]).to(dtype)
    w = grid.prox(v, 1.0)
    nearest = (v.double()[:, None] - levels).abs().min(dim=1).values
    slack = 16 * torch.finfo(dtype).eps * max(abs(grid.low), abs(grid.high))
    assert ((w - v).double().abs() <= nearest + slack).all()
    assert grid.value(w) == 0
    assert len(w.unique()) == grid.levels


@pytest.mark.parametrize("penalty", [GroupLasso(1.0), RowSparse(1)], **each)
def test_group_penalties_refuse_vectors(penalty):
    for call in (penalty.value, lambda w: penalty.prox(w, 1.0)):
        with pytest.raises(ValueError, match="rows and columns"):
            call(torch.randn(4))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: L1(-1.0), "weight"),
        (lambda: L1(math.nan), "weight"),
        (lambda: Ridge(math.inf), "weight"),
        (lambda: ElasticNet(-0.1, 1.0), "l1"),
        (lambda: ElasticNet(0.1, -1.0), "l2"),
        (lambda: Box(1.0, 1.0), "low"),
        (lambda: Box(math.nan, 1.0), "low"),
        (lambda: Ball(0.0), "radius"),
        (lambda: Ball(math.inf), "radius"),
        (lambda: GroupLasso(-1.0), "weight"),
        (lambda: GroupLasso(1.0, dim=2), "dim"),
        (lambda: RowSparse(0), "rows"),
        (lambda: RowSparse(1.5), "rows"),
        (lambda: UniformGrid(1.0, 0.0, 4), "low"),
        (lambda: UniformGrid(0.0, 1.0, 1), "levels"),
        (lambda: UniformGrid(0.0, math.inf, 4), "low"),
    ],
)
def test_bad_hyperparameters_are_refused(make, name):
    with pytest.raises(ValueError, match=f"Expected arguments? `{name}`"):
        make()


def test_penalties_are_values():
    assert L1(0.5) == L1(weight=0.5) != Ridge(0.5)
    assert {p.convex for p in (RowSparse(1), UniformGrid(0.0, 1.0, 2))} == {False}
    with pytest.raises(TypeError):
        Penalty()
