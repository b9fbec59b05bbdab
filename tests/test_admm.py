"""dlADMM, pdADMM and its variants against published runs, naive loops and their own definitions."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from toolbox import run_processes, same, trainer, weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bcd import DLADMM, MDLAM, MLP, PDADMM, PDADMMG, PDADMMGQ, LiftedModule, full_batch
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted import dladmm, pdadmm
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.layers import Residual
from lightning_bcd.lifted.quantized import GridCodec
from lightning_bcd.prox import CrossEntropyLoss, resolve_loss
from lightning_bcd.prox.penalties import UniformGrid

F64 = torch.float64
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")


def network(widths, activation="ReLU", bias=True, seed=0):
    torch.manual_seed(seed)
    return MLP(widths, activation=activation, bias=bias).double()


def problem(samples, features, outputs, loss="cross_entropy", seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator, dtype=F64)
    labels = torch.randint(outputs, (samples,), generator=generator)
    loss = resolve_loss(loss)
    return x, loss.encode(labels, outputs, F64), loss


def golden(name):
    file = GOLDEN / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"{file} is absent")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(file).items()}


def golden_chain(run):
    depth = sum(key.startswith("w") and key.endswith("_0") for key in run)
    net = network([run["x"].shape[1], *(len(run[f"b{layer}_0"]) for layer in range(1, depth + 1))])
    chain = Chain(net)
    with torch.no_grad():
        for layer, stage in enumerate(chain, 1):
            stage.weight.copy_(run[f"w{layer}_0"])
            stage.bias.copy_(run[f"b{layer}_0"])
    loss = CrossEntropyLoss()
    return chain, loss, loss.encode(run["y"].long(), len(chain[depth - 1].bias), F64)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["dladmm_a", "dladmm_b"])
def test_dladmm_equals_the_published_code(name):
    run = golden(name)
    chain, loss, y = golden_chain(run)
    rho = float(run["rho"])
    algorithm = DLADMM(preset="reference", rho=rho, search_start=float(run["theta0"]), rho_schedule="constant")
    state = algorithm.start(chain, run["x"], y, Alone())
    last = len(chain)
    for sweep in range(11):
        if sweep:
            algorithm.sweep(chain, state, loss, Alone())
        for layer, stage in enumerate(chain, 1) if sweep in (0, 1, 2, 10) else ():
            close(stage.weight.detach(), run[f"w{layer}_{sweep}"])
            close(stage.bias.detach(), run[f"b{layer}_{sweep}"])
            close(state.variables["z"][layer - 1], run[f"z{layer}_{sweep}"])
            if layer < last:
                close(state.variables["a"][layer - 1], run[f"a{layer}_{sweep}"])
        if sweep in (0, 1, 2, 10):
            close(state.variables["u"][0], run[f"u_{sweep}"])


@pytest.mark.parametrize("name", ["pdadmm_g_a", "pdadmm_g_b", "pdadmm_g_q_a"])
def test_pdadmm_equals_the_published_code(name):
    run = golden(name)
    chain, loss, y = golden_chain(run)
    options = {"preset": "reference", "rho": float(run["rho"]), "mu": float(run["mu"]), "z_rule": "reference"}
    options["rho_schedule"] = "constant"
    if name == "pdadmm_g_q_a":
        grid = run["grid"]
        algorithm = PDADMMGQ(quantize="q", grid=(float(grid[0]), float(grid[-1]), len(grid)), **options)
    else:
        algorithm = PDADMMG(**options)
    state = algorithm.start(chain, run["x"], y, Alone())
    for layer in range(len(chain) - 1):
        # The published start is not on the grid.
        state.variables["q"][layer].copy_(run[f"q{layer + 1}_0"])
    for sweep in range(11):
        if sweep:
            algorithm.sweep(chain, state, loss, Alone())
        for layer, stage in enumerate(chain, 1) if sweep in (0, 1, 2, 10) else ():
            close(stage.weight.detach(), run[f"w{layer}_{sweep}"])
            close(stage.bias.detach(), run[f"b{layer}_{sweep}"])
            close(state.variables["z"][layer - 1], run[f"z{layer}_{sweep}"])
            if layer < len(chain):
                close(state.variables["q"][layer - 1], run[f"q{layer}_{sweep}"])
                close(state.variables["u"][layer - 1], run[f"u{layer}_{sweep}"])
                close(state.variables["p"][layer - 1], run[f"p{layer + 1}_{sweep}"])


# -- the equations, each step from the Lagrangian alone ---------------------------------------------------------


def data_fit(loss, v, y):
    if loss == "squared":
        return (v - y).square().sum() / 2
    if loss == "hinge":
        return (1 - y * v).clamp(min=0).sum()
    return -(y * v.log_softmax(1)).sum()


def best_output(loss, centre, tau, y):
    """argmin R(v; y) + τ/2 ‖v − centre‖²."""
    if loss == "squared":
        return (y + tau * centre) / (1 + tau)
    if loss == "hinge":
        options = torch.stack([centre, centre + y / tau, y])
        value = (1 - y * options).clamp(min=0) + tau / 2 * (options - centre).square()
        return options.gather(0, value.argmin(0, keepdim=True))[0]
    v = centre.clone()
    for _ in range(60):
        p = v.softmax(1)
        hessian = torch.diag_embed(p + tau) - p[:, :, None] * p[:, None, :]
        v = v - torch.linalg.solve(hessian, p - y + tau * (v - centre))
    return v


def best_hidden(activation, a, centres):
    """argmin (a − σ(u))² + Σ (u − centre)², entry by entry."""

    def value(u):
        return (a - sigma(u)).square() + sum((u - c).square() for c in centres)

    if activation == "Tanh":
        sigma = torch.tanh
        step = 0.02
        grid = torch.arange(-8, 8, step, dtype=F64)[:, None, None]
        best = grid.flatten()[value(grid).argmin(0)]
        low, high = best - step, best + step
        for _ in range(60):
            u = (low + high) / 2
            t = torch.tanh(u)
            rises = (t - a) * (1 - t * t) + sum(u - c for c in centres) > 0
            low, high = torch.where(rises, low, u), torch.where(rises, u, high)
        return (low + high) / 2
    slope = {"ReLU": 0.0, "LeakyReLU": 0.01}[activation]

    def sigma(u):
        return torch.where(u > 0, u, slope * u)

    total = sum(centres)
    up = ((a + total) / (1 + len(centres))).clamp(min=0)
    down = ((slope * a + total) / (slope**2 + len(centres))).clamp(max=0)
    return torch.where(value(up) <= value(down), up, down)


SIGMA = {"ReLU": torch.relu, "LeakyReLU": torch.nn.functional.leaky_relu, "Tanh": torch.tanh}


class Naive:
    """Variables by name; every step differentiates the Lagrangian anew, nothing is held."""

    def __init__(self, algorithm, chain, state, loss, activation):
        self.algorithm, self.loss, self.activation, self.sigma = algorithm, loss, activation, SIGMA[activation]
        self.rho, self.nu = algorithm.rho, algorithm.nu or algorithm.rho
        self.x, self.y, self.last = state.x, state.y, len(chain) - 1
        self.v = {name: [t.clone() for t in tensors] for name, tensors in state.variables.items() if name != "m"}
        self.v["w"] = [stage.weight.detach().clone() for stage in chain]
        self.v["b"] = [stage.bias.detach().clone() if stage.bias is not None else torch.zeros(()) for stage in chain]
        self.biases = chain[0].bias is not None

    def product(self, layer):
        inputs = self.x if layer == 0 else self.v[self.inputs][layer - 1]
        return inputs @ self.v["w"][layer].T + self.v["b"][layer]

    def along(self, name, layer, t):
        """The Lagrangian with another value of one variable."""
        old, self.v[name][layer] = self.v[name][layer], t
        value = self.lagrangian()
        self.v[name][layer] = old
        return value

    def slope(self, name, layer, direction=None):
        """Gradient g of a variable and Hessian times a direction (g if None)."""
        leaf = self.v[name][layer].clone().requires_grad_()
        (g,) = torch.autograd.grad(self.along(name, layer, leaf), leaf, create_graph=True)
        (image,) = torch.autograd.grad(g, leaf, g.detach() if direction is None else direction)
        return g.detach(), image

    def descend(self, name, layer):
        """One gradient step with the length of the rule."""
        (g, image), old = self.slope(name, layer), self.v[name][layer]
        if self.algorithm.step == "exact":
            theta = float((g * image).sum() / g.square().sum())
        else:
            theta, doubled = self.algorithm.search_start, 0
            while self.along(name, layer, old - g / theta) > self.lagrangian() - g.square().sum() / (2 * theta):
                theta, doubled = 2 * theta, doubled + 1
                if self.algorithm.doublings is not None and doubled > self.algorithm.doublings:
                    return
        self.v[name][layer] = old - g / theta

    def minimise(self, name, layer):
        """The minimum of a quadratic whose Hessian is diagonal."""
        g, diagonal = self.slope(name, layer, torch.ones_like(self.v[name][layer]))
        self.v[name][layer] = self.v[name][layer] - g / diagonal

    def bias(self, layer):
        if self.biases:
            self.minimise("b", layer)


class NaiveDLADMM(Naive):
    inputs = "a"

    def lagrangian(self):
        v = self.v
        total = data_fit(self.loss, v["z"][-1], self.y)
        for layer in range(self.last):
            total = total + self.nu / 2 * (v["z"][layer] - self.product(layer)).square().sum()
            total = total + self.nu / 2 * (v["a"][layer] - self.sigma(v["z"][layer])).square().sum()
        error = v["z"][-1] - self.product(self.last)
        return total + (v["u"][0] * error).sum() + self.rho / 2 * error.square().sum()

    def output(self):
        centre = self.product(self.last) - self.v["u"][0] / self.rho
        self.v["z"][-1] = best_output(self.loss, centre, self.rho, self.y)

    def hidden(self, layer):
        self.v["z"][layer] = best_hidden(self.activation, self.v["a"][layer], [self.product(layer)])

    def sweep(self):
        self.output()
        self.bias(self.last)
        self.descend("w", self.last)
        for layer in reversed(range(self.last)):
            self.descend("a", layer)
            self.hidden(layer)
            self.bias(layer)
            self.descend("w", layer)
        for layer in range(self.last):
            self.descend("w", layer)
            self.bias(layer)
            self.hidden(layer)
            self.descend("a", layer)
        self.descend("w", self.last)
        self.bias(self.last)
        self.output()
        self.v["u"][0] = self.v["u"][0] + self.rho * (self.v["z"][-1] - self.product(self.last))


class NaivePDADMM(Naive):
    inputs = "p"

    def lagrangian(self):
        v = self.v
        total = data_fit(self.loss, v["z"][-1], self.y)
        for layer in range(self.last + 1):
            total = total + self.nu / 2 * (v["z"][layer] - self.product(layer)).square().sum()
            total = total + getattr(self.algorithm, "mu", 0.0) / 2 * v["w"][layer].square().sum()
        for layer in range(self.last):
            gap = v["p"][layer] - v["q"][layer]
            total = total + self.nu / 2 * (v["q"][layer] - self.sigma(v["z"][layer])).square().sum()
            total = total + (v["u"][layer] * gap).sum() + self.rho / 2 * gap.square().sum()
        return total

    def hidden(self, layer):
        q, m, z = self.v["q"][layer], self.product(layer), self.v["z"][layer]
        if self.algorithm.z_rule == "exact":
            self.v["z"][layer] = best_hidden(self.activation, q, [m, z])
            return
        low, high = ((m + z) / 2).clamp(max=0), ((m + z + q) / 3).clamp(min=0)
        values = [(u - m).square() + (q - self.sigma(u)).square() for u in (low, high)]
        self.v["z"][layer] = torch.where(values[0] < values[1], low, high)

    def sweep(self):
        for layer in range(self.last):
            self.descend("p", layer)
        for layer in range(self.last + 1):
            self.descend("w", layer)
        for layer in range(self.last + 1):
            self.bias(layer)
        for layer in range(self.last):
            self.hidden(layer)
        self.v["z"][-1] = best_output(self.loss, self.product(self.last), self.nu, self.y)
        for layer in range(self.last):
            self.minimise("q", layer)
        for layer in range(self.last):
            self.v["u"][layer] = self.v["u"][layer] + self.rho * (self.v["p"][layer] - self.v["q"][layer])


def begin(algorithm, net, x, y, loss, noise=0.0):
    """Chain and state; with noise no constraint holds at the start."""
    chain = Chain(net)
    algorithm.check(chain, loss)
    state = algorithm.start(chain, x, y, Alone())
    if noise:
        generator = torch.Generator().manual_seed(3)
        for name, tensors in state.variables.items():
            for tensor in tensors if name != "m" else ():
                tensor.add_(noise * torch.randn(tensor.shape, generator=generator, dtype=F64))
        with torch.no_grad():
            algorithm.refresh(chain, state)
    return chain, state


def sweeps_equal_the_equations(kind, algorithm, activation, bias, loss_name):
    x, y, loss = problem(13, 6, 3, loss_name)
    chain, state = begin(algorithm, network((6, 8, 5, 3), activation, bias), x, y, loss, noise=0.5)
    naive = kind(algorithm, chain, state, loss_name, activation)
    start = [w.clone() for w in naive.v["w"]]
    for _ in range(3):
        naive.sweep()
        report = algorithm.sweep(chain, state, loss, Alone())
        found = {name: tensors for name, tensors in state.variables.items() if name != "m"}
        found["w"] = [stage.weight.detach() for stage in chain]
        if bias:
            found["b"] = [stage.bias.detach() for stage in chain]
        for name, tensors in found.items():
            for layer, tensor in enumerate(tensors):
                torch.testing.assert_close(tensor, naive.v[name][layer], rtol=1e-8, atol=1e-9)
        assert float(report.objective) == pytest.approx(float(naive.lagrangian()), rel=1e-9)
        assert float(report.objective) == pytest.approx(float(algorithm.objective(chain, state, loss)), rel=1e-10)
    return [float((a - b).abs().max()) for a, b in zip(start, naive.v["w"], strict=True)]


ACTIVATIONS = ["ReLU", "LeakyReLU", "Tanh"]
LOSSES = ["squared", "cross_entropy", "hinge"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("step", ["exact", "backtracking"])
def test_a_sweep_of_dladmm_equals_the_equations(step, activation, bias, loss):
    algorithm = DLADMM(rho=1.3, nu=0.7, step=step, search_start=0.3)
    assert min(sweeps_equal_the_equations(NaiveDLADMM, algorithm, activation, bias, loss)) > 1e-2


PDADMM_CASES = {
    "exact": (PDADMM, {}),
    "backtracking": (PDADMM, {"step": "backtracking", "search_start": 0.7}),
    "steps left out": (PDADMM, {"step": "backtracking", "search_start": 5e-3}),
    "ridge": (PDADMMG, {"mu": 0.4}),
    "ridge, backtracking": (PDADMMG, {"mu": 0.4, "step": "backtracking", "search_start": 0.7}),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", PDADMM_CASES)
def test_a_sweep_of_pdadmm_equals_the_equations(case, activation, bias, loss):
    kind, options = PDADMM_CASES[case]
    algorithm = kind(rho=1.9, nu=0.6, **options)
    moved = sweeps_equal_the_equations(NaivePDADMM, algorithm, activation, bias, loss)
    assert (min(moved) == 0) == (case == "steps left out")
    if activation == "ReLU":
        algorithm = kind(rho=1.9, nu=0.6, z_rule="reference", **options)
        sweeps_equal_the_equations(NaivePDADMM, algorithm, activation, bias, loss)


def objectives(algorithm, activation="ReLU", loss="cross_entropy", sweeps=40, noise=0.0, samples=20):
    x, y, loss = problem(samples, 6, 3, loss)
    chain, state = begin(algorithm, network((6, 8, 5, 3), activation), x, y, loss, noise)
    return [float(algorithm.sweep(chain, state, loss, Alone()).objective) for _ in range(sweeps)]


PAIRS = [("ReLU", "squared"), ("ReLU", "cross_entropy"), ("LeakyReLU", "hinge"), ("Tanh", "cross_entropy")]


def never_rises(values):
    return all(b <= a + 1e-12 * abs(a) for a, b in pairwise(values)) and values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(("activation", "loss"), PAIRS)
@pytest.mark.parametrize("step", ["exact", "backtracking", "lipschitz"])
def test_the_lagrangian_of_dladmm_falls_from_some_sweep_on(step, activation, loss):
    assert never_rises(objectives(DLADMM(rho=10.0, step=step), activation, loss))
    assert never_rises(objectives(DLADMM(rho=1.0, step=step), activation, loss, noise=0.3)[15:])


@pytest.mark.parametrize(("activation", "loss"), PAIRS)
@pytest.mark.parametrize("step", ["exact", "lipschitz"])
def test_the_lagrangian_of_pdadmm_falls_from_some_sweep_on_where_rho_exceeds_four_nu(step, activation, loss):
    assert never_rises(objectives(PDADMM(rho=2.0, nu=0.4, step=step), activation, loss))
    algorithm = PDADMMG(rho=0.5, nu=0.1, mu=0.01, step=step)
    assert never_rises(objectives(algorithm, activation, loss, noise=0.3)[15:])


EVERY = {
    "dladmm": DLADMM(rho=1.3, nu=0.7),
    "dladmm, mean": DLADMM(rho=1.3, nu=0.7, reduction="mean"),
    "pdadmm": PDADMM(rho=1.3, nu=0.3),
    "pdadmm_g": PDADMMG(rho=1.3, nu=0.3, mu=0.2, reduction="mean", step="lipschitz"),
    "pdadmm_g_q": PDADMMGQ(rho=1.3, nu=0.3, bits=4, quantize="both", mu=0.1),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_report_is_the_objective_and_residuals_are_root_mean_squares(name):
    algorithm = EVERY[name]
    x, y, loss = problem(17, 6, 3)
    chain, state = begin(algorithm, network((6, 8, 5, 3), "LeakyReLU"), x, y, loss)
    for sweep in range(4):
        report = algorithm.sweep(chain, state, loss, Alone())
        assert float(report.objective) == pytest.approx(float(algorithm.objective(chain, state, loss)), rel=1e-10)
        assert report.objective.dtype == F64
        of_stages = torch.stack([report.of_stage(layer) for layer in range(3)]).sum()
        torch.testing.assert_close(report.data_fit + of_stages, report.objective)
        v = state.variables
        inputs = [x, *v["a" if "a" in v else "p"]]
        outputs = v["a" if "a" in v else "q"]
        with torch.no_grad():
            linear = [z - stage.forward(a) for z, stage, a in zip(v["z"], chain, inputs, strict=True)]
        images = [stage.activation(z) for stage, z in zip(chain, v["z"], strict=True)][:-1]
        errors = {"linear": linear, "activation": [a - image for a, image in zip(outputs, images, strict=True)]}
        if "p" in v:
            errors["consensus"] = [p - q for p, q in zip(v["p"], v["q"], strict=True)]
        assert set(errors) == set(report.residuals)
        for key, tensors in errors.items():
            wanted = torch.tensor([float(t.square().mean().sqrt()) for t in tensors], dtype=F64)
            found = torch.stack(report.residuals[key])
            torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-9, atol=1e-12)
            assert not found[len(wanted) :].any()
            # On a grid P and Q may agree.
            assert sweep == 0 or key == "consensus" or wanted.max() > 1e-6


def products(widths, samples):
    return [2 * a * b * samples for a, b in pairwise(widths)]


@pytest.mark.parametrize("kind", [DLADMM, PDADMM, PDADMMGQ])
def test_a_sweep_multiplies_no_more_than_announced(kind):
    widths, samples = (12, 17, 9, 13, 4), 50
    x, y, loss = problem(samples, widths[0], widths[-1])
    algorithm = kind(rho=0.5)
    chain, state = begin(algorithm, network(widths), x, y, loss)
    first, *others = products(widths, samples)
    wanted = 4 * first + 8 * sum(others) if kind is DLADMM else 2 * first + 4 * sum(others)
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            algorithm.sweep(chain, state, loss, Alone())
        # The largest eigenvalue of WᵀW, which a projected step needs, takes matrices times vectors.
        assert 0.99 * wanted <= counter.get_total_flops() <= (1.15 if kind is PDADMMGQ else 1) * wanted


@pytest.mark.parametrize(("restart_every", "momentum"), [(1, 0.0), (1, 0.9), (None, 0.9)])
def test_restarts_and_momentum_take_one_product_per_layer(restart_every, momentum):
    widths, samples = (12, 17, 9, 13, 4), 50
    x, y, loss = problem(samples, widths[0], widths[-1])
    chain, state = begin(
        algorithm := DLADMM(rho=0.5, restart_every=restart_every, momentum=momentum), network(widths), x, y, loss
    )
    first, *others = products(widths, samples)
    for sweep in range(3):
        with FlopCounterMode(display=False) as counter:
            algorithm.sweep(chain, state, loss, Alone())
        wanted = 4 * first + 8 * sum(others) + (first + sum(others) if sweep else 0)
        assert 0.99 * wanted <= counter.get_total_flops() <= wanted


def moved(algorithm, sweeps=20):
    x, y, loss = problem(40, 6, 3)
    net = network((6, 8, 5, 3))
    before = [p.detach().clone() for p in net.parameters() if p.ndim == 2]
    chain, state = begin(algorithm, net, x, y, loss)
    for _ in range(sweeps):
        algorithm.sweep(chain, state, loss, Alone())
    after = [p.detach() for p in net.parameters() if p.ndim == 2]
    return [float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("kind", [DLADMM, PDADMM, PDADMMG])
def test_exact_steps_move_every_layer_where_the_published_search_leaves_the_lower_ones(kind):
    for rho in (1e-6, 1e-3, 1.0):
        assert min(moved(kind(rho=rho))) > 1e-2
    published = moved(kind(rho=1e-6, step="backtracking"))
    assert published[0] < 1e-12
    assert published[1] < 1e-7
    assert published[2] > 100 * published[1]


@pytest.mark.parametrize("kind", [DLADMM, PDADMM])
def test_the_output_starts_as_asked(kind):
    x, y, loss = problem(15, 6, 3)
    net = network((6, 8, 3))
    wanted = {"forward": net(x).detach(), "labels": 2 * y - 1, "zeros": torch.zeros_like(y)}
    for init_output, output in wanted.items():
        chain, state = begin(kind(init_output=init_output), net, x, y, loss)
        torch.testing.assert_close(state.variables["z"][-1], output)
        torch.testing.assert_close(state.variables["z"][0], chain[0].forward(x).detach())
        torch.testing.assert_close(state.variables["m"][-1], net(x).detach())
        assert not state.variables["u"][0].any()
    assert kind(preset="reference").init_output == ("labels" if kind is DLADMM else "zeros")


# -- the published schedule of ρ ----------------------------------------------------------------------------------


class Costs:
    """A loss whose values are given."""

    def __init__(self, costs):
        self.costs = iter(costs)

    def value(self, v, y):
        return torch.tensor(next(self.costs) * len(v), dtype=F64)


def scheduled(kind, costs, rho):
    """The rule, as the papers' codes have it."""
    patience, limit = (3, 0.1) if kind is DLADMM else (2, 1.0)
    last, count, found = None, 0, []
    for cost in costs:
        stalled = last is not None and (cost > last if kind is DLADMM else cost > last - 1e-3)
        count, last = count + 1 if stalled else 0, cost
        if count == patience:
            count = 0
            if rho < limit:
                rho = min(10 * rho, limit)
        found.append(rho)
    return found


@pytest.mark.parametrize("kind", [DLADMM, PDADMM, PDADMMG, PDADMMGQ])
def test_rho_rises_tenfold_exactly_when_the_published_rule_says_so(kind):
    x, y, loss = problem(8, 6, 3)
    raised = []
    for seed, rho in enumerate([1e-6, 3e-4, 0.03, 0.5]):
        generator = torch.Generator().manual_seed(seed)
        up_and_down = 5 + 0.1 * torch.randn(60, generator=generator, dtype=F64).cumsum(0)
        slow = 3 - (2e-3 * torch.rand(60, generator=generator, dtype=F64)).cumsum(0)  # on both sides of 0.001
        costs = (slow if seed % 2 else up_and_down).tolist()
        algorithm = kind(rho=rho, rho_schedule="published")
        chain, state = begin(algorithm, network((6, 5, 3)), x, y, loss)
        fake = Costs(costs)
        found = []
        for sweep in range(60):
            if sweep == 31:  # a checkpoint hands on the velocity alone
                state = algorithm.start(chain, x, y, Alone(), {k: v.clone() for k, v in state.velocity.items()})
            penalties = algorithm.penalties(chain, state, fake, Alone())
            assert penalties[0] == penalties[1]
            found.append(penalties[0])
        assert found == scheduled(kind, costs, rho)
        raised.append(len(set(found)))
    assert max(raised) > 2


@pytest.mark.parametrize("kind", [DLADMM, PDADMM])
def test_rho_stays_below_its_cap_and_is_never_lowered_to_it(kind):
    x, y, loss = problem(8, 6, 3)
    cap = 0.1 if kind is DLADMM else 1.0
    for rho in (0.02, 0.1, 1.0, 7.0):
        algorithm = kind(rho=rho, rho_schedule="published", nu=0.3)
        chain, state = begin(algorithm, network((6, 5, 3)), x, y, loss)
        found = [algorithm.penalties(chain, state, Costs([5.0 + sweep]), Alone()) for sweep in range(20)]
        assert found[0] == (rho, 0.3)
        assert found[-1] == (max(rho, cap), 0.3)


def test_a_raised_rho_is_used_in_the_sweep_and_raises_the_search_start_of_dladmm_alone():
    x, y, loss = problem(20, 6, 3)
    for kind, factor in ((DLADMM, 10.0), (PDADMM, 1.0)):
        options = {"step": "backtracking", "search_start": 0.01, "nu": 0.004}
        raised = kind(rho=0.005, rho_schedule=lambda sweep, rho: 10 * rho, **options)
        plain = kind(rho=0.05, **(options | {"search_start": 0.01 * factor}))
        results = []
        for algorithm in (raised, plain):
            net = network((6, 5, 3))
            chain, state = begin(algorithm, net, x, y, loss, noise=0.3)
            values = [float(algorithm.sweep(chain, state, loss, Alone()).objective) for _ in range(3)]
            results.append([torch.tensor(values, dtype=F64), *(p.detach() for p in net.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_schedule_is_given_the_sweep_and_the_first_rho_and_must_return_a_positive_number():
    x, y, loss = problem(8, 6, 3)
    seen = []

    def schedule(sweep, rho):
        seen.append((sweep, rho))
        return 1.0 if sweep < 2 else -1.0

    algorithm = PDADMM(rho=0.25, rho_schedule=schedule)
    chain, state = begin(algorithm, network((6, 5, 3)), x, y, loss)
    for _ in range(2):
        algorithm.sweep(chain, state, loss, Alone())
    with pytest.raises(ValueError, match=r"`rho_schedule`.*got -1.0 in sweep 2"):
        algorithm.sweep(chain, state, loss, Alone())
    assert seen == [(0, 0.25), (1, 0.25), (2, 0.25)]


# -- ridge, mean, products ----------------------------------------------------------------------------------------


def weights_after(algorithm, sweeps=30, samples=40):
    x, y, loss = problem(samples, 6, 3)
    net = network((6, 8, 5, 3))
    chain, state = begin(algorithm, net, x, y, loss)
    for _ in range(sweeps):
        algorithm.sweep(chain, state, loss, Alone())
    return [p.detach() for p in net.parameters()]


def test_a_ridge_penalty_shrinks_the_weights_of_every_layer():
    norms = [
        [float(p.norm()) for p in weights_after(PDADMMG(rho=0.5, nu=0.1, mu=mu)) if p.ndim == 2]
        for mu in (0.0, 0.1, 1.0)
    ]
    assert all(none > some > much for none, some, much in zip(*norms, strict=True))


def test_without_ridge_pdadmm_g_is_pdadmm():
    for a, b in zip(weights_after(PDADMM(rho=0.5)), weights_after(PDADMMG(rho=0.5, mu=0.0)), strict=True):
        assert torch.equal(a, b)


def test_the_mean_is_the_sum_with_mu_times_the_number_of_samples():
    for step in ("exact", "backtracking", "lipschitz"):
        options = {"rho": 0.5, "nu": 0.1, "step": step, "search_start": 0.1}
        mean = weights_after(PDADMMG(mu=0.01, reduction="mean", **options))
        total = weights_after(PDADMMG(mu=0.01 * 40, **options))
        other = weights_after(PDADMMG(mu=0.01, **options))
        for a, b, c in zip(mean, total, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            assert not torch.allclose(a, c, rtol=1e-4)
    for a, b in zip(weights_after(DLADMM(rho=1.0)), weights_after(DLADMM(rho=1.0, reduction="mean")), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_products_carried_along_equal_fresh_ones(name):
    algorithm = EVERY[name]
    x, y, loss = problem(30, 6, 3)
    chain, state = begin(algorithm, network((6, 8, 5, 3)), x, y, loss, noise=0.3)
    for sweep in range(45):
        algorithm.sweep(chain, state, loss, Alone())
        if sweep in (18, 24, 44):
            v = state.variables
            for m, stage, inputs in zip(v["m"], chain, [x, *v["a" if "a" in v else "p"]], strict=True):
                with torch.no_grad():
                    torch.testing.assert_close(m, stage.forward(inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_every_twenty_sweeps_rounding_is_wiped_out(name):
    algorithm = EVERY[name]
    x, y, loss = problem(30, 6, 3)
    results = []
    for spoilt in (False, True):
        net = network((6, 8, 5, 3))
        chain, state = begin(algorithm, net, x, y, loss)
        for sweep in range(22):
            if sweep == 20 and spoilt:
                for m in state.variables["m"]:
                    m.add_(1.0)
            algorithm.sweep(chain, state, loss, Alone())
        results.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- quantised ----------------------------------------------------------------------------------------------------

GRIDS = [{"bits": 2}, {"bits": 8}, {"grid": (-1.0, 20.0, 22)}, {"grid": (-1.0, 2.0, 1000)}, {"grid": (0.1, 1.7, 5)}]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("quantize", ["p", "q", "both"])
def test_quantised_variables_lie_on_the_grid_after_every_sweep(quantize, grid):
    algorithm = PDADMMGQ(rho=1.0, nu=0.2, quantize=quantize, **grid)
    x, y, loss = problem(25, 6, 3)
    net = network((6, 8, 5, 3), "LeakyReLU")
    chain, state = begin(algorithm, net, x, y, loss)
    if "bits" in grid:
        outputs = [v for _, v in chain.forward(x)][:-1]
        low, high = (float(f(torch.stack([f(v) for v in outputs]))) for f in (torch.min, torch.max))
        fixed = state.velocity["grid"].tolist()
        assert fixed == pytest.approx([2 * low - high, 2 * high - low], rel=1e-12)
        penalty = UniformGrid(*fixed, 2 ** grid["bits"])
    else:
        penalty = UniformGrid(*grid["grid"])
    snapped = {"both": "pq"}.get(quantize, quantize)
    for sweep in range(8):
        for name in "pq":
            on_grid = [torch.equal(t, penalty.prox(t, 1.0)) for t in state.variables[name]]
            assert on_grid == [name in snapped] * 2, (sweep, name)
        for name in snapped:
            assert all(len(t.unique()) <= penalty.levels for t in state.variables[name])
        algorithm.sweep(chain, state, loss, Alone())
        if "bits" in grid:
            assert state.velocity["grid"].tolist() == fixed


@pytest.mark.parametrize("quantize", ["p", "both"])
def test_a_quantised_step_of_p_never_raises_its_sub_problem(quantize, monkeypatch):
    """ν/2 ‖Z − PWᵀ − 1bᵀ‖² + ⟨U, P − Q⟩ + ρ/2 ‖P − Q‖²."""
    steps = []

    def value(sweep, layer):
        v, stage, below = sweep.state.variables, sweep.chain[layer], layer - 1
        gap = v["p"][below] - v["q"][below]
        error = v["z"][layer] - stage.forward(v["p"][below])
        return float(sweep.nu / 2 * error.square().sum() + (v["u"][below] * gap + sweep.rho / 2 * gap**2).sum())

    plain = pdadmm.Sweep.update_p

    def watched(sweep, layer):
        before, old = value(sweep, layer), sweep.p[layer - 1].clone()
        plain(sweep, layer)
        steps.append((before, value(sweep, layer), not torch.equal(old, sweep.p[layer - 1])))

    monkeypatch.setattr(pdadmm.Sweep, "update_p", watched)
    for bits in (4, 6, 10, 14):
        for rho, nu in ((1.0, 0.2), (0.1, 0.5), (1.0, 30.0)):
            algorithm = PDADMMGQ(rho=rho, nu=nu, quantize=quantize, bits=bits)
            objectives(algorithm, sweeps=6)
            x, y, loss = problem(20, 6, 3, "squared")
            chain, state = begin(algorithm, network((6, 8, 5, 3), "Tanh"), x, y, loss)
            state.variables["u"][0].add_(torch.randn(20, 8, generator=torch.Generator().manual_seed(1), dtype=F64))
            for _ in range(4):
                algorithm.sweep(chain, state, loss, Alone())
    assert all(after <= before + 1e-11 * (1 + abs(before)) for before, after, _ in steps)
    assert sum(changed for *_, changed in steps) > len(steps) / 2


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("levels", [*(2**bits for bits in range(1, 17)), 3, 22, 1000, 257])
def test_packed_values_come_out_to_the_last_bit(levels, dtype):
    generator = torch.Generator().manual_seed(levels)
    for low, high in ((-1.0, 2.0), (0.0, 0.37), (-0.013, 41.7)):
        grid = UniformGrid(low, high, levels)
        codec = GridCodec(grid)
        assert codec.bits == math.ceil(math.log2(levels))
        for shape in ((1, 1), (3, 1), (7, 5), (8, 8), (31, 13)):
            values = grid.prox((low + (high - low) * torch.rand(shape, generator=generator)).to(dtype), 1.0)
            values.view(-1)[0], values.view(-1)[-1] = grid.prox(torch.tensor([low, high], dtype=dtype), 1.0)
            message = codec.encode(values)
            assert message.dtype == torch.uint8
            assert len(message) == codec.size(values.numel()) == math.ceil(values.numel() * codec.bits / 8)
            out = torch.full_like(values, torch.nan)
            codec.decode(message, out)
            assert torch.equal(out, values)


def test_a_grid_finer_than_its_numbers_still_comes_out():
    """Rounding may put the last level more than half a spacing too high."""
    grid = UniformGrid(1000.0, 1000.0003, 256)
    values = grid.prox(torch.linspace(1000.0, 1000.0003, 100).view(10, 10), 1.0)
    out = torch.empty_like(values)
    codec = GridCodec(grid)
    codec.decode(codec.encode(values), out)
    assert torch.equal(out, values)


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "offload": (DLADMM, {"offload": True}, "`offload`"),
    "storage": (PDADMM, {"storage_dtype": "bfloat16"}, "`storage_dtype`"),
    "rho": (DLADMM, {"rho": 0.0}, "`rho`.*positive.*got 0.0"),
    "rho infinite": (PDADMM, {"rho": math.inf}, "`rho`.*got inf"),
    "rho nan": (PDADMM, {"rho": math.nan}, "`rho`.*got nan"),
    "nu": (DLADMM, {"nu": -1.0}, "`nu`.*got -1.0"),
    "search start": (DLADMM, {"search_start": 0.0}, "`search_start`"),
    "mu": (PDADMMG, {"mu": -0.1}, "`mu`.*got -0.1"),
    "mu nan": (PDADMMG, {"mu": math.nan}, "`mu`"),
    "step": (DLADMM, {"step": "armijo"}, "`step`.*armijo"),
    "solver": (DLADMM, {"output_solver": "sgd"}, "`output_solver`"),
    "start": (PDADMM, {"init_output": "ones"}, "`init_output`"),
    "reduction": (PDADMM, {"reduction": "max"}, "`reduction`"),
    "schedule": (PDADMM, {"rho_schedule": "linear"}, "`rho_schedule`"),
    "preset": (DLADMM, {"preset": "best"}, "`preset`"),
    "z_rule": (PDADMM, {"z_rule": "other"}, "`z_rule`"),
    "quantize": (PDADMMGQ, {"quantize": "z"}, "`quantize`"),
    "two grids": (PDADMMGQ, {"bits": 4, "grid": (0.0, 1.0, 4)}, "`grid` and `bits`"),
    "bits": (PDADMMGQ, {"bits": 0}, "`bits`.*got 0"),
    "many bits": (PDADMMGQ, {"bits": 17}, "`bits`.*got 17"),
    "half bits": (PDADMMGQ, {"bits": 2.5}, "`bits`.*got 2.5"),
    "short grid": (PDADMMGQ, {"grid": (0.0, 1.0)}, "`grid`"),
    "levels": (PDADMMGQ, {"grid": (0.0, 1.0, 1)}, "`grid`.*levels"),
    "many levels": (PDADMMGQ, {"grid": (0.0, 1.0, 2**16 + 1)}, "`grid`.*levels"),
    "empty grid": (PDADMMGQ, {"grid": (1.0, 0.0, 4)}, "`low` to be below `high`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_by_name(name):
    kind, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("kind", [DLADMM, PDADMM, PDADMMG, PDADMMGQ])
def test_networks_and_losses_that_do_not_fit_are_refused(kind):
    squared, cross_entropy = resolve_loss("squared"), resolve_loss("cross_entropy")
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"stages \['0'\] are others. Use ThreeSplitting"):
        kind().check(Chain(convolution), cross_entropy)
    residual = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Residual(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"without skip connections.*ResidualSplitting"):
        kind().check(Chain(residual), cross_entropy)
    plain = Chain(network((4, 3, 2)))
    kind(output_solver="fista").check(plain, cross_entropy)
    with pytest.raises(ValueError, match=r"`output_solver` to be 'newton' with SquaredLoss"):
        kind(output_solver="fista").check(plain, squared)
    if kind is not DLADMM:
        kind(z_rule="reference").check(plain, squared)
        with pytest.raises(ValueError, match=r"ReLU in all hidden stages with z_rule='reference'"):
            kind(z_rule="reference").check(Chain(network((4, 3, 2), "Tanh")), squared)


@pytest.mark.parametrize("name", EVERY)
def test_frozen_stages_stay_bit_identical_and_the_others_move(name):
    algorithm = EVERY[name]
    x, y, loss = problem(20, 6, 3)
    net = network((6, 8, 5, 3))
    stage = Chain(net)[1]
    for parameter in (stage.weight, stage.bias):
        parameter.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    chain, state = begin(algorithm, net, x, y, loss, noise=0.3)
    for _ in range(5):
        report = algorithm.sweep(chain, state, loss, Alone())
        assert float(report.objective) == pytest.approx(float(algorithm.objective(chain, state, loss)), rel=1e-10)
    assert [torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)] == [
        False, False, True, True, False, False,
    ]  # fmt: skip


# -- LiftedModule -------------------------------------------------------------------------------------------------


class Stalling(PDADMMG):
    """Its training loss never counts as progress: ρ rises every second sweep."""

    stalls = staticmethod(lambda cost, last: True)


class RisingDLADMM(DLADMM):
    """Likewise, every third sweep."""

    stalls = staticmethod(lambda cost, last: True)


TRAINED = {
    "dladmm": lambda: DLADMM(rho=0.5, nu=0.3),
    "dladmm, published": lambda: RisingDLADMM(preset="reference", rho=1e-4),
    "dladmm, recommended": lambda: DLADMM(preset="recommended", init="he"),
    "pdadmm": lambda: PDADMM(rho=0.5, nu=0.1, step="lipschitz"),
    "pdadmm_g, published": lambda: Stalling(rho=1e-3, mu=0.01, rho_schedule="published", init="he"),
    "pdadmm_g_q": lambda: PDADMMGQ(rho=0.5, nu=0.1, bits=6, reduction="mean"),
    "mdlam": lambda: MDLAM(rho=0.3, mu=0.01, epsilon=10.0, epsilon_decay=0.7),
}
#: What a run hands on from sweep to sweep, beside the auxiliary variables.
CARRIED = {
    "dladmm, published": {"rho"},
    "dladmm, recommended": {f"{kind}{layer}" for kind in ("gradient", "direction") for layer in range(3)} | set("0123"),
    "pdadmm_g, published": {"rho"},
    "pdadmm_g_q": {"grid"},
    "mdlam": {"t", *"012"},
}


def data(samples=41):
    x, _, _ = problem(samples, 6, 3)
    return x, (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()


def module(name, seed=0, **arguments):
    return LiftedModule(network((6, 8, 5, 3), seed=seed), TRAINED[name](), "cross_entropy", **arguments)


@pytest.mark.parametrize("name", ["dladmm", "pdadmm", "pdadmm_g_q", "mdlam"])
def test_a_trainer_makes_the_sweeps_of_a_plain_loop_and_the_network_learns(name):
    model, plain = module(name), module(name)
    runner = trainer(max_epochs=30)
    runner.fit(model, full_batch(data()))
    x, labels = data()
    state = plain.algorithm.start(plain.chain, x, plain.loss.encode(labels, 3, F64), Alone())
    for _ in range(30):
        report = plain.algorithm.sweep(plain.chain, state, plain.loss, Alone())
    assert same(weights(model.network), weights(plain.network))
    assert torch.equal(model.report.objective, report.objective)
    (result,) = runner.validate(model, full_batch(data()), verbose=False)
    (before,) = runner.validate(module(name), full_batch(data()), verbose=False)
    assert result["val_loss"] < before["val_loss"] - 0.05


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(name, tmp_path):
    whole, part, resumed = (module(name, seed, save_auxiliary=True) for seed in (0, 0, 5))
    batches = full_batch(data())
    torch.manual_seed(2)  # for init="he"
    trainer(max_epochs=24).fit(whole, batches)
    torch.manual_seed(2)
    runner = trainer(max_epochs=7)
    runner.fit(part, batches)
    runner.save_checkpoint(tmp_path / "part.ckpt")
    trainer(max_epochs=24).fit(resumed, batches, ckpt_path=tmp_path / "part.ckpt")
    assert resumed.sweeps == 24
    assert same(weights(resumed.network), weights(whole.network))
    assert torch.equal(resumed.report.objective, whole.report.objective)
    for key, tensors in whole._state.variables.items():
        assert same(tensors, resumed._state.variables[key])
    velocity = whole._state.velocity
    assert set(velocity) == CARRIED.get(name, set())
    for key, tensor in velocity.items():
        assert torch.equal(tensor, resumed._state.velocity[key])
    if "rho" in velocity:
        # Neither lost nor counted twice: after 23 stalls ρ is at its cap.
        assert float(velocity["rho"][0]) == (0.1 if name.startswith("dl") else 1.0)


def test_the_grid_of_a_checkpoint_is_that_of_the_first_forward_pass(tmp_path):
    model, resumed = (module("pdadmm_g_q", seed, save_auxiliary=True) for seed in (0, 5))
    x, _ = data()
    outputs = [v for _, v in model.chain.forward(x)][:-1]
    wanted = [min(float(v.min()) for v in outputs), max(float(v.max()) for v in outputs)]
    runner = trainer(max_epochs=5)
    runner.fit(model, full_batch(data()))
    runner.save_checkpoint(tmp_path / "part.ckpt")
    trainer(max_epochs=6).fit(resumed, full_batch(data()), ckpt_path=tmp_path / "part.ckpt")
    span = wanted[1] - wanted[0]
    assert model._state.velocity["grid"].tolist() == resumed._state.velocity["grid"].tolist()
    assert model._state.velocity["grid"].tolist() == pytest.approx([wanted[0] - span, wanted[1] + span], rel=1e-12)


# -- two processes that share the samples -------------------------------------------------------------------------


def exact_output(model):
    """FISTA ends when the loss of a process's own samples changes little: it depends on how they are shared."""
    model.algorithm = replace(model.algorithm, output_solver="newton")
    return model


def shared(rank, directory):
    found = {}
    for name in TRAINED:
        torch.manual_seed(2)
        model = exact_output(module(name, seed=rank, save_auxiliary=True))
        runner = trainer(max_epochs=6, devices=2, strategy="ddp")
        runner.fit(model, full_batch(data()))
        runner.save_checkpoint(directory / f"{name}.ckpt")
        rows = {key: [t.clone() for t in tensors] for key, tensors in model._state.variables.items()}
        found[name] = weights(model.network), float(model.report.objective), rows, model._state.velocity
    return found


def test_two_processes_equal_one(tmp_path):
    first, second = run_processes(shared, tmp_path)
    for name, (found, objective, rows, velocity) in first.items():
        other, other_objective, other_rows, other_velocity = second[name]
        assert same(found, other)
        assert objective == other_objective
        assert {key: t.tolist() for key, t in velocity.items()} == {k: t.tolist() for k, t in other_velocity.items()}
        torch.manual_seed(2)
        model = exact_output(module(name))
        trainer(max_epochs=6).fit(model, full_batch(data()))
        for a, b in zip(found, weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert objective == pytest.approx(float(model.report.objective), rel=1e-9)
        for key, tensors in model._state.variables.items():
            for layer, tensor in enumerate(tensors):
                shards = [rows[key][layer], other_rows[key][layer]]
                assert [len(t) for t in shards] == [20, 21]
                torch.testing.assert_close(torch.cat(shards), tensor, rtol=1e-8, atol=1e-9)
        resumed = exact_output(module(name, seed=5, save_auxiliary=True))
        trainer(max_epochs=9).fit(resumed, full_batch(data()), ckpt_path=tmp_path / f"{name}.ckpt")
        trainer(max_epochs=3).fit(model, full_batch(data()))
        for a, b in zip(weights(resumed.network), weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [0, 2])
def test_conjugate_steps_end_at_least_squares_and_never_rise(bias, layer):
    x, y, loss = problem(60, 6, 3)
    x = x + 2  # far from centred, as features of ReLU are
    algorithm = DLADMM(rho=0.3, nu=1.2, direction="conjugate")
    chain, state = begin(algorithm, network([6, 8, 7, 3], bias=bias), x, y, loss, noise=0.5)
    sweep = dladmm.Sweep(algorithm, chain, state, loss, Alone(), 0.3, 1.2)
    values = []
    with torch.no_grad():
        for _ in range(9):  # as many as a fixed quadratic of this size needs, and one more
            values.append(float(algorithm.objective(chain, state, loss)))
            sweep.update_w(layer)
        inputs = state.variables["a"][layer - 1] if layer else x
        columns = torch.cat([inputs, torch.ones(60, 1, dtype=F64)], 1) if bias else inputs
        target = sweep.target(layer)[0]
        best = target - columns @ torch.linalg.pinv(columns) @ target
        torch.testing.assert_close(target - state.variables["m"][layer], best, rtol=0, atol=1e-8)
        torch.testing.assert_close(state.variables["m"][layer], chain[layer].forward(inputs), rtol=0, atol=1e-11)
    assert all(after <= before + 1e-12 for before, after in pairwise(values))
    assert values[0] - values[-1] > 1e-3


def test_conjugate_steps_need_exact_lengths():
    with pytest.raises(ValueError, match="`step` to be 'exact' with direction='conjugate', but got 'lipschitz'"):
        DLADMM(direction="conjugate", step="lipschitz")
    with pytest.raises(ValueError, match="`direction` to be one of"):
        DLADMM(direction="newton")


@pytest.mark.parametrize("restart_every", [None, 1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_restarts_keep_the_dual_and_momentum_moves_hidden_weights_on(restart_every, momentum):
    x, y, loss = problem(30, 6, 3)
    algorithm, plain = DLADMM(rho=0.5, restart_every=restart_every, momentum=momentum), DLADMM(rho=0.5)
    chain, state = begin(algorithm, network((6, 8, 5, 3)), x, y, loss)
    other, expected = begin(plain, network((6, 8, 5, 3)), x, y, loss)
    hidden = [p for stage in list(other)[:-1] for p in (stage.weight, stage.bias)]
    velocity = [torch.zeros_like(p) for p in hidden]
    for sweep in range(6):
        algorithm.sweep(chain, state, loss, Alone())
        if sweep and restart_every is not None and sweep % restart_every == 0:
            fresh = plain.start(other, x, y, Alone())
            fresh.variables["u"] = expected.variables["u"]
            expected = fresh
        before = [p.detach().clone() for p in hidden]
        plain.sweep(other, expected, loss, Alone())
        with torch.no_grad():
            for p, old, v in zip(hidden, before, velocity, strict=True):
                v.mul_(momentum).add_(p - old)
                p.copy_(old + v)
            inputs = [x, *expected.variables["a"]]
            for m, stage, a in zip(expected.variables["m"], other, inputs, strict=True):
                m.copy_(stage.forward(a))
        for a, b in zip(weights_of(chain), weights_of(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.variables["u"][0], expected.variables["u"][0], rtol=1e-10, atol=1e-12)
    assert state.variables["u"][0].abs().max() > 1e-3


def weights_of(chain):
    return [p.detach() for stage in chain for p in (stage.weight, stage.bias)]


def test_recommended_settings_of_dladmm_learn_hidden_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator, dtype=F64)
    labels = (x[:, 0] * x[:, 1] > 0).long()  # no linear model does better than chance
    loss, net = CrossEntropyLoss(), network((5, 40, 40, 2))
    algorithm = DLADMM(preset="recommended")
    chain = Chain(net)
    algorithm.initialise(chain, x, Alone())
    state = algorithm.start(chain, x, loss.encode(labels, 2, F64), Alone())
    for _ in range(100):
        algorithm.sweep(chain, state, loss, Alone())
    with torch.no_grad():
        assert float((net(x).argmax(1) == labels).double().mean()) > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restart_every": 0}, "`restart_every` to be None or at least 1, but got 0"),
        ({"momentum": 1.0}, r"`momentum` to be in \[0, 1\), but got 1.0"),
    ],
)
def test_bad_accelerations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DLADMM(**arguments)
