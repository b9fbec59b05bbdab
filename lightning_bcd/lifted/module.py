"""LiftedModule: the Lightning side of every lifted algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bcd.communicator import Alone, Communicator
from lightning_bcd.compatibility import as_misconfiguration
from lightning_bcd.distributed.all_reduce import AllReduce
from lightning_bcd.distributed.block_sync import broadcast_tensors
from lightning_bcd.distributed.strategy import LayerParallelStrategy
from lightning_bcd.lifted.algorithm import LiftedAlgorithm, LiftedState, Report, share_weights
from lightning_bcd.lifted.batch import Fingerprint, check_input, check_memory, encode_targets, split_batch
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.checkpoint import pack, restore
from lightning_bcd.lifted.evaluation import LiftedEvaluation
from lightning_bcd.prox.losses import Loss, resolve_loss

#: A rise of the objective beyond this share of it is not rounding.
RISE = {torch.float64: 1e-10, torch.float32: 1e-5}


class SweepOptimizer(torch.optim.Optimizer):
    """Runs a sweep as its step, so that `trainer.global_step` counts sweeps. It reads no gradients."""

    def __init__(self, device: torch.device) -> None:
        # LearningRateMonitor reads the learning rate of every optimizer.
        super().__init__([nn.Parameter(torch.zeros((), device=device))], {"lr": 0.0})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure."""
        return None if closure is None else closure()


class LiftedModule(LiftedEvaluation):
    """A network trained by a lifted algorithm; validated, tested and used by a plain forward pass.

    One training batch is one sweep. With one batch per epoch, see `full_batch`, the auxiliary variables persist from
    sweep to sweep: the algorithm of the papers. With mini-batches they are initialised by a forward pass for each
    batch, and the proximal terms hold the weights together (online mode). `trainer.global_step` counts sweeps.

    Logged once per epoch: `lifted/objective`, `lifted/data_fit`, per stage `lifted/penalty/<stage>` (all its terms),
    `lifted/residual/<stage>` (root mean square of U − P) and `lifted/activation_residual/<stage>` (of V − σ(U));
    `val_loss`, `val_acc`, `test_loss`, `test_acc` (accuracies with class labels only).

    Args:
        network: `nn.Sequential` of linear modules, activations and `Residual`, see `Chain`. Its parameters are trained
            in place: afterwards it is an ordinary network.
        algorithm: `ThreeSplitting()`, `TwoSplitting()`, `ResidualSplitting()`, or another `LiftedAlgorithm`.
        loss: `"squared"`, `"cross_entropy"`, `"hinge"`, `"logistic"`, or a `Loss`.
        persist: Keep the auxiliary variables between sweeps. `"auto"`: exactly with one training batch per epoch.
        save_auxiliary: Put the auxiliary variables into checkpoints: a resumed run then continues exactly. Without
            them it starts again from a forward pass.
        log_train_accuracy: Log `train_acc` after every sweep, by a forward pass over the training batch.

    Attributes:
        network: The network.
        report: Terms of the objective after the last sweep, float64.
        sweeps: Sweeps done so far.
        communicator: The processes of the run, e.g. `LayerGroups` with the bytes it sent.

    Raises:
        ValueError: If the network cannot be lifted, or the algorithm's arguments do not suit it.

    Example:
        >>> from torch import nn
        >>> from lightning_bcd import LiftedModule, ThreeSplitting
        >>> network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> model = LiftedModule(network, ThreeSplitting(gamma=1.0, rho=1.0, alpha=5.0), loss="squared")
    """

    automatic_optimization = False

    def __init__(
        self,
        network: nn.Module,
        algorithm: LiftedAlgorithm,
        loss: str | Loss = "squared",
        *,
        persist: Literal["auto"] | bool = "auto",
        save_auxiliary: bool = False,
        log_train_accuracy: bool = False,
    ) -> None:
        if persist not in ("auto", True, False):
            raise ValueError(f"Expected argument `persist` to be 'auto', True or False, but got {persist!r}.")
        super().__init__(network, algorithm, resolve_loss(loss))
        self.persist = persist
        self.save_auxiliary = save_auxiliary
        self.log_train_accuracy = log_train_accuracy
        self.report: Report | None = None
        self.sweeps = 0
        self._initialised = False
        self._state: LiftedState | None = None
        self._fingerprint: Fingerprint | None = None
        self._saved: dict[str, Any] = {}
        self._velocity: dict[str, Tensor] = {}
        self.communicator: Communicator = Alone()
        self._warned = False
        self._first = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer whose steps are sweeps."""
        return SweepOptimizer(self.device)

    # -- training -----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the place of DistributedDataParallel, which has no gradients to average here."""
        strategy = self.trainer.strategy
        if stage != "fit":
            return
        if isinstance(strategy, DDPStrategy) and "DeepSpeed" not in type(strategy).__name__:
            strategy.configure_ddp = self._equalise  # type: ignore[method-assign]
        elif not isinstance(strategy, SingleDeviceStrategy):
            raise MisconfigurationException(
                f"Expected Trainer argument `strategy` to be 'auto' or 'ddp' with LiftedModule, but got "
                f"{type(strategy).__name__}. Samples are shared among processes; weights are not cut in pieces."
            )

    def teardown(self, stage: str) -> None:
        """Let go of the Trainer's strategy, so that it wraps the next module again."""
        vars(self.trainer.strategy).pop("configure_ddp", None)

    def _equalise(self) -> None:
        # Not the auxiliary variables: every process has its own samples.
        broadcast_tensors(self.network)

    def on_train_start(self) -> None:
        """Refuse half precision, and mini-batches for auxiliary variables that shall persist."""
        if any(p.dtype not in RISE for p in self.network.parameters()):
            raise MisconfigurationException(
                "Expected weights in float32 or float64 with LiftedModule, but the Trainer's `precision` makes them "
                "half. Use precision='32-true' and ThreeSplitting(storage_dtype='bfloat16') to save memory."
            )
        batches = self.trainer.num_training_batches
        if self.persist is True and batches != 1:
            raise MisconfigurationException(
                f"Expected one training batch per epoch with persist=True, but got {batches}: auxiliary variables "
                "belong to fixed samples. Use full_batch(train_set), or persist='auto' for the online mode."
            )
        if self.algorithm.needs_full_batch and not self._persists:
            raise MisconfigurationException(
                f"Expected all samples in one batch with these arguments of {type(self.algorithm).__name__}, but got "
                f"{batches} batches. Use full_batch(train_set)."
            )
        if self.device.type == "mps":
            raise MisconfigurationException(
                "Expected Trainer argument `accelerator` to be 'cpu' or 'gpu' with LiftedModule, but got 'mps', which "
                "has no float64. Use accelerator='cpu'."
            )
        self.communicator = self._make_communicator()
        # Weights may have changed since the last fit, and so may the samples.
        self.report, self._first = None, True
        if not self._persists:
            self.reset_auxiliary()

    def _make_communicator(self) -> Communicator:
        strategy = self.trainer.strategy
        if isinstance(strategy, LayerParallelStrategy):
            if not self.algorithm.layer_parallel:
                raise MisconfigurationException(
                    f"Expected an algorithm that updates all layers at once with strategy='layer_parallel', but got "
                    f"{type(self.algorithm).__name__}. Use PDADMM, PDADMMG or PDADMMGQ, or strategy='ddp'."
                )
            with as_misconfiguration():
                # The input of the first layer is fixed: it takes half of the products.
                return strategy.communicator([(2 if i else 1) * s.weight.numel() for i, s in enumerate(self.chain)])
        return AllReduce() if self.trainer.world_size > 1 else Alone()

    def share_weights(self) -> None:
        """Bring the weights of all layers together where processes train different layers."""
        share_weights(self.chain, self.communicator)

    def on_validation_start(self) -> None:
        """Evaluate the weights of all layers."""
        if self.trainer.state.fn == "fit":
            self.share_weights()

    def on_train_end(self) -> None:
        """Leave every process with the weights of all layers."""
        self.share_weights()
        if self._state is not None:
            self.algorithm.finish(self.chain, self._current(), self.communicator)

    def reset_auxiliary(self) -> None:
        """Forget the auxiliary variables and free their memory; the next sweep starts from a forward pass."""
        self._state, self._saved = None, {}
        for name in [name for name, _ in self.named_buffers(recurse=False) if name.startswith("auxiliary_")]:
            delattr(self, name)

    def use_chain(self, chain: Chain, algorithm: LiftedAlgorithm | None = None, *, restart: bool = True) -> None:
        """Train other stages of the network from the next sweep on; for callbacks, during a fit.

        Args:
            chain: Stages of `network`.
            algorithm: Another algorithm; the present one if None.
            restart: Forget the auxiliary variables and what sweeps hand on. False with those of a checkpoint.

        Raises:
            ValueError: If the stages do not suit the algorithm.
        """
        algorithm = algorithm or self.algorithm
        algorithm.check(chain, self.loss)
        self.chain, self.algorithm, self.report = chain, algorithm, None
        self.communicator = self._make_communicator()
        if restart:
            self.reset_auxiliary()
            self._velocity = {}

    @property
    def _persists(self) -> bool:
        return self.trainer.num_training_batches == 1 if self.persist == "auto" else self.persist

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Sweep once over the batch."""
        with as_misconfiguration():
            state = self._state_of(batch)
        before = self.report
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        # The gradient scaler of 16-mixed precision insists on a backward pass and a gradient; this one is zero.
        self.manual_backward(optimizer.param_groups[0]["params"][0] * 0)
        with as_misconfiguration(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            optimizer.step(closure=lambda: self._sweep(state))
        assert self.report is not None
        self._check_objective(before, self.report)
        self._log_report(self.report, len(state.x))
        if self.log_train_accuracy:
            self.share_weights()
            self._log_train_accuracy(batch)
        return {"loss": self.report.objective}

    def _sweep(self, state: LiftedState) -> None:
        self.report = self.algorithm.sweep(self.chain, state, self.loss, self.communicator)
        self.sweeps += 1

    def _state_of(self, batch: Any) -> LiftedState:
        """The state of the last sweep if the batch is the same; samples may change between two fits, not inside one."""
        first, self._first = self._first, False
        if not self._persists or self._state is None:
            return self._begin(batch)
        assert self._fingerprint is not None
        changed = torch.tensor(float(not self._fingerprint.matches(*split_batch(batch))), device=self.device)
        self.communicator.sum([changed])  # all processes do the same
        if not changed:
            return self._recall(batch)
        if not first:
            raise ValueError(
                f"Expected the same {len(self._state.x)} samples in the same order in every sweep, because each has "
                "auxiliary variables of its own, but the batch changed. Use full_batch(train_set): no shuffling, no "
                "random augmentation, no drop_last. Or use persist=False."
            )
        rank_zero_info("The training samples are not those of the last fit: auxiliary variables start again.")
        self.reset_auxiliary()
        return self._begin(batch)

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Input, targets and encoded targets; every process raises if one has bad data."""
        error: Exception | None = None
        try:
            x, targets = split_batch(batch)
            check_input(x, self.chain)
            y = encode_targets(targets, len(x), x.dtype, self.num_outputs, self.loss)
        except (TypeError, ValueError) as found:
            error = found
        bad = torch.tensor(float(error is not None), device=self.device)
        self.communicator.sum([bad])
        if error is not None:
            raise error
        if bad > 0:
            raise ValueError("Another process was given data it cannot use; its message says what. Mend its data.")
        return x, targets, y

    def _begin(self, batch: Any) -> LiftedState:
        """Auxiliary variables for a batch that has none: from a checkpoint, or by a forward pass."""
        x, targets, y = self._checked(batch)
        if self._persists:
            needed = self.algorithm.bytes_per_sample(self.chain, x) * len(x)
            temporary = self.algorithm.temporary_bytes(self.chain, x)
            rank_zero_info(check_memory(needed, temporary, x.device, self.algorithm.offload))
        if not self._initialised:
            self.algorithm.initialise(self.chain, x, self.communicator)
            if self.communicator.size > 1:  # the random numbers of rank 0 for all
                broadcast_tensors(self.network)
            self._initialised = True
        velocity = {name: tensor.to(x.device) for name, tensor in self._velocity.items()}
        state = self.algorithm.start(self.chain, x, y, self.communicator, velocity)
        state.sweep, self._velocity = self.sweeps, state.velocity
        if self._persists:
            self._fingerprint = Fingerprint(x, targets)
            self.algorithm.release(state, self.communicator.layers(len(self.chain)))
            if self._saved:
                restore(self._saved, state, self._fingerprint.value, self.communicator.size)
                self._saved = {}
            self._state = state
            self._hold(state)
        return state

    def _recall(self, batch: Any) -> LiftedState:
        """The state of the last sweep, if this is the same batch."""
        x, targets = split_batch(batch)
        state = self._current()
        state.cache = {name: tensor.to(x.device) for name, tensor in state.cache.items()}
        if x is not state.x:  # the same values, perhaps moved to a device again
            y = encode_targets(targets, len(x), x.dtype, self.num_outputs, self.loss)
            state.x, state.y = x, self.algorithm.scale_targets(y)
        return state

    def _hold(self, state: LiftedState) -> None:
        # As buffers they follow the module to other devices; not persistent, so that exported weights stay small.
        for name, tensors in state.variables.items() if not self.algorithm.offload else ():
            for index, tensor in enumerate(tensors):
                self.register_buffer(f"auxiliary_{name}_{index}", tensor, persistent=False)

    def _current(self) -> LiftedState:
        """The persistent state with the buffers as they are now: moving the module replaces them."""
        assert self._state is not None
        if not self.algorithm.offload:
            for name, tensors in self._state.variables.items():
                tensors[:] = [getattr(self, f"auxiliary_{name}_{index}") for index in range(len(tensors))]
        return self._state

    def _check_objective(self, before: Report | None, after: Report) -> None:
        value = float(after.objective)
        if not math.isfinite(value):
            raise MisconfigurationException(
                f"The objective is {value} after sweep {self.sweeps}. Check that the data is finite and of moderate "
                "size, or use a larger `alpha`."
            )
        if before is None or self._warned or not (self._persists and self.algorithm.descends):
            return
        dtype = next(self.network.parameters()).dtype
        rise = value - float(before.objective)
        if rise > RISE[dtype] * abs(float(before.objective)):
            self._warned = True
            layer, term = after.largest_rise(before)
            rank_zero_warn(
                f"The objective rose by {rise:.3g} to {value:.6g} in sweep {self.sweeps}, most in the {term} term of "
                f"stage '{self.chain[layer].name}'. With exact sub-problems it cannot: use a larger `alpha`, or "
                "float64."
            )

    # -- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the number of sweeps, momentum and, with `save_auxiliary`, the auxiliary variables of all processes."""
        velocity = {name: tensor.cpu().clone() for name, tensor in self._velocity.items()}
        saved: dict[str, Any] = {"version": 1, "sweeps": self.sweeps, "initialised": self._initialised}
        saved["velocity"] = velocity
        if self.save_auxiliary and self._state is not None:
            assert self._fingerprint is not None
            state = self._current()
            saved |= pack(state, self._fingerprint.value, self.communicator.size)
            for name, tensors in state.variables.items():
                owners = [self.algorithm.layer_of(name, index) for index in range(len(tensors))]
                if self.communicator.layers(len(self.chain)) != range(len(self.chain)):
                    saved["variables"][name] = self.communicator.gather(tensors, owners)
        elif self._saved:  # loaded, and not yet used
            saved |= {name: self._saved[name] for name in ("variables", "cache", "fresh", "fingerprints")}
        checkpoint["lifted"] = saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back; the auxiliary variables wait for the training batch."""
        saved = checkpoint.get("lifted")
        if saved is None:
            return
        if saved["version"] != 1:
            raise MisconfigurationException(
                f"Expected lifted state of version 1 in the checkpoint, but got {saved['version']}. Update "
                "lightning-bcd."
            )
        self.sweeps, self._initialised = saved["sweeps"], saved["initialised"]
        self._velocity = dict(saved["velocity"])
        self.reset_auxiliary()
        self._saved = saved if "variables" in saved else {}
        if self.sweeps and not self._saved and self.persist is not False:
            rank_zero_info(
                "The checkpoint holds no auxiliary variables: they start from a forward pass. Use save_auxiliary=True "
                "to continue exactly."
            )
