"""Hybrid coordinate descent: its searches against brute force, its steps against naive loops, its guarantees."""

import math
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Trainer
from toolbox import LiveBytes, data, loader
from torch import nn
from torch.nn import functional as F

from lightning_bcd import BCDModule, HybridCoordinateDescent
from lightning_bcd.optim import piecewise
from lightning_bcd.optim.hybrid import _top
from lightning_bcd.optim.piecewise import minimise_pieces
from lightning_bcd.optim.recorder import Recorder


class Paper(nn.Module):
    """Two-layer ReLU network whose output weights stay fixed."""

    def __init__(self, inputs, width, bias=False):
        super().__init__()
        self.hidden, self.output = nn.Linear(inputs, width, bias=bias), nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.hidden.weight)
        nn.init.uniform_(self.output.weight, -1, 1)
        self.output.requires_grad_(False)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.output(self.relu(self.hidden(x)))[:, 0]


def paper(inputs, width, samples=10, dtype=torch.float64, bias=False):
    x = F.normalize(torch.randn(samples, inputs, dtype=dtype), dim=1)
    y = torch.randn(samples, dtype=dtype)
    net = Paper(inputs, width, bias).to(dtype)
    return net, lambda: ((net(x) - y) ** 2).sum() / (2 * samples)


def sequential(*widths, activation=nn.ReLU, dtype=torch.float64):
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def squared(net, samples=9, inputs=5, outputs=3):
    x, y = torch.randn(samples, inputs).double(), torch.randn(samples, outputs).double()
    return lambda: F.mse_loss(net(x), y)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def loss_moved(parameter, position, step, closure):
    """The loss with one entry moved."""
    with torch.no_grad():
        flat, old = parameter.view(-1), parameter.view(-1)[position].clone()
        flat[position] += step
        loss = float(closure())
        flat[position] = old
    return loss


def targets(net, closure, **arguments):
    """x* − x of every parameter: one step with α = 1, taken back."""
    before = weights(net)
    optimizer = HybridCoordinateDescent(net.parameters(), alpha=1.0, model=net, **arguments)
    optimizer.step(closure)
    steps = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
    with torch.no_grad():
        for p, b in zip(net.parameters(), before, strict=True):
            p.copy_(b)
    return steps


def assert_beats_grid(net, closure, steps, grid):
    for parameter, step in zip(net.parameters(), steps, strict=True):
        if not parameter.requires_grad:
            continue
        for position, t in enumerate(step.view(-1).tolist()):
            mine = loss_moved(parameter, position, t, closure)
            best = min(loss_moved(parameter, position, float(g), closure) for g in grid)
            assert mine <= best + 1e-12, (position, t)


# -- the searches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [24, 0])
@pytest.mark.parametrize("samples", [1, 2, 7, 16])
def test_pieces_beat_a_dense_grid_also_with_ties_zeros_and_dead_units(samples, limit, monkeypatch):
    monkeypatch.setattr(piecewise, "UNROLLED", limit)
    monkeypatch.setattr(piecewise, "MANY", 0)
    x = torch.randint(-2, 3, (samples, 1, 12)).double() / 2  # many zeros, many equal breakpoints
    z = torch.randint(-3, 4, (samples, 6, 1)).double() / 2
    z[:, 0], z[:, 1] = -1.0, 1.0  # a dead unit, one that is active on all samples
    g, h = torch.randn(samples, 6, 1).double(), torch.rand(samples, 6, 1).double()

    def phi(t):
        change = (z + t * x).relu() - z.relu()
        return (g * change + h / 2 * change**2).sum(0)

    slope = g - h * z.relu()
    t = minimise_pieces(x, z, (h / 2, slope + h * z, z * (slope + h * z / 2)))
    grid = torch.cat([torch.linspace(-40, 40, 8001), torch.linspace(-1, 1, 2001)]).double()
    best = torch.stack([phi(step) for step in grid]).amin(0)
    assert (phi(t) <= best + 1e-12).all()
    assert (t[:, (x == 0).all(0)[0]] == 0).all()
    assert (phi(t) < -1e-3).any()
    assert (t != 0).any()


def test_both_ways_to_sort_agree(monkeypatch):
    x, z = torch.randn(13, 1, 40).double(), torch.randn(13, 20, 1).double()
    terms = torch.rand(13, 20, 1).double(), torch.randn(13, 20, 1).double(), torch.randn(13, 20, 1).double()
    monkeypatch.setattr(piecewise, "MANY", 0)
    unrolled = minimise_pieces(x, z, terms)
    monkeypatch.setattr(piecewise, "UNROLLED", 0)
    torch.testing.assert_close(minimise_pieces(x, z, terms), unrolled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_search_of_a_two_layer_network_is_exact_on_every_coordinate(bias):
    net, closure = paper(6, 5, bias=bias)
    with torch.no_grad():
        net.hidden.weight[0] = 0  # a unit that gets no gradient
    steps = targets(net, closure, dw=math.inf)
    assert_beats_grid(net, closure, steps, torch.linspace(-20, 20, 401))
    assert (steps[0] != 0).any()


def test_rank_one_search_of_the_output_layer_is_exact_and_agrees_with_brute_force():
    net = sequential(5, 7, 3)
    closure = squared(net)
    steps = targets(net, closure, dw=math.inf)[2:]
    loss = closure()
    for parameter, step in zip((net[2].weight, net[2].bias), steps, strict=True):
        gradient = torch.autograd.grad(closure(), parameter)[0].view(-1)
        for position, t in enumerate(step.view(-1).tolist()):
            # A parabola is known from one more value.
            bend = loss_moved(parameter, position, 1.0, closure) - loss.item() - float(gradient[position])
            assert t == pytest.approx(-float(gradient[position]) / (2 * bend), rel=1e-9)


@pytest.mark.parametrize("outputs", [1, 3])
def test_rank_one_search_of_any_layer_uses_the_gauss_newton_diagonal(outputs):
    net = sequential(5, 4, 6, outputs, activation=nn.Tanh)
    x, y = torch.randn(9, 5).double(), torch.randn(9, outputs).double()
    steps = targets(net, lambda: F.mse_loss(net(x), y), dw=math.inf)
    named = dict(net.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x,)))(named)
    gradient = torch.autograd.grad(F.mse_loss(net(x), y), list(named.values()))
    for step, g, name in zip(steps, gradient, named, strict=True):
        curvature = 2 / (9 * outputs) * jacobian[name].square().sum((0, 1))
        torch.testing.assert_close(step, -g / curvature, rtol=1e-8, atol=1e-10)


def test_gauss_newton_is_the_hessian_of_a_convex_loss_at_the_output():
    net = sequential(5, 3)
    x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))

    def loss(weight):
        return F.cross_entropy(F.linear(x, weight, net[0].bias), y)

    steps = targets(net, lambda: F.cross_entropy(net(x), y), dw=math.inf)
    hessian = torch.func.hessian(loss)(net[0].weight.detach()).reshape(15, 15).diagonal()
    gradient = torch.func.grad(loss)(net[0].weight.detach()).view(-1)
    torch.testing.assert_close(steps[0].view(-1), -gradient / hessian, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_local_search_goes_to_the_vertex_of_the_piece_the_point_lies_on(bias):
    net, closure = paper(6, 5, bias=bias)
    for dw in (math.inf, 1e-2):
        steps = targets(net, closure, dw=dw, search="local")
        for parameter, step in zip(net.parameters(), steps, strict=True):
            if not parameter.requires_grad:
                continue
            gradient = torch.autograd.grad(closure(), parameter, create_graph=True)[0].view(-1)
            second = [
                torch.autograd.grad(g, parameter, retain_graph=True)[0].view(-1)[k] for k, g in enumerate(gradient)
            ]
            curvature, gradient = torch.stack(second), gradient.detach()
            searched = (gradient.abs() < dw) & (curvature > 0)
            wanted = -gradient / torch.where(searched, curvature, 1)
            torch.testing.assert_close(step.view(-1), wanted, rtol=1e-9, atol=1e-12)
            assert searched.any()


def test_local_search_of_chosen_coordinates_equals_that_of_all():
    net = sequential(5, 4, 3)
    closure = squared(net)
    everything = torch.cat([s.view(-1) for s in targets(net, closure, search="local")])
    steps = targets(net, closure, search="local", selection="greedy", top_k=9)
    chosen = torch.cat([s.view(-1) for s in steps])
    torch.testing.assert_close(chosen, everything * (chosen != 0))
    assert (chosen != 0).sum() == 9


def test_loss_without_curvature_takes_gradient_steps():
    net = sequential(5, 4, 3)
    x, y = torch.randn(9, 5).double(), torch.randn(9, 3).double()
    gradients = torch.autograd.grad(F.l1_loss(net(x), y), list(net.parameters()))
    for step, gradient in zip(targets(net, lambda: F.l1_loss(net(x), y)), gradients, strict=True):
        torch.testing.assert_close(step, -gradient)


@pytest.mark.parametrize("scale", [100, 200, 300, 400, 800])
def test_tiny_inputs_and_curvatures_give_finite_steps(scale):
    net = sequential(5, 8, 3, dtype=torch.float32)
    x = torch.randn(9, 5) * torch.tensor([1.0, 1e-20, 1e-38, 1e-45, 0.0])
    labels = net(x).argmax(dim=1)
    with torch.no_grad():
        net[2].weight.mul_(scale)
    for step in targets(net, lambda: F.cross_entropy(net(x), labels), dw=math.inf):
        assert step.isfinite().all()


def test_search_by_trials_finds_the_minimum_of_a_parabola_and_warns_once_with_the_cost():
    net = sequential(3, 1)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
    exact = targets(net, lambda: F.mse_loss(net(x), y), dw=math.inf)
    optimizer = HybridCoordinateDescent(net.parameters(), dw=100.0, alpha=1.0)
    before = weights(net)
    with pytest.warns(UserWarning, match=r"up to 15 evaluations .* Pass `model=`") as caught:
        [optimizer.step(lambda: F.mse_loss(net(x), y)) for _ in range(2)]
    assert sum("15 evaluations" in str(warning.message) for warning in caught) == 1
    net.load_state_dict(dict(zip(net.state_dict(), before, strict=True)))
    optimizer.step(lambda: F.mse_loss(net(x), y))
    for p, b, step in zip(net.parameters(), before, exact, strict=True):
        torch.testing.assert_close(p.detach() - b, step, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:HybridCoordinateDescent searches")
@pytest.mark.parametrize("sequentially", [False, True])
def test_trials_of_other_modules_are_evaluated_together_or_one_by_one(sequentially):
    """A convolution; a closure that branches on the loss cannot be evaluated under vmap."""
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(4, 1, 5).double(), torch.randn(4, 1).double()
    calls = []

    def closure():
        calls.append(1)
        net.zero_grad()
        loss = F.mse_loss(net(x), y)
        if sequentially and float(loss.detach()) < 0:
            raise AssertionError
        loss.backward()
        return loss

    def alone():
        return F.mse_loss(net(x), y)

    parameter = net[0].weight
    optimizer = HybridCoordinateDescent([parameter], alpha=1.0, model=net)
    before = parameter.detach().clone()
    closure()
    gradient = parameter.grad.clone()
    calls.clear()
    optimizer.step(closure)
    assert gradient.abs().max() < 1
    assert (len(calls) > 30) == sequentially
    torch.testing.assert_close(parameter.grad, gradient)
    step = (parameter.detach() - before).view(-1)
    with torch.no_grad():
        parameter.copy_(before)
    assert (step != 0).all()
    for position, t in enumerate(step.tolist()):
        # A local minimum up to the grid of the search: better than no step, half of it and twice of it.
        still, half, double = (loss_moved(parameter, position, t * factor, alone) for factor in (0, 0.5, 2))
        mine = loss_moved(parameter, position, t, alone)
        assert mine < still
        assert mine <= min(half, double)


@pytest.mark.parametrize("search", ["global", "local"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_activations_may_work_in_place(activation, search):
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = sequential(5, 6, 3, activation=partial(activation, inplace=inplace))
        found.append(targets(net, squared(net), dw=math.inf, search=search))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Tied(nn.Module):
    """Two modules that share a weight."""

    def __init__(self, other):
        super().__init__()
        self.first, self.last, self.other = nn.Linear(4, 4), nn.Linear(4, 4), other(4, 4)
        self.other.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x).relu()) + x @ self.other.weight


@pytest.mark.parametrize("other", [nn.Linear, nn.Embedding])
def test_a_weight_that_modules_share_is_searched_by_trials(other):
    net = Tied(other).double()
    closure = squared(net, inputs=4, outputs=4)
    with pytest.warns(UserWarning, match="searches coordinate by coordinate"):
        step = targets(net, closure, dw=math.inf)[0].view(-1)
    for position, t in enumerate(step.tolist()):
        still, mine = (loss_moved(net.first.weight, position, size, closure) for size in (0.0, t))
        assert mine < still


def test_layers_with_a_parametrised_weight_are_searched_by_trials():
    net = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)
    ).double()
    closure = squared(net)
    optimizer = HybridCoordinateDescent(net.parameters(), model=net)
    with pytest.warns(UserWarning, match="searches coordinate by coordinate"):
        losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert all(b < a for a, b in pairwise(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_may_be_more_precise_than_the_weights(dtype):
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(9, 5, dtype=dtype), torch.randn(9, 3)
    optimizer = HybridCoordinateDescent(net.parameters(), model=net)

    def closure():
        return F.mse_loss(net(x).double(), y.double())

    with pytest.warns(UserWarning, match="searches coordinate by coordinate"):
        losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("search", ["global", "local"])
def test_the_closure_may_use_autocast(search):
    net = sequential(5, 8, 3, dtype=torch.float32)
    x, y = torch.randn(30, 5), torch.randint(3, (30,))
    optimizer = HybridCoordinateDescent(net.parameters(), model=net, search=search)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(net(x), y)

    losses = [float(optimizer.step(closure)) for _ in range(6)]
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


# -- the step -------------------------------------------------------------------------------------------------------


def test_jacobi_step_is_a_naive_loop_over_coordinates():
    """Steep coordinates step by their gradient, flat ones are searched, all from the same point."""
    net, closure = paper(6, 5)
    gradient = torch.autograd.grad(closure(), net.hidden.weight)[0]
    dw = float(gradient.abs().median())
    alone = targets(net, closure, dw=math.inf)[0]
    before = net.hidden.weight.detach().clone()
    naive = before.clone()
    for i in range(5):
        for j in range(6):
            g = float(gradient[i, j])
            naive[i, j] += 0.3 * (-g if abs(g) >= dw else float(alone[i, j]))
    HybridCoordinateDescent(net.parameters(), dw=dw, alpha=0.3, model=net).step(closure)
    torch.testing.assert_close(net.hidden.weight.detach(), naive, rtol=1e-10, atol=1e-12)
    assert (gradient.abs() >= dw).any()
    assert (gradient.abs() < dw).any()


@pytest.mark.parametrize("search", ["global", "local"])
@pytest.mark.parametrize("chunk_bytes", [1, 2000, 20000])
def test_chunks_do_not_change_the_step(chunk_bytes, search):
    """Each chunk has steep and flat coordinates, also behind the first one."""
    net = sequential(5, 7, 3)
    closure = squared(net)
    dw = float(torch.cat([g.abs().view(-1) for g in torch.autograd.grad(closure(), list(net.parameters()))]).median())
    whole, parts = (targets(net, closure, dw=dw, search=search, chunk_bytes=size) for size in (2**26, chunk_bytes))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("search", "size"), [("global", 600_000), ("global", 200_000), ("local", 600_000)])
def test_searches_stay_below_their_bound(search, size):
    for width, samples in ((16, 10), (64, 10), (64, 40)):
        net, closure = paper(1000, width, samples, torch.float32)
        optimizer = HybridCoordinateDescent([net.hidden.weight], model=net, search=search, chunk_bytes=size)
        with Recorder(net, [net.hidden.weight], through_relu=search == "global") as record:
            loss = closure()
        gradients, layers = record.differentiate(loss, [net.hidden.weight])
        with LiveBytes() as live, torch.no_grad():
            optimizer._directions(gradients, layers, closure, float(loss.detach()), True)
        # Beside it, tables of samples x neurons, and one number per coordinate and chunk.
        tables = 4 * samples * (10 * width + 4 * 1000)
        assert live.peak <= min(size, max(2**19, net.hidden.weight.nbytes)) + tables


def test_one_over_n_divides_by_the_number_of_coordinates():
    net, closure = paper(6, 5)
    steps = targets(net, closure)
    before = net.hidden.weight.detach().clone()
    HybridCoordinateDescent(net.parameters(), alpha="1/n", model=net).step(closure)
    torch.testing.assert_close(net.hidden.weight.detach() - before, steps[0] / 30)


def test_infinite_gradient_threshold_zero_is_gradient_descent():
    net, closure = paper(6, 5)
    before, gradient = net.hidden.weight.detach().clone(), torch.autograd.grad(closure(), net.hidden.weight)[0]
    HybridCoordinateDescent(net.parameters(), dw=0.0, alpha=0.1).step(closure)
    torch.testing.assert_close(net.hidden.weight.detach(), before - 0.1 * gradient)


def test_gauss_seidel_goes_block_by_block_from_the_point_reached():
    net = sequential(5, 4, 3)
    closure = squared(net)
    other = sequential(5, 4, 3)
    other.load_state_dict(net.state_dict())
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "dw": 0.01}]
    HybridCoordinateDescent(groups, alpha=0.2, model=net, selection="gauss_seidel").step(closure)
    after = weights(net)
    net.load_state_dict(other.state_dict())
    for layer, dw in ((net[0], 1.0), (net[2], 0.01)):
        HybridCoordinateDescent(layer.parameters(), dw=dw, alpha=0.2, model=net).step(closure)
    for a, b in zip(after, net.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-14)
    net.load_state_dict(other.state_dict())
    calls = []
    optimizer = HybridCoordinateDescent(net.parameters(), alpha=0.2, model=net, selection="gauss_seidel")
    optimizer.step(lambda: (calls.append(1), closure())[1])
    assert len(calls) == 4  # one group: its parameters are the blocks


def test_greedy_moves_the_coordinates_of_largest_gradient_only():
    net = sequential(5, 4, 3)
    closure = squared(net)
    gradient = torch.cat([g.view(-1) for g in torch.autograd.grad(closure(), list(net.parameters()))])
    dw = float(gradient.abs().topk(10).values[-1])  # ten of the chosen are steep, the others are searched
    everything = torch.cat([s.view(-1) for s in targets(net, closure, dw=dw)])
    steps = torch.cat([s.view(-1) for s in targets(net, closure, dw=dw, selection="greedy", top_k=25)])
    top = gradient.abs().topk(25).indices
    assert set(steps.nonzero()[:, 0].tolist()) == set(top.tolist())
    torch.testing.assert_close(steps[top], everything[top])


@pytest.mark.parametrize("count", [3, 4000, 60_000, 70_000])
def test_greedy_finds_the_largest_of_many_gradients(count):
    values = torch.rand(70_000)
    values[::4] = 0.0  # what a sample of every fourth entry sees
    for entries in (values, values.masked_fill(torch.arange(70_000) == 69_999, torch.nan), torch.zeros(70_000)):
        found, where = _top(entries, count)
        assert len(where.unique()) == count
        torch.testing.assert_close(entries[where], found, equal_nan=True)
        torch.testing.assert_close(found.sort().values, entries.topk(count).values.sort().values, equal_nan=True)


LOSSES = {
    "squared": (squared, nn.ReLU),
    "tanh": (squared, nn.Tanh),
    "cross-entropy": (None, nn.ReLU),
    "absolute": (None, nn.ReLU),
}


@pytest.mark.parametrize("dw", [0.01, 1.0, math.inf])
@pytest.mark.parametrize("selection", ["jacobi", "gauss_seidel", "greedy"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("search", ["global", "local"])
def test_loss_never_rises_with_backtracking(search, name, selection, dw):
    make, activation = LOSSES[name]
    net = sequential(5, 12, 8, 3, activation=activation)
    x, y, labels = torch.randn(30, 5).double(), torch.randn(30, 3).double(), torch.randint(3, (30,))
    closures = {
        "cross-entropy": lambda: F.cross_entropy(net(x), labels),
        "absolute": lambda: F.l1_loss(net(x), y),
    }
    closure = make(net) if make else closures[name]
    top_k = 10 if selection == "greedy" else None
    arguments = {"dw": dw, "selection": selection, "top_k": top_k, "search": search}
    optimizer = HybridCoordinateDescent(net.parameters(), model=net, **arguments)
    losses = [float(optimizer.step(closure)) for _ in range(12)] + [float(closure().detach())]
    assert all(b <= a for a, b in pairwise(losses)), losses
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("search", ["global", "local"])
@pytest.mark.parametrize("width", [32, 128])
def test_falls_faster_per_epoch_than_gradient_descent_on_the_setting_of_the_paper(width, search):
    def run(make):
        torch.manual_seed(1)
        net, closure = paper(1000, width, dtype=torch.float32)
        optimizer = make(net)

        def backward():
            optimizer.zero_grad()
            loss = closure()
            loss.backward()
            return loss

        return [float(optimizer.step(backward).detach()) for _ in range(11)]

    hybrid = run(lambda net: HybridCoordinateDescent([net.hidden.weight], model=net, search=search))
    for lr in (0.01, 0.1):
        descent = run(lambda net, lr=lr: torch.optim.SGD([net.hidden.weight], lr=lr))
        assert hybrid[0] == descent[0]
        assert all(a < b for a, b in zip(hybrid[3:], descent[3:], strict=True))
        assert hybrid[10] < 1e-2 * descent[10]


def test_stops_where_the_loss_is_exact_to_rounding():
    net, closure = paper(1000, 32, dtype=torch.float32)
    optimizer, calls = HybridCoordinateDescent([net.hidden.weight], model=net, search="local"), []
    for _ in range(40):
        calls.append(0)
        optimizer.step(lambda: (calls.append(calls.pop() + 1), closure())[1])
    assert float(closure().detach()) < 1e-10
    assert max(calls[30:]) <= 12


def test_targets_beyond_a_hill_are_left_out_so_that_the_loss_falls():
    """All coordinates aim at far minima on the rising side: without a second look nothing would move."""
    found = []
    for seed in range(30):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).double()
        x, y = torch.randn(6, 2).double(), torch.randn(6, 1).double()
        gradient = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
        steps = targets(net, lambda net=net, x=x, y=y: F.mse_loss(net(x), y), dw=math.inf)
        if sum(float((s * g).sum()) for s, g in zip(steps, gradient, strict=True)) <= 0:
            continue
        optimizer = HybridCoordinateDescent(net.parameters(), dw=math.inf, model=net)
        before = float(optimizer.step(lambda net=net, x=x, y=y: F.mse_loss(net(x), y)))
        found.append(float(F.mse_loss(net(x), y)) / before)
    assert found
    assert max(found) < 0.999


# -- as a torch optimizer -------------------------------------------------------------------------------------------


def test_closure_may_or_may_not_call_backward():
    results = []
    for backward in (False, True):
        torch.manual_seed(3)
        net = sequential(5, 4, 3)
        closure = squared(net)
        optimizer = HybridCoordinateDescent(net.parameters(), model=net)

        def evaluate(optimizer=optimizer, closure=closure, backward=backward):
            optimizer.zero_grad()
            loss = closure()
            if backward:
                loss.backward()
            return loss

        losses = [optimizer.step(evaluate) for _ in range(4)]
        assert not losses[0].requires_grad
        results.append(weights(net))
        if backward:  # the gradient at the point of the step, not of a trial
            assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_frozen_and_unused_parameters_stay_untouched():
    net = sequential(5, 4, 4, 3)
    unused = nn.Parameter(torch.ones(3).double())
    net[2].requires_grad_(False)
    before = weights(net)
    HybridCoordinateDescent([*net.parameters(), unused], model=net).step(squared(net))
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [True, True, False, False, True, True]
    assert torch.equal(unused, torch.ones(3).double())


def test_model_may_be_called_for_several_batches():
    """The sum of two losses over halves is the loss over all samples."""
    net = sequential(5, 6, 1)
    x, y = torch.randn(8, 5).double(), torch.randn(8, 1).double()
    halves = [slice(0, 3), slice(3, 8)]

    def in_parts():
        net.zero_grad()
        losses = [((net(x[part]) - y[part]) ** 2).sum() for part in halves]
        for loss in losses:
            loss.backward()
        return sum(losses).detach()

    whole = targets(net, lambda: ((net(x) - y) ** 2).sum(), dw=math.inf)
    for a, b in zip(targets(net, in_parts, dw=math.inf), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_resume_is_exact():
    def make():
        torch.manual_seed(0)
        net = sequential(5, 12, 8, 3)
        return net, HybridCoordinateDescent(net.parameters(), dw=0.05, model=net, selection="gauss_seidel")

    net, optimizer = make()
    x, y = torch.randn(30, 5).double(), torch.randint(3, (30,))
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(net(x), y))
    saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, "state.pt")
    loaded = torch.load("state.pt", weights_only=True)
    other, resumed = make()
    other.load_state_dict(loaded["net"])
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(net(x), y))
        resumed.step(lambda: F.cross_entropy(other(x), y))
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(other), strict=True))
    assert resumed.param_groups[0]["dw"] == 0.05


@pytest.mark.parametrize("selection", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("failing", [1, 2, 3, 5])
def test_parameters_are_restored_if_an_evaluation_raises(selection, failing):
    net = sequential(5, 4, 3)
    closure, before, calls = squared(net), weights(net), []

    def fails():
        calls.append(1)
        if len(calls) == failing:
            raise KeyError("lost")
        return closure()

    optimizer = HybridCoordinateDescent(net.parameters(), model=net, selection=selection)
    optimizer.step(closure)
    with torch.no_grad():
        for p, b in zip(net.parameters(), before, strict=True):
            p.copy_(b)

    def train():
        for _ in range(6):
            before[:] = weights(net)
            optimizer.step(fails)

    with pytest.raises(KeyError, match="lost"):
        train()
    assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))


class Net(BCDModule):
    def __init__(self, **arguments):
        hybrid = partial(self.make, **arguments)
        super().__init__(blocks="linear", inner_steps=2, sweep="all", optimizer=hybrid)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.losses = []

    def make(self, parameters, **arguments):
        return HybridCoordinateDescent(parameters, model=self.net, **arguments)

    def block_loss(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        self.losses.append(float(self.block_loss(batch, batch_idx).detach()))


def fit(model, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = Trainer(enable_checkpointing=False, **quiet, **arguments)
    trainer.fit(model, loader(48, 48))
    return trainer


def test_trains_one_block_at_a_time_in_a_bcd_module_like_a_plain_loop():
    model = Net(dw=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Block .* got no gradient")
        trainer = fit(model, max_epochs=4)
    assert trainer.global_step == 4 * 3 * 2
    assert all(b < a for a, b in pairwise(model.losses))
    plain = Net().net
    x, y = data(48).tensors
    optimizers = [HybridCoordinateDescent(plain[i].parameters(), dw=0.1, model=plain) for i in (0, 2, 4)]
    for _ in range(4):
        for i, optimizer in zip((0, 2, 4), optimizers, strict=True):
            plain.requires_grad_(False)
            plain[i].requires_grad_(True)
            for _ in range(2):
                optimizer.step(lambda: F.cross_entropy(plain(x), y))
    for a, b in zip(model.net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-3, atol=1e-4)


def test_optimizer_state_of_a_bcd_module_is_part_of_its_checkpoint():
    model = Net()
    trainer = fit(model, max_epochs=1)
    state = trainer.optimizers[0].state_dict()["state"]
    assert len(state) == 3
    assert all(0 < entry["alpha"] <= 1 for entry in state.values())


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dw": -1.0}, r"`dw` to be at least 0, but got -1.0\."),
        ({"dw": math.nan}, r"`dw` to be at least 0, but got nan"),
        ({"dw": "big"}, r"`dw` to be at least 0, but got 'big'"),
        ({"alpha": "wolfe"}, r"`alpha` to be 'backtracking', '1/n' or a positive number, but got 'wolfe'"),
        ({"alpha": 0.0}, r"`alpha` .* but got 0.0"),
        ({"alpha": True}, r"`alpha` .* but got True"),
        ({"alpha": None}, r"`alpha` .* but got None"),
        ({"selection": "random"}, r"`selection` to be 'jacobi', 'gauss_seidel' or 'greedy', but got 'random'"),
        ({"selection": "greedy"}, r"`top_k` to be a number of coordinates for selection='greedy', but got None"),
        ({"selection": "greedy", "top_k": 0}, r"`top_k` .* but got 0"),
        ({"top_k": 3}, r"`top_k` to be None with selection='jacobi', but got 3\. Leave it out"),
        ({"chunk_bytes": 0}, r"`chunk_bytes` to be a positive number of bytes, but got 0"),
        ({"search": "grid"}, r"`search` to be 'global' or 'local', but got 'grid'"),
        ({"model": "net"}, r"`model` to be the module that the closure calls, but got 'net'"),
        ({"model": nn.Linear(2, 2)}, r"`model` to hold parameters of the optimizer, but got Linear with none"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HybridCoordinateDescent(nn.Linear(3, 2).parameters(), **arguments)


def test_refuses_a_group_with_a_bad_threshold_and_complex_parameters():
    with pytest.raises(ValueError, match="`dw` to be at least 0, but got -2"):
        HybridCoordinateDescent([{"params": nn.Linear(3, 2).parameters(), "dw": -2}])
    with pytest.raises(ValueError, match=r"`params` to be real, but got torch\.complex64"):
        HybridCoordinateDescent([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (None, r"`closure` to be a function that returns the loss, but got None"),
        (lambda net, x: net(x).sum() * math.nan, r"finite loss, but got nan"),
        (lambda net, x: net(x).sum().detach(), r"the loss with its graph, but got a tensor without"),
        (lambda net, x: float(net(x).sum().detach()), r"the loss as a scalar tensor, but got -?\d"),
        (lambda net, x: net(x), r"the loss as a scalar tensor, but got a tensor of shape \(4, 2\)"),
        (lambda net, x: F.linear(x, net.weight).sum(), r"`model` to be the module that the closure calls, but Linear"),
        (lambda net, x: (net(x) * 0).sum().sqrt(), r"finite gradient, but the slope .* is nan"),
    ],
)
def test_refuses_a_bad_closure_and_changes_nothing(closure, message):
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    before = weights(net)
    optimizer = HybridCoordinateDescent(net.parameters(), model=net)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure and (lambda: closure(net, x)))
    assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))


def test_refuses_a_model_that_returns_no_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x), x

    net, x = Pair(), torch.randn(4, 3)
    with pytest.raises(ValueError, match="`model` to return one tensor, but got tuple"):
        HybridCoordinateDescent(net.parameters(), model=net).step(lambda: net(x)[0].square().sum())
