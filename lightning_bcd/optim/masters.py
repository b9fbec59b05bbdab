"""fp32 master weights for the bfloat16 parameters of the active block, and how they are rounded back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Rounding: TypeAlias = Literal["stochastic", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


@torch.no_grad()
def stochastic_round(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16 without bias: `E[result] = values`.

    A value between the neighbours `a < b` becomes `b` with probability `(value - a) / (b - a)`, to 16 bits. Values
    that bfloat16 can hold, infinities and NaN stay as they are. Beyond the largest bfloat16 the outer neighbour is
    infinite, as for rounding to nearest.

    Args:
        values: Float32 tensor of any shape.
        generator: Source of 16 random bits per value, on the device of `values`. The global one if None.

    Returns:
        A bfloat16 tensor of the same shape.

    Raises:
        TypeError: If `values` is not float32.
    """
    if values.dtype is not torch.float32:
        raise TypeError(f"Expected argument `values` to be float32, but got {values.dtype}. Pass `values.float()`.")
    # The upper half of a float32 is a bfloat16, and bit patterns count magnitudes: what is added to the lower half
    # carries over in proportion to the distance, for either sign.
    bits = torch.empty_like(values, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    return _truncate(values, bits.add_(values.view(torch.int32)))


def rounding_generator(seed: int, draws: int, device: torch.device) -> torch.Generator:
    """Return the generator of the `draws`-th rounding: equal on all ranks, and its only state is a number."""
    # Some generators take 32 bits. The odd factor sets the sequences of different seeds apart.
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + draws) & 0xFFFFFFFF)


def _round_half_away(values: Tensor) -> Tensor:
    # Ties go up in magnitude, so that the rounded-off part fits int16: -0x8000 to 0x7fff.
    return _truncate(values, values.view(torch.int32) + 0x8000)


def _truncate(values: Tensor, bits: Tensor) -> Tensor:
    """Return the upper halves of `bits` as bfloat16, and NaN where the float32 `values` are NaN."""
    rounded = bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    # The carry turns some NaN patterns into infinity or zero.
    return rounded.masked_fill_(values.isnan(), torch.nan)


def _residual(master: Tensor) -> Tensor:
    """What `_round_half_away` takes off the bit pattern, int16."""
    # The lower half as a signed number: the cast keeps the low bits.
    return master.view(torch.int32).to(torch.int16)


def _add_residual(low: Tensor, residual: Tensor) -> Tensor:
    """Return the float32 that `_round_half_away` made `low` of."""
    residual = residual.to(low.device)
    # Nothing is smaller than zero in magnitude. A weight that somebody has set to zero since would become NaN.
    residual = torch.where(low == 0, residual.clamp(min=0), residual)
    return low.float().view(torch.int32).add_(residual).view(torch.float32)


class MasterWeights:
    """Trains bfloat16 parameters through fp32 copies, with the user's own optimizer.

    A block that becomes active gets its masters (`enter`) and loses them when it leaves (`leave`). Around the
    optimizer step (`lift`, step, `lower`) each parameter object is its fp32 master with an fp32 gradient, so the
    optimizer keeps fp32 state under the same keys; in between it is the bfloat16 tensor, the rounded master. Memory
    of the active block: 2 bytes per weight, 4 per master and 4 per gradient during the step, and the optimizer state.

    While a parameter has a master, the master counts: other writes to the weight are lost at the next `lower`.
    Parameters that are not bfloat16 are left alone everywhere.

    Args:
        rounding: `"stochastic"` keeps, on average, progress below the spacing of bfloat16 over visits. `"nearest"`
            loses it when the block leaves.
        keep_residual: Keep on the host, 2 bytes per weight, what rounding took off when a block left, and give it back
            its exact fp32 weights when it returns. Weights are then rounded to nearest, whatever `rounding` says.
        seed: Of the random numbers for rounding, which are the same in every process and independent of torch's
            global ones.

    Raises:
        ValueError: If `rounding` is unknown.
    """

    def __init__(self, *, rounding: Rounding = "stochastic", keep_residual: bool = False, seed: int = 0) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"Expected argument `rounding` to be one of {ROUNDINGS}, but got {rounding!r}.")
        self.rounding = rounding
        self.keep_residual = keep_residual
        self.seed = seed
        # While a parameter is lifted, its entry is the bfloat16 tensor instead of the master.
        self._masters: dict[nn.Parameter, Tensor] = {}
        self._lifted: dict[nn.Parameter, None] = {}  # a set in order: random numbers are drawn in this order
        self._residuals: dict[nn.Parameter, Tensor] = {}
        self._draws = 0

    @torch.no_grad()
    def enter(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make masters for the bfloat16 ones among `parameters`; those that have one keep it.

        Raises:
            ValueError: If a parameter is a DTensor (FSDP2).
        """
        parameters = list(parameters)
        for parameter in parameters:
            # Not isinstance: DTensor moved between torch versions.
            if parameter.dtype is torch.bfloat16 and hasattr(parameter, "to_local"):
                raise ValueError(
                    "Expected bfloat16 parameters to be plain tensors, but got a DTensor (FSDP2). Keep the parameters "
                    "in float32 and pass `mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)` to "
                    "`fully_shard`, which computes in bfloat16 and steps on float32."
                )
        for parameter in parameters:
            if parameter in self._masters:  # a loaded one: the model may have moved to its device since
                self._masters[parameter] = self._masters[parameter].to(parameter.device)
            elif parameter.dtype is torch.bfloat16:
                low, residual = parameter.detach(), self._residuals.pop(parameter, None)
                self._masters[parameter] = low.float() if residual is None else _add_residual(low, residual)

    @torch.no_grad()
    def leave(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop the masters of `parameters`; with `keep_residual`, keep on the host what rounding took off.

        Raises:
            ValueError: If one of them is lifted.
        """
        for parameter in parameters:
            if parameter in self._lifted:
                raise ValueError("Expected parameters that leave to be lowered, but got a lifted one. Call `lower`.")
            master = self._masters.pop(parameter, None)
            if master is not None and self.keep_residual:
                residual = _residual(master)
                if parameter.is_cuda:
                    residual = torch.empty_like(residual, device="cpu", pin_memory=True).copy_(residual)
                self._residuals[parameter] = residual

    @torch.no_grad()
    def lift(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Before the optimizer step: turn parameters into their masters and their gradients into float32.

        Args:
            parameters: Only these. All if None. Those without a master or without a gradient stay as they are.
        """
        for parameter in list(self._masters if parameters is None else parameters):
            if parameter not in self._masters or parameter in self._lifted or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            parameter.grad = None
            self._masters[parameter].requires_grad_(parameter.requires_grad)
            self._swap(parameter)
            self._lifted[parameter] = None
            parameter.grad = gradient

    @torch.no_grad()
    def lower(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """After the optimizer step: round the masters into the weights and drop the gradients.

        The weights are written in place: views, tied tensors and whoever else holds their memory see the change.

        Args:
            parameters: Only these, as far as they are lifted. All if None.
        """
        generators: dict[torch.device, torch.Generator] = {}
        for parameter in list(self._lifted if parameters is None else parameters):
            if parameter in self._lifted:
                parameter.grad = None  # its memory serves the rounding
                self._masters[parameter].copy_(self._round(parameter.detach(), generators))
                self._put_back(parameter)
        # Each call has its own seed, so that the state is one number, whatever the devices.
        self._draws += bool(generators)

    def restore(self) -> None:
        """After an exception: turn lifted parameters back into their weights, unchanged, and drop the gradients.

        The masters stay as the interrupted step left them. To drop them as well, call `leave` next.
        """
        for parameter in list(self._lifted):
            self._put_back(parameter)

    def _round(self, master: Tensor, generators: dict[torch.device, torch.Generator]) -> Tensor:
        if self.keep_residual:
            return _round_half_away(master)
        if self.rounding == "nearest":
            return master.to(torch.bfloat16)
        if master.device not in generators:
            generators[master.device] = rounding_generator(self.seed, self._draws, master.device)
        return stochastic_round(master, generators[master.device])

    def _put_back(self, parameter: nn.Parameter) -> None:
        parameter.grad = None
        self._swap(parameter)
        del self._lifted[parameter]

    def _swap(self, parameter: nn.Parameter) -> None:
        # `parameter.data = master` would change the dtype of the tensor behind the parameter, upon which autograd
        # forgets its gradient accumulator, and with it the hooks by which DDP averages: the processes would part
        # silently. So the parameter object gets another tensor behind it for the time of the step. The public
        # `torch.utils.swap_tensors` does the same, but refuses while a graph or DDP holds the tensor.
        torch._C._swap_tensor_impl(parameter, self._masters[parameter])

    def keep_state_precision(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Make `optimizer.load_state_dict` keep the float32 state of bfloat16 parameters.

        torch casts loaded state to the dtype of the parameter. State that was saved in less than float32, by a run
        without masters, becomes float32 as well, because it will meet float32 gradients.

        Args:
            optimizer: Any torch optimizer that keeps its state per parameter.

        Returns:
            The handles of the two hooks; `remove()` undoes the change.
        """
        saved: list[dict[str, Any]] = []

        def remember(_: Optimizer, state_dict: dict[str, Any]) -> None:
            saved[:] = [state_dict]

        def put_back(loaded: Optimizer) -> None:
            state_dict = saved.pop()
            # Saved states are numbered; torch matches the numbers with parameters by their place in the groups.
            numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
            parameters = chain.from_iterable(group["params"] for group in loaded.param_groups)
            for number, parameter in zip(numbers, parameters, strict=True):
                if parameter.dtype is torch.bfloat16 and number in state_dict["state"]:
                    loaded.state[parameter] = _precise(state_dict["state"][number], loaded.state[parameter])

        return [
            optimizer.register_load_state_dict_pre_hook(remember),
            optimizer.register_load_state_dict_post_hook(put_back),
        ]

    def master_bytes(self) -> int:
        """Bytes of the masters, on the devices of their parameters."""
        return sum(4 * master.numel() for master in self._masters.values())

    def state_dict(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """Return masters, residuals and the position in the random numbers, by name; tensors are not copied.

        Args:
            names: Of all parameters that were given to `enter`.
        """
        masters = {p: p.detach() if p in self._lifted else master for p, master in self._masters.items()}
        return {
            "draws": self._draws,
            "masters": {names[parameter]: master for parameter, master in masters.items()},
            "residuals": {names[parameter]: residual for parameter, residual in self._residuals.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Replace everything by a saved state. Parameters that are not bfloat16 (any more) get no master.

        Args:
            state_dict: From `state_dict`.
            parameters: The parameters by name, with the weights of the same moment loaded.

        Raises:
            ValueError: If the state holds a name or a shape that `parameters` does not.
        """
        for name, tensor in chain(state_dict["masters"].items(), state_dict["residuals"].items()):
            if name not in parameters or parameters[name].shape != tensor.shape:
                expected = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ValueError(
                    f"Expected the saved master weights to match the model, but got {name!r} of shape "
                    f"{tuple(tensor.shape)} where the model has {expected}. Load them into the model they were saved "
                    "from."
                )
        self.restore()
        low = {name: parameter for name, parameter in parameters.items() if parameter.dtype is torch.bfloat16}
        masters, residuals = state_dict["masters"], state_dict["residuals"]
        self._draws = state_dict["draws"]
        self._masters = {low[name]: m.to(low[name].device, copy=True) for name, m in masters.items() if name in low}
        self._residuals = {low[name]: residual.clone() for name, residual in residuals.items() if name in low}


def _precise(saved: Any, loaded: Any) -> Any:
    """Return `loaded`, its bfloat16 tensors replaced by `saved` ones in float32 or more."""
    if isinstance(loaded, Tensor):
        if loaded.dtype is not torch.bfloat16 or not saved.is_floating_point():
            return loaded
        return saved.to(loaded.device, torch.promote_types(saved.dtype, torch.float32), copy=True)
    if isinstance(loaded, dict):
        return {key: _precise(saved[key], value) for key, value in loaded.items()}
    if isinstance(loaded, (list, tuple)):
        return type(loaded)(_precise(*pair) for pair in zip(saved, loaded, strict=True))
    return loaded
