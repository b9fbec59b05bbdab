"""Train a network without back-propagation: dlADMM on MNIST.

One epoch is one iteration over the whole training set: backward over the layers, forward again, then the dual
variable. `--samples` takes fewer training images, for a quick look.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import DLADMM, MLP, LiftedModule, MNISTDataModule

IMAGES = 60_000


def main() -> None:
    """Train, test, and show how far the constraints are from being met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with the MNIST IDX files")
    parser.add_argument("--samples", type=int, default=IMAGES, help="training images")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1000, 1000])
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--log-dir", default="lightning_logs", help="folder for TensorBoard")
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    # batch_size=None: the training set is one batch, its auxiliary variables persist from sweep to sweep.
    data = MNISTDataModule(options.data_dir, batch_size=None, val_fraction=1 - options.samples / IMAGES)
    network = MLP([data.num_features, *options.hidden, data.num_classes])
    algorithm = DLADMM(preset="recommended")
    model = LiftedModule(network, algorithm, loss="cross_entropy", log_train_accuracy=True)
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
    residuals = model.report.residuals
    for index, stage in enumerate(model.chain):
        print(f"stage {stage.name}: Z − P {float(residuals['linear'][index]):.2e}", end="")
        print(f", A − σ(Z) {float(residuals['activation'][index]):.2e}" if stage is not model.chain[-1] else "")


if __name__ == "__main__":
    main()
