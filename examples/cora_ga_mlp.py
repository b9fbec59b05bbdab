"""A deep graph-augmented MLP on Cora, without back-propagation: pdADMM-G, grown from 2 to 5 to 10 layers.

`--data-dir` is the folder with `cora.npz` or `citeseer.npz`, see `PlanetoidDataModule`. One epoch is one sweep over all
training nodes; `--sweeps` of them train each depth.
"""

import argparse

from lightning.pytorch import Trainer, seed_everything

from lightning_bcd import MLP, PDADMMG, GrowLayers, LiftedModule, PlanetoidDataModule


def main() -> None:
    """Train, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--name", choices=PlanetoidDataModule.names, default="cora")
    parser.add_argument("--sweeps", type=int, default=60, help="per depth")
    parser.add_argument("--width", type=int, default=500)
    options = parser.parse_args()
    seed_everything(0, verbose=False)

    data = PlanetoidDataModule(options.data_dir, name=options.name, hops=4)
    data.setup()
    depths = [2, 5, 10]
    network = MLP([data.num_features, *[options.width] * (depths[-1] - 1), data.num_classes])
    # A layer that starts as the identity needs a weaker pull to zero than one that starts from noise.
    algorithms = [PDADMMG(preset="recommended", mu=mu) for mu in (5.0, 0.3, 0.03)]
    model = LiftedModule(network, algorithms[0], loss="cross_entropy")
    trainer = Trainer(
        max_epochs=len(depths) * options.sweeps,
        accelerator="cpu",
        callbacks=[GrowLayers(depths, every=options.sweeps, algorithms=algorithms)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        check_val_every_n_epoch=options.sweeps,
    )
    trainer.fit(model, data)
    trainer.validate(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
