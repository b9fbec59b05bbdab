"""BCDCallback where memory is short: steps inside backward, bfloat16 weights, landscape expansion, the visit report."""

import copy
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import Classifier, MemoryLogger, Recorder, StatefulLoader, loader, mlp, same, trainer, weights
from torch import nn
from torch.nn import functional as F

from lightning_bcd import BCDCallback, BCDModule

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
}


def scheduled(make):
    def make_optimizers(parameters):
        optimizer = make(parameters)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return make_optimizers


def fit(callback, make=OPTIMIZERS["adamw"], module=None, epochs=3, callbacks=(), **arguments):
    model = module or Classifier(make)
    run = trainer(*callbacks, callback, max_epochs=epochs, **arguments)
    run.fit(model, loader())
    return model, run


# -- steps inside the backward pass -----------------------------------------------------------------------------


class GradientBytes(Callback):
    """Peak of the gradients alive while backward runs."""

    def setup(self, trainer, pl_module, stage):
        self.peak = 0
        for parameter in pl_module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self.look(pl_module))

    def look(self, module):
        held = sum(p.grad.numel() * p.grad.element_size() for p in module.parameters() if p.grad is not None)
        self.peak = max(self.peak, held)


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_backward_give_the_same_weights_from_one_gradient_at_a_time(name, policy):
    results = []
    for inside in (False, True):
        watch, recorder, logger = GradientBytes(), Recorder(), MemoryLogger()
        callback = BCDCallback(
            strategy="random",
            steps_per_block=2,
            optimizer_state=policy,
            warmup_steps=1,
            step_in_backward=inside,
        )
        model, run = fit(
            callback, scheduled(OPTIMIZERS[name]), callbacks=[watch, recorder], logger=logger, log_every_n_steps=1
        )
        norms = [(step, row) for step, row in logger.rows if any("grad_norm" in key for key in row)]
        results.append((weights(model), recorder.moved, recorder.steps, run.optimizers[0].param_groups[0]["lr"], norms))
        largest = max(sum(p.numel() for p in b.parameters) for b in callback.blocks)
        single = max(p.numel() for p in model.parameters())
        assert watch.peak == 4 * (single if inside else largest)
    (plain, moved, steps, lr, norms), (inside, *rest, inside_norms) = results
    assert same(plain, inside)
    assert rest == [moved, steps, lr]
    assert len(norms) == len(inside_norms) == 9
    for (_, a), (_, b) in zip(norms, inside_norms, strict=True):
        numbers = {key: value for key, value in a.items() if "optimizer_bytes" not in key}
        assert {key: b[key] for key in numbers} == pytest.approx(numbers, rel=1e-6)


def test_steps_in_backward_work_with_an_optimizer_per_block_and_with_scores():
    results = []
    for inside in (False, True):
        callback = BCDCallback(
            strategy="greedy",
            steps_per_block=2,
            optimizer={"net.0": OPTIMIZERS["sgd"], ".*": OPTIMIZERS["adamw"]},
            step_in_backward=inside,
        )
        model, _ = fit(callback)
        results.append((weights(model), callback.strategy.visits))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def clipping_module():
    class Clips(Classifier):
        def configure_gradient_clipping(self, *args, **kwargs):
            pass

    return Clips()


@pytest.mark.parametrize("argument", ["step_in_backward", "expand"])
@pytest.mark.parametrize(
    ("arguments", "module", "words"),
    [
        ({"accumulate_grad_batches": 2}, None, "accumulate_grad_batches"),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, None, "accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, None, "gradient_clip_val"),
        ({}, clipping_module, "configure_gradient_clipping"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}, None, "scaler"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(argument, arguments, module, words):
    options = {"step_in_backward": True} if argument == "step_in_backward" else {"expand": "sgd", "expand_lr": 0.1}
    model = module() if module else Classifier()
    before = weights(model)
    with pytest.raises(MisconfigurationException, match=words) as error:
        fit(BCDCallback(steps_per_block=2, **options), module=model, **arguments)
    assert argument in str(error.value)
    assert same(weights(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_that_evaluates_the_loss_itself_cannot_step_in_backward():
    for options in ({"step_in_backward": True}, {"expand": "sgd", "expand_lr": 0.1}):
        with pytest.raises(MisconfigurationException, match="LBFGS"):
            fit(BCDCallback(steps_per_block=2, optimizer=torch.optim.LBFGS, **options))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rounding": "up"}, "rounding"),
        ({"expand": "adam", "expand_lr": 0.1}, "expand"),
        ({"expand": "sgd"}, "expand_lr"),
        ({"expand": "sgd", "expand_lr": 0.0}, "expand_lr"),
        ({"expand_lr": 0.1}, "expand"),
        ({"expand": "sgd", "expand_lr": 0.1, "mode": "mask"}, "mode"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(MisconfigurationException, match=f"`{words}`"):
        BCDCallback(**arguments)


class Scaled(torch.optim.SGD):
    """An optimizer with an attribute of its own."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.scale = 0.5

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.scale)
        super().step()
        return loss


def test_an_optimizer_with_attributes_of_its_own_steps_in_backward():
    plain, inside = (fit(BCDCallback(steps_per_block=2, step_in_backward=each), Scaled)[0] for each in (False, True))
    assert same(weights(plain), weights(inside))


class Saliency(Classifier):
    """Runs backward passes that are not training: in validation and on the inputs."""

    def training_step(self, batch, batch_idx):
        self.foreign(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        with torch.inference_mode(False), torch.enable_grad():
            self.foreign([tensor.clone() for tensor in batch])

    def foreign(self, batch):
        x = batch[0].clone().requires_grad_(True)
        F.cross_entropy(self.net(x), batch[1]).backward()
        for parameter in self.parameters():
            parameter.grad = None


@pytest.mark.parametrize("options", [{"step_in_backward": True}, {"expand": "sgd", "expand_lr": 0.1}])
def test_other_backward_passes_do_not_train(options):
    results = []
    for module in (Classifier(), Saliency()):
        callback = BCDCallback(strategy="cyclic", steps_per_block=2, **options)
        run = trainer(callback, max_epochs=2)
        run.fit(module, loader(), loader())
        results.append(weights(module))
    assert same(*results)


def test_a_module_that_looks_at_gradients_is_warned():
    class Looks(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.seen = [p.grad for p in self.parameters() if p.grad is not None]

    model = Looks()
    with pytest.warns(UserWarning, match="on_before_optimizer_step will see no gradient"):
        fit(BCDCallback(steps_per_block=2, step_in_backward=True), module=model)
    assert model.seen == []


# -- landscape expansion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "sign"])
@pytest.mark.parametrize("inside", [False, True])
def test_expansion_moves_the_blocks_above_by_their_gradient(rule, inside):
    callback = BCDCallback(strategy="cyclic", steps_per_block=2, expand=rule, expand_lr=0.03, step_in_backward=inside)
    recorder = Recorder()
    model, run = fit(callback, OPTIMIZERS["sgd"], epochs=1, callbacks=[recorder], precision="64-true")
    # Two steps on each block, written out.
    net = mlp().double()
    velocity = {}
    for step, (x, y) in enumerate(loader()):
        active = step // 2
        gradients = torch.autograd.grad(F.cross_entropy(net(x.double()), y), list(net.parameters()))
        with torch.no_grad():
            for index, (p, g) in enumerate(zip(net.parameters(), gradients, strict=True)):
                if index // 2 > active:
                    p -= 0.03 * (g.sign() if rule == "sign" else g)
                elif index // 2 == active:
                    g = g + 0.01 * p
                    velocity[index] = g if index not in velocity else 0.9 * velocity[index] + g
                    p -= 0.1 * velocity[index]
    for a, b in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert recorder.held == [{f"net.{2 * (i // 2)}.weight", f"net.{2 * (i // 2)}.bias"} for i in range(6)]
    assert all(p.grad is None and p.requires_grad for p in model.parameters() if p not in run.optimizers[0].state)


def test_expansion_does_not_disturb_the_measurement_of_scores():
    class Follow(BCDCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            net = copy.deepcopy(pl_module.net)
            for parameter in net.parameters():
                parameter.requires_grad_(True)
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            self.expected = [math.hypot(net[i].weight.grad.norm(), net[i].bias.grad.norm()) for i in (0, 2, 4)]

    seen = []
    callback = Follow(strategy="importance", steps_per_block=2, expand="sgd", expand_lr=0.01)
    observe = callback.strategy.observe
    callback.strategy.observe = lambda norms: (seen.append((norms, callback.expected)), observe(norms))
    fit(callback)
    assert len(seen) == 7
    for norms, expected in seen:
        assert norms == pytest.approx(expected, rel=1e-5)


# -- bfloat16 weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["adamw"]])
def test_bfloat16_weights_train_through_float32_masters_of_the_active_block(optimizer, inside):
    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.dtypes.append({p.dtype for p in pl_module.parameters()})
            state = trainer.optimizers[0].state
            self.states.append(
                {(n, state[p]["exp_avg"].dtype) for n, p in pl_module.named_parameters() if state.get(p)}
            )

    look, recorder = Look(), Recorder()
    look.dtypes, look.states = [], []
    callback = BCDCallback(strategy="cyclic", steps_per_block=2, optimizer=optimizer, step_in_backward=inside)
    model, _ = fit(callback, epochs=1, callbacks=[look, recorder], precision="bf16-true")
    assert all(dtypes == {torch.bfloat16} for dtypes in look.dtypes)
    assert len(look.states) == 6
    for step, states in enumerate(look.states):
        names = [f"net.{2 * (step // 2)}.{kind}" for kind in ("weight", "bias")]
        assert states == {(name, torch.float32) for name in names}
    for step, moved in enumerate(recorder.moved):
        assert moved == {f"net.{2 * (step // 2)}.weight", f"net.{2 * (step // 2)}.bias"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


def test_small_steps_add_up_over_visits_unless_rounded_to_nearest():
    # A constant gradient: Adam then moves every weight by the learning rate in every step.
    class Constant(Classifier):
        def loss(self, batch):
            return sum(p.float().sum() for p in self.parameters())

    start = torch.rand(2048, 6, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.01

    def train(steps_per_block, **arguments):
        net = nn.Sequential(nn.Linear(6, 2048), nn.ReLU(), nn.Linear(2048, 3))
        with torch.no_grad():
            net[0].weight.copy_(start)
        model = Constant(partial(torch.optim.Adam, lr=1e-5), net=net)
        callback = BCDCallback(strategy="cyclic", steps_per_block=steps_per_block, optimizer_state="keep", **arguments)
        fit(callback, module=model, epochs=-1, max_steps=20, precision="bf16-true")
        assert [row.steps for row in callback.report] == [10, 10]
        return model.net[0].weight.detach()

    def shift(weight):
        return float((start.bfloat16().float() - weight.float()).mean())

    one_visit = shift(train(10))
    assert one_visit == pytest.approx(1e-4, rel=0.02)
    assert shift(train(2)) == pytest.approx(one_visit, rel=0.05)
    assert shift(train(2, rounding="nearest")) < one_visit / 3
    # With the residual nothing is lost: the same bits however the steps are split.
    assert torch.equal(train(2, keep_residual=True), train(10, keep_residual=True))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"keep_residual": True, "optimizer_state": "keep"}, {"optimizer_state": "offload", "step_in_backward": True}],
)
@pytest.mark.parametrize("stop", [3, 4])
def test_bfloat16_runs_resume_bit_identically(arguments, stop, tmp_path):
    def run(**limits):
        callback = BCDCallback(strategy="random", steps_per_block=2, **arguments)
        model = Classifier(OPTIMIZERS["adamw"])
        run = trainer(callback, precision="bf16-true", **limits)
        return model, run

    model, whole = run(max_steps=11, max_epochs=-1)
    whole.fit(model, StatefulLoader())
    first, begun = run(max_steps=stop, max_epochs=-1)
    begun.fit(first, StatefulLoader())
    begun.save_checkpoint(tmp_path / "half.ckpt")
    second, rest = run(max_steps=11, max_epochs=-1)
    rest.fit(second, StatefulLoader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(model), weights(second))


def test_clipping_sees_the_float32_gradient_of_the_active_block():
    seen = []

    class Watch(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
            seen.append((len(gradients), gradients[0].dtype, float(norm)))

    fit(BCDCallback(steps_per_block=2), module=Watch(), precision="bf16-true")
    assert len(seen) == 18
    for count, dtype, norm in seen:
        assert count == 2
        assert dtype == torch.float32
        assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("policy", ["reset", "keep", "offload"])
def test_state_made_in_the_constructor_is_float32_too(policy):
    class States(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            state = trainer.optimizers[0].state
            moved = [p for p in pl_module.parameters() if p in state and state[p]["step"] > 0]
            dtypes.append({state[p]["sum"].dtype for p in moved})

    dtypes = []
    callback = BCDCallback(strategy="cyclic", steps_per_block=2, optimizer_state=policy)
    fit(callback, OPTIMIZERS["adagrad"], callbacks=[States()], precision="bf16-true")
    assert dtypes == [{torch.float32}] * 18


def test_lbfgs_on_bfloat16_weights_is_refused():
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        fit(BCDCallback(optimizer=torch.optim.LBFGS, steps_per_block=2), precision="bf16-true")


class BlockNet(BCDModule):
    def __init__(self):
        super().__init__(optimizer=OPTIMIZERS["adamw"], inner_steps=2, gradient_clip_val=0.5)
        self.net = mlp()

    def block_loss(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_module_of_bfloat16_weights_keeps_float32_state():
    model = BlockNet()
    before = weights(model)
    run = trainer(precision="bf16-true", max_epochs=3)
    run.fit(model, loader())
    state = run.optimizers[0].state
    assert {values["exp_avg"].dtype for values in state.values()} == {torch.float32}
    assert all(not torch.equal(a.bfloat16(), b) for a, b in zip(before, model.parameters(), strict=True))


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_adds_up_visits_steps_and_loss_decrease():
    class Losses(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            self.losses.append(float(outputs["loss"]))

    losses, callback = Losses(), BCDCallback(strategy="cyclic", steps_per_block=2)
    assert callback.report == []
    fit(callback, callbacks=[losses], max_steps=17)
    rows = callback.report
    assert [row.name for row in rows] == ["net.0", "net.2", "net.4"]
    assert [row.visits for row in rows] == [3, 3, 2]
    assert [row.steps for row in rows] == [6, 6, 5]
    assert all(row.seconds > 0 for row in rows)
    for block, row in enumerate(rows):
        starts = [2 * (block + 3 * cycle) for cycle in range(row.visits)]
        mean = sum(losses.losses[start] - losses.losses[start + 1] for start in starts) / row.visits
        assert row.mean_loss_decrease == pytest.approx(mean, rel=1e-4)


def test_the_report_goes_on_after_a_resume_and_is_printed(tmp_path, capsys, caplog):
    first = BCDCallback(strategy="cyclic", steps_per_block=2)
    _, run = fit(first, epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    second = BCDCallback(strategy="cyclic", steps_per_block=2)
    model = Classifier(OPTIMIZERS["adamw"])
    with caplog.at_level("INFO"):
        trainer(second, max_epochs=2).fit(model, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert [row.steps for row in second.report] == [4, 4, 4]
    assert [row.seconds > before.seconds for row, before in zip(second.report, first.report, strict=True)] == [True] * 3
    text = caplog.text + capsys.readouterr().err
    assert "mean loss decrease" in text
    assert "net.4" in text
