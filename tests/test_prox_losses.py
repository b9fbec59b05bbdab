"""Losses and their proximal operators against brute force, bisection and scipy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from torch.nn import functional as F

from lightning_bcd.prox import CrossEntropyLoss, HingeLoss, LogisticLoss, Loss, SquaredLoss, resolve_loss

LOSSES = [SquaredLoss(), CrossEntropyLoss(), LogisticLoss(), HingeLoss()]
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
each = {"ids": repr}


def targets(loss, n, k, dtype=torch.float64):
    return loss.encode(torch.randint(k, (n,)), k, dtype)


def distributions(kind, n, k):
    if kind == "one_hot":
        return F.one_hot(torch.randint(k, (n,)), k).double()
    return (
        torch.softmax(3 * torch.randn(n, k).double(), dim=1) if kind == "soft" else torch.full((n, k), 1 / k).double()
    )


@pytest.mark.parametrize("loss", LOSSES, **each)
def test_values_are_the_formulas_summed_in_float64(loss):
    v = 3 * torch.randn(40, 5)
    y = targets(loss, 40, 5, torch.float32)
    expected = {
        "SquaredLoss": lambda v, y: 0.5 * ((v - y) ** 2).sum(),
        "CrossEntropyLoss": lambda v, y: F.cross_entropy(v, y, reduction="sum"),
        "LogisticLoss": lambda v, y: torch.log1p(torch.exp(-y * v)).sum(),
        "HingeLoss": lambda v, y: torch.relu(1 - y * v).sum(),
    }[type(loss).__name__](v.double(), y.double())
    value = loss.value(v, y)
    assert value.dtype == torch.float64
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.value(v.double(), y.double()), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("loss", LOSSES, **each)
def test_values_of_huge_predictions_are_finite(loss):
    v = torch.tensor([[1e6, -1e6, 0.0], [-1e6, 1e6, 0.0]])
    y = loss.encode(torch.tensor([0, 2]), 3, torch.float32)
    assert torch.isfinite(loss.value(v, y))
    assert torch.isfinite(loss.prox(v, 0.7, y)).all()


@pytest.mark.parametrize("loss", LOSSES, **each)
@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0, 20.0, 1e4])
def test_prox_beats_every_perturbation(loss, t):
    v, y = 4 * torch.randn(30, 4).double(), targets(loss, 30, 4)
    u = loss.prox(v, t, y)

    def objective(u):
        return torch.stack([loss.value(row, label) for row, label in zip(u.split(1), y.split(1), strict=True)]) + (
            u - v
        ).square().sum(dim=1) / (2 * t)

    best = objective(u)
    for size in (1e-5, 1e-3, 0.1, 1.0, 30.0):
        for _ in range(4):
            assert (best <= objective(u + size * torch.randn_like(u)) * (1 + 1e-14) + 1e-14).all()
    assert (best <= objective(v) * (1 + 1e-14)).all()


@pytest.mark.parametrize("loss", LOSSES, **each)
@pytest.mark.parametrize("t", [1e-2, 1.0, 1e2])
def test_prox_in_float32_is_that_in_float64_to_rounding(loss, t):
    v, y = 10 * torch.randn(200, 6), targets(loss, 200, 6, torch.float32)
    u = loss.prox(v, t, y)
    assert u.dtype == torch.float32
    torch.testing.assert_close(u.double(), loss.prox(v.double(), t, y.double()), rtol=1e-5, atol=2e-5)


def test_prox_leaves_its_arguments_alone():
    for loss in [*LOSSES, CrossEntropyLoss(solver="fista")]:
        v, y = torch.randn(5, 3), targets(loss, 5, 3, torch.float32)
        copies = v.clone(), y.clone()
        loss.prox(v, 0.5, y)
        loss.value(v, y)
        loss.check_targets(y)
        assert torch.equal(v, copies[0])
        assert torch.equal(y, copies[1])


def test_squared_prox_is_the_weighted_mean():
    v, y, tau = torch.randn(6, 3).double(), torch.randn(6, 3).double(), 0.4
    torch.testing.assert_close(SquaredLoss().prox(v, 1 / tau, y), (y + tau * v) / (1 + tau), rtol=1e-14, atol=0)


@pytest.mark.parametrize("t", [1e-4, 0.5, 1.0, 3.0, 1e5])
def test_hinge_prox_is_the_best_of_a_dense_grid(t):
    s = torch.cat([torch.tensor([1.0, 1 - t, 1 - t / 2, 0.0, -1e6, 1e6, 1 - 2 * t]), 3 * torch.randn(300)]).double()
    y = torch.sign(torch.randn_like(s))
    u = HingeLoss().prox((y * s)[:, None], t, y[:, None])[:, 0] * y
    grid = torch.cat(
        [torch.linspace(-2, 2, 4001).double().expand(len(s), -1) * t + s[:, None], s.new_ones(len(s), 1)], 1
    )

    def objective(u, s):
        return (1 - u).clamp(min=0) + (u - s) ** 2 / (2 * t)

    lowest = objective(grid, s[:, None]).min(dim=1).values
    assert (objective(u, s) <= lowest * (1 + 1e-12)).all()
    assert u[0] == 1  # at the margin nothing moves
    assert HingeLoss().prox(torch.tensor([[5.0]]), t, torch.tensor([[1.0]])) == 5


@pytest.mark.parametrize("t", [1e-6, 1e-3, 1.0, 30.0, 1e3, 1e6, 1e9])
def test_logistic_prox_is_the_root_that_bisection_finds(t):
    s = torch.cat([k * torch.randn(60).double() for k in (1e-3, 1, 10, 100, 1e4)])
    s = torch.cat([s, torch.tensor([0.0, -t, -t / 2, t, -0.9 * t, -1.1 * t, 1e6, -1e6]).double()])
    y = torch.sign(torch.randn_like(s))
    m = LogisticLoss().prox((y * s)[:, None], t, y[:, None])[:, 0] * y

    def slope(m, s):
        return float(m - s - t * torch.sigmoid(-torch.as_tensor(m, dtype=torch.float64)))

    for root, start in zip(m.tolist(), s.tolist(), strict=True):
        low, high = start - 1e-9 * (1 + abs(start)), (start + t) + 1e-9 * (1 + abs(start) + t)
        expected = brentq(slope, low, high, args=(start,), xtol=1e-13, rtol=1e-15, maxiter=300)
        assert abs(root - expected) <= 1e-12 * (1 + abs(expected)) + 1e-15 * (abs(start) + t)


@pytest.mark.parametrize("tau", [1e-6, 1e-4, 1e-2, 0.1, 1.0, 3.0, 30.0, 1e3])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_cross_entropy_prox_is_stationary(tau, classes):
    for kind in ("one_hot", "soft", "uniform"):
        for scale in (0.0, 1e-3, 1.0, 10.0, 100.0):
            y = distributions(kind, 60, classes)
            v = scale * torch.randn(60, classes).double()
            v[::7] = v[::7, :1]  # ties
            u = CrossEntropyLoss().prox(v, 1 / tau, y)
            assert (tau * (u - v) + torch.softmax(u, dim=1) - y).abs().max() < 1e-9
            u = CrossEntropyLoss().prox(v.float(), 1 / tau, y.float()).double()
            residual = (tau * (u - v.float()) + torch.softmax(u, dim=1) - y).abs().max()
            assert residual < 1e-5 * (1 + tau * (1 + v.abs().max()))


@pytest.mark.parametrize("tau", [0.02, 1.0, 50.0])
def test_cross_entropy_prox_is_what_scipy_finds(tau):
    v, y = 5 * torch.randn(4, 6).double(), distributions("soft", 4, 6)
    u = CrossEntropyLoss().prox(v, 1 / tau, y).numpy()

    def objective(x, c, y):
        shifted = x - x.max()
        p = np.exp(shifted) / np.exp(shifted).sum()
        value = x.max() + np.log(np.exp(shifted).sum()) - y @ x + tau / 2 * ((x - c) ** 2).sum()
        return value, p - y + tau * (x - c)

    for row, c, label in zip(u, v.numpy(), y.numpy(), strict=True):
        found = minimize(objective, c, args=(c, label), jac=True, options={"gtol": 1e-10}).x
        np.testing.assert_allclose(row, found, atol=1e-6)


def test_fista_comes_close_to_newton():
    v, y = 3 * torch.randn(50, 10).double(), distributions("one_hot", 50, 10)
    for tau in (1.0, 3.0, 10.0):  # for small tau its step is too long to converge

        def objective(u, tau=tau):
            return CrossEntropyLoss().value(u, y) + tau / 2 * (u - v).square().sum()

        exact = CrossEntropyLoss().prox(v, 1 / tau, y)
        fista = CrossEntropyLoss(solver="fista").prox(v, 1 / tau, y)
        assert -1e-10 <= objective(fista) - objective(exact) < 0.05
        near = CrossEntropyLoss(solver="fista").prox(v, 1 / tau, y, start=exact)
        assert -1e-10 <= objective(near) - objective(exact) < 0.05
        one = CrossEntropyLoss(solver="fista", max_iterations=1).prox(v, 1 / tau, y)
        step = (tau * v + v / 4 - (torch.softmax(v, dim=1) - y)) / (tau + 1 / 4)
        torch.testing.assert_close(one, step)


@pytest.mark.parametrize("name", ["dladmm_a", "dladmm_b"])
def test_fista_takes_the_last_layer_steps_of_the_published_code(name):
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    run = {key: torch.as_tensor(value) for key, value in np.load(path).items()}
    rho, y = float(run["rho"]), F.one_hot(run["y"].long(), len(run["b3_0"])).double()
    loss = CrossEntropyLoss(solver="fista")
    z = run["z3_0"]
    # The iteration updates z_L twice: first from the old weights, at its end from the new ones.
    for t in (0, 1):
        centre = run[f"a2_{t}"] @ run[f"w3_{t}"].T + run[f"b3_{t}"] - run["u_0"] / rho
        z = loss.prox(centre, 1 / rho, y, start=z)
    torch.testing.assert_close(z, run["z3_1"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES, **each)
def test_labels_are_encoded_and_accepted(loss):
    y = loss.encode(torch.tensor([2, 0], dtype=torch.int32), 3, torch.float64)
    low = 0.0 if loss.targets == "one_hot" else -1.0
    assert y.tolist() == [[low, low, 1.0], [1.0, low, low]]
    assert y.dtype == torch.float64
    loss.check_targets(y)


@pytest.mark.parametrize("loss", [LogisticLoss(), HingeLoss()], **each)
def test_one_output_is_a_binary_problem(loss):
    assert loss.encode(torch.tensor([0, 1, 1]), 1, torch.float32).tolist() == [[-1.0], [1.0], [1.0]]


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.tensor([0.0, 1.0]), TypeError),
        (torch.tensor([[0, 1]]), ValueError),
        (torch.tensor([0, 3]), ValueError),
        (torch.tensor([-1, 0]), ValueError),
    ],
)
def test_bad_labels_are_refused(labels, error):
    for loss in LOSSES:
        with pytest.raises(error, match="Expected argument `labels`"):
            loss.encode(labels, 3, torch.float32)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (SquaredLoss(), [[float("nan"), 0.0]]),
        (CrossEntropyLoss(), [[1.5, -0.5]]),
        (CrossEntropyLoss(), [[0.5, 0.4]]),
        (CrossEntropyLoss(), [[-1.0, 1.0]]),
        (LogisticLoss(), [[0.0, 1.0]]),
        (HingeLoss(), [[0.0, 1.0]]),
        (HingeLoss(), [[float("inf"), 1.0]]),
    ],
)
def test_bad_targets_are_refused(loss, y):
    with pytest.raises(ValueError, match="Expected argument `y`"):
        loss.check_targets(torch.tensor(y))


def test_names_and_objects_are_resolved():
    names = {"squared": SquaredLoss, "cross_entropy": CrossEntropyLoss, "logistic": LogisticLoss, "hinge": HingeLoss}
    assert all(resolve_loss(name) == kind() for name, kind in names.items())

    class Huber:
        def value(self, v, y): ...

        def prox(self, v, t, y): ...

    own = Huber()
    assert resolve_loss(own) is own
    with pytest.raises(ValueError, match=r"Expected argument `loss`.*squared.*huber"):
        resolve_loss("huber")
    for wrong in (3, object(), SquaredLoss):
        with pytest.raises(TypeError, match="Expected argument `loss`"):
            resolve_loss(wrong)


def test_bad_hyperparameters_are_refused():
    with pytest.raises(ValueError, match="Expected argument `solver`"):
        CrossEntropyLoss(solver="adam")
    with pytest.raises(ValueError, match="Expected argument `max_iterations`"):
        CrossEntropyLoss(solver="fista", max_iterations=0)
    with pytest.raises(TypeError):
        Loss()
