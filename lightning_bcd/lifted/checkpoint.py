"""Auxiliary variables in checkpoints, so that a resumed run continues exactly."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bcd.lifted.algorithm import LiftedState
from lightning_bcd.lifted.batch import same_samples


def pack(state: LiftedState, fingerprint: Tensor, processes: int) -> dict[str, Any]:
    """Return plain types and tensors of the host; every process must make the call.

    Args:
        state: The state of this process.
        fingerprint: Checksum of its samples.
        processes: How many share the samples; all get the rows of all, in order.
    """
    return {
        "variables": {name: [_gather(t, processes) for t in tensors] for name, tensors in state.variables.items()},
        "fresh": state.fresh,
        "cache": {name: tensor.cpu().clone() for name, tensor in state.cache.items()},
        "fingerprints": _gather(fingerprint[None], processes),
    }


def restore(saved: dict[str, Any], state: LiftedState, fingerprint: Tensor, processes: int) -> None:
    """Fill a fresh state with what `pack` saved.

    Raises:
        ValueError: If the samples are not those of the checkpoint.
    """
    if set(saved["variables"]) != set(state.variables):
        raise ValueError(
            f"Expected auxiliary variables {sorted(state.variables)} in the checkpoint, but got "
            f"{sorted(saved['variables'])}: it is of another algorithm. Resume with the one that was saved."
        )
    rank = dist.get_rank() if processes > 1 else 0
    sizes = _gather(torch.tensor([len(state.x)]), processes).tolist()
    known = saved["fingerprints"]
    total = int(known[:, 0].sum())
    # Shared among another number of processes the samples have other checksums; their number must do.
    changed = len(known) == processes and not same_samples(known[rank], fingerprint)
    if total != sum(sizes) or changed:
        raise ValueError(
            f"Expected the training samples of the checkpoint ({total} of them) in the same order, because their "
            f"auxiliary variables are resumed, but got other ones ({sum(sizes)}). Resume with the same data, or train "
            "on from the weights alone: save without save_auxiliary."
        )
    first = sum(sizes[:rank])
    for name, tensors in state.variables.items():
        for tensor, everything in zip(tensors, saved["variables"][name], strict=True):
            tensor.copy_(everything[first : first + len(tensor)])
    state.fresh = saved["fresh"]
    state.cache.update({name: tensor.to(state.x.device) for name, tensor in saved["cache"].items()})


def _gather(tensor: Tensor, processes: int) -> Tensor:
    """Rows of all processes, on the host."""
    mine = tensor.detach().cpu()
    if processes == 1:
        return mine.clone()
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, mine)
    return torch.cat(parts)
