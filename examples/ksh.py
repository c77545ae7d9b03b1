"""The network of Krizhevsky, Sutskever and Hinton ("AlexNet"), trained by a compiled step on made-up images.

    python examples/ksh.py                          # an eighth of the paper's width, a minute
    python examples/ksh.py --width 1 --classes 1000 --mini-batch-size 128 --images 1280 --device cuda

Krizhevsky, Sutskever, Hinton: "ImageNet classification with deep convolutional neural networks", NIPS 2012. Layers,
groups (the halves of layers 2, 4 and 5 that the paper keeps on two GPUs), overlapping pooling, dropout, momentum 0.9,
weight decay 5e-4, random crops of 224x224 out of 256x256 and mirror images are the paper's; at full width there are
60,965,224 parameters. Different from it are:

 * made-up images: gratings, whose classes differ in colour and period, under noise;
 * local response normalisation, which a compiled step cannot express: `--local-response-norm` puts it behind the ReLU
   of the first two layers as in the paper, and trains by autograd;
 * initial weights of variance 2 / inputs and biases of zero, where the paper takes a standard deviation of 0.01, and
   biases of one in some layers, which a narrow network does not learn from;
 * no change of colours, and one central crop instead of ten in evaluation; the learning rate stays as it is.

Expect the loss to fall from above 3 to about 0.5, and nine of ten test images to be recognised, where chance is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn

import pyconv

SIDE, CROP = 256, 224

_NOISE = 0.5


def ksh(
    width: float = 1.0, classes: int = 1000, *, local_response_norm: bool = False, p_dropout: float = 0.5
) -> nn.Sequential:
    """The network, (N, 3, 224, 224) -> scores (N, classes).

    Args:
        width: maps and hidden units over the paper's; the maps are rounded to an even number, for the groups.
        classes: the paper's are 1000.
        local_response_norm: normalise behind the ReLU of the first two layers; `pyconv.compile_training` refuses it.
        p_dropout: probability of a hidden unit of the fully connected layers to be dropped.

    Raises:
        ValueError: a width that is not positive, no class, or a probability that is none.
    """
    common.check_width(width)
    if classes < 1:
        raise ValueError(f"classes must be at least 1, but got {classes}")
    maps = [2 * max(1, round(n * width / 2)) for n in (96, 256, 384, 384, 256)]
    hidden = max(1, round(4096 * width))

    def pooled(*sizes: int, **arguments: int) -> list[nn.Module]:
        """Convolution and ReLU, then pooling over windows of 3x3 that overlap."""
        if not local_response_norm:
            return [pyconv.ConvMaxPool2d(*sizes, pool_size=3, pool_stride=2, activation="relu", **arguments)]
        # The paper multiplies the sum of 5 squares by 1e-4, torch their mean.
        norm = nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0)
        conv = pyconv.ConvMaxPool2d(*sizes, pool_size=1, activation="relu", **arguments)
        return [conv, norm, nn.MaxPool2d(3, stride=2)]

    model = nn.Sequential(
        *pooled(3, maps[0], 11, stride=4, padding=2),  # 224x224 -> 55x55 -> 27x27
        *pooled(maps[0], maps[1], 5, padding=2, groups=2),  # 27x27 -> 13x13
        pyconv.ConvMaxPool2d(maps[1], maps[2], 3, pool_size=1, padding=1, activation="relu"),
        pyconv.ConvMaxPool2d(maps[2], maps[3], 3, pool_size=1, padding=1, groups=2, activation="relu"),
        pyconv.ConvMaxPool2d(
            maps[3], maps[4], 3, pool_size=3, pool_stride=2, padding=1, groups=2, activation="relu"
        ),  # 13x13 -> 6x6
        nn.Flatten(),
        pyconv.LinearActDropout(maps[4] * 6 * 6, hidden, activation="relu", p=p_dropout),
        pyconv.LinearActDropout(hidden, hidden, activation="relu", p=p_dropout),
        nn.Linear(hidden, classes),
    )
    common.initialise_for_relu(model)
    return model


def make_images(count: int, classes: int, generator: torch.Generator) -> common.Images:
    """`count` images (count, 3, 256, 256): gratings of any direction, whose colour and period tell the class.

    Classes are taken in turn, so that each has its share.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    labels = torch.arange(count) % classes
    part = labels.view(-1, 1, 1) / classes
    period = 8.0 * 4.0 ** ((part * 3) % 1.0)  # 8 to 32 pixels, three times over while the colour goes once round
    angle, phase = math.pi * uniform(count, 1, 1), 2 * math.pi * uniform(count, 1, 1)
    row, column = torch.arange(SIDE).view(-1, 1), torch.arange(SIDE)
    waves = torch.sin(2 * math.pi / period * (torch.cos(angle) * row + torch.sin(angle) * column) + phase)
    hue = 2 * math.pi * (part + torch.arange(3).view(-1, 1) / 3)  # (count, 3, 1)
    images = torch.cos(hue).unsqueeze(-1) * (1.0 + waves).unsqueeze(1)
    return images + _NOISE * torch.randn(images.shape, generator=generator), labels


def main(arguments: Sequence[str] | None = None) -> common.Result:
    parser = common.parser_for(__doc__)
    common.add_training_options(parser, epochs=12, mini_batch_size=10, learning_rate=0.001)
    parser.add_argument(
        "--width", type=common.positive, default=0.125, help="maps and units over the paper's (default: %(default)s)"
    )
    parser.add_argument("--classes", type=common.count, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--images", type=common.count, default=200, metavar="N", help="to train on (default: %(default)s)"
    )
    parser.add_argument("--local-response-norm", action="store_true", help="as in the paper; trains by autograd")
    options = common.start(parser, arguments)
    model = ksh(options.width, options.classes, local_response_norm=options.local_response_norm).to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(options.seed)
    training, validation, test = (
        make_images(count, options.classes, generator)
        for count in (options.images, (options.images + 1) // 2, (options.images + 1) // 2)
    )
    edge = (SIDE - CROP) // 2
    return common.train(
        model,
        common.eager_step(model, optimizer)
        if options.local_response_norm
        else pyconv.compile_training(model, optimizer=optimizer),
        [training, *((x[:, :, edge : edge + CROP, edge : edge + CROP], y) for x, y in (validation, test))],
        epochs=options.epochs,
        mini_batch_size=options.mini_batch_size,
        seed=options.seed,
        distortion=pyconv.RandomDistortion((3, SIDE, SIDE), crop=(CROP, CROP), flip=0.5, seed=options.seed),
    )


if __name__ == "__main__":
    main()
