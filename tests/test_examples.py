"""The example scripts: their networks against plain torch, what they claim, and what they refuse."""

from __future__ import annotations

import base64
import importlib
import re
import runpy
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import numerics
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_support import assert_same_parameters, difference, eager_step

import pyconv
from pyconv import network3

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # before any package that has the name of one of them

import adversarial  # noqa: E402
import ciresan  # noqa: E402
import common  # noqa: E402
import inception  # noqa: E402
import ksh  # noqa: E402
import lenet5  # noqa: E402
import noise  # noqa: E402
import pictures  # noqa: E402
import simard  # noqa: E402

SCRIPTS = ("adversarial", "ciresan", "inception", "ksh", "lenet5", "noise", "simard")

# Sums of at most 9,216 products, whose magnitudes add up to about 100 times the result, err by 98 * 100 * eps = 2e-12;
# there are eight layers. A window that chose another maximum, or a lost term, shows from 1e-4 on.
BOUND = 1e-10


@pytest.fixture(autouse=True)
def _embedded_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYCONV_DATA", raising=False)


# ------------------------------------------------------------------------------------------------------------
# Networks against plain torch
# ------------------------------------------------------------------------------------------------------------


def torch_lenet5() -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d(2), nn.Conv2d(1, 6, 5), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def torch_simard() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 5, stride=2), nn.Tanh(), nn.Conv2d(5, 50, 5, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(1250, 100), nn.Tanh(), nn.Linear(100, 10),
    )  # fmt: skip


def torch_ciresan() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(841, 25), nn.Tanh(), nn.Linear(25, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(),
        nn.Linear(15, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 10),
    )  # fmt: skip


def torch_ksh(maps: tuple[int, int, int, int, int], hidden: int, classes: int, norm: bool = False) -> nn.Module:
    def norms() -> list[nn.Module]:
        return [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)] if norm else []

    return nn.Sequential(
        nn.Conv2d(3, maps[0], 11, stride=4, padding=2), nn.ReLU(), *norms(), nn.MaxPool2d(3, 2),
        nn.Conv2d(maps[0], maps[1], 5, padding=2, groups=2), nn.ReLU(), *norms(), nn.MaxPool2d(3, 2),
        nn.Conv2d(maps[1], maps[2], 3, padding=1), nn.ReLU(),
        nn.Conv2d(maps[2], maps[3], 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(maps[3], maps[4], 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Linear(maps[4] * 36, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


NARROW = (12, 32, 48, 48, 32)
"""The maps of an eighth of KSH's width."""


class TorchInception(nn.Module):
    """The block as the paper draws it, pooled afterwards."""

    def __init__(self, sizes: tuple[int, ...], pool_size: int) -> None:
        super().__init__()
        n_in, n1x1, n3x3_reduce, n3x3, n5x5_reduce, n5x5, projection = sizes
        self.one = nn.Conv2d(n_in, n1x1, 1)
        reduced = nn.Conv2d(n_in, n3x3_reduce, 1), nn.ReLU()
        self.three = nn.Sequential(*reduced, nn.Conv2d(n3x3_reduce, n3x3, 3, padding=1))
        reduced = nn.Conv2d(n_in, n5x5_reduce, 1), nn.ReLU()
        self.five = nn.Sequential(*reduced, nn.Conv2d(n5x5_reduce, n5x5, 5, padding=2))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(n_in, projection, 1))
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        together = torch.cat([branch(x) for branch in (self.one, self.three, self.five, self.pool)], dim=1)
        return F.max_pool2d(torch.relu(together), self.pool_size)


def torch_inception_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), TorchInception((32, 16, 16, 32, 4, 8, 8), 2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 10),
    )  # fmt: skip


INCEPTION_3A = (192, 64, 96, 128, 16, 32, 32)

TWINS = {
    "lenet5": (lenet5.lenet5, torch_lenet5, (3, 1, 28, 28)),
    "simard": (simard.simard, torch_simard, (3, 1, 29, 29)),
    "ciresan": (lambda: ciresan.ciresan(0.01), torch_ciresan, (3, 1, 29, 29)),
    "ksh": (lambda: ksh.ksh(0.125, 10), lambda: torch_ksh(NARROW, 512, 10), (2, 3, 224, 224)),
    "ksh, normalised": (
        lambda: ksh.ksh(0.125, 10, local_response_norm=True),
        lambda: torch_ksh(NARROW, 512, 10, norm=True),
        (2, 3, 224, 224),
    ),
    "inception 3a": (
        lambda: inception.Inception(*INCEPTION_3A),
        lambda: TorchInception(INCEPTION_3A, 1),
        (2, 192, 9, 7),
    ),
    "inception 3a, pooled": (
        lambda: inception.Inception(*INCEPTION_3A, pool_size=2),
        lambda: TorchInception(INCEPTION_3A, 2),
        (2, 192, 9, 7),
    ),
    "inception": (inception.inception_net, torch_inception_net, (3, 1, 28, 28)),
}


@pytest.mark.parametrize("name", TWINS)
def test_values_and_gradients_are_those_of_plain_torch(name: str) -> None:
    """In float64, in which no two values of a window come close to each other; without dropout."""
    make, make_twin, shape = TWINS[name]
    model, twin = make().double().eval(), make_twin().double()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            if ours.dim() == 1:
                ours.normal_(0.0, 0.1)  # zeros would not tell whether there is a bias
            theirs.copy_(ours)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = model(x), twin(x)
    assert y.shape == expected.shape
    assert difference(y, expected) <= BOUND
    grad_output = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, *model.parameters()], grad_output)
    expected_gradients = torch.autograd.grad(expected, [x, *twin.parameters()], grad_output)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert expected_gradient.norm() > 0.0
        assert difference(gradient, expected_gradient) <= BOUND


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (lenet5.lenet5, 61_706),
        (simard.simard, 132_540),
        (ciresan.ciresan, 12_115_010),
        (ksh.ksh, 60_965_224),
        (lambda: ksh.ksh(local_response_norm=True), 60_965_224),
        (lambda: inception.Inception(*INCEPTION_3A), 163_696),
    ],
    ids=["lenet5", "simard", "ciresan", "ksh", "ksh, normalised", "inception 3a"],
)
def test_numbers_of_parameters_are_the_papers(make, parameters: int) -> None:
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_part_of_the_width_rounds_the_units() -> None:
    sizes = [layer.out_features for layer in ciresan.ciresan(0.1)[1:]]
    assert sizes == [250, 200, 150, 100, 50, 10]
    with torch.device("meta"):
        model = ksh.ksh(0.01, 7)
    assert [len(layer.weight) for layer in model if hasattr(layer, "weight")] == [2, 2, 4, 4, 2, 41, 41, 7]


@pytest.mark.parametrize("make", [ciresan.ciresan, ksh.ksh])
@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf")])
def test_a_width_that_is_none_is_refused(make, width: float) -> None:
    with pytest.raises(ValueError, match=f"width must be a positive number, but got {width}"):
        make(width)


def test_ksh_needs_a_class() -> None:
    with pytest.raises(ValueError, match="classes must be at least 1, but got 0"):
        ksh.ksh(classes=0)


# ------------------------------------------------------------------------------------------------------------
# KSH, layer by layer
# ------------------------------------------------------------------------------------------------------------


def test_ksh_has_the_papers_layers() -> None:
    """Maps, places and parameters behind every layer of the full width, beside those of plain torch."""
    with torch.device("meta"):
        model, twin = ksh.ksh(), torch_ksh((96, 256, 384, 384, 256), 4096, 1000)
    shapes, x = [], torch.empty(2, 3, 224, 224, device="meta")
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [
        (96, 27, 27), (256, 13, 13), (384, 13, 13), (384, 13, 13), (256, 6, 6), (9216,), (4096,), (4096,), (1000,)
    ]  # fmt: skip
    assert [p.shape for p in model.parameters()] == [p.shape for p in twin.parameters()]
    by_layer = [sum(p.numel() for p in layer.parameters()) for layer in model if hasattr(layer, "weight")]
    assert by_layer == [34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000]
    x, convolved = torch.empty(2, 3, 224, 224, device="meta"), []
    for layer in twin[:13]:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            convolved.append(tuple(x.shape[1:]))
    assert convolved == [(96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)]


def check_linear(layer: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """Output and gradients of a fully connected layer, with ReLU where it has one, within docs/design.md's bound."""
    x = x.detach().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad_output)
    exact_x, weight, bias, g = (numerics.double(t) for t in (x, layer.weight, layer.bias, grad_output))
    value = exact_x @ weight.T + bias
    if isinstance(layer, pyconv.LinearActDropout):
        g = g * (y > 0)  # where rounding may have decided otherwise than float64 does
        value = value.relu()
    sums = [
        (y, value, exact_x.abs() @ weight.abs().T + bias.abs(), weight.shape[1] + 1),
        (gradients[0], g @ weight, g.abs() @ weight.abs(), weight.shape[0]),
        (gradients[1], g.T @ exact_x, g.abs().T @ exact_x.abs(), len(x)),
        (gradients[2], g.sum(0), g.abs().sum(0), len(x)),
    ]
    eps = torch.finfo(torch.float32).eps
    for (actual, expected, scale, terms), name in zip(sums, ("output", *numerics.GRADIENT_NAMES), strict=True):
        bound = (2 + terms**0.5) * eps * scale + eps * expected.abs()
        numerics.Expectation(expected, scale, bound).check(actual.detach(), f"{name} of {layer}")


def check_layers(model: nn.Sequential, x: Tensor) -> None:
    """Each layer of KSH on what the layers before it give, in float32; gradients for a random one of its output."""
    for layer in model.eval():
        with torch.no_grad():
            y = layer(x)
        grad_output = torch.randn_like(y)
        if isinstance(layer, pyconv.ConvMaxPool2d):
            names = ("stride", "padding", "dilation", "groups", "pool_size", "pool_stride", "pool_padding")
            arguments = {name: getattr(layer, name) for name in (*names, "pool_dilation", "ceil_mode", "activation")}
            numerics.check_bounds(x, layer.weight.detach(), layer.bias.detach(), grad_output, **arguments)
        elif not isinstance(layer, nn.Flatten):
            check_linear(layer, x, grad_output)
        x = y


def ksh_with_biases(width: float, classes: int) -> nn.Sequential:
    model = ksh.ksh(width, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0, 0.1)
    return model


def test_layers_of_a_narrow_ksh_keep_the_error_bound() -> None:
    check_layers(ksh_with_biases(0.125, 10), torch.randn(2, 3, 224, 224))


@pytest.mark.long
def test_layers_of_ksh_keep_the_error_bound() -> None:
    check_layers(ksh_with_biases(1.0, 1000), torch.randn(2, 3, 224, 224))


def test_a_compiled_step_of_ksh_is_the_eager_one() -> None:
    """With dropout, momentum and weight decay, in float64; the second step has a momentum."""
    compiled, eager = (ksh_with_biases(0.0625, 10).double() for _ in range(2))
    eager.load_state_dict(compiled.state_dict())
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    step = pyconv.compile_training(compiled, optimizer=torch.optim.SGD(compiled.parameters(), **settings))
    optimizer = torch.optim.SGD(eager.parameters(), **settings)
    for seed in range(2):
        x, y = torch.randn(3, 3, 224, 224, dtype=torch.float64), torch.tensor([1, 0, 9])
        torch.manual_seed(seed)
        expected = eager_step(eager, optimizer, x, y)
        torch.manual_seed(seed)
        assert difference(step(x, y), expected) <= BOUND
    assert_same_parameters(compiled, eager, BOUND)


def test_local_response_normalisation_is_the_papers() -> None:
    """b_i = a_i / (2 + 1e-4 * sum over 5 neighbouring maps of a_j ** 2) ** 0.75, behind ReLU and before pooling."""
    model = ksh.ksh(0.125, 10, local_response_norm=True).double()
    kinds = [type(layer) for layer in model[:6]]
    assert kinds == [pyconv.ConvMaxPool2d, nn.LocalResponseNorm, nn.MaxPool2d] * 2
    a = torch.randn(2, 12, 5, 5, dtype=torch.float64) * 100.0
    squares = F.pad(a.square(), (0, 0, 0, 0, 2, 2))
    sums = sum(squares[:, i : i + 12] for i in range(5))
    assert difference(model[1](a), a / (2.0 + 1e-4 * sums) ** 0.75) <= BOUND
    with pytest.raises(pyconv.UnsupportedError, match="LocalResponseNorm"):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_images_of_a_class_share_their_colour() -> None:
    x, y = ksh.make_images(12, 4, torch.Generator().manual_seed(0))
    assert x.shape == (12, 3, 256, 256) and y.tolist() == [0, 1, 2, 3] * 3
    colours = x.mean(dim=(2, 3))
    within = torch.stack([colours[y == c].std(dim=0) for c in range(4)]).max()
    between = torch.pdist(torch.stack([colours[y == c].mean(dim=0) for c in range(4)])).min()
    assert between > 5 * within
    assert not torch.equal(x[0], x[4])


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "least_accuracy"),
    [
        (lenet5, ["--epochs", "3"], 0.9),
        (simard, ["--epochs", "3", "--undistorted"], 0.85),
        (simard, ["--epochs", "3"], 0.7),
        (ciresan, ["--epochs", "3"], 0.7),
        (ksh, ["--epochs", "4", "--images", "40", "--classes", "2", "--width", "0.0625"], 0.8),
        (ksh, ["--epochs", "1", "--images", "8", "--classes", "2", "--width", "0.0625", "--local-response-norm"], 0.0),
        (inception, ["--epochs", "2"], 0.8),
    ],
    ids=["lenet5", "simard-undistorted", "simard", "ciresan", "ksh", "ksh-normalised", "inception"],
)
def test_training_lowers_the_loss(script, arguments: list[str], least_accuracy: float, capsys) -> None:
    result = script.main(arguments)
    epochs = int(arguments[1])
    assert len(result.losses) == epochs
    assert epochs == 1 or result.losses[-1] < 0.9 * result.losses[0]
    assert result.accuracy >= least_accuracy
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch {e}" for e in range(epochs)] + [lines[-1]]
    assert lines[-1] == f"test accuracy {result.accuracy:.2%}"


def test_the_same_seed_gives_the_same_training() -> None:
    losses = [lenet5.main(["--epochs", "1", "--seed", seed]).losses for seed in ("1", "1", "2")]
    assert losses[0] == losses[1] != losses[2]


class RecordingDistortion:
    """Negates the images, and writes down what it is asked."""

    def __init__(self) -> None:
        self.epochs: list[list[int]] = []

    def set_epoch(self, epoch: int) -> None:
        assert epoch == len(self.epochs)
        self.epochs.append([])

    def apply(self, images: Tensor, positions: Tensor) -> Tensor:
        assert torch.equal(images.flatten(), positions.float())
        self.epochs[-1] += positions.tolist()
        return -images


def test_train_distorts_every_image_anew_in_every_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    model, distortion = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)), RecordingDistortion()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    images = torch.arange(10.0).view(10, 1, 1, 1), torch.zeros(10, dtype=torch.int64)
    seen: list[Tensor] = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        assert model.training
        optimizer.step()
        seen.append(x.flatten())
        return x.mean()

    result = common.train(
        model, step, [images] * 3, epochs=2, mini_batch_size=4, seed=0, distortion=distortion,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )  # fmt: skip
    assert [sorted(epoch) for epoch in distortion.epochs] == [list(range(10))] * 2
    assert distortion.epochs[0] != distortion.epochs[1]
    assert torch.cat(seen).tolist() == [-float(position) for epoch in distortion.epochs for position in epoch]
    assert [len(x) for x in seen] == [4, 4, 2] * 2
    assert result.losses == pytest.approx([-4.5, -4.5])
    assert optimizer.param_groups[0]["lr"] == 0.25


# ------------------------------------------------------------------------------------------------------------
# Fooled networks
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network that recognises most of the embedded digits."""
    torch.manual_seed(0)
    network = network3.experiments.EXPERIMENTS["demo"].network()
    training, validation, _ = network3.load_digits()
    network.SGD(training, 5, 10, 0.1, validation, None, 0.1, verbose=False)
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    network.save(path)
    return path


def images_of(path: Path) -> list[Tensor]:
    """The pixels of the pictures of an SVG file, each a PNG file of 8-bit grey values, which must be well formed."""
    found = []
    for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}image"):
        kind, data = element.attrib["href"].split(",")
        assert kind == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        chunks, place = {}, 8
        while place < len(content):
            (length,) = struct.unpack_from(">I", content, place)
            body = content[place + 4 : place + 8 + length]
            assert struct.unpack_from(">I", content, place + 8 + length) == (zlib.crc32(body),)
            chunks[body[:4]] = body[4:]
            place += 12 + length
        assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
        width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        assert rest == [8, 0, 0, 0, 0]
        rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, 1 + width)
        assert (rows[:, 0] == 0).all()
        found.append(rows[:, 1:])
    return found


def texts_of(path: Path) -> list[str | None]:
    return [element.text for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("target", [None, 3])
def test_adversarial_images_fool_the_network_within_the_bound(
    target: int | None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, epsilon = tmp_path / "picture.svg", 0.2
    arguments = ["--network", str(trained), "--output", str(output), "--epsilon", str(epsilon)]
    outcomes = adversarial.main(arguments + ([] if target is None else ["--target", str(target)]))
    network = network3.load_network(trained)
    _, _, (x, y) = network3.load_digits()
    recognised = network.predict(x) == y
    if target is not None:
        recognised &= y != target
    x, y = x[recognised], y[recognised]
    aim = (y + 1) % 10 if target is None else torch.full_like(y, target)
    printed = capsys.readouterr().out
    for name, outcome in outcomes.items():
        predictions = network(outcome.images).argmax(dim=1)
        assert torch.equal(outcome.predictions, predictions)
        succeeded = predictions == aim if "targeted" in name else predictions != y
        assert outcome.success == pytest.approx(succeeded.double().mean().item())
        # x + epsilon and its difference from x are rounded; all are at most 1.
        change = (outcome.images.double() - x).abs()
        assert 0.5 * epsilon < change.amax() <= epsilon + torch.finfo(torch.float32).eps
        assert outcome.images.amin() >= 0.0 and outcome.images.amax() <= 1.0
        assert f"{name:20} success {outcome.success:7.2%}, mean change of a pixel {change.mean():.4f}" in printed
    assert outcomes["fast"].success >= 0.5
    assert outcomes["iterated"].success >= 0.9
    assert outcomes["iterated, targeted"].success >= 0.5
    assert outcomes["iterated"].success > outcomes["fast"].success
    assert outcomes["iterated, targeted"].success > outcomes["fast, targeted"].success
    pixels, texts = images_of(output), texts_of(output)
    assert len(pixels) == 8 * 6
    for i in range(8):
        first, last = pixels[6 * i], pixels[6 * i + 5]
        assert torch.equal(first, ((1 - x[i]) * 255).round().byte().view(28, 28))
        expected = ((1 - outcomes["iterated, targeted"].images[i]) * 255).round().byte().view(28, 28)
        assert torch.equal(last, expected)
        assert texts[6 + 6 * i] == str(int(y[i]))
        assert texts[6 + 6 * i + 2] == f"taken for {int(outcomes['iterated'].predictions[i])}"


def test_the_gradient_is_that_of_each_image_without_dropout(trained: Path) -> None:
    """The direction of the fast method is the sign of the gradient of each image's own cost, by differences."""
    network = network3.load_network(trained).double()
    network.layers[-1].p_dropout = 0.5
    _, _, (x, y) = network3.load_digits()
    # In the digits' blank parts the positions of a window tie, and the cost has no one derivative.
    x, y = x[:4].double() + 0.1 * torch.rand(4, 784, dtype=torch.float64), y[:4]
    found = adversarial.cost_gradient(network.train(), x, y)
    direction = torch.randn_like(x)
    with torch.no_grad():
        costs = [network.eval().cost(x + h * direction, y) for h in (-1e-6, 1e-6)]
    # Central differences err by h**2 times the third derivative, and by rounding over h: far below 1e-6.
    assert float((found * direction).sum()) == pytest.approx(float(costs[1] - costs[0]) / 2e-6, rel=1e-5)


def test_noise_is_taken_for_each_digit(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "picture.svg"
    found = noise.main(["--network", str(trained), "--output", str(output)])
    network = network3.load_network(trained)
    with torch.no_grad():
        probabilities = network(found.images)
    assert torch.equal(probabilities.argmax(dim=1), torch.arange(10))
    assert torch.allclose(probabilities.diagonal(), found.after) and (found.after >= 0.99).all()
    assert (found.after > found.before).all()
    assert found.images.amin() >= 0.0 and found.images.amax() <= 1.0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^digit \d: probability .* after the ascent$", printed, re.MULTILINE)) == 10
    answers = re.search(r"answers 0 to 9: \[(.*)\]", printed)
    assert answers and sum(map(int, answers[1].split(","))) == 1000
    pixels = images_of(output)
    assert len(pixels) == 20
    assert torch.equal(pixels[13], ((1 - found.images[3]) * 255).round().byte().view(28, 28))
    # The start is noise, and the ascent goes at most steps * 0.01 away from it.
    start = torch.rand(1000, 784, generator=torch.Generator().manual_seed(0))[:10]
    assert torch.equal(pixels[3], ((1 - start[3]) * 255).round().byte().view(28, 28))


def test_a_network_is_trained_where_none_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = [tmp_path / f"{i}.svg" for i in range(2)]
    for output in outputs:
        noise.main(["--epochs", "1", "--steps", "2", "--output", str(output)])
    assert outputs[0].read_text() == outputs[1].read_text()
    recognised = re.search(r"the network recognises (.*)% of 300 test digits", capsys.readouterr().out)
    assert recognised and float(recognised[1]) > 70.0


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------


def test_a_table_of_pictures_keeps_pixels_and_words(tmp_path: Path) -> None:
    path = tmp_path / "table.svg"
    image = torch.tensor([[0.0, 0.5, 1.0], [-1.0, 2.0, 0.2]])
    pictures.write_table(path, ["a < b & c", "second"], [[(image, '"x" > 1'), (image.T, "")]])
    assert [pixels.tolist() for pixels in images_of(path)] == [
        [[0, 128, 255], [0, 255, 51]],
        [[0, 0], [128, 255], [255, 51]],
    ]
    assert texts_of(path) == ["a < b & c", "second", '"x" > 1', None]
    root = ET.parse(path).getroot()
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    for element in root.iter("{http://www.w3.org/2000/svg}image"):
        x, y, w, h = (int(element.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height


def test_pictures_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected an image of shape \(H, W\) with pixels, but got \(1, 2, 3\)"):
        pictures.png(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="expected rows of 2 images, one for each heading, but got 1"):
        pictures.write_table(tmp_path / "x.svg", ["a", "b"], [[(torch.zeros(2, 2), "")]])


# ------------------------------------------------------------------------------------------------------------
# Command lines
# ------------------------------------------------------------------------------------------------------------


def test_the_digits_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "train_digits.py"))
    assert example["train"](epochs=2, mini_batch_size=10, learning_rate=0.01) > 0.8
    assert capsys.readouterr().out.count("validation accuracy") == 2


@pytest.mark.parametrize("name", ["train_digits", "lenet5"])
def test_examples_are_scripts(name: str) -> None:
    result = subprocess.run(
        [sys.executable, f"examples/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "--epochs" in result.stdout, result.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_first_line_and_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert module.__doc__.splitlines()[0] in printed
    assert "--seed" in printed and "--threads" in printed
    named = set(re.findall(r"(?<!-)--[a-z-]+", module.__doc__)) - {"--network"}
    assert named <= set(re.findall(r"--[a-z-]+", printed))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_in_the_readme(name: str) -> None:
    assert f"[{name}.py](examples/{name}.py)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (lenet5, ["--epochs", "0"], "argument --epochs: expected a positive whole number, but got '0'"),
        (lenet5, ["--epochs", "few"], "argument --epochs: expected a positive whole number, but got 'few'"),
        (lenet5, ["--learning-rate", "nan"], "expected a positive number, but got 'nan'"),
        (lenet5, ["--learning-rate", "-1"], "expected a positive number, but got '-1'"),
        (lenet5, ["--seed", "-1"], "expected a whole number from 0 to 2**63 - 1, but got '-1'"),
        (lenet5, ["--device", "cuda:99"], "expected a device that PyTorch finds here, but got 'cuda:99'"),
        (lenet5, ["--device", "gpu"], "expected a device that PyTorch finds here, but got 'gpu'"),
        (ciresan, ["--width", "0"], "argument --width: expected a positive number, but got '0'"),
        (noise, ["--output", "no/such.svg"], "expected a file in an existing folder, but got 'no/such.svg'"),
        (noise, ["--output", "/"], "expected a file in an existing folder, but got '/'"),
        (adversarial, ["--target", "10"], "argument --target: invalid choice: 10"),
    ],
)
def test_wrong_usage_is_named(script, arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", [adversarial, noise])
def test_a_missing_or_foreign_network_ends_the_script(script, tmp_path: Path) -> None:
    missing, foreign, other = (tmp_path / name for name in ("missing", "foreign", "other"))
    foreign.write_bytes(b"something else")
    network3.Network([network3.SoftmaxLayer(9, 3)], 1).save(other)
    for path, message in (
        (missing, "No such file"),
        (foreign, "foreign"),
        (other, "expected a network of 784 inputs and 10 classes, but got 9 and 3"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main(["--network", str(path), "--output", str(tmp_path / "x.svg")])
    assert not (tmp_path / "x.svg").exists()


def test_a_picture_that_cannot_be_written_ends_the_script() -> None:
    with pytest.raises(SystemExit, match="No space left on device"):
        common.save_picture(Path("/dev/full"), ["a"], [[(torch.zeros(2, 2), "")]])


def test_a_network_that_recognises_nothing_ends_the_attack(tmp_path: Path) -> None:
    """A new softmax layer is all zeros: it answers 0, and with the target 0 no digit is left to attack."""
    path = tmp_path / "network"
    network3.Network([network3.SoftmaxLayer(784, 10)], 1).save(path)
    with pytest.raises(SystemExit, match="recognises some of the digits, but it recognises none"):
        adversarial.main(["--network", str(path), "--target", "0", "--output", str(tmp_path / "x.svg")])


def test_unreadable_data_end_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYCONV_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"\$PYCONV_DATA=.* cannot be read: .*train-images-idx3-ubyte"):
        lenet5.main(["--epochs", "1"])
