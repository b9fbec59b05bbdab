"""Block coordinate descent for PyTorch Lightning."""

from lightning_bcd.blocks import LayerBlock, create_blocks_from_model, describe_blocks
from lightning_bcd.callback import BCDCallback
from lightning_bcd.comparison import compare_training_methods
from lightning_bcd.compiling import compile_blocks
from lightning_bcd.coordinator import BlockCoordinateDescentCoordinator
from lightning_bcd.datamodules import DigitsDataModule, FashionMNISTDataModule, MNISTDataModule
from lightning_bcd.distributed.strategy import LayerParallelStrategy
from lightning_bcd.full_batch import full_batch
from lightning_bcd.graphs import PlanetoidDataModule, graph_augment
from lightning_bcd.lifted.dladmm import DLADMM
from lightning_bcd.lifted.growth import GrowLayers
from lightning_bcd.lifted.layers import MLP, Abs, DenseReLU, Residual, Sign
from lightning_bcd.lifted.mdlam import MDLAM
from lightning_bcd.lifted.module import LiftedModule
from lightning_bcd.lifted.pdadmm import PDADMM, PDADMMG
from lightning_bcd.lifted.quantized import PDADMMGQ
from lightning_bcd.lifted.residual import ResidualSplitting
from lightning_bcd.lifted.three_splitting import ThreeSplitting
from lightning_bcd.lifted.tikhonov import TikhonovBCD
from lightning_bcd.lifted.two_splitting import TwoSplitting
from lightning_bcd.memory import estimate_memory
from lightning_bcd.models import MLPClassifier
from lightning_bcd.module import BCDMixin, BCDModule
from lightning_bcd.optim.block import BlockOptimizer
from lightning_bcd.optim.hybrid import HybridCoordinateDescent
from lightning_bcd.scored_strategy import GreedyStrategy, ImportanceStrategy, ScoredStrategy
from lightning_bcd.strategy import BCDStrategy, CyclicStrategy, RandomStrategy
from lightning_bcd.tracking import BlockLossTracker

__version__ = "0.1.0"

__all__ = [
    "DLADMM",
    "MDLAM",
    "MLP",
    "PDADMM",
    "PDADMMG",
    "PDADMMGQ",
    "Abs",
    "BCDCallback",
    "BCDMixin",
    "BCDModule",
    "BCDStrategy",
    "BlockCoordinateDescentCoordinator",
    "BlockLossTracker",
    "BlockOptimizer",
    "CyclicStrategy",
    "DenseReLU",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "GreedyStrategy",
    "GrowLayers",
    "HybridCoordinateDescent",
    "ImportanceStrategy",
    "LayerBlock",
    "LayerParallelStrategy",
    "LiftedModule",
    "MLPClassifier",
    "MNISTDataModule",
    "PlanetoidDataModule",
    "RandomStrategy",
    "Residual",
    "ResidualSplitting",
    "ScoredStrategy",
    "Sign",
    "ThreeSplitting",
    "TikhonovBCD",
    "TwoSplitting",
    "__version__",
    "compare_training_methods",
    "compile_blocks",
    "create_blocks_from_model",
    "describe_blocks",
    "estimate_memory",
    "full_batch",
    "graph_augment",
]
