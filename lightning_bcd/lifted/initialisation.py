"""Initial weights for lifted training, where scale decides more than in back-propagation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_bcd.lifted.chain import Chain, Stage


def _reference(stage: Stage, first: bool, last: bool, mean: Tensor) -> None:
    nn.init.normal_(stage.weight, std=0.01)
    _fill_bias(stage, 0.1)


def _he(stage: Stage, first: bool, last: bool, mean: Tensor) -> None:
    nn.init.kaiming_normal_(stage.weight, nonlinearity="relu")
    _fill_bias(stage, 0.0)


def _orthogonal(stage: Stage, first: bool, last: bool, mean: Tensor) -> None:
    nn.init.orthogonal_(stage.weight)
    _fill_bias(stage, 0.0)


def _identity(stage: Stage, first: bool, last: bool, mean: Tensor) -> None:
    # The first layer mixes the inputs, the others hand them on.
    if first:
        nn.init.orthogonal_(stage.weight)
    elif isinstance(stage.operator, nn.Linear):
        nn.init.eye_(stage.weight)
    else:
        nn.init.dirac_(stage.weight, stage.groups)
    _fill_bias(stage, 0.0)


def _looks_linear(stage: Stage, first: bool, last: bool, mean: Tensor) -> None:
    # Units in pairs of opposite sign: ReLU(u) − ReLU(−u) = u, so that the network starts as an orthogonal linear map.
    m, d = stage.weight.shape[0], stage.weight[0].numel()
    half = nn.init.orthogonal_(stage.weight.new_empty((m + 1) // 2, d if first else (d + 1) // 2))
    wide = half if first else torch.cat([half, -half], 1)
    weight = torch.cat([wide, -wide])[:m, :d]
    stage.weight.copy_((torch.zeros_like(weight) if last else weight).view_as(stage.weight))
    _fill_bias(stage, 0.0)
    if first and stage.bias is not None:
        # Centre the input: kinks lie in the middle of the data.
        center = stage.columns(stage.apply(mean[None], stage.weight, None)).mean(0)
        stage.bias.copy_(-center)


def _fill_bias(stage: Stage, value: float) -> None:
    if stage.bias is not None:
        nn.init.constant_(stage.bias, value)


INITS: dict[str, Callable[[Stage, bool, bool, Tensor], None]] = {
    "reference": _reference,
    "he": _he,
    "orthogonal": _orthogonal,
    "identity": _identity,
    "looks_linear": _looks_linear,
}


@torch.no_grad()
def initialise(chain: Chain, init: str, mean: Tensor) -> None:
    """Set the weights of a chain in place, from the global random state; frozen stages keep theirs.

    Args:
        chain: The chain.
        init: `"reference"`: W ~ 0.01 N(0, 1), b = 0.1, as published. `"he"`: W ~ N(0, 2/d), b = 0. `"orthogonal"`:
            (semi-)orthogonal W, b = 0. `"identity"`: the first layer orthogonal, the others the identity (padded or
            cut), b = 0. `"looks_linear"` (Balduzzi et al., The shattered gradients problem, ICML 2017): orthogonal
            blocks M as [M; −M] in the first layer and [[M, −M], [−M, M]] behind it, zero in the last; the bias of the
            first layer centres the input, the others are zero. For dense networks with ReLU-like activations.
        mean: Mean sample of the training input.
    """
    for index, stage in enumerate(chain):
        if stage.weight.requires_grad:
            INITS[init](stage, index == 0, index == len(chain) - 1, mean)
