"""Learning-rate schedulers in manual optimization, stepped by the interval the user gave."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau

_KEYS = ("interval", "monitor", "strict", "reduce_on_plateau")


class SchedulerIntervals:
    """Steps `configure_optimizers`' schedulers as automatic optimization would.

    In manual optimization Lightning drops the keys `interval`, `monitor` and `strict` of a scheduler and never
    steps it. This class reads them before they are dropped, writes them back and steps.

    Args:
        module: The module; its `configure_optimizers` is watched for one call.
    """

    def __init__(self, module: LightningModule) -> None:
        self._settings: list[dict[str, Any]] = []
        self._module = module
        # Also an override that the user put on the instance.
        self._own = vars(module).get("configure_optimizers")
        original = module.configure_optimizers

        def configure_optimizers() -> Any:
            self.release()
            return self._read(original())

        module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
        self._watching = True

    def release(self) -> None:
        """Stop watching; safe to call twice."""
        if self._watching:
            self._watching = False
            del self._module.configure_optimizers
            if self._own is not None:
                self._module.configure_optimizers = self._own  # type: ignore[method-assign]

    def _read(self, configured: Any) -> Any:
        """Return `configured` without the keys Lightning would warn about."""
        if isinstance(configured, dict):
            if "lr_scheduler" not in configured:
                return configured
            return {**configured, "lr_scheduler": self._strip(configured["lr_scheduler"])}
        if not isinstance(configured, (list, tuple)):
            return configured
        if configured and all(isinstance(entry, dict) for entry in configured):
            return [self._read(entry) for entry in configured]
        if len(configured) == 2 and isinstance(configured[0], (list, tuple)):
            schedulers = configured[1] if isinstance(configured[1], (list, tuple)) else [configured[1]]
            return configured[0], [self._strip(scheduler) for scheduler in schedulers]
        return configured

    def _strip(self, scheduler: Any) -> Any:
        if not isinstance(scheduler, dict):
            self._settings.append({})
            return scheduler
        self._settings.append({key: scheduler[key] for key in _KEYS if key in scheduler})
        return {key: value for key, value in scheduler.items() if key not in _KEYS}

    def apply(self, trainer: Trainer) -> None:
        """Write the settings into the Trainer's configurations, where LearningRateMonitor looks too."""
        # Weight averaging may have removed the schedulers since.
        for config, settings in zip(trainer.lr_scheduler_configs, self._settings, strict=False):
            config.reduce_on_plateau = isinstance(config.scheduler, ReduceLROnPlateau)
            for key, value in settings.items():
                setattr(config, key, value)

    def step(self, trainer: Trainer, interval: str) -> None:
        """Step every scheduler of this interval whose frequency is met.

        Raises:
            MisconfigurationException: If a scheduler's monitored metric is not there.
        """
        count = trainer.global_step if interval == "step" else trainer.current_epoch + 1
        for config in trainer.lr_scheduler_configs:
            if config.interval != interval or count % config.frequency:
                continue
            metric = None
            if config.reduce_on_plateau:
                metric = trainer.callback_metrics.get(str(config.monitor))
                if metric is None:
                    message = (
                        f"ReduceLROnPlateau is conditioned on metric {config.monitor!r}, which is not available. "
                        f"Available are {sorted(trainer.callback_metrics)}. Log it, or set `monitor` to one of these."
                    )
                    if config.strict:
                        raise MisconfigurationException(message)
                    warnings.warn(message, stacklevel=2)
                    continue
            trainer.lightning_module.lr_scheduler_step(config.scheduler, metric)
