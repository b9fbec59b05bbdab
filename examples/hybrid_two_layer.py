"""Hybrid coordinate descent on a two-layer ReLU network: line searches along single weights, no learning rate.

The problem of arXiv 2408.01374: 10 samples on the unit sphere in 1,000 dimensions, random targets, fixed output
weights. Every weight computes its own target from the same point: the best value, or with `--search local` the vertex
of the parabola it stands on. The loss never rises.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from lightning_bcd import HybridCoordinateDescent


def main() -> None:
    """Train the hidden weights and print the loss beside that of gradient descent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dw", type=float, default=1.0)
    parser.add_argument("--search", choices=["global", "local"], default="global")
    parser.add_argument("--top-k", type=int, help="move only so many weights per epoch: those of largest gradient")
    options = parser.parse_args()

    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(10, 1000), dim=1), torch.randn(10)

    def network() -> nn.Sequential:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(1000, options.width, bias=False), nn.ReLU(), nn.Linear(options.width, 1))
        nn.init.normal_(net[0].weight)
        nn.init.uniform_(net[2].weight, -1, 1)
        net[2].requires_grad_(False)
        return net

    hybrid_net, descent_net = network(), network()
    hybrid = HybridCoordinateDescent(
        hybrid_net.parameters(),
        dw=options.dw,
        model=hybrid_net,
        selection="greedy" if options.top_k else "jacobi",
        top_k=options.top_k,
        search=options.search,
    )
    descent = torch.optim.SGD(descent_net[0].parameters(), lr=0.1)

    def loss_of(net: nn.Module) -> torch.Tensor:
        return (net(x)[:, 0] - y).square().mean() / 2

    for epoch in range(options.epochs):
        loss = hybrid.step(lambda: loss_of(hybrid_net))  # returns the loss before the step
        descent.zero_grad()
        other = loss_of(descent_net)
        other.backward()
        descent.step()
        print(f"epoch {epoch}: hybrid {loss.item():.2e}, gradient descent with step 0.1 {other.item():.2e}")


if __name__ == "__main__":
    main()
