"""Activation checkpointing of Hugging Face models: backward stops at the active block, and results stay."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from toolbox import same
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_bcd import LayerBlock, create_blocks_from_model
from lightning_bcd.checkpointing import check_checkpointing, remove_input_gradient_hooks

transformers = pytest.importorskip("transformers")

LAYERS = 5
NOT_REENTRANT = {"use_reentrant": False}
KINDS = ["gpt2", "llama"]


def causal_lm(kind: str) -> nn.Module:
    common = {"vocab_size": 32, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        sizes = {"n_embd": 8, "n_layer": LAYERS, "n_head": 2, "n_positions": 8}
        drop = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}  # replayed with the same random numbers
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes, **drop)).train()
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**common, **sizes, tie_word_embeddings=True, max_position_embeddings=8)
    return transformers.LlamaForCausalLM(config).train()


def enable(model: nn.Module, arguments: dict | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name is old, but every release knows it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if not model.get_input_embeddings()._forward_hooks:
        model.enable_input_require_grads()  # older releases do it for adapters only


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def activate(blocks: list[LayerBlock], active: int) -> None:
    for index, block in enumerate(blocks):
        block.unfreeze() if index == active else block.freeze()


def backward(model: nn.Module) -> tuple[set[int], set[int], torch.Tensor]:
    """Return the layers whose input got a gradient, those that were computed again, and the loss."""
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    reached: set[int] = set()
    runs = [0] * LAYERS

    def watch(index: int, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: reached.add(index))

    def count(index: int, module: nn.Module, inputs: object) -> None:
        runs[index] += 1

    handles = []
    for index, layer in enumerate(layers_of(model)):
        handles.append(layer.register_forward_pre_hook(partial(watch, index)))
        handles.append(layer.mlp.register_forward_pre_hook(partial(count, index)))
    torch.manual_seed(1)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return reached, {index for index, count in enumerate(runs) if count > 1}, loss.detach()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", ["embeddings", *range(LAYERS), "head"])
def test_without_the_hook_backward_stops_at_the_active_block_and_gives_the_same_bits(kind, block):
    plain = causal_lm(kind)
    model = copy.deepcopy(plain)
    enable(model, NOT_REENTRANT)
    assert remove_input_gradient_hooks(model) == [model]
    check_checkpointing(model)
    active = {"embeddings": 0, "head": LAYERS + 1}[block] if isinstance(block, str) else block + 1
    for each in (plain, model):
        blocks = create_blocks_from_model(each)
        assert (blocks[0].name, blocks[-1].name, len(blocks)) == ("embeddings", "head", LAYERS + 2)
        activate(blocks, active)

    reached, again, loss = backward(model)
    # Layer i is block i + 1. The input of the active layer needs no gradient itself.
    assert reached == {i for i in range(LAYERS) if i + 1 > active}
    assert again == {i for i in range(LAYERS) if i + 1 >= active}
    _, none, plain_loss = backward(plain)
    assert none == set()
    assert torch.equal(loss, plain_loss)
    assert gradients(model).keys() == gradients(plain).keys() != set()
    assert same(list(gradients(model).values()), list(gradients(plain).values()))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_hook_backward_runs_to_the_first_layer(kind):
    model = causal_lm(kind)
    enable(model, NOT_REENTRANT)
    activate(create_blocks_from_model(model), LAYERS + 1)
    reached, again, _ = backward(model)
    assert reached == again == set(range(LAYERS))
    # Taken away now, and again when it comes back.
    for _ in range(2):
        assert remove_input_gradient_hooks(model) == [model]
        reached, again, _ = backward(model)
        assert reached == again == set()
        enable(model, NOT_REENTRANT)


@pytest.mark.parametrize("kind", KINDS)
def test_removed_hooks_can_be_restored(kind):
    model = causal_lm(kind)
    enable(model, NOT_REENTRANT)
    wrapper = nn.ModuleDict({"model": model})  # as inside a LightningModule
    changed = remove_input_gradient_hooks(wrapper)
    assert changed == [model]
    assert remove_input_gradient_hooks(wrapper) == []
    for module in changed:
        module.enable_input_require_grads()
    model.requires_grad_(False)
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_the_hook_of_an_inner_module_is_found():
    model = causal_lm("gpt2")
    model.transformer.enable_input_require_grads()
    assert remove_input_gradient_hooks(model) == [model.transformer]
    assert not model.get_input_embeddings()._forward_hooks


def test_a_hook_whose_handle_was_overwritten_is_removed_too():
    model = causal_lm("llama")
    model.enable_input_require_grads()
    enable(model, NOT_REENTRANT)  # installs it a second time
    assert remove_input_gradient_hooks(model) == [model]
    assert not model.get_input_embeddings()._forward_hooks


def test_other_hooks_and_models_without_the_methods_are_left_alone():
    model = causal_lm("gpt2")
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    assert remove_input_gradient_hooks(model) == []
    assert remove_input_gradient_hooks(nn.Sequential(nn.Linear(2, 2))) == []
    model(input_ids=torch.tensor([[1, 2]]))
    assert seen == [1]


class OldModel(nn.Module):
    """As in older releases: one handle, which stays when its hook is removed; no embeddings to ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(4, 2)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def enable_input_require_grads(self) -> None:
        hook = lambda module, inputs, output: output.requires_grad_(True)  # noqa: E731
        self._require_grads_hook = self.embeddings.register_forward_hook(hook)

    def disable_input_require_grads(self) -> None:
        self._require_grads_hook.remove()


def test_models_of_older_releases_work():
    model = OldModel().requires_grad_(False)
    assert remove_input_gradient_hooks(model) == []
    for _ in range(2):
        model.enable_input_require_grads()
        assert model.embeddings(torch.tensor([1])).requires_grad
        assert remove_input_gradient_hooks(model) == [model]
        assert not model.embeddings(torch.tensor([1])).requires_grad
        assert remove_input_gradient_hooks(model) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [{"use_reentrant": True}, {"preserve_rng_state": False}, {}])
def test_reentrant_checkpointing_is_refused_with_the_remedy(kind, arguments):
    model = causal_lm(kind)
    enable(model, arguments)
    with pytest.raises(ValueError, match=r'kwargs=\{"use_reentrant": False\}'):
        check_checkpointing(nn.ModuleDict({"model": model}))
    enable(model, NOT_REENTRANT)
    check_checkpointing(model)


def test_reentrant_checkpointing_would_lose_the_gradient_of_the_lowest_layer_in_the_block():
    model = causal_lm("gpt2")
    enable(model, {"use_reentrant": True})
    remove_input_gradient_hooks(model)
    activate(create_blocks_from_model(model), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns too
        tokens = torch.randint(32, (2, 8))
        assert not model(input_ids=tokens, labels=tokens).loss.requires_grad


def test_checkpointing_that_is_off_is_not_checked():
    model = causal_lm("gpt2")
    check_checkpointing(model)
    enable(model, {"use_reentrant": True})
    model.gradient_checkpointing_disable()
    check_checkpointing(model)
    check_checkpointing(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (checkpoint, True),  # the function alone, as models of their own make do
        (partial(checkpoint, use_reentrant=None), True),
        (partial(checkpoint, use_reentrant=False), False),
        (None, False),  # a flag that nothing is known about
    ],
)
def test_only_an_explicit_non_reentrant_function_passes(function, refused):
    module = nn.Linear(2, 2)
    module.gradient_checkpointing, module._gradient_checkpointing_func = True, function
    if refused:
        with pytest.raises(ValueError, match="Linear"):
            check_checkpointing(module)
    else:
        check_checkpointing(module)


def test_the_default_of_the_installed_release_is_judged_by_what_it_does():
    model = causal_lm("gpt2")
    enable(model)
    reentrant = int(transformers.__version__.split(".")[0]) < 5
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=True"):
            check_checkpointing(model)
    else:
        check_checkpointing(model)
