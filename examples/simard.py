"""The convolutional network of Simard, Steinkraus and Platt on digits that are distorted anew in every epoch.

    python examples/simard.py
    python examples/simard.py --undistorted
    PYCONV_DATA=PATH-TO-MNIST python examples/simard.py

Simard, Steinkraus, Platt: "Best practices for convolutional neural networks applied to visual document analysis",
ICDAR 2003. Two convolutional layers of 5 and 50 maps with filters of 5x5 move by two pixels instead of being followed
by pooling; then come 100 hidden units and a softmax: 132,540 parameters. Images of 28x28 get a row and a column of
zeros, since 29x29 is what the strides fit. Elastic distortion is the paper's: random fields smoothed by a Gaussian of 4
pixels, times 34. Different from the paper are:

 * its affine distortion, whose ranges it does not give: here rotation by up to 10 degrees, scaling and shear by up to
   10 %, and shifts by up to a pixel;
 * tanh in all layers, since the paper leaves its activation open;
 * mini-batches and momentum, where the paper takes one image at a time. As there, the learning rate is multiplied by
   0.3 from time to time: here twice, after half and after three quarters of the epochs.

Expect 99 % and more of the 300 test digits inside the package, and about 98 % without the distortion; the paper reports
99.6 % on MNIST.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyconv

IMAGE_SHAPE = (1, 29, 29)


def simard() -> nn.Sequential:
    """(N, 1, 29, 29) -> scores (N, 10)."""
    return nn.Sequential(
        pyconv.ConvMaxPool2d(1, 5, kernel_size=5, pool_size=1, stride=2, activation="tanh"),  # 29x29 -> 13x13
        pyconv.ConvMaxPool2d(5, 50, kernel_size=5, pool_size=1, stride=2, activation="tanh"),  # 13x13 -> 5x5
        nn.Flatten(),
        pyconv.LinearActDropout(50 * 5 * 5, 100, activation="tanh"),
        nn.Linear(100, 10),
    )


def padded(images: Tensor) -> Tensor:
    """(n, 1, 28, 28) -> (n, 1, 29, 29): a row of zeros below and a column of zeros on the right."""
    return F.pad(images, (0, 1, 0, 1))


def main(arguments: Sequence[str] | None = None) -> common.Result:
    parser = common.parser_for(__doc__)
    common.add_training_options(parser, epochs=40, mini_batch_size=10, learning_rate=0.01)
    parser.add_argument("--undistorted", action="store_true", help="train on the images as they are")
    options = common.start(parser, arguments)
    model = simard().to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=0.9)
    distortion = pyconv.RandomDistortion(
        IMAGE_SHAPE, shift=1.0, rotation=10.0, scale=0.1, shear=0.1, elastic=34.0, elastic_sigma=4.0, seed=options.seed
    )
    return common.train(
        model,
        pyconv.compile_training(model, optimizer=optimizer),
        [(padded(x), y) for x, y in common.load_images()],
        epochs=options.epochs,
        mini_batch_size=options.mini_batch_size,
        seed=options.seed,
        distortion=None if options.undistorted else distortion,
        scheduler=torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [options.epochs // 2, 3 * options.epochs // 4], gamma=0.3
        ),
    )


if __name__ == "__main__":
    main()
