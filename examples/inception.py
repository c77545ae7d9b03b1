"""An inception block of GoogLeNet out of fused convolutions, and a small network with one of them on digits.

    python examples/inception.py
    PYCONV_DATA=PATH-TO-MNIST python examples/inception.py --epochs 3

Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich: "Going deeper with convolutions", 2014. Four
branches, of convolutions of 1x1, of 3x3, of 5x5, and of max-pooling, see the same maps; what they give is put side by
side. Convolutions of 1x1 before the large ones and behind the pooling keep the number of products down. A ConvMaxPool2d
with a window of one position is a convolution with ReLU in one pass. Where max-pooling follows the block, each branch
ends in it, which gives the same maps without those before the pooling ever being written.

The branches make the model more than a sequence, so it trains by autograd. Different from the paper is all that is
around the block: one layer before it; behind it dropout and a softmax as there, but no average of each map, which would
say of a digit's strokes that they are there and not where.

Expect about 98 % of the 300 test digits inside the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

import pyconv


class Inception(nn.Module):
    """The inception block with dimension reductions (figure 2b of the paper), ReLU behind every convolution.

    Args:
        in_channels: maps of the input.
        n1x1: maps of the branch of one convolution of 1x1.
        n3x3_reduce, n3x3: maps of the convolution of 1x1, then of the one of 3x3.
        n5x5_reduce, n5x5: the same with 5x5.
        pool_projection: maps of the convolution of 1x1 behind the max-pooling of 3x3.
        pool_size: of the max-pooling that follows the block; 1 for none.

    Shape:
        (N, in_channels, H, W) -> (N, n1x1 + n3x3 + n5x5 + pool_projection, H // pool_size, W // pool_size)
    """

    def __init__(
        self,
        in_channels: int,
        n1x1: int,
        n3x3_reduce: int,
        n3x3: int,
        n5x5_reduce: int,
        n5x5: int,
        pool_projection: int,
        *,
        pool_size: int = 1,
    ) -> None:
        super().__init__()

        def convolution(n_in: int, n_out: int, kernel_size: int, pool_size: int) -> nn.Module:
            return pyconv.ConvMaxPool2d(
                n_in, n_out, kernel_size, pool_size, padding=kernel_size // 2, activation="relu"
            )

        self.branches = nn.ModuleList(
            [
                convolution(in_channels, n1x1, 1, pool_size),
                nn.Sequential(
                    convolution(in_channels, n3x3_reduce, 1, 1), convolution(n3x3_reduce, n3x3, 3, pool_size)
                ),
                nn.Sequential(
                    convolution(in_channels, n5x5_reduce, 1, 1), convolution(n5x5_reduce, n5x5, 5, pool_size)
                ),
                nn.Sequential(
                    nn.MaxPool2d(3, stride=1, padding=1), convolution(in_channels, pool_projection, 1, pool_size)
                ),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def inception_net() -> nn.Sequential:
    """(N, 1, 28, 28) -> scores (N, 10)."""
    model = nn.Sequential(
        pyconv.ConvMaxPool2d(1, 32, kernel_size=5, pool_size=2, padding=2, activation="relu"),  # 28x28 -> 14x14
        Inception(32, 16, 16, 32, 4, 8, 8, pool_size=2),  # 14x14 -> 64 maps of 7x7
        nn.Flatten(),
        pyconv.Dropout(0.4),
        nn.Linear(64 * 7 * 7, 10),
    )
    common.initialise_for_relu(model)
    return model


def main(arguments: Sequence[str] | None = None) -> common.Result:
    parser = common.parser_for(__doc__)
    common.add_training_options(parser, epochs=10, mini_batch_size=10, learning_rate=0.01)
    options = common.start(parser, arguments)
    model = inception_net().to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=0.9)
    return common.train(
        model,
        common.eager_step(model, optimizer),
        common.load_images(),
        epochs=options.epochs,
        mini_batch_size=options.mini_batch_size,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
