"""What only a CUDA device can show; skipped without one."""

from functools import partial

import pytest
import torch
from toolbox import Classifier, loader, same, trainer, weights

from lightning_bcd import MLP, BCDCallback, LiftedModule, ThreeSplitting, estimate_memory, full_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def fit(policy, strategy="cyclic"):
    model, callback = Classifier(), BCDCallback(strategy=strategy, steps_per_block=2, optimizer_state=policy)
    run = trainer(callback, accelerator="gpu", max_epochs=3)
    run.fit(model, loader())
    return weights(model), callback, run


def test_offloaded_state_is_pinned_host_memory_and_comes_back_unchanged():
    kept, _, _ = fit("keep")
    offloaded, callback, run = fit("offload")
    assert same(kept, offloaded)
    host = callback.state_dict()["run"]["offloaded"]
    assert len(host) == 4
    for state in host.values():
        assert state["exp_avg"].is_pinned()
    assert len(run.optimizers[0].state) == 2


def test_the_next_state_is_fetched_during_the_last_step_and_the_same_bits_come_back():
    events = []

    class Watch(BCDCallback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            store = self._run._store
            events.append((self._run.steps, {p.device.type for state in store._ahead.values() for p in state.values()}))
            super().on_train_batch_end(trainer, pl_module, *args)

    model, callback = Classifier(), Watch(strategy="cyclic", steps_per_block=3, optimizer_state="offload")
    trainer(callback, accelerator="gpu", max_epochs=6).fit(model, loader())
    kept, other = Classifier(), BCDCallback(strategy="cyclic", steps_per_block=3, optimizer_state="keep")
    trainer(other, accelerator="gpu", max_epochs=6).fit(kept, loader())
    assert same(weights(model), weights(kept))
    # From the second cycle on, at the end of the last step of a visit only.
    for step, (done, devices) in enumerate(events):
        assert ("cuda" in devices) == (step >= 9 and done == 3)


@pytest.mark.parametrize("arguments", [{}, {"keep_residual": True, "optimizer_state": "offload"}])
def test_bfloat16_weights_step_inside_backward(arguments):
    results = []
    for inside in (False, True):
        callback = BCDCallback(strategy="cyclic", steps_per_block=2, step_in_backward=inside, **arguments)
        model = Classifier()
        trainer(callback, accelerator="gpu", precision="bf16-true", max_epochs=3).fit(model, loader())
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)


def test_the_memory_estimate_is_what_the_allocator_gives_out():
    class Wide(Classifier):
        def loss(self, batch):
            return self.net(torch.ones(1, 2048, device=self.device)).square().mean()

    make = partial(torch.optim.Adam, lr=1e-5, foreach=False)
    net = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(6)])
    model, callback = Wide(make, net), BCDCallback("linear", "cyclic", steps_per_block=1)
    # Workspaces of the linear algebra library are not the model's.
    warm = torch.ones(2048, 2048, device="cuda", requires_grad=True)
    (torch.ones(1, 2048, device="cuda") @ warm).sum().backward()
    del warm
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer(callback, accelerator="gpu", max_epochs=2).fit(model, loader())
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(estimate_memory(model, callback.blocks, make).total, rel=0.05)


def test_scores_are_measured_on_the_device():
    _, callback, _ = fit("reset", "greedy")
    assert min(callback.strategy.visits) >= 1
    assert all(score > 0 for score in callback.strategy.scores)


def lifted(accelerator, **options):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP([6, 8, 3]).double()
    model = LiftedModule(network, ThreeSplitting(alpha=0.1, **options), save_auxiliary=True)
    run = trainer(accelerator=accelerator, max_epochs=3)
    run.fit(model, full_batch((x, (x[:, 0] > 0).long())))
    return model, run


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"update": "prox_linear", "step": "lipschitz"}])
def test_lifted_sweeps_on_a_gpu_equal_those_on_the_cpu(options):
    (gpu, _), (cpu, _) = lifted("gpu", **options), lifted("cpu", **options)
    for a, b in zip(weights(gpu.network), weights(cpu.network), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-8, atol=1e-9)
    held = gpu._current().variables["v"][0]
    assert held.is_pinned() == bool(options.get("offload"))


def test_a_lifted_run_of_a_gpu_goes_on_on_the_cpu(tmp_path):
    model, run = lifted("gpu", momentum=0.5)
    run.save_checkpoint(tmp_path / "run.ckpt")
    resumed, _ = lifted("cpu", momentum=0.5)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = full_batch((x, (x[:, 0] > 0).long()))
    trainer(accelerator="cpu", max_epochs=5).fit(resumed, batch, ckpt_path=tmp_path / "run.ckpt")
    trainer(accelerator="cpu", max_epochs=2).fit(model, batch)
    for a, b in zip(weights(resumed.network), weights(model.network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
