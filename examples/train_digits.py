"""A plain PyTorch training loop with pyconv's layers, on the handwritten digits inside the package.

    python examples/train_digits.py --epochs 10
    python examples/train_digits.py --device cuda

The network: (N, 1, 28, 28) -> 20 maps of 12x12 -> 40 maps of 4x4 -> 100 -> 10 classes.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import pyconv
from pyconv import network3


def make_model() -> nn.Sequential:
    """Two convolution-and-pooling layers, a hidden layer with dropout, and the scores of ten digits."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        pyconv.ConvMaxPool2d(1, 20, kernel_size=5, pool_size=2, activation="relu"),
        pyconv.ConvMaxPool2d(20, 40, kernel_size=5, pool_size=2, activation="relu"),
        nn.Flatten(),
        pyconv.LinearActDropout(40 * 4 * 4, 100, activation="relu", p=0.5),
        nn.Linear(100, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Fraction of the digits `x` (n, 784) that `model` gives the label `y` (n,)."""
    model.eval()
    return (model(x).argmax(dim=1) == y).float().mean().item()


def train(epochs: int, mini_batch_size: int, learning_rate: float, device: str = "cpu") -> float:
    """Train with momentum SGD, print a line per epoch, and return the accuracy on the test digits."""
    training_data, validation_data, test_data = (
        (x.to(device), y.to(device)) for x, y in network3.load_data_shared()
    )
    model = make_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(training_data[0]), device=device)
        for chosen in order.split(mini_batch_size):
            x, y = training_data[0][chosen], training_data[1][chosen]
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: validation accuracy {accuracy(model, *validation_data):.2%}")
    return accuracy(model, *test_data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--mini-batch-size", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--learning-rate", type=float, default=0.01, metavar="RATE", help="default: 0.01")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    result = train(arguments.epochs, arguments.mini_batch_size, arguments.learning_rate, arguments.device)
    print(f"test accuracy {result:.2%}")


if __name__ == "__main__":
    main()
