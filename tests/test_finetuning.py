"""BCDCallback on Hugging Face models with activation checkpointing, and on compiled ones."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toolbox import same, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bcd import BCDCallback

transformers = pytest.importorskip("transformers")


def gpt2(layers=4):
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=layers, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


class LanguageModel(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def tokens():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randint(20, (24, 8), generator=generator)), batch_size=2)


class Reached(Callback):
    """Which layers the backward pass went through, by the gradient of their output."""

    def __init__(self, callback):
        self.callback, self.steps, self.late = callback, [], False

    def on_train_start(self, trainer, pl_module):
        for number, layer in enumerate(pl_module.model.transformer.h):
            layer.register_forward_hook(lambda module, args, output, n=number: self.watch(n, output))

    def watch(self, number, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda gradient: self.reached.add(number))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reached = set()
        if self.late and batch_idx == 6:
            pl_module.model.gradient_checkpointing_enable()

    def on_train_batch_end(self, trainer, pl_module, *args):
        active = next(i for i, b in enumerate(self.callback.blocks) if b.parameters[0].requires_grad)
        self.steps.append((active, sorted(self.reached)))


def fit(model, watch=True, **options):
    callback = BCDCallback(strategy="backward", steps_per_block=2, **options)
    reached = Reached(callback)
    run = trainer(callback, reached, max_epochs=1)
    run.fit(LanguageModel(model), tokens())
    return callback, reached, run


def hooks(model):
    return len(model.get_input_embeddings()._forward_hooks)


def test_backward_stops_at_the_active_block_with_checkpointing_on():
    plain = gpt2()
    fit(plain)
    model = gpt2()
    model.gradient_checkpointing_enable()
    assert hooks(model) == 1
    callback, reached, _ = fit(model)
    assert [b.name for b in callback.blocks] == ["embeddings", *(f"model.transformer.h.{i}" for i in range(4)), "head"]
    assert len(reached.steps) == 12
    for active, layers in reached.steps:
        # Block i + 1 is layer i; the output of a frozen layer below the active one never gets a gradient.
        assert layers == list(range(max(active - 1, 0), 4))
    assert same(weights(plain), weights(model))
    assert hooks(model) == 1, "given back after training"


def test_a_hook_that_comes_during_training_is_removed_at_the_next_visit():
    model = gpt2()
    callback = BCDCallback(strategy="backward", steps_per_block=2)
    reached = Reached(callback)
    reached.late = True
    model.gradient_checkpointing_enable()
    trainer(reached, callback, max_epochs=1).fit(LanguageModel(model), tokens())
    assert hooks(model) == 1
    for active, layers in reached.steps:
        assert layers == list(range(max(active - 1, 0), 4))


def test_reentrant_checkpointing_is_refused_when_fitting_begins():
    model = gpt2()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(MisconfigurationException, match="use_reentrant=False"):
        fit(model)
    assert hooks(model) == 1
    assert all(p.requires_grad for p in model.parameters())


class Compiled(LanguageModel):
    def __init__(self, layers):
        super().__init__(nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(layers)]))
        self.model.compile(backend="eager")

    def training_step(self, batch, batch_idx):
        return self.model(batch[0].float()).square().mean()


def test_a_whole_model_compile_warns_when_blocks_exceed_the_recompile_limit():
    limit = torch._dynamo.config.recompile_limit
    for layers, options in ((limit + 1, {}), (limit + 1, {"mode": "mask"}), (limit, {})):
        run = trainer(BCDCallback("linear", steps_per_block=1, **options), max_steps=1, max_epochs=-1)
        if layers > limit and not options:
            with pytest.warns(UserWarning, match="compile_blocks"):
                run.fit(Compiled(layers), tokens())
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*compile_blocks.*")
                run.fit(Compiled(layers), tokens())
