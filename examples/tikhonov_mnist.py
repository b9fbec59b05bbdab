"""Train a network without back-propagation: Tikhonov BCD on MNIST.

A ReLU network whose layers read all layers before them. One epoch is one sweep over the whole training set: all
activations of one sample from one linear system, the same for all samples, then least squares for the weights. `--svm`
fits the output layer by scikit-learn's LinearSVC at the end. `--samples` takes fewer training images, for a quick look.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import DenseReLU, FashionMNISTDataModule, LiftedModule, MNISTDataModule, TikhonovBCD

IMAGES = 60_000


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with the IDX files of MNIST or Fashion-MNIST")
    parser.add_argument("--fashion", action="store_true", help="they are those of Fashion-MNIST")
    parser.add_argument("--samples", type=int, default=IMAGES, help="training images")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1000, 1000])
    parser.add_argument("--connections", choices=["dense", "chain"], default="dense")
    parser.add_argument("--sweeps", type=int, default=10)
    parser.add_argument("--svm", action="store_true")
    parser.add_argument("--log-dir", default="lightning_logs", help="folder for TensorBoard")
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    # batch_size=None: the training set is one batch, its activations persist from sweep to sweep.
    source = FashionMNISTDataModule if options.fashion else MNISTDataModule
    data = source(options.data_dir, batch_size=None, val_fraction=1 - options.samples / IMAGES)
    network = DenseReLU([data.num_features, *options.hidden, data.num_classes], options.connections)
    algorithm = TikhonovBCD(preset="recommended", classifier="svm" if options.svm else None)
    model = LiftedModule(network, algorithm, loss="squared", log_train_accuracy=True)
    trainer = Trainer(
        max_epochs=options.sweeps,
        accelerator="cpu",
        default_root_dir=options.log_dir,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
