"""dlADMM, pdADMM and its variants against published runs, naive loops and their own definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bcd import DLADMM, MLP, PDADMMG, PDADMMGQ
from lightning_bcd.communicator import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.prox import CrossEntropyLoss, resolve_loss

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
