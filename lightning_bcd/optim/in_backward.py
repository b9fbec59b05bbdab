"""The optimizer step of the active block inside the backward pass, one parameter at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bcd.optim.block import BlockOptimizer, refuse_closure
from lightning_bcd.optim.masters import MasterWeights


class StepInBackward:
    """Steps each parameter as soon as its gradient is ready and frees the gradient at once.

    The largest gradient in memory is then that of one parameter, not of one block. The user's optimizer does the
    arithmetic: a copy of it that shares state and settings is shown one parameter at a time. The optimizer's own
    `step`, called later as usual, finds no gradient left and only fires its hooks.

    Args:
        optimizer: The optimizer of the run.
        masters: The float32 masters, if weights are bfloat16.
        reduce: Averages the gradient of a parameter over all ranks, in a distributed run.

    Attributes:
        armed: Whether the backward pass under way is that of the training step; in others nothing steps.
        stepped: The parameters that were stepped since `enter` or `forget`.
        squares: ‖gradient‖² of each of them, as `measure` says.
        measure: Function from a gradient to the number kept in `squares`, or None.

    Raises:
        ValueError: If the optimizer evaluates the loss itself (LBFGS).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        masters: MasterWeights | None = None,
        reduce: Callable[[nn.Parameter], None] | None = None,
    ) -> None:
        refuse_closure(optimizer, "step_in_backward")
        self._inner = optimizer.optimizers if isinstance(optimizer, BlockOptimizer) else [optimizer]
        self._masters = masters
        self._reduce = reduce
        self._handles: list[RemovableHandle] = []
        self.armed = False
        self.stepped: set[Tensor] = set()
        self.squares: list[Tensor] = []
        self.measure: Callable[[Tensor], Tensor] | None = None

    def enter(self, parameters: Sequence[nn.Parameter]) -> None:
        """Step these parameters in every backward pass from now on."""
        self.leave()
        owners = {
            p: (optimizer, single, index)
            for optimizer, single in [(optimizer, _without_hooks(optimizer)) for optimizer in self._inner]
            for index, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        for parameter in parameters:
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._stepper(parameter, *owners[parameter]))  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def leave(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Start the books of another step."""
        self.stepped.clear()
        self.squares.clear()

    def _stepper(
        self, parameter: nn.Parameter, optimizer: Optimizer, single: Optimizer, group: int
    ) -> Callable[[Tensor], None]:
        def step(gradient_owner: Tensor) -> None:
            if not self.armed:
                return
            if self._reduce is not None:
                self._reduce(parameter)
            assert parameter.grad is not None
            if self.measure is not None:
                self.squares.append(self.measure(parameter.grad))
            if self._masters is not None:
                self._masters.lift([parameter])
            # Looked up at every step: schedulers change the settings, load_state_dict replaces both containers.
            single.param_groups = [{**optimizer.param_groups[group], "params": [parameter]}]
            single.state = optimizer.state
            type(single).step(single)
            if self._masters is not None:
                self._masters.lower([parameter])
            parameter.grad = None
            self.stepped.add(parameter)

        return step


def _without_hooks(optimizer: Optimizer) -> Optimizer:
    # copy.copy would keep state and groups only, and no attribute of the class.
    single: Optimizer = object.__new__(type(optimizer))
    vars(single).update(vars(optimizer))
    # A learning-rate scheduler replaces `step` on the object to count calls; hooks belong to the whole step.
    vars(single).pop("step", None)
    single._optimizer_step_pre_hooks = OrderedDict()
    single._optimizer_step_post_hooks = OrderedDict()
    return single
