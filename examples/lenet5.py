"""LeNet-5, the ancestor of today's convolutional networks, trained by a compiled step on handwritten digits.

    python examples/lenet5.py
    PYCONV_DATA=PATH-TO-MNIST python examples/lenet5.py

LeCun, Bottou, Bengio, Haffner: "Gradient-based learning applied to document recognition", Proceedings of the IEEE 86,
1998. This is the form that today's libraries give it, with 61,706 parameters. Different from the paper are:

 * max-pooling, where the paper has sums of windows with a trained coefficient and bias;
 * each of the 16 maps sees all 6 before it, where the paper connects some of them by a table;
 * tanh, where the paper has 1.7159 tanh(2/3 x);
 * a softmax and its cross entropy, where the paper compares with one drawn pattern for each class;
 * images of 28x28 are padded to the paper's 32x32 by the first layer.

Expect about 98 % of the 300 test digits inside the package; the paper reports 99.05 % on MNIST.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from torch import nn

import pyconv


def lenet5() -> nn.Sequential:
    """(N, 1, 28, 28) -> scores (N, 10)."""
    return nn.Sequential(
        pyconv.ConvMaxPool2d(1, 6, kernel_size=5, pool_size=2, padding=2, activation="tanh"),  # 28x28 -> 14x14
        pyconv.ConvMaxPool2d(6, 16, kernel_size=5, pool_size=2, activation="tanh"),  # 10x10 -> 5x5
        nn.Flatten(),
        pyconv.LinearActDropout(16 * 5 * 5, 120, activation="tanh"),
        pyconv.LinearActDropout(120, 84, activation="tanh"),
        nn.Linear(84, 10),
    )


def main(arguments: Sequence[str] | None = None) -> common.Result:
    parser = common.parser_for(__doc__)
    common.add_training_options(parser, epochs=15, mini_batch_size=10, learning_rate=0.01)
    options = common.start(parser, arguments)
    model = lenet5().to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=0.9)
    return common.train(
        model,
        pyconv.compile_training(model, optimizer=optimizer),
        common.load_images(),
        epochs=options.epochs,
        mini_batch_size=options.mini_batch_size,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
