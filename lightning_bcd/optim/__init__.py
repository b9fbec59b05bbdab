"""Optimizers made for blocks of coordinates."""

from lightning_bcd.optim.block import BlockOptimizer, OptimizerFactory

__all__ = ["BlockOptimizer", "OptimizerFactory"]
