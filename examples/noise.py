"""Images of noise that a network is sure are digits.

    python examples/noise.py
    python -m pyconv train && python examples/noise.py --network network-demo.safetensors

Nguyen, Yosinski, Clune: "Deep neural networks are easily fooled: high confidence predictions for unrecognizable
images", CVPR 2015. From an image of uniform noise for each digit, steps along the gradient of the digit's log
probability for the pixels, each a hundredth of the pixels' range long in the largest of them, lead to images which the
network takes for that digit with near certainty, and which still look like noise. The paper's main images come from
evolution, which needs no gradient; gradient ascent is another of its ways. What the network makes of a thousand images
of plain noise is printed for comparison: it has no answer "none of them".

Expect probabilities of 99 % and more for all ten digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import common
import torch
from torch import Tensor

from pyconv.network3 import Network

_CLASSES = 10
_PLAIN = 1000
_STEP = 0.01


class Found(NamedTuple):
    """Images (10, 784), one for each digit, and the probabilities (10,) of that digit before and after the ascent."""

    images: Tensor
    before: Tensor
    after: Tensor


def ascend(network: Network, noise: Tensor, steps: int) -> Found:
    """From `noise` (10, 784) towards images of high probability of the digits 0 to 9, with pixels in [0, 1]."""
    network.eval()
    digits = torch.arange(_CLASSES)

    def probabilities(x: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x)[digits, digits]

    x = noise
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(network.cost(x, digits), x)
        largest = gradient.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        x = (x.detach() - _STEP * gradient / largest).clamp(0.0, 1.0)
    return Found(x, probabilities(noise), probabilities(x))


def main(arguments: Sequence[str] | None = None) -> Found:
    parser = common.parser_for(__doc__)
    common.add_network_options(parser, output="noise.svg")
    parser.add_argument("--steps", type=common.count, default=150, metavar="N", help="default: %(default)s")
    options = common.start(parser, arguments)
    network, _ = common.network_and_test_digits(options)
    generator = torch.Generator().manual_seed(options.seed)
    plain = torch.rand(_PLAIN, network.layers[0].n_in, generator=generator)
    with torch.no_grad():
        confidence = network(plain).amax(dim=1)
    taken_for = torch.bincount(network.predict(plain), minlength=_CLASSES).tolist()
    print(
        f"{_PLAIN} images of plain noise: mean probability of the answer {confidence.mean():.2%}, "
        f"at least 99 % for {int((confidence >= 0.99).sum())}; answers 0 to 9: {taken_for}"
    )
    noise = plain[:_CLASSES]
    found = ascend(network, noise, options.steps)
    for digit in range(_CLASSES):
        print(f"digit {digit}: probability {found.before[digit]:.2%} before, {found.after[digit]:.2%} after the ascent")
    common.save_picture(
        options.output,
        [str(digit) for digit in range(_CLASSES)],
        [
            [(1.0 - x.view(28, 28), f"{p:.2%}") for x, p in zip(images, probabilities.tolist(), strict=True)]
            for images, probabilities in ((noise, found.before), (found.images, found.after))
        ],
    )
    return found


if __name__ == "__main__":
    main()
