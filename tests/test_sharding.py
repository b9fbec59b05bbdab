"""Parameters that FSDP shards over two gloo processes."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import Classifier, Recorder, data, run_processes, same, trainer, weights
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bcd import BCDCallback, create_blocks_from_model
from lightning_bcd.ranks import check_sharding
from lightning_bcd.scheduler import BlockScheduler
from lightning_bcd.strategy import CyclicStrategy

ADAM = partial(torch.optim.Adam, lr=1e-2)


class Sharded(Classifier):
    def configure_model(self):
        if self.device_mesh is not None:
            for index in (0, 2, 4):
                fully_shard(self.net[index], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fit(callback, devices=2, recorder=None, **arguments):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if devices == 2 else "auto"
    run = trainer(
        *([recorder] if recorder else []),
        callback,
        strategy=strategy,
        devices=devices,
        max_epochs=3,
        use_distributed_sampler=False,
        **arguments,
    )
    model = Sharded(ADAM)
    sampler = DistributedSampler(data(), 2, run.global_rank, shuffle=False) if devices == 2 else None
    run.fit(model, DataLoader(data(), batch_size=8 if devices == 2 else 16, sampler=sampler))
    return [p.full_tensor().detach() for p in model.parameters()] if devices == 2 else weights(model)


OPTIONS = {
    "random, reset": {"strategy": "random"},
    "cyclic, keep": {"strategy": "cyclic", "optimizer_state": "keep", "warmup_steps": 1},
    "backward, mask": {"strategy": "backward", "mode": "mask"},
}


class Moved(Recorder):
    """The local shards, because sharded tensors cannot be compared."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {n: p.to_local().detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *args):
        named = pl_module.named_parameters()
        self.moved.append({n for n, p in named if not torch.equal(p.to_local(), self.before[n])})


def shard(rank, directory):
    results = {name: fit(BCDCallback(steps_per_block=2, **options)) for name, options in OPTIONS.items()}
    recorder = Moved()
    fit(BCDCallback(strategy="cyclic", steps_per_block=3), recorder=recorder)
    results["moved"] = recorder.moved
    try:
        fit(BCDCallback(steps_per_block=2), precision="bf16-true")
    except MisconfigurationException as error:
        results["bfloat16"] = str(error)
    for name, options in {
        "greedy": {"strategy": "greedy"},
        "offload": {"optimizer_state": "offload"},
        "in backward": {"step_in_backward": True},
        "expanded": {"expand": "sgd", "expand_lr": 0.1},
    }.items():
        try:
            fit(BCDCallback(steps_per_block=2, **options))
        except MisconfigurationException as error:
            results[name] = str(error)
    return results


def test_fully_sharded_blocks_train_as_in_one_process(tmp_path):
    first, second = run_processes(shard, tmp_path)
    for name, options in OPTIONS.items():
        assert same(first[name], second[name])
        alone = fit(BCDCallback(steps_per_block=2, **options), devices=1)
        for a, b in zip(first[name], alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for result in (first, second):
        assert len(result["moved"]) == 9
        for step, moved in enumerate(result["moved"]):
            assert moved
            assert moved <= {f"net.{2 * (step // 3)}.weight", f"net.{2 * (step // 3)}.bias"}
    for name, words in {
        "greedy": "GreedyStrategy",
        "offload": "offload",
        "in backward": "step_in_backward",
        "expanded": "expand",
        "bfloat16": "MixedPrecisionPolicy",
    }.items():
        assert words in first[name]
        assert "FSDP" in first[name]


def flat_parameters(rank, directory):
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for original in (False, True):
        model = Classifier(ADAM)
        policy = ModuleWrapPolicy({torch.nn.Linear})
        model.net = FullyShardedDataParallel(
            model.net, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
        )
        try:
            check_sharding(model, CyclicStrategy(), "reset")
            results[original] = train_by_hand(model, rank)
        except MisconfigurationException as error:
            results[original] = str(error)
    return results


def train_by_hand(model, rank=None):
    blocks = create_blocks_from_model(model, "auto")
    optimizer = ADAM(model.parameters())
    run = BlockScheduler(
        blocks, CyclicStrategy(), steps_per_block=2, mode="freeze", optimizer=optimizer, policy="reset"
    )
    run.listen()
    x, y = data().tensors
    for _ in range(12):
        if run.visit_done:
            run.begin_visit()
        mine = slice(None) if rank is None else slice(24 * rank, 24 * rank + 24)
        F.cross_entropy(model.net(x[mine]), y[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.release()
    model.net.eval()
    return model.net(x).detach()


def test_fsdp1_trains_original_parameters_and_refuses_flat_ones_with_the_remedy(tmp_path):
    for result in run_processes(flat_parameters, tmp_path):
        assert "use_orig_params=True" in result[False]
        torch.testing.assert_close(result[True], train_by_hand(Classifier(ADAM)), rtol=1e-4, atol=1e-6)


def test_deepspeed_is_refused_with_the_remedy(monkeypatch):
    class FakeDeepSpeedStrategy:
        """DeepSpeed itself is not installed with the tests."""

        root_device = torch.device("cpu")

    run = trainer()
    assert "DeepSpeed" in DeepSpeedStrategy.__name__
    callback, model = BCDCallback(), Classifier(ADAM)
    monkeypatch.setattr(type(run), "strategy", FakeDeepSpeedStrategy())
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy"):
        callback.setup(run, model, "fit")
