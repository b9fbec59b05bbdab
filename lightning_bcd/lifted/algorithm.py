"""What a lifted algorithm is: initialise auxiliary variables, sweep over them, report the objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_bcd.communicator import Communicator
from lightning_bcd.lifted.chain import Chain
from lightning_bcd.lifted.initialisation import INITS, initialise
from lightning_bcd.prox.losses import Loss

#: Rows per chunk when none is given: temporaries that stay in the cache of a CPU, and products that fill a GPU.
CHUNK_CPU, CHUNK_CUDA = 512, 16384
#: A number, one number per stage, or a function of the sweep (0, 1, …) and the number of stages that returns either.
Schedule = float | Sequence[float] | Callable[[int, int], float | Sequence[float]]


@dataclass
class LiftedState:
    """Auxiliary variables of a batch, one tensor per stage, and where a run stands.

    Attributes:
        x: Input, N × …
        y: Encoded targets, N × outputs.
        variables: Name ("v", "u") → one tensor per stage that has it, rows = samples, in their storage dtype and place.
        samples: Number of samples over all processes.
        sweep: Sweeps done.
        fresh: Whether the variables are those of a forward pass with the present weights.
        cache: What sweeps hand on about these samples (the Gram matrix of the input, warm starts).
        velocity: What sweeps hand on about the weights (momentum).
    """

    x: Tensor
    y: Tensor
    variables: dict[str, list[Tensor]]
    samples: int
    sweep: int = 0
    fresh: bool = True
    cache: dict[str, Tensor] = field(default_factory=dict)
    velocity: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, chunk_size: int) -> Iterator[slice]:
        """Yield slices that cover the rows."""
        for start in range(0, len(self.x), chunk_size):
            yield slice(start, min(start + chunk_size, len(self.x)))

    def read(self, name: str, layer: int, rows: slice) -> Tensor:
        """Rows of a variable in the dtype and on the device of the input; layer −1 of "v" is the input itself."""
        if name == "v" and layer < 0:
            return self.x[rows]
        return self.variables[name][layer][rows].to(self.x.device, self.x.dtype, non_blocking=True)

    def as_stored(self, name: str, layer: int, value: Tensor) -> Tensor:
        """A value of a variable, rounded as it would be by its storage."""
        dtype = self.variables[name][layer].dtype
        return value if dtype == value.dtype else value.to(dtype).to(value.dtype)

    def write(self, name: str, layer: int, rows: slice, value: Tensor) -> None:
        """Store rows of a variable."""
        self.variables[name][layer][rows].copy_(value, non_blocking=True)

    @property
    def bytes(self) -> int:
        """Bytes of the auxiliary variables."""
        return sum(t.numel() * t.element_size() for tensors in self.variables.values() for t in tensors)


@dataclass
class Report:
    """Terms of the objective at the end of a sweep, float64 scalars on the device.

    Attributes:
        data_fit: κ R(V_L; Y).
        coupling: Per stage, the γ terms (activation).
        linear: Per stage, the ρ terms (pre-activation); zero for algorithms that have none.
        penalty: Per stage, r(W) + s(V).
        dual: Per stage, the terms of dual variables; empty for algorithms that have none.
        residuals: Name → per stage, root mean square of a constraint's violation.
    """

    data_fit: Tensor
    coupling: list[Tensor]
    linear: list[Tensor]
    penalty: list[Tensor]
    dual: list[Tensor] = field(default_factory=list)
    residuals: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def objective(self) -> Tensor:
        """The sum of all terms."""
        return self.data_fit + torch.stack([*self.coupling, *self.linear, *self.penalty, *self.dual]).sum()

    def of_stage(self, stage: int) -> Tensor:
        """The sum of a stage's terms."""
        terms = (self.coupling, self.linear, self.penalty, self.dual)
        return torch.stack([values[stage] for values in terms if values]).sum()

    def largest_rise(self, before: Report) -> tuple[int, str]:
        """Stage and name of the term that grew most since an earlier report."""
        rises = {(len(self.coupling) - 1, "loss"): float(self.data_fit - before.data_fit)}
        for name in ("coupling", "linear", "penalty"):
            for layer, (new, old) in enumerate(zip(getattr(self, name), getattr(before, name), strict=True)):
                rises[layer, name] = float(new - old)
        return max(rises, key=lambda key: rises[key])


@dataclass(frozen=True, kw_only=True)
class LiftedAlgorithm(ABC):
    """A block coordinate descent over weights and auxiliary variables of a chain.

    An algorithm holds hyperparameters only; what changes is in the `LiftedState` and in the weights of the network.
    In a plain loop: `check`, `initialise`, `start`, then `sweep` as often as wanted. `LiftedModule` does it for a
    Trainer.

    Args:
        init: How to set the weights before the first sweep: `"he"`, `"orthogonal"`, `"identity"`, `"looks_linear"` or
            `"reference"`, see `lightning_bcd.lifted.initialisation`; None leaves them as they are, unless a preset
            sets them. Stages whose weight is frozen keep it.
        chunk_size: Rows per chunk of a layer's update: results differ by rounding only. Chosen by device if None.
        storage_dtype: Precision the auxiliary variables are kept in, e.g. `"bfloat16"`; that of the input if None.
        offload: Keep auxiliary variables in host memory and bring in one chunk at a time.

    Raises:
        ValueError: If an argument is out of range.
    """

    init: Literal["identity", "orthogonal", "looks_linear", "he", "reference"] | None = None
    chunk_size: int | None = None
    storage_dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    offload: bool = False

    #: Temporaries of a sweep: matrices of the largest variable's width that are alive at once, at most.
    temporaries: ClassVar[int] = 16
    #: Whether processes may hold different layers, see `LayerParallelStrategy`.
    layer_parallel: ClassVar[bool] = False
    #: Whether stages may read several earlier ones, see `DenseReLU`.
    several_inputs: ClassVar[bool] = False
    #: Preset → values for arguments left at None; those of "paper" apply without a preset, and after one.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        if self.presets:
            preset = getattr(self, "preset", None)
            check_choice("preset", preset, [None, *(name for name in self.presets if name != "paper")])
            chosen = self.presets["paper"] | self.presets.get(preset or "paper", {})
            for name in (field.name for field in fields(self)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, chosen.get(name))  # the dataclass is frozen
        check_choice("init", self.init, [None, *INITS])
        check_choice("storage_dtype", self.storage_dtype, [None, "float32", "float64", "bfloat16", "float16"])
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"Expected argument `chunk_size` to be at least 1, but got {self.chunk_size}. Use None.")

    @property
    @abstractmethod
    def descends(self) -> bool:
        """Whether the objective can never rise with these hyperparameters."""

    def check(self, chain: Chain, loss: Loss) -> None:
        """Raise a ValueError if the chain, the loss or the number of hyperparameters does not suit the algorithm."""
        for stage in chain:
            if stage.bias is not None and stage.bias.requires_grad != stage.weight.requires_grad:
                raise ValueError(
                    f"Expected weight and bias of stage '{stage.name}' to be both trained or both frozen, but one has "
                    "requires_grad=False. Freeze or unfreeze both."
                )
            if stage.sources is not None and not self.several_inputs:
                raise ValueError(
                    f"Expected the stages of a network for {type(self).__name__} to read the one before, but stage "
                    f"'{stage.name}' reads several. Use TikhonovBCD, or DenseReLU(connections='chain')."
                )

    @abstractmethod
    def sweep(self, chain: Chain, state: LiftedState, loss: Loss, comm: Communicator) -> Report:
        """Update every block once and report the objective after it."""

    @property
    def needs_full_batch(self) -> bool:
        """Whether all samples must come as one batch that stays."""
        return False

    def finish(self, chain: Chain, state: LiftedState, comm: Communicator) -> None:  # noqa: B027  # a hook
        """What is left to do when training ends."""

    @abstractmethod
    def objective(self, chain: Chain, state: LiftedState, loss: Loss) -> Tensor:
        """The objective of this process's samples, computed from its definition."""

    @abstractmethod
    def variables(self, chain: Chain, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield per stage the auxiliary variables (name → tensor) that rows of the input start with."""

    def layer_of(self, name: str, index: int) -> int:
        """The layer that updates a tensor of `LiftedState.variables`."""
        return index

    def readers(self, name: str, index: int) -> Sequence[int]:
        """The layers whose updates read it."""
        return [index]

    def release(self, state: LiftedState, layers: range) -> None:
        """Free the variables that a process with these layers does not read."""
        for name, tensors in state.variables.items():
            for index, tensor in enumerate(tensors):
                if not any(layer in layers for layer in self.readers(name, index)):
                    tensors[index] = tensor.new_empty(0, *tensor.shape[1:])

    def scale_targets(self, y: Tensor) -> Tensor:
        """The targets that the sub-problems use."""
        return y

    def initialise(self, chain: Chain, x: Tensor, comm: Communicator) -> None:
        """Set the weights as `init` says; x is the training input."""
        if self.init is not None:
            sums = torch.cat([x.sum(0, dtype=torch.float64).flatten(), x.new_tensor([len(x)], dtype=torch.float64)])
            comm.sum([sums])
            initialise(chain, self.init, (sums[:-1] / sums[-1]).view_as(x[0]).to(x.dtype))

    def rows_per_chunk(self, x: Tensor) -> int:
        """Rows that are updated together."""
        return self.chunk_size or (CHUNK_CUDA if x.is_cuda else CHUNK_CPU)

    def bytes_per_sample(self, chain: Chain, x: Tensor) -> int:
        """Bytes of auxiliary variables per sample."""
        with precise(x.device):
            numbers = sum(t.numel() for stage in self.variables(chain, x[:1]) for t in stage.values())
        return numbers * self._storage(x).itemsize

    def temporary_bytes(self, chain: Chain, x: Tensor) -> int:
        """Bytes that a sweep over x takes beside the auxiliary variables, at most (sums over samples left out)."""
        with precise(x.device):
            widest = max(t.numel() for stage in self.variables(chain, x[:1]) for t in stage.values())
        return self.temporaries * self.temporary_rows(x) * max(widest, x[0].numel()) * x.dtype.itemsize

    def temporary_rows(self, x: Tensor) -> int:
        """Rows of the temporaries of a sweep."""
        return min(len(x), self.rows_per_chunk(x))

    def start(
        self, chain: Chain, x: Tensor, y: Tensor, comm: Communicator, velocity: dict[str, Tensor] | None = None
    ) -> LiftedState:
        """Initialise the auxiliary variables of a batch from the weights as they are.

        Args:
            chain: The chain.
            x: Input, N × …
            y: Encoded targets, N × outputs.
            comm: The processes that share the samples.
            velocity: What earlier sweeps handed on about the weights.
        """
        count = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        comm.sum([count])
        state = LiftedState(x, self.scale_targets(y), {}, samples=int(count), velocity=velocity or {})
        self.restart(chain, state)
        return state

    def restart(self, chain: Chain, state: LiftedState) -> None:
        """Set the auxiliary variables to those of a forward pass again."""
        x = state.x
        options: dict[str, Any] = {"dtype": self._storage(x), "device": "cpu" if self.offload else x.device}
        with precise(x.device):
            for rows in state.rows(self.rows_per_chunk(x)):
                filled: Counter[str] = Counter()  # not every stage has every variable
                for stage in self.variables(chain, x[rows]):
                    for name, value in stage.items():
                        tensors = state.variables.setdefault(name, [])
                        if len(tensors) <= filled[name]:
                            shape = (len(x), *value.shape[1:])
                            tensors.append(torch.empty(shape, pin_memory=self.offload and x.is_cuda, **options))
                        tensors[filled[name]][rows].copy_(value)
                        filled[name] += 1
        state.fresh = True

    def _storage(self, x: Tensor) -> torch.dtype:
        return getattr(torch, self.storage_dtype) if self.storage_dtype else x.dtype


@torch.no_grad()
def share_weights(chain: Chain, comm: Communicator) -> None:
    """Bring the weights of all layers together where processes train different layers."""
    pairs = [(layer, p) for layer, stage in enumerate(chain) for p in (stage.weight, stage.bias) if p is not None]
    tensors = [tensor for _, tensor in pairs]
    for tensor, whole in zip(tensors, comm.gather(tensors, [layer for layer, _ in pairs]), strict=True):
        if whole is not tensor:
            tensor.copy_(whole)


@contextmanager
def precise(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast or reduced precision (TF32, bfloat16) inside float32 products."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def per_layer(name: str, value: Schedule, sweep: int, depth: int) -> list[float]:
    """Return one number per stage of a schedule.

    Raises:
        ValueError: If there is another number of them, or one is negative or not finite.
    """
    now: Any = value(sweep, depth) if callable(value) else value
    single = isinstance(now, Real) or getattr(now, "ndim", 1) == 0
    values = [float(now)] * depth if single else [float(v) for v in now]
    if len(values) != depth:
        raise ValueError(
            f"Expected argument `{name}` to be one number or {depth}, one per stage, but got {len(values)}. Give one "
            "per linear module, the last layer included."
        )
    # `not >=` also catches NaN.
    if any(not 0 <= v < float("inf") for v in values):
        raise ValueError(f"Expected argument `{name}` to be finite and not negative, but got {values}.")
    return values


def positive(name: str, values: Sequence[float]) -> None:
    """Raise a ValueError that names the argument unless all values are above zero."""
    if min(values) <= 0:
        raise ValueError(
            f"Expected argument `{name}` to be positive, but got {min(values)}. At 0 its term would vanish and the "
            "sub-problem would have no unique solution; use a small positive number."
        )


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise a ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"Expected argument `{name}` to be one of {list(allowed)}, but got {value!r}. Choose one.")
