from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bcd.lifted.algorithm import Alone
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.layers import Abs, Residual, Sign
from lightning_bcd.lifted.residual import ResidualSplitting
from lightning_bcd.lifted.three_splitting import ThreeSplitting
from lightning_bcd.prox import L1, ElasticNet, NonNegative, Ridge, resolve_loss

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden runs are not part of a clone")
F64 = torch.float64


def network(widths, activation=nn.ReLU, seed=0, bias=True, residual=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = []
        for i, (a, b) in enumerate(pairwise(widths)):
            stage = [nn.Linear(a, b, bias=bias)]
            if i < len(widths) - 2:
                stage.append(activation())
            modules += [Residual(*stage)] if residual and a == b else stage
        return nn.Sequential(*modules).double()


def problem(samples, features, outputs, loss, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator, dtype=F64)
    labels = torch.randint(outputs, (samples,), generator=generator)
    return x, loss.encode(labels, outputs, F64)


def golden(name):
    """Network, data and the stored arrays of a published run."""
    data = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    depth = len(data["dims"]) - 1
    widths = [data["w1_0"].shape[1]] + [data[f"w{i}_0"].shape[0] for i in range(1, depth + 1)]
    net = network(widths)
    for i, stage in enumerate(Chain(net), start=1):
        stage.weight.data.copy_(data[f"w{i}_0"])
        stage.bias.data.copy_(data[f"b{i}_0"])
    y = nn.functional.one_hot(data["y"], widths[-1]).to(F64)
    return net, data, data["x"], y


@needs_golden
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("name", ["three_splitting_a", "three_splitting_b"])
def test_sweeps_equal_the_published_code(name, chunk_size):
    net, data, x, y = golden(name)
    numbers = {key: float(data[key]) for key in ("gamma", "rho", "alpha")}
    algorithm = ThreeSplitting(**numbers, bias_update="reference", chunk_size=chunk_size)
    chain, loss = Chain(net), resolve_loss("squared")
    state = algorithm.start(chain, x, y, Alone())
    assert algorithm.objective(chain, state, loss) == pytest.approx(float(data["objective"][0]), rel=1e-10)
    for sweep in range(1, 11):
        report = algorithm.sweep(chain, state, loss, Alone())
        expected = float(data["objective"][sweep])
        assert float(report.objective) == pytest.approx(expected, rel=1e-9)
        if sweep not in (1, 2, 10):
            continue
        for i, stage in enumerate(chain):
            found = (stage.weight, stage.bias, state.variables["v"][i], state.variables["u"][i])
            for letter, value in zip("wbvu", found, strict=True):
                torch.testing.assert_close(value.detach(), data[f"{letter}{i + 1}_{sweep}"], rtol=1e-8, atol=1e-8)
