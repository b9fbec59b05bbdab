"""`torch.compile` for block training: the layers share a few graphs, whatever the number of blocks.

Compiled code depends on which parameters need a gradient. A compiled whole model is therefore compiled anew for
every block that becomes the active one. The layers of a transformer run the same code, so compiling them one by one
gives few graphs for all blocks: a frozen layer below the active block, the active layer, a frozen layer above it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from lightning_bcd.blocks import LayerBlock


def compile_blocks(
    model: nn.Module,
    blocks: Sequence[LayerBlock],
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> list[str]:
    """Compile every repeated layer of the model in place, so that all layers share their graphs.

    A repeated layer is a member of an `nn.ModuleList` or `nn.Sequential` with at least two members of its class, a
    class made of submodules with parameters; of nested lists the outermost counts. It is compiled
    (`nn.Module.compile`, names in the state dict stay) if its trained parameters belong to one block; that block may
    hold several layers. Embeddings, heads and other modules that occur once stay as they are, and so do layers that
    are compiled already.

    Layers of equal shapes share at most 4 graphs in training, frozen or active, each with an input that needs a
    gradient or does not, and 2 in evaluation. Batches of another size need them once more; `dynamic=True` serves all
    sizes. Layers of other shapes have graphs of their own, and below torch 2.5 every layer has. Call it before
    training::

        blocks = create_blocks_from_model(model)
        compile_blocks(model, blocks)
        trainer = Trainer(callbacks=[BCDCallback(blocks=blocks)])

    Args:
        model: The model that holds the blocks.
        blocks: Its blocks.
        backend: As in `torch.compile`.
        mode: As in `torch.compile`, for example `"reduce-overhead"`; not the `mode` of `BCDCallback`.
        dynamic: As in `torch.compile`.
        fullgraph: As in `torch.compile`: raise an error where a layer cannot be one graph.

    Returns:
        The names of the modules that were compiled by this call.

    Raises:
        ValueError: If no repeated layer has its parameters in one block.

    Warns:
        UserWarning: If a Hugging Face model keeps a key-value cache. Each layer then writes to an entry of its own
            and needs graphs of its own.
    """
    block_of = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters}
    compiled: list[str] = []
    chosen: set[str] = set()
    for path, layer in _repeated(model, block_of):
        # Parents come first: what lies inside a chosen layer is compiled with it.
        inside = any(path.startswith(f"{outer}.") for outer in chosen)
        if inside or len({block_of[id(p)] for p in layer.parameters() if id(p) in block_of}) != 1:
            continue
        chosen.add(path)
        if not _is_compiled(layer):
            layer.compile(backend=backend, mode=mode, dynamic=dynamic, fullgraph=fullgraph)
            compiled.append(path)
    if not chosen:
        raise ValueError(
            f"Expected argument `blocks` to hold whole layers of a repeated layer list, but got {len(blocks)} blocks "
            "of which none does. Compile the layers yourself with `layer.compile()`, or compile the whole model and "
            "train with mode='mask'."
        )
    if any(getattr(getattr(module, "config", None), "use_cache", False) is True for module in model.modules()):
        warnings.warn(
            "The model keeps a key-value cache while it trains, which makes torch.compile treat every layer "
            "differently and soon run them uncompiled. Set `model.config.use_cache = False`.",
            UserWarning,
            stacklevel=2,
        )
    return compiled


def warn_if_recompiling(model: nn.Module, blocks: Sequence[LayerBlock], mode: Literal["freeze", "mask"]) -> None:
    """Warn if a compiled module would be compiled more often than torch allows, and then run uncompiled.

    In freeze mode a compiled module is compiled anew for each of its blocks that becomes the active one, until the
    limit `torch._dynamo.config.recompile_limit` is reached. It is found if it came from `torch.compile(module)`,
    `module.compile()` or, as a LightningModule, from `trainer.fit(torch.compile(module))`.

    Args:
        model: The model, compiled or with compiled submodules.
        blocks: The blocks of the run.
        mode: How inactive blocks are kept from training. With `"mask"` nothing is recompiled.

    Warns:
        UserWarning: If the parameters of a compiled module belong to more blocks than the limit.
    """
    if mode == "mask":
        return
    # Older torch calls it cache_size_limit.
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    limit: int = getattr(torch._dynamo.config, name)
    for path, module in model.named_modules():
        if not _is_compiled(module):
            continue
        inside = {id(parameter) for parameter in module.parameters()}
        count = sum(any(id(parameter) in inside for parameter in block.parameters) for block in blocks)
        if count > limit:
            warnings.warn(
                f"{path or type(module).__name__!r} is compiled as a whole and holds {count} blocks. It is compiled "
                f"anew for each active block, and after torch._dynamo.config.{name} = {limit} times it runs "
                "uncompiled. Compile its layers one by one instead, with `compile_blocks(model, blocks)`, or train "
                "with mode='mask'.",
                UserWarning,
                stacklevel=2,
            )
            return  # what lies inside is compiled with it


def _is_compiled(module: nn.Module) -> bool:
    # A LightningModule that came out of torch.compile carries `_compiler_ctx`, which is None otherwise.
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or isinstance(module, OptimizedModule) or getattr(module, "_compiler_ctx", None) is not None


def _repeated(model: nn.Module, trained: dict[int, int]) -> list[tuple[str, nn.Module]]:
    """Return path and module of the members of all layer lists, parents first."""

    def holds(module: nn.Module) -> bool:
        return any(id(parameter) in trained for parameter in module.parameters())

    found = []
    for path, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            members = [(name, member) for name, member in container.named_children() if holds(member)]
            counts = Counter(type(member) for _, member in members)
            nested = {type(member) for _, member in members if any(map(holds, member.children()))}
            found += [
                (f"{path}.{name}" if path else name, member)
                for name, member in members
                if counts[type(member)] > 1 and type(member) in nested
            ]
    return found
