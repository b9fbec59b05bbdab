"""Train the layers of one network on several processes: pdADMM with strategy="layer_parallel".

python examples/layer_parallel.py --devices 2
torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
    examples/layer_parallel.py --devices 2 --num-nodes 2

With `--bits 8` neighbours exchange a byte per number instead of four. `--data-dir` takes the folder with the MNIST
files instead of the digits of scikit-learn.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import MLP, PDADMM, PDADMMGQ, DigitsDataModule, LiftedModule, MNISTDataModule
from lightning_bcd.distributed.exchange import LayerGroups


def main() -> None:
    """Train, test, and show what each process held and sent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with the MNIST IDX files")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--sweeps", type=int, default=40)
    parser.add_argument("--rho", type=float, default=1e-2)
    parser.add_argument("--bits", type=int, help="quantise P and Q to this many bits")
    parser.add_argument("--devices", type=int, default=2, help="processes on this machine")
    parser.add_argument("--num-nodes", type=int, default=1)
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    data = MNISTDataModule(options.data_dir, batch_size=None) if options.data_dir else DigitsDataModule(batch_size=None)
    network = MLP([data.num_features, *[options.width] * (options.layers - 1), data.num_classes])
    algorithm = PDADMMGQ(rho=options.rho, init="he", bits=options.bits) if options.bits else None
    model = LiftedModule(network, algorithm or PDADMM(rho=options.rho, init="he"), loss="cross_entropy")
    trainer = Trainer(
        max_epochs=options.sweeps,
        accelerator="cpu",
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy="layer_parallel",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    trainer.test(model, data)
    exchange = model.communicator
    assert isinstance(exchange, LayerGroups)
    held = exchange.layers(len(model.chain))
    print(f"process {trainer.global_rank}: layers {held.start} to {held.stop - 1}, {exchange.sent:,} bytes sent")


if __name__ == "__main__":
    main()
