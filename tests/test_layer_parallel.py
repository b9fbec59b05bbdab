"""Layers on several processes: the iterates, the bytes and the errors."""

import os
import socket
import time
from datetime import timedelta
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import run_processes, same, trainer, weights
from torch.utils.data import DataLoader, TensorDataset

from lightning_bcd import DLADMM, MLP, PDADMM, PDADMMG, PDADMMGQ, LiftedModule, ThreeSplitting, full_batch
from lightning_bcd.communicator import balanced_groups
from lightning_bcd.distributed.exchange import LayerGroups
from lightning_bcd.distributed.strategy import LayerParallelStrategy

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


#: Algorithm, precision and bytes of a whole P or Q, N × d = 240 numbers, on the wire.
WIRE = {
    "float32": (lambda: PDADMM(rho=0.1), torch.float32, 4 * 240),
    "8 bits": (lambda: PDADMMGQ(rho=0.1, bits=8), torch.float32, 240),
    "4 bits": (lambda: PDADMMGQ(rho=0.1, bits=4), torch.float32, 120),
    "5 bits": (lambda: PDADMMGQ(rho=0.1, bits=5), torch.float64, 150),
    "3 levels": (lambda: PDADMMGQ(rho=0.1, grid=(0.0, 2.0, 3)), torch.float64, 60),
}


def layer_parallel(rank, directory):
    found = {}
    for name, make in ALGORITHMS.items():
        model = module(make(), save_auxiliary=True)
        runner = layered(max_epochs=4)
        runner.fit(model, full_batch(samples()))
        comm = model.communicator
        assert isinstance(comm, LayerGroups)
        sent = comm.sent
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
            "sent": sent,
        }
    if os.environ["WORLD_SIZE"] == "2":
        for part in (bytes_on_the_wire, given_groups, validation, refusals):
            found[part.__name__] = part()
        found["lost"] = lost(rank, directory, found)
    return found


def layered(*callbacks, strategy="layer_parallel", **arguments):
    return trainer(*callbacks, devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, **arguments)


def bytes_on_the_wire():
    found = {}
    for name, (make, dtype, _) in WIRE.items():
        model = module(make(), dtype=dtype)
        layered(max_epochs=3).fit(model, full_batch(samples(dtype)))
        found[name] = model.communicator.sent, weights(model.network)
    return found


def given_groups():
    model = module(PDADMM(rho=0.1))
    layered(max_epochs=4, strategy=LayerParallelStrategy(layers=[1, 4])).fit(model, full_batch(samples()))
    layers = model.communicator.layers(5)
    return [layers.start, layers.stop, model.communicator.sent], weights(model.network)


def loader():
    return DataLoader(TensorDataset(*samples()), batch_size=7)


class Watch(Callback):
    """Notes the validation loss and the checksum of all weights in every epoch."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        total = sum(float(p.detach().abs().sum()) for p in pl_module.network.parameters())
        self.seen.append((float(trainer.callback_metrics["val_loss"]), total))


def validation():
    model, watch = module(PDADMM(rho=0.1)), Watch()
    runner = layered(watch, max_epochs=3, num_sanity_val_steps=0)
    runner.fit(model, full_batch(samples()), loader())
    seen = list(watch.seen)
    outputs = torch.cat(runner.predict(model, loader()))
    return seen, outputs, float(runner.validate(model, loader(), verbose=False)[0]["val_loss"])


def refusals():
    """The messages of fits that must not start."""
    cases = [
        (ThreeSplitting(), "layer_parallel"),
        (DLADMM(), "layer_parallel"),
        *((PDADMM(), LayerParallelStrategy(layers=layers)) for layers in ([2, 2], [5], [0, 5], [1, 2, 2])),
    ]
    found = []
    for algorithm, strategy in cases:
        model = module(algorithm)
        try:
            layered(max_epochs=1, strategy=strategy).fit(model, full_batch(samples()))
        except MisconfigurationException as error:
            found.append((str(error), model.sweeps))
    return found


class Leave(Callback):
    """Process 1 ends without a word before the third sweep."""

    def __init__(self, path, found):
        self.path, self.found, self.began = path, found, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            if trainer.global_rank == 1:
                torch.save(self.found, self.path)
                os._exit(0)
            self.began = time.monotonic()


def lost(rank, directory, found):
    """The error of process 0, and after how many seconds it came."""
    port = [None]
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = [probe.getsockname()[1]]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()  # the next one has another timeout
    os.environ["MASTER_PORT"] = str(port[0])
    leave = Leave(directory / "1.pt", found)
    save = ModelCheckpoint(directory, filename="{step}", save_top_k=-1)
    strategy = LayerParallelStrategy(timeout=timedelta(seconds=20))
    model = module(ALGORITHMS["quantized"](), save_auxiliary=True)
    runner = layered(leave, save, max_epochs=6, strategy=strategy, enable_checkpointing=True)
    try:
        runner.fit(model, full_batch(samples()))
    except RuntimeError as error:
        return str(error), time.monotonic() - leave.began, model.sweeps
    return None


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    return directory, run_processes(layer_parallel, directory, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    directory = tmp_path_factory.mktemp("four")
    return directory, run_processes(layer_parallel, directory, 4)


@pytest.mark.parametrize("world_size", ["two", "four"])
def test_processes_that_share_layers_make_the_iterates_of_one(world_size, request):
    directory, results = request.getfixturevalue(world_size)
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
        trainer(max_epochs=6).fit(resumed, full_batch(samples()), ckpt_path=directory / f"{name}.ckpt")
        for a, b in zip(weights(resumed.network), weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", ["two", "four"])
def test_p_and_q_cross_every_boundary_once_per_sweep_and_u_never(world_size, request):
    results = request.getfixturevalue(world_size)[1]
    whole, packed = 8 * SAMPLES * WIDTH, 5 * SAMPLES * WIDTH // 8
    p_and_q = dict.fromkeys(ALGORITHMS, (whole, whole)) | {"quantized": (packed, packed)}
    p_and_q["quantized_q"] = (whole, packed)
    for name, (p, q) in p_and_q.items():
        for rank, result in enumerate(results):
            assert result[name]["sent"] == 4 * (p * (rank > 0) + q * (rank < len(results) - 1))


def test_bytes_per_sweep_are_those_of_the_precision(two):
    for name, (make, dtype, size) in WIRE.items():
        model = module(make(), dtype=dtype)
        trainer(max_epochs=3).fit(model, full_batch(samples(dtype)))
        for result in two[1]:
            sent, found = result["bytes_on_the_wire"][name]
            assert sent == 3 * size
            assert all(t.dtype == dtype for t in found)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            for a, b in zip(found, weights(model.network), strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_groups_may_be_given(two):
    model = module(PDADMM(rho=0.1))
    trainer(max_epochs=4).fit(model, full_batch(samples()))
    sent = 4 * 8 * SAMPLES * WIDTH
    assert [result["given_groups"][0] for result in two[1]] == [[0, 1, sent], [1, 5, sent]]
    for result in two[1]:
        for a, b in zip(result["given_groups"][1], weights(model.network), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_validation_and_prediction_see_the_weights_of_all_layers(two):
    model, watch = module(PDADMM(rho=0.1)), Watch()
    runner = trainer(watch, max_epochs=3, num_sanity_val_steps=0)
    runner.fit(model, full_batch(samples()), loader())
    wanted = list(watch.seen)
    assert len({loss for loss, _ in wanted}) == 3
    for result in two[1]:
        seen, outputs, after = result["validation"]
        for found, expected in zip(seen, wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-6)
        assert after == pytest.approx(wanted[-1][0], rel=1e-6)
        torch.testing.assert_close(outputs, model(samples()[0]).detach(), rtol=1e-10, atol=1e-10)


def test_what_layers_cannot_share_is_refused_on_every_process(two):
    for result in two[1]:
        refused = result["refusals"]
        assert [sweeps for _, sweeps in refused] == [0] * 6
        for (message, _), name in zip(refused, ("ThreeSplitting", "DLADMM"), strict=False):
            assert f"but got {name}. Use PDADMM, PDADMMG or PDADMMGQ, or strategy='ddp'" in message
        for (message, _), layers in zip(refused[2:], ([2, 2], [5], [0, 5], [1, 2, 2]), strict=True):
            assert "argument `layers` of LayerParallelStrategy to be 2 positive numbers" in message
            assert f"the 5 layers of the network, but got {layers}" in message


def test_a_lost_process_ends_the_other_and_the_last_checkpoint_goes_on_exactly(two):
    directory, results = two
    message, seconds, sweeps = results[0]["lost"]
    assert message.startswith("Lost a process that holds other layers")
    assert "start all processes again from the last checkpoint" in message
    assert seconds < 25
    assert sweeps == 2
    assert sorted(path.name for path in directory.glob("step=*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]
    make = ALGORITHMS["quantized"]
    whole, resumed = module(make()), module(make(), save_auxiliary=True, seed=5)
    trainer(max_epochs=6).fit(whole, full_batch(samples()))
    trainer(max_epochs=6).fit(resumed, full_batch(samples()), ckpt_path=directory / "step=2.ckpt")
    assert same(weights(resumed.network), weights(whole.network))


class FallSilent(Callback):
    """Process 1 lives on, but says nothing before the third sweep."""

    began = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            if trainer.global_rank == 1:
                time.sleep(16)
                raise KeyboardInterrupt
            self.began = time.monotonic()


def silent(rank, directory):
    silence, model = FallSilent(), module(PDADMM(rho=0.5))
    strategy = LayerParallelStrategy(timeout=timedelta(seconds=6))
    try:
        layered(silence, max_epochs=6, strategy=strategy).fit(model, full_batch(samples()))
    except (RuntimeError, SystemExit) as error:
        return str(error), time.monotonic() - silence.began, model.sweeps
    return None


def test_a_silent_process_counts_as_lost_after_the_timeout(tmp_path):
    message, seconds, sweeps = run_processes(silent, tmp_path)[0]
    assert message.startswith("Lost a process that holds other layers: it ended, or was silent for longer than the")
    assert 5 < seconds < 14
    assert sweeps == 2


# -- groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(1, 8))
def test_balanced_groups_are_the_best_of_all_cuts(depth):
    generator = torch.Generator().manual_seed(depth)
    for trial in range(5):
        costs = torch.randint(0 if trial == 4 else 1, 20, (depth,), generator=generator).tolist()
        for groups in range(1, depth + 1):
            found = balanced_groups(costs, groups)
            assert [layer for group in found for layer in group] == list(range(depth))
            assert len(found) == groups
            assert min(len(group) for group in found) >= 1
            ends = [(0, *cuts, depth) for cuts in combinations(range(1, depth), groups - 1)]
            best = min(max(sum(costs[a:b]) for a, b in pairwise(cut)) for cut in ends)
            assert max(sum(costs[layer] for layer in group) for group in found) == best


@pytest.mark.parametrize(("depth", "groups"), [(3, 4), (1, 2), (2, 0)])
def test_every_process_needs_a_layer(depth, groups):
    with pytest.raises(ValueError, match=f"one process per layer, but got {groups} processes and {depth} layers"):
        balanced_groups([1.0] * depth, groups)
