"""Block coordinate descent in a plain PyTorch loop: the coordinator steps, the tracker keeps the losses.

Every block has an optimizer of its own; while one is trained, the others are frozen. No Trainer is involved.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_bcd import BlockCoordinateDescentCoordinator, BlockLossTracker, create_blocks_from_model


def main() -> None:
    """Train on 1,500 digits, test on the other 297."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--plot", metavar="FILE.png", help="save the loss of every block (needs matplotlib)")
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    blocks = create_blocks_from_model(model, block_type="linear")
    coordinator = BlockCoordinateDescentCoordinator(
        blocks=blocks,
        optimizer_class=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1, "momentum": 0.9},
        per_block_kwargs={blocks[-1].name: {"lr": 0.05}},
    )
    tracker = BlockLossTracker(num_blocks=len(blocks))
    for epoch in range(options.epochs):
        for rows in torch.randperm(1500).split(50):
            for block in range(len(blocks)):
                tracker.record(block, coordinator.step(block, model, x[rows], y[rows], nn.CrossEntropyLoss()))
        summary = tracker.get_epoch_summary()
        print(f"epoch {epoch}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in summary.items()))

    accuracy = (model(x[1500:]).argmax(dim=1) == y[1500:]).float().mean()
    print(f"test accuracy: {accuracy:.4f}")
    if options.plot:
        tracker.plot_block_losses(options.plot)


if __name__ == "__main__":
    main()
