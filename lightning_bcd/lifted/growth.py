"""Deep networks grown from shallow ones: train a few layers, append identity layers, train on.

    σ(I σ(u) + 0) = σ(u),   so that   v ↦ … σ(I σ(W_1 v + b_1)) …   equals   v ↦ σ(W_1 v + b_1)

with ReLU, clipped ReLU, hard tanh, absolute value, sign and no activation. The layers that are not trained yet wait as
identities behind those that are: a plain forward pass of the deep network is one of the shallow network. This is how
deep pdADMM-G networks are trained (2, then 5, then 10 layers, [1]).

[1] Wang, Li, Chai, Wang, Cheng, Zhao. Towards Quantized Model Parallelism for Graph-Augmented MLPs Based on
    Gradient-Free ADMM Framework. IEEE Transactions on Neural Networks and Learning Systems, 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bcd.compatibility import as_misconfiguration
from lightning_bcd.distributed.block_sync import broadcast_tensors
from lightning_bcd.lifted.algorithm import LiftedAlgorithm
from lightning_bcd.lifted.chain import Chain, Stage
from lightning_bcd.lifted.module import LiftedModule
from lightning_bcd.prox.activations import Activation


def shallow_chain(chain: Chain, layers: int) -> Chain:
    """The first `layers` − 1 stages and the last one; parameters are shared."""
    shallow = copy(chain)
    shallow.stages = [*chain.stages[: layers - 1], chain[-1]]
    return shallow


def check_growth(chain: Chain, layers: int) -> None:
    """Raise a ValueError unless the stages behind the first `layers` − 1, but for the last, can be identities."""
    for previous, stage in zip(chain.stages[layers - 2 : -2], chain.stages[layers - 1 : -1], strict=True):
        operator = stage.operator
        square = isinstance(operator, nn.Linear) and operator.in_features == operator.out_features
        if not (square and stage.dense) or stage.residual or stage.sources is not None:
            raise ValueError(
                f"Expected stage '{stage.name}' to be a square nn.Linear without skip connection, because it is "
                f"appended as an identity, but got {operator}{' in a Residual' if stage.residual else ''}. Give all "
                f"stages from '{chain[layers - 1].name}' on the width of the one before them."
            )
        if not keeps(stage.activation, previous.activation):
            raise ValueError(
                f"Expected the activation of stage '{stage.name}' to leave the values of the stage before it as they "
                f"are, because it is appended as an identity, but {type(stage.activation).__name__} changes values of "
                f"{type(previous.activation).__name__}. Use nn.ReLU, nn.ReLU6, nn.Hardtanh, Abs, Sign or nn.Identity."
            )


def keeps(after: Activation, before: Activation) -> bool:
    """Whether σ_after(σ_before(u)) = σ_before(u) for all u of a grid from −100 to 100."""
    values = before(torch.linspace(-100, 100, 4001, dtype=torch.float64))
    return torch.equal(after(values), values)


@torch.no_grad()
def set_identity(stage: Stage) -> None:
    """Set W = I, b = 0."""
    nn.init.eye_(stage.weight)
    if stage.bias is not None:
        nn.init.zeros_(stage.bias)


@torch.no_grad()
def renew(stage: Stage, generator: torch.Generator) -> None:
    """Draw W and b anew as torch does for nn.Linear: uniform between ∓1/√d for d inputs.

    Args:
        stage: The stage.
        generator: Of the CPU, so that the numbers do not depend on the device.
    """
    bound = stage.weight.shape[1] ** -0.5

    def draw(t: Tensor) -> None:
        t.copy_(torch.empty(t.shape, dtype=t.dtype).uniform_(-bound, bound, generator=generator))

    draw(stage.weight)
    if stage.bias is not None:
        draw(stage.bias)


class GrowLayers(Callback):
    """Train a network of `LiftedModule` in stages of growing depth (Section 5 of [1]).

    The module is given the whole network. In growth stage k its first `grow[k]` − 1 layers and its last are trained;
    the layers between are the identity (W = I, b = 0), so that validation, test and checkpoints, which use the whole
    network, see the shallow one. After `every` sweeps the next stage begins: layers trained so far are kept, the next
    identities join them, and the last layer, the auxiliary variables, momentum and the schedule of ρ start anew. The
    last stage goes on until the Trainer ends.

    A checkpoint holds the stage; with `LiftedModule(..., save_auxiliary=True)` a resumed run continues exactly. Under
    `strategy="layer_parallel"` the layers of every stage are shared among the processes anew, so the first stage must
    have as many layers as there are processes.

    Args:
        grow: Linear modules of each stage, rising, from at least 2 to those of the network.
        every: Sweeps per stage.
        algorithms: The algorithm of each stage, for hyperparameters that change with depth; that of the module if
            None. Weights are initialised once, by the first.

    Attributes:
        stage: The growth stage, 0 … len(grow) − 1; None before the first fit.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At the start of a fit, if the network cannot grow so, or an algorithm does not suit
            its stage.

    Example:
        >>> from lightning_bcd import MLP, PDADMMG, GrowLayers, LiftedModule
        >>> model = LiftedModule(MLP([64, *[50] * 4, 10]), PDADMMG(rho=1e-2), loss="cross_entropy")
        >>> callback = GrowLayers(grow=[2, 5], every=100)  # Trainer(max_epochs=200, callbacks=[callback])
    """

    def __init__(
        self, grow: Sequence[int] = (2, 5, 10), every: int = 200, algorithms: Sequence[LiftedAlgorithm] | None = None
    ) -> None:
        self.grow = list(grow)
        if not self.grow or self.grow[0] < 2 or sorted(set(self.grow)) != self.grow:
            raise ValueError(f"Expected argument `grow` to be rising numbers from 2 on, but got {self.grow}.")
        if every < 1:
            raise ValueError(f"Expected argument `every` to be at least 1, but got {every}.")
        if algorithms is not None and len(algorithms) != len(self.grow):
            raise ValueError(
                f"Expected argument `algorithms` to hold one algorithm per stage of growth ({len(self.grow)}), but got "
                f"{len(algorithms)}. Repeat those that stay the same."
            )
        self.every = every
        self.algorithms = None if algorithms is None else list(algorithms)
        self.stage: int | None = None
        self._begun = self._seed = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the layers behind the first stage identities, or take up the stage of a checkpoint."""
        if not isinstance(pl_module, LiftedModule):
            raise MisconfigurationException(
                f"Expected GrowLayers to be used with LiftedModule, but got {type(pl_module).__name__}. It grows the "
                "networks of lifted algorithms."
            )
        whole = Chain(pl_module.network)
        with as_misconfiguration():
            self._check(pl_module, whole)
        # A module without sweeps is new to this callback, whatever it did with others before.
        if self.stage is not None and pl_module.sweeps:
            self._train(pl_module, whole, restart=False)
            return
        self.stage, self._begun = 0, pl_module.sweeps
        self._seed = int(torch.randint(2**31, ()))
        for stage in whole.stages[self.grow[0] - 1 : -1]:
            set_identity(stage)
        self._train(pl_module, whole, restart=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the next stage if this one had its sweeps."""
        assert isinstance(pl_module, LiftedModule)
        assert self.stage is not None
        # Before the next sweep and not after the last one: a run that ends here keeps what it has trained.
        if self.stage + 1 == len(self.grow) or pl_module.sweeps < self._begun + (self.stage + 1) * self.every:
            return
        pl_module.share_weights()
        self.stage += 1
        whole = Chain(pl_module.network)
        # A seed of its own per stage: a resumed run draws the same numbers.
        renew(whole[-1], torch.Generator().manual_seed(self._seed + self.stage))
        if trainer.world_size > 1:
            broadcast_tensors(whole[-1].operator)
        with as_misconfiguration():
            self._train(pl_module, whole, restart=True)

    def _check(self, module: LiftedModule, whole: Chain) -> None:
        if self.grow[-1] != len(whole):
            raise ValueError(
                f"Expected argument `grow` to end with {len(whole)}, the number of linear modules of the network, but "
                f"got {self.grow}."
            )
        check_growth(whole, self.grow[0])
        for index, layers in enumerate(self.grow):
            algorithm = module.algorithm if self.algorithms is None else self.algorithms[index]
            algorithm.check(shallow_chain(whole, layers), module.loss)

    def _train(self, module: LiftedModule, whole: Chain, restart: bool) -> None:
        assert self.stage is not None
        algorithm = None if self.algorithms is None else self.algorithms[self.stage]
        module.use_chain(shallow_chain(whole, self.grow[self.stage]), algorithm, restart=restart)

    def state_dict(self) -> dict[str, Any]:
        """Return the stage, the sweep growth began with, and the seed of last layers."""
        return {"grow": self.grow, "stage": self.stage, "begun": self._begun, "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        if state_dict["grow"] != self.grow:
            raise MisconfigurationException(
                f"Expected argument `grow` of GrowLayers to be that of the checkpoint, {state_dict['grow']}, but got "
                f"{self.grow}. Resume with the same stages."
            )
        self.stage, self._begun, self._seed = state_dict["stage"], state_dict["begun"], state_dict["seed"]
