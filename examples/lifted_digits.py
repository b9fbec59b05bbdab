"""Train a network without back-propagation: three-splitting BCD on handwritten digits.

One epoch is one sweep over the whole training set. `--activation Sign` trains a binary network, which has no useful
gradient. `--data-dir` takes the folder with the MNIST files instead of the digits of scikit-learn.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import MLP, DigitsDataModule, LiftedModule, MNISTDataModule, ThreeSplitting


def main() -> None:
    """Train, test, and show what each sweep did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder with the MNIST IDX files")
    parser.add_argument("--hidden", type=int, nargs="+", default=[100, 100, 100])
    parser.add_argument("--activation", default="ReLU")
    parser.add_argument("--sweeps", type=int, default=15)
    parser.add_argument("--log-dir", default="lightning_logs", help="folder for TensorBoard")
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    # batch_size=None: the training set is one batch, its auxiliary variables persist from sweep to sweep.
    data = MNISTDataModule(options.data_dir, batch_size=None) if options.data_dir else DigitsDataModule(batch_size=None)
    network = MLP([data.num_features, *options.hidden, data.num_classes], activation=options.activation)
    algorithm = ThreeSplitting(preset="recommended")
    model = LiftedModule(network, algorithm, loss="squared", log_train_accuracy=True)
    trainer = Trainer(
        max_epochs=options.sweeps,
        accelerator="cpu",
        default_root_dir=options.log_dir,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, data)
    trainer.test(model, data)
    for index, stage in enumerate(model.chain):
        print(
            f"stage {stage.name}: objective terms {float(model.report.coupling[index]):.2e} (activation), "
            f"{float(model.report.linear[index]):.2e} (pre-activation)"
        )


if __name__ == "__main__":
    main()
