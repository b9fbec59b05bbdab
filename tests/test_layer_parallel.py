"""Layers on several processes: the iterates, the bytes and the errors."""

import pytest
import torch
from toolbox import run_processes, trainer, weights

from lightning_bcd import MLP, PDADMM, PDADMMG, PDADMMGQ, LiftedModule, full_batch
from lightning_bcd.distributed.exchange import LayerGroups

SAMPLES, WIDTH = 30, 8


def samples(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()


def module(algorithm, seed=0, dtype=torch.float64, layers=5, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLP([6, *[WIDTH] * (layers - 1), 3]).to(dtype)
    return LiftedModule(network, algorithm, "cross_entropy", **arguments)


ALGORITHMS = {
    "exact": lambda: PDADMM(rho=0.1),
    "ridge": lambda: PDADMMG(rho=0.1, mu=0.01, nu=0.02, step="lipschitz"),
    "published": lambda: PDADMM(preset="reference", rho=1e-3, output_solver="newton"),
    "quantized": lambda: PDADMMGQ(rho=0.1, bits=5, quantize="both"),
    "quantized_q": lambda: PDADMMGQ(rho=0.1, grid=(-1.0, 20.0, 22), quantize="q"),
}


def evaluation(model):
    outputs = model(samples()[0])
    return [p.detach().clone() for p in model.network.parameters()], outputs.detach()


def layer_parallel(rank, directory):
    found = {}
    for name, make in ALGORITHMS.items():
        model = module(make(), save_auxiliary=True)
        runner = layered(max_epochs=4)
        runner.fit(model, full_batch(samples()))
        comm = model._comm
        assert isinstance(comm, LayerGroups)
        runner.save_checkpoint(directory / f"{name}.ckpt")
        resumed = module(make(), save_auxiliary=True, seed=7)
        layered(max_epochs=6).fit(resumed, full_batch(samples()), ckpt_path=directory / f"{name}.ckpt")
        layered(max_epochs=2).fit(model, full_batch(samples()))
        held = {key: [len(t) for t in tensors] for key, tensors in model._state.variables.items()}
        found[name] = {
            "weights": weights(model.network),
            "resumed": weights(resumed.network),
            "objective": float(model.report.objective),
            "layers": (comm.layers(5).start, comm.layers(5).stop),
            "held": held,
        }
    return found


def layered(**arguments):
    import os

    return trainer(devices=int(os.environ["WORLD_SIZE"]), strategy="layer_parallel", **arguments)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_that_share_layers_make_the_iterates_of_one(tmp_path, world_size):
    results = run_processes(layer_parallel, tmp_path, world_size)
    for name, make in ALGORITHMS.items():
        model = module(make())
        trainer(max_epochs=4).fit(model, full_batch(samples()))
        trainer(max_epochs=2).fit(model, full_batch(samples()))
        for found in (result[name] for result in results):
            for a, b, c in zip(found["weights"], found["resumed"], weights(model.network), strict=True):
                torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
                assert torch.equal(a, b), name
            assert found["objective"] == pytest.approx(float(model.report.objective), rel=1e-12)
        stages = [stage for result in results for stage in range(*result[name]["layers"])]
        assert stages == list(range(5))
        # No process holds all the auxiliary variables.
        assert all(0 in result[name]["held"]["z"] for result in results)
        # A checkpoint of several processes goes on in one.
        resumed = module(make(), save_auxiliary=True, seed=5)
        trainer(max_epochs=6).fit(resumed, full_batch(samples()), ckpt_path=tmp_path / f"{name}.ckpt")
        for a, b in zip(weights(resumed.network), weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
