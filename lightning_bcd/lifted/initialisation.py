"""Initial weights for lifted training, where scale decides more than in back-propagation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lightning_bcd.lifted.chain import Chain, Stage


def _reference(stage: Stage, first: bool) -> None:
    nn.init.normal_(stage.weight, std=0.01)
    _fill_bias(stage, 0.1)


def _he(stage: Stage, first: bool) -> None:
    nn.init.kaiming_normal_(stage.weight, nonlinearity="relu")
    _fill_bias(stage, 0.0)


def _orthogonal(stage: Stage, first: bool) -> None:
    nn.init.orthogonal_(stage.weight)
    _fill_bias(stage, 0.0)


def _identity(stage: Stage, first: bool) -> None:
    # The first layer mixes the inputs, the others hand them on.
    if first:
        nn.init.orthogonal_(stage.weight)
    elif isinstance(stage.operator, nn.Linear):
        nn.init.eye_(stage.weight)
    else:
        nn.init.dirac_(stage.weight, stage.groups)
    _fill_bias(stage, 0.0)


def _fill_bias(stage: Stage, value: float) -> None:
    if stage.bias is not None:
        nn.init.constant_(stage.bias, value)


INITS: dict[str, Callable[[Stage, bool], None]] = {
    "reference": _reference,
    "he": _he,
    "orthogonal": _orthogonal,
    "identity": _identity,
}


@torch.no_grad()
def initialise(chain: Chain, init: str) -> None:
    """Set the weights of a chain in place, from the global random state.

    Args:
        chain: The chain.
        init: `"reference"`: W ~ 0.01 N(0, 1), b = 0.1, as published. `"he"`: W ~ N(0, 2/d), b = 0. `"orthogonal"`:
            (semi-)orthogonal W, b = 0. `"identity"`: the first layer orthogonal, the others the identity (padded or
            cut), b = 0.
    """
    for index, stage in enumerate(chain):
        INITS[init](stage, index == 0)
