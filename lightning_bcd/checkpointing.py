"""Activation checkpointing of Hugging Face models, made to stop where the active block begins.

Nothing is imported from transformers: its models are known by the attributes and methods they share.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle


def remove_input_gradient_hooks(model: nn.Module) -> list[nn.Module]:
    """Remove the hooks that make the output of the input embeddings require a gradient.

    `gradient_checkpointing_enable()` installs such a hook (`enable_input_require_grads()`), for adapters and for
    reentrant checkpointing. With it, backward runs down to the first layer whichever block is active, and every
    layer is kept or computed again for it. A pass over the modules, cheap enough for every visit.

    Args:
        model: The model, or a module around it.

    Returns:
        The modules whose hooks were removed; `module.enable_input_require_grads()` installs them again.
    """
    # Looked up in the class: wrappers pass unknown attributes on to what they wrap.
    candidates = [module for module in model.modules() if hasattr(type(module), "disable_input_require_grads")]
    changed = []
    for module in candidates:
        if _has_handle(module):
            module.disable_input_require_grads()  # type: ignore[operator]
            changed.append(module)
    # A second `enable_input_require_grads()` forgets the handles of the first, whose hooks then stay.
    for module in candidates:
        if _remove_forgotten(module) and module not in changed:
            changed.append(module)
    return changed


def check_checkpointing(model: nn.Module) -> None:
    """Refuse reentrant activation checkpointing, which gives a block above frozen ones no gradient.

    The reentrant variant needs an input that requires a gradient, and has none once everything below the active
    block is frozen. Needed for `mode="freeze"` only.

    Args:
        model: The model, or a module around it.

    Raises:
        ValueError: If a module checkpoints (`gradient_checkpointing` is true) by a function that is not told
            `use_reentrant=False`; `torch.utils.checkpoint.checkpoint` is reentrant unless told so.
    """
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False) or function is None:
            continue
        told = function.keywords.get("use_reentrant") if isinstance(function, partial) else None
        if told is not False:
            raise ValueError(
                f"Expected activation checkpointing with use_reentrant=False, but got use_reentrant={told} in "
                f"{name or type(module).__name__!r}. Call "
                'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )


def _has_handle(module: nn.Module) -> bool:
    attributes = vars(module)
    # One handle in older releases, where it stays as an attribute when its hook is removed.
    handles = [*(attributes.get("_require_grads_hooks") or ()), attributes.get("_require_grads_hook")]
    return any(isinstance(handle, RemovableHandle) and _is_installed(handle) for handle in handles)


def _is_installed(handle: RemovableHandle) -> bool:
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def _remove_forgotten(module: nn.Module) -> bool:
    try:
        embeddings = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False  # a model without input embeddings says so in one of these ways
    hooks = embeddings._forward_hooks if isinstance(embeddings, nn.Module) else {}
    # transformers and peft call it make_inputs_require_grads and make_inputs_require_grad
    found = [key for key, hook in hooks.items() if getattr(hook, "__name__", "").startswith("make_inputs_require_grad")]
    for key in found:
        del hooks[key]
    return bool(found)
