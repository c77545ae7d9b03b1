"""Adversarial images: digits that a network takes for others after changes that would mislead no reader.

    python examples/adversarial.py
    python examples/adversarial.py --target 3 --epsilon 0.15
    python -m pyconv train && python examples/adversarial.py --network network-demo.safetensors

Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow, Fergus: "Intriguing properties of neural networks", 2013, found
such images with L-BFGS. Here the gradient of the cost for the pixels does it:

 * one step of `epsilon` in the direction of its sign, the fast method of Goodfellow, Shlens, Szegedy: "Explaining and
   harnessing adversarial examples", 2014;
 * several smaller steps, after each of which every pixel is put back to within `epsilon` of the original and into
   [0, 1].

Untargeted, the cost of the right digit rises; targeted, the cost of a wrong one, the next digit unless --target says
which, falls. Only digits that the network recognises are attacked, and an attack on one counts as a success where the
network's answer is wrong, or is the target. Pixels lie between 0 (paper) and 1 (ink).

Expect that, at the default bound, the fast method succeeds on nine digits of ten, and the steps on all; that of the
targeted attacks the former succeeds on three of ten, and the latter on nine. A network trained on MNIST withstands
more: some half and nearly all, one of seven to one of four and three of four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import common
import pictures
import torch
from torch import Tensor

from pyconv.network3 import Network

_SHOWN = 8


class Outcome(NamedTuple):
    """The fraction of attacks that succeeded, their images (n, 784), and what the network takes these for (n,)."""

    success: float
    images: Tensor
    predictions: Tensor


def cost_gradient(network: Network, x: Tensor, y: Tensor) -> Tensor:
    """The gradient (n, 784) of the cost of the labels y (n,) for the pixels x (n, 784), without dropout."""
    network.eval()
    x = x.detach().requires_grad_()
    return torch.autograd.grad(network.cost(x, y), x)[0]


def fast_gradient_sign(network: Network, x: Tensor, y: Tensor, epsilon: float, *, targeted: bool = False) -> Tensor:
    """Images within `epsilon` of x (n, 784), of a higher cost for the labels y (n,); targeted, of a lower one."""
    direction = cost_gradient(network, x, y).sign()
    return (x - epsilon * direction if targeted else x + epsilon * direction).clamp(0.0, 1.0)


def iterated(
    network: Network, x: Tensor, y: Tensor, epsilon: float, *, targeted: bool = False, steps: int = 20
) -> Tensor:
    """As `fast_gradient_sign`, by `steps` steps of 2.5 * epsilon / steps: enough to cross the bound and turn back."""
    low, high = (x - epsilon).clamp(min=0.0), (x + epsilon).clamp(max=1.0)
    found = x
    for _ in range(steps):
        found = fast_gradient_sign(network, found, y, 2.5 * epsilon / steps, targeted=targeted)
        found = found.clamp(low, high)
    return found


def attack(
    network: Network, x: Tensor, y: Tensor, target: Tensor | None, method: Callable[..., Tensor], **arguments: float
) -> Outcome:
    """Attack the images x (n, 784) of the digits y (n,), towards the digits `target` (n,) if there are any."""
    aim = y if target is None else target
    images = method(network, x, aim, targeted=target is not None, **arguments)
    predictions = network.predict(images)
    succeeded = predictions != y if target is None else predictions == target
    return Outcome(succeeded.float().mean().item(), images, predictions)


def main(arguments: Sequence[str] | None = None) -> dict[str, Outcome]:
    parser = common.parser_for(__doc__)
    common.add_network_options(parser, output="adversarial.svg")
    parser.add_argument(
        "--epsilon", type=common.positive, default=0.2, help="most that a pixel may change (default: %(default)s)"
    )
    parser.add_argument("--steps", type=common.count, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--images", type=common.count, default=300, metavar="N", help="test digits to attack (default: %(default)s)"
    )
    parser.add_argument(
        "--target", type=int, choices=range(10), metavar="DIGIT", help="of the targeted attacks (default: the next one)"
    )
    options = common.start(parser, arguments)
    network, (x, y) = common.network_and_test_digits(options)
    recognised = network.predict(x) == y
    if options.target is not None:
        recognised &= y != options.target  # those are there already
    x, y = x[recognised][: options.images], y[recognised][: options.images]
    if len(x) == 0:
        common.fail("expected a network that recognises some of the digits, but it recognises none")
    target = (y + 1) % 10 if options.target is None else torch.full_like(y, options.target)
    bound = {"epsilon": options.epsilon}
    outcomes = {
        "fast": attack(network, x, y, None, fast_gradient_sign, **bound),
        "iterated": attack(network, x, y, None, iterated, **bound, steps=options.steps),
        "fast, targeted": attack(network, x, y, target, fast_gradient_sign, **bound),
        "iterated, targeted": attack(network, x, y, target, iterated, **bound, steps=options.steps),
    }
    print(f"{len(x)} digits that the network recognises, pixels changed by at most {options.epsilon}:")
    for name, outcome in outcomes.items():
        change = (outcome.images - x).abs().mean().item()
        print(f"{name:20} success {outcome.success:7.2%}, mean change of a pixel {change:.4f}")

    def row(i: int, name: str) -> list[pictures.Cell]:
        outcome = outcomes[name]
        change = 0.5 - (outcome.images[i] - x[i]) / (2 * options.epsilon)  # black is more ink, grey as much as before
        return [
            (1.0 - x[i].view(28, 28), f"{int(y[i])}"),
            (change.view(28, 28), name),
            (1.0 - outcome.images[i].view(28, 28), f"taken for {int(outcome.predictions[i])}"),
        ]

    shown = range(min(_SHOWN, len(x)))
    headings = ["original", "change", "adversarial"]
    rows = [row(i, "iterated") + row(i, "iterated, targeted") for i in shown]
    common.save_picture(options.output, 2 * headings, rows)
    return outcomes


if __name__ == "__main__":
    main()
